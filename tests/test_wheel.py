"The built wheel works in a fresh environment, away from the repository."
import json, os, subprocess, sys, sysconfig, venv, zipfile
from pathlib import Path
import numpy as np
import pytest
from PIL import Image
from maskrcnn_edu.data.shapes import draw_shapes

root = Path(__file__).resolve().parent.parent


def call(*command, cwd, env=None):
    done = subprocess.run([str(c) for c in command], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f'{command}\n{done.stdout}\n{done.stderr}'
    return done.stdout

@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    "The wheel, built from a copy of the tracked files."
    folder = tmp_path_factory.mktemp('wheel')
    files = call('git', 'ls-files', '-z', cwd=root).split('\0')
    for file in filter(lambda f: f and (root/f).is_file(), files):
        (folder/'source'/file).parent.mkdir(parents=True, exist_ok=True)
        (folder/'source'/file).write_bytes((root/file).read_bytes())
    call(sys.executable, '-m', 'pip', 'wheel', '--quiet', '--no-deps', '--no-build-isolation', '--wheel-dir', folder,
         folder/'source', cwd=folder)
    return next(folder.glob('*.whl'))

@pytest.fixture(scope='module')
def fresh(wheel, tmp_path_factory):
    "A new environment with the wheel; it borrows the other packages, so that nothing is downloaded."
    folder = tmp_path_factory.mktemp('fresh')
    venv.create(folder, with_pip=False)
    python = folder/'bin/python'
    site = Path(call(python, '-c', 'import sysconfig; print(sysconfig.get_path("purelib"))', cwd=folder).strip())
    call(sys.executable, '-m', 'pip', '--python', python, 'install', '--quiet', '--no-deps', '--no-index', wheel, cwd=folder)
    (site/'borrowed.pth').write_text(sysconfig.get_path('purelib') + '\n')   # after the fresh packages on sys.path
    return folder

@pytest.fixture(scope='module')
def clean_env():
    return {k: v for k, v in os.environ.items() if k not in ('PYTHONPATH', 'PYTHONHOME', 'VIRTUAL_ENV')}


def test_wheel_holds_what_is_not_code(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    sources = {p.name for p in (root/'maskrcnn_edu'/'cuda'/'csrc').iterdir()}
    assert sources <= {Path(n).name for n in names if n.startswith('maskrcnn_edu/cuda/csrc/')}, 'without its sources the native code cannot compile itself'
    assert 'maskrcnn_edu/overview.svg' in names
    assert {'maskrcnn_edu/weights/shapes.safetensors', 'maskrcnn_edu/weights/nuclei.safetensors'} <= set(names)
    assert not [n for n in names if n.startswith(('tests/', 'nbs/', 'tools/', 'benchmarks/'))]

def test_diagram_is_found_without_the_repository(fresh, clean_env, tmp_path):
    code = ('import maskrcnn_edu.core as c; print(c.__file__); '
            'assert "lit" in c.show_diagram("nms").svg')
    file = call(fresh/'bin/python', '-c', code, cwd=tmp_path, env=clean_env).strip().splitlines()[-1]
    assert Path(file).is_relative_to(fresh), f'imported {file}, not the installed wheel'

def test_predict_works_from_the_wheel(fresh, clean_env, tmp_path):
    sample = draw_shapes(np.random.default_rng(7))
    Image.fromarray(sample.image).save(tmp_path/'some shapes.png')
    call(fresh/'bin/maskrcnn-edu', 'predict', 'some shapes.png', '--weights', 'shapes', '--out', 'found',
         cwd=tmp_path, env=clean_env)
    pictures, results = [p for end in ('png', 'tif') for p in (tmp_path/'found').rglob(f'*.{end}')], list((tmp_path/'found').rglob('*.json'))
    assert len(pictures) >= 2, f'an overlay and a label map are expected, found {pictures}'
    instances = json.loads(results[0].read_text())
    found = instances['annotations'] if isinstance(instances, dict) else instances
    assert len(found) >= len(sample.instances) > 0

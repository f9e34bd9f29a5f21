"How the native ops come to be: compiled once however many ask, loaded from the cache, and done without in every other case, with one sentence that says why."
import json, os, shutil, subprocess, sys
from pathlib import Path
import pytest
from maskrcnn_edu.cuda import build

root = Path(__file__).resolve().parent.parent
compiler = shutil.which(os.environ.get('CXX', 'c++')) or shutil.which('g++')
needs_compiler = pytest.mark.skipif(not compiler, reason='there is no C++ compiler on PATH')
ask = '''
import json, time, warnings
import torch
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter('always')
    start = time.perf_counter()
    from maskrcnn_edu import cuda
    seconds = time.perf_counter() - start
    from maskrcnn_edu.nms import nms_keep
keep = nms_keep(torch.tensor([[0., 0, 9, 9], [0, 0, 9, 8], [20, 20, 30, 30]]), torch.tensor([.5, .9, .1]), .5).tolist()
print(json.dumps(dict(backend=cuda.backend(), keep=keep, seconds=seconds, said=[str(w.message) for w in caught if 'maskrcnn_edu' in str(w.message)])))
'''

def environment(cache, **changes):
    "An environment of its own: the cache in a new folder, no backend forced."
    env = {k: v for k, v in os.environ.items() if k not in ('MASKRCNN_EDU_BACKEND', 'CXX', 'NVCC')} | dict(MASKRCNN_EDU_CACHE=str(cache), CUDA_VISIBLE_DEVICES='', PYTHONPATH=str(root))
    return env | {k: str(v) for k, v in changes.items()}

def start(cache, **changes):
    return subprocess.Popen([sys.executable, '-c', ask], env=environment(cache, **changes), cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

def answer(process):
    out, err = process.communicate()
    assert process.returncode == 0, err
    found = json.loads(out)
    assert found['keep'] == [False, True, True]
    return found

@pytest.fixture(scope='session')
def counting(tmp_path_factory):
    "A compiler that keeps count of its calls, beside the true one."
    folder = tmp_path_factory.mktemp('compiler')
    script = folder / 'c++'
    script.write_text(f'#!/bin/sh\necho call >> {folder}/calls\nexec {compiler} "$@"\n')
    script.chmod(0o755)
    return script, lambda: len((folder / 'calls').read_text().splitlines()) if (folder / 'calls').exists() else 0

@pytest.fixture(scope='session')
def warm(tmp_path_factory, counting):
    "A cache that ten processes filled at the same time."
    cache = tmp_path_factory.mktemp('cache')
    found = [answer(p) for p in [start(cache, CXX=counting[0]) for _ in range(10)]]
    return cache, found, counting[1]()

@needs_compiler
def test_ten_processes_at_once_and_one_compiles(warm):
    _, found, calls = warm
    assert [f['backend'] for f in found] == ['cpp'] * 10 and calls == 1 and not any(f['said'] for f in found)

@needs_compiler
def test_the_next_process_compiles_nothing(warm, counting):
    cache, _, calls = warm
    assert answer(start(cache, CXX=counting[0]))['backend'] == 'cpp' and counting[1]() == calls
    left = sorted(p.suffix for p in (cache/'ops').iterdir())
    assert left == ['.lock', '.so'], 'nothing half-made stays behind'

def damaged(warm, tmp_path, damage):
    shutil.copytree(warm[0], tmp_path/'cache')
    file, = (tmp_path/'cache'/'ops').glob('*.so')
    damage(file)
    return tmp_path/'cache', file

@needs_compiler
@pytest.mark.parametrize('damage', [lambda f: f.write_bytes(f.read_bytes()[:5000]), lambda f: f.write_bytes(b'nonsense'), lambda f: f.write_bytes(b'')], ids=['cut', 'nonsense', 'empty'])
def test_a_damaged_library_is_not_loaded_but_made_again(warm, counting, tmp_path, damage):
    cache, file = damaged(warm, tmp_path, damage)
    before = counting[1]()
    assert answer(start(cache, CXX=counting[0]))['backend'] == 'cpp' and counting[1]() == before + 1
    assert answer(start(cache, CXX=counting[0]))['backend'] == 'cpp' and counting[1]() == before + 1

@needs_compiler
def test_a_read_only_cache_that_is_filled_is_used_and_an_empty_one_done_without(warm, counting, tmp_path):
    shutil.copytree(warm[0], tmp_path/'full')
    (tmp_path/'empty').write_text('a file where the folder should be: not even root can write here')
    assert answer(start(tmp_path/'full', CXX=counting[0]))['backend'] == 'cpp'
    found = answer(start(tmp_path/'empty', CXX=counting[0]))
    assert found['backend'] == 'torch' and len(found['said']) == 1
    assert 'cannot be written' in found['said'][0] and 'MASKRCNN_EDU_CACHE' in found['said'][0] and str(tmp_path/'empty') in found['said'][0]

def test_without_a_compiler(tmp_path):
    found = answer(start(tmp_path, PATH=tmp_path))
    assert found['backend'] == 'torch' and len(found['said']) == 1
    assert 'PyTorch backend' in found['said'][0] and 'no compiler found on PATH' in found['said'][0]

def test_a_compiler_that_fails_is_quoted(tmp_path):
    script = tmp_path/'c++'
    script.write_text('#!/bin/sh\necho "x.cpp:1: error: I do not like this" >&2\nexit 1\n')
    script.chmod(0o755)
    found = answer(start(tmp_path/'cache', CXX=script))
    assert found['backend'] == 'torch' and 'I do not like this' in found['said'][0]
    log, = (tmp_path/'cache'/'ops').glob('*.log')
    assert 'I do not like this' in log.read_text() and str(log) in found['said'][0]
    assert not list((tmp_path/'cache'/'ops').glob('.build-*'))

@needs_compiler
def test_a_compiler_that_does_not_know_this_processor_builds_for_any(tmp_path):
    script = tmp_path/'c++'
    script.write_text(f'#!/bin/sh\ncase "$*" in *march=native*) echo "error: bad value native" >&2; exit 1;; esac\nexec {compiler} "$@"\n')
    script.chmod(0o755)
    found = answer(start(tmp_path/'cache', CXX=script))
    assert found['backend'] == 'cpp' and not found['said']

def test_torch_can_be_forced(tmp_path):
    found = answer(start(tmp_path, MASKRCNN_EDU_BACKEND='torch'))
    assert found['backend'] == 'torch' and not found['said'] and not list(tmp_path.iterdir())

@pytest.mark.parametrize('backend, changes, words', [
    ('cuda', {}, 'cuda: torch finds no GPU'),
    ('cpp', dict(CXX='no-such-compiler'), 'cpp: no compiler found (CXX=no-such-compiler is not there)'),
    ('fortran', {}, 'say torch, cpp or cuda')])
def test_a_backend_that_is_forced_and_cannot_be_had_is_an_error(tmp_path, backend, changes, words):
    p = start(tmp_path, MASKRCNN_EDU_BACKEND=backend, **changes)
    _, err = p.communicate()
    last = err.splitlines()[-1]
    assert p.returncode != 0 and f'MASKRCNN_EDU_BACKEND={backend}' in last and words in last

@needs_compiler
def test_the_key_follows_all_that_matters(monkeypatch, tmp_path):
    monkeypatch.setenv('CXX', compiler)
    command = build.cpp_command()
    key = build.key(command)
    assert build.key(command) == key and build.key(command + ['-O1']) != key
    monkeypatch.setattr(build.torch, '__version__', '0.0')
    assert build.key(command) != key
    monkeypatch.undo()
    shutil.copytree(build.SOURCES, tmp_path/'csrc')
    (tmp_path/'csrc'/'nms.cpp').write_text('changed')
    monkeypatch.setattr(build, 'SOURCES', tmp_path/'csrc')
    assert build.key(command) != key
    monkeypatch.undo()
    monkeypatch.setattr(build, 'processor', lambda: 'another one')
    assert build.key(command) != key

@needs_compiler
def test_a_process_that_dies_while_it_compiles_holds_nobody_up(tmp_path, counting):
    script = tmp_path/'c++'
    script.write_text('#!/bin/sh\ntouch %s/started\nsleep 60\n' % tmp_path)
    script.chmod(0o755)
    p = start(tmp_path/'cache', CXX=script)
    while not (tmp_path/'started').exists(): assert p.poll() is None
    p.kill()
    p.wait()
    script.write_text(f'#!/bin/sh\nexec {compiler} "$@"\n')   # the same path; size and time differ, and so does the key: the folder is what they share
    assert answer(start(tmp_path/'cache', CXX=script))['backend'] == 'cpp'

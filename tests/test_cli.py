"The command line on tiny data: what it leaves, what it prints, how it fails, and how it stops and goes on"
import csv, errno, json, math, os, shutil, signal, subprocess, sys, time, zipfile
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import tifffile
import torch
from hypothesis import given, settings, strategies as st
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from maskrcnn_edu.checkpoints import load_weights, save_weights
from maskrcnn_edu.core import set_seed
from maskrcnn_edu.cuda import backend
from maskrcnn_edu.data import CLASSES, DataError, InstanceDataset, Sample, open_dataset, make_shapes, write_coco
from maskrcnn_edu.mask_rcnn import MaskRCNN, SHAPES
from maskrcnn_edu.results import read_geojson
from maskrcnn_edu.train import (
    SHAPES_RECIPE, app, class_notes, coco_recipe, evaluate, fit, in_classes_of, match_classes, pictures_of, renumber, train_shapes, with_classes)

FILES = ['history.csv', 'results.png', 'scores.json', 'state.pth', 'weights.safetensors']
SCORES = {'box_ap', 'mask_ap', 'mask_ap50', 'mask_ap75'}
EMPTY = Sample(np.full((128, 128, 3), 90, np.uint8), make_shapes(1, seed=5)[0].instances[[]], 'empty')
KEPT = ['--epochs', 3, '--seed', 7, '--device', 'cpu']   # of the run that is stopped and resumed

# ---- calling it

def cli(*args): return CliRunner().invoke(app, [str(a) for a in args])

def ok(*args):
    done = cli(*args)
    if done.exception: raise AssertionError(f'{done.stdout}\n{done.stderr}') from done.exception
    return done

def fails(*args, words):
    "Exit code 1 and one sentence with these words on stderr, no traceback"
    done = cli(*args)
    assert done.exit_code == 1 and isinstance(done.exception, SystemExit), f'{done.stdout}\n{done.stderr}\n{done.exception!r}'
    sentence = done.stderr.replace('\r', '\n').strip().splitlines()[-1]
    assert sentence.startswith('Error: ') and 'Traceback' not in done.stderr and done.stderr.count('Error:') == 1, done.stderr
    for w in words: assert str(w) in sentence, sentence
    return done

def command(*args, **kwargs):
    "As a program of its own, on one thread and on the backend that this one has: that a compiler is missing is said there, not here"
    program = Path(sys.executable).with_name('maskrcnn-edu')
    return subprocess.Popen([str(a) for a in (program, *args)], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=os.environ | {'OMP_NUM_THREADS': '1', 'MKL_NUM_THREADS': '1', 'MASKRCNN_EDU_BACKEND': backend()}, **kwargs)

def strict(text):
    "Json as the standard has it, without NaN"
    def refuse(word): raise AssertionError(f'{word} is not json')
    return json.loads(text, parse_constant=refuse)

def history(out): return list(csv.DictReader((out/'history.csv').open()))

def losses(out): return [{k: v for k, v in row.items() if 'loss' in k or k[:2] in ('t_', 'v_')} for row in history(out)]

# ---- tiny data

@pytest.fixture(scope='module', autouse=True)
def surroundings(tmp_path_factory):
    "A cache of our own, and one thread, so that losses can be compared to the last digit"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as m:
        m.setenv('MASKRCNN_EDU_CACHE', str(tmp_path_factory.mktemp('cache')))
        m.setenv('COLUMNS', '200')
        yield
    torch.set_num_threads(threads)

def zipped(folder, path):
    with zipfile.ZipFile(path, 'w') as z:
        for p in sorted(folder.rglob('*')): z.write(p, p.relative_to(folder))
    return path

def shapes_set(folder, n=12, n_valid=3):
    write_coco([*make_shapes(n - 1, seed=5), EMPTY], folder, 'train', CLASSES)
    write_coco([*make_shapes(n_valid - 1, seed=6), replace(EMPTY, image=EMPTY.image + 1, name='empty_valid')], folder, 'valid', CLASSES)
    return folder

def one_json(folder, samples, classes=CLASSES, name='annotations.json'):
    "images/ and annotations.json"
    write_coco(samples, folder, 'x', classes)
    shutil.move(folder/'annotations'/'x.json', folder/name)
    (folder/'annotations').rmdir()
    return folder

def squares(n, seed=1):
    "Images with squares only"
    some = [replace(s, instances=s.instances[s.instances.labels == 1]) for s in make_shapes(8 * n, seed=seed)]
    return [s for s in some if len(s.instances)][:n]

def edit(path, change):
    found = json.loads(path.read_text())
    change(found)
    path.write_text(json.dumps(found))

def kaggle(folder):
    "Six images of several sizes and kinds with round nuclei; the last has none"
    rng = np.random.default_rng(0)
    for i, (h, w, mode) in enumerate([(96, 80, 'RGBA'), (100, 130, 'L'), (128, 128, 'RGB'), (70, 90, 'RGBA'), (96, 96, 'L'), (64, 64, 'RGB')]):
        name = f'{i:02d}{"ab" * 3}'
        for kind in ('images', 'masks'): (folder/'stage1_train'/name/kind).mkdir(parents=True)
        pixels, masks = rng.integers(10, 30, (h, w)).astype(np.uint8), discs(h, w, [] if i == 5 else [(20, 20), (22, 50), (50, 30)])
        for j, mask in enumerate(masks):
            pixels[mask] = 180
            Image.fromarray(mask.astype(np.uint8) * 255).save(folder/'stage1_train'/name/'masks'/f'{j}.png')
        Image.fromarray(pixels).convert(mode).save(folder/'stage1_train'/name/'images'/f'{name}.png')
    return folder

def discs(h, w, centres, radius=9):
    y, x = np.mgrid[:h, :w]
    return [(y - cy)**2 + (x - cx)**2 <= radius**2 for cy, cx in centres]

@pytest.fixture(scope='module')
def shapes(tmp_path_factory): return shapes_set(tmp_path_factory.mktemp('shapes'))

@pytest.fixture(scope='module')
def nuclei(tmp_path_factory): return kaggle(tmp_path_factory.mktemp('nuclei'))

@pytest.fixture(scope='module')
def shapes_run(shapes, tmp_path_factory):
    "An uninterrupted run"
    out = tmp_path_factory.mktemp('runs')/'shapes'
    return out, ok('train', 'shapes', '--data', shapes, '--out', out, *KEPT)

@pytest.fixture(scope='module')
def nuclei_run(nuclei, tmp_path_factory):
    out = tmp_path_factory.mktemp('runs')/'nuclei'
    return out, ok('train', 'nuclei', '--data', nuclei, '--out', out, '--epochs', 1)

@pytest.fixture(scope='module')
def any_weights(tmp_path_factory):
    "Weights of a network that never learned, and is never too unsure to answer"
    set_seed(0)
    return save_weights(MaskRCNN(SHAPES.change(detection=dict(min_score=0.))), tmp_path_factory.mktemp('weights')/'any.safetensors', CLASSES)

# ---- train

def check_run(out, classes, epochs):
    assert sorted(p.name for p in out.iterdir()) == sorted([*FILES, 'report.html', 'run.json'])
    assert [row['epoch'] for row in history(out)] == [str(i) for i in range(epochs)]
    assert all(math.isfinite(float(x)) for row in losses(out) for x in row.values()) and {'t_mask', 'v_mask', 'valid_loss'} <= set(losses(out)[0])
    scores = strict((out/'scores.json').read_text())
    assert SCORES | {'images', 'per_class'} <= set(scores)
    with Image.open(out/'results.png') as im: assert im.width > 500 and np.asarray(im.convert('L')).std() > 10
    assert torch.load(out/'state.pth', weights_only=True)['epochs'] == epochs
    model, names = load_weights(out/'weights.safetensors')
    assert names == classes and model.config.n_classes == len(classes)
    return scores

def test_train_shapes_on_a_folder(shapes_run):
    out, done = shapes_run
    scores = check_run(out, CLASSES, 3)
    assert scores['images'] == 3 and 'dsb' not in scores
    assert f"mask_ap {scores['mask_ap']:.3f}" in done.stdout and str(out) in done.stdout
    state, trained = torch.load(out/'state.pth', weights_only=True)['model'], load_file(out/'weights.safetensors')
    assert all(torch.equal(state[k], v) for k, v in trained.items())

def test_train_shapes_on_a_zip(shapes, tmp_path):
    ok('train', 'shapes', '--data', zipped(shapes, tmp_path/'set.zip'), '--out', tmp_path/'runs'/'deep', '--epochs', 1)
    check_run(tmp_path/'runs'/'deep', CLASSES, 1)

def test_train_nuclei(nuclei_run):
    scores = check_run(nuclei_run[0], ['background', 'nucleus'], 1)
    assert scores['images'] == 1 and {'dsb', 'ap_by_iou', 'by_kind'} <= set(scores)

def test_train_nuclei_on_a_zip(nuclei, tmp_path):
    ok('train', 'nuclei', '--data', zipped(nuclei, tmp_path/'stage1.zip'), '--out', tmp_path/'run', '--epochs', 1)
    check_run(tmp_path/'run', ['background', 'nucleus'], 1)

def test_train_coco(tmp_path):
    "Images of several sizes, ids with gaps, fewer images than a batch, faults that are reported"
    samples = [Sample(s.image[:h, :w], s.instances.window(0, 0, h, w), s.name) for s, (h, w) in zip(make_shapes(5, seed=2, size=160), [(160, 120), (100, 160), (160, 160), (90, 90), (130, 150)])]
    folder = one_json(tmp_path/'set', samples, ['background', 'box', 'ball', 'tent'])
    def change(found):
        for c in found['categories']: c['id'] *= 10
        for a in found['annotations']: a['category_id'] *= 10
        found['annotations'][0]['bbox'] = [-30, 5, 50, 40]
        found['annotations'].append(found['annotations'][0] | dict(id=999, segmentation=[], bbox=[1, 1, 5, 5]))
    edit(folder/'annotations.json', change)
    done = ok('train', 'coco', '--data', folder, '--out', tmp_path/'run', '--epochs', 1)
    check_run(tmp_path/'run', ['background', 'box', 'ball', 'tent'], 1)
    assert 'box reaches out of the image; clipped' in done.stdout and 'annotation 999: no segmentation; object dropped' in done.stdout
    scores = strict(ok('evaluate', '--weights', tmp_path/'run'/'weights.safetensors', '--data', zipped(folder, tmp_path/'set.zip'), '--json').stdout)
    assert scores['images'] == 5 and set(scores['per_class']) == {'box', 'ball', 'tent'}

def test_recipe_fits_the_data(shapes):
    train, _ = open_dataset(shapes)
    recipe = coco_recipe(train)
    assert recipe.config.n_classes == 4 and recipe.slots == 8 and recipe.item_tfms[0].size == 128
    assert recipe.config.rpn.sizes[0][0] < 40 < 64 <= recipe.config.rpn.sizes[-1][0]   # the shapes are 40 to 64 pixels, and are seen at 0.8 to 1.25 of it

def test_only_background_stops(tmp_path):
    write_coco([replace(EMPTY, image=EMPTY.image + i, name=f'e{i}') for i in range(4)], tmp_path/'set', 'train', CLASSES)
    write_coco([replace(EMPTY, image=EMPTY.image + 9, name='v')], tmp_path/'set', 'valid', CLASSES)
    for what in ('shapes', 'coco'): fails('train', what, '--data', tmp_path/'set', '--out', tmp_path/'run', '--epochs', 1, words=['no object'])
    fails('evaluate', '--weights', 'shapes', '--data', tmp_path/'set', words=['no object'])
    assert not (tmp_path/'run').exists()

def test_same_seed_same_losses(shapes, tmp_path):
    "The functions of the last notebook, called with a shorter recipe"
    train, valid = open_dataset(shapes)
    recipe, (a, b, c) = replace(SHAPES_RECIPE, epochs=1, bs=4), (tmp_path/n for n in 'abc')
    for out, seed in ((a, 3), (b, 3), (c, 4)): fit(recipe, train.subset(range(8)), valid.subset([0]), out, seed=seed, device='cpu')
    assert (a/'history.csv').read_bytes() == (b/'history.csv').read_bytes() and losses(a) != losses(c)
    a, b, c = (load_file(p/'weights.safetensors') for p in (a, b, c))
    assert all(torch.equal(a[k], b[k]) for k in a) and not all(torch.equal(a[k], c[k]) for k in a)

def test_an_earlier_run_is_moved_aside(shapes, shapes_run, tmp_path):
    shutil.copytree(shapes_run[0], tmp_path/'run')
    before = {p.name: p.read_bytes() for p in (tmp_path/'run').iterdir()}
    fails('train', 'shapes', '--data', tmp_path/'nowhere', '--out', tmp_path/'run', words=['nowhere'])
    fails('train', 'shapes', '--data', shapes, '--out', tmp_path/'run', '--device', 'nonsense', words=['nonsense'])
    assert {p.name: p.read_bytes() for p in (tmp_path/'run').iterdir()} == before
    train_shapes(tmp_path/'run', shapes, recipe=replace(SHAPES_RECIPE, epochs=1))
    assert {p.name: p.read_bytes() for p in (tmp_path/'run-1').iterdir()} == before and len(history(tmp_path/'run')) == 1

# ---- Ctrl-C

def wait_for(path, process, seconds=120):
    for _ in range(50 * seconds):
        if path.exists(): return
        assert process.poll() is None, process.communicate()
        time.sleep(.02)
    raise AssertionError(f'{path} did not appear')

def test_stop_and_resume(shapes, shapes_run, tmp_path):
    "Ctrl-C after the first epoch, then --resume: the same table as the run that nobody stopped"
    out = tmp_path/'run'
    args = ['train', 'shapes', '--data', shapes, '--out', out, *KEPT]
    process = command(*args)
    wait_for(out/'state.pth', process)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130 and 'Traceback' not in err, err
    assert 'Stopped' in err and '--resume' in err and str(out) in err
    state = torch.load(out/'state.pth', weights_only=True)
    assert state['epochs'] < 3 and len(history(out)) == state['epochs'] and not (out/'scores.json').exists()
    assert load_weights(out/'weights.safetensors')[1] == CLASSES
    fails(*args[:-6], '--epochs', 4, '--seed', 7, '--resume', words=['--resume', '--epochs 3', '--seed 7'])
    fails(*args[:-6], '--epochs', 3, '--seed', 8, '--resume', words=['--resume', '--epochs 3', '--seed 7'])
    process = command(*args, '--resume')
    stdout, err = process.communicate(timeout=300)
    assert process.returncode == 0 and 'Warning' not in err, err
    check_run(out, CLASSES, 3)
    assert losses(out) == losses(shapes_run[0])
    assert (out/'scores.json').read_text() == (shapes_run[0]/'scores.json').read_text()

def test_stop_before_the_first_epoch_says_so(shapes, tmp_path, monkeypatch):
    def stopped(*args, **kwargs): raise KeyboardInterrupt
    monkeypatch.setattr('maskrcnn_edu.train.open_dataset', stopped)
    done = cli('train', 'shapes', '--data', shapes, '--out', tmp_path/'run')
    assert done.exit_code == 130 and 'nothing is saved' in done.stderr and '--resume' not in done.stderr and not (tmp_path/'run').exists()

def test_resume_of_a_finished_run_only_scores_it(shapes, shapes_run, tmp_path):
    shutil.copytree(shapes_run[0], tmp_path/'run')
    (tmp_path/'run'/'scores.json').unlink()
    ok('train', 'shapes', '--data', shapes, '--out', tmp_path/'run', *KEPT, '--resume')
    assert all((tmp_path/'run'/f).read_bytes() == (shapes_run[0]/f).read_bytes() for f in FILES)

def test_resume_without_a_run(shapes, tmp_path):
    fails('train', 'shapes', '--data', shapes, '--out', tmp_path/'run', '--resume', words=[tmp_path/'run'/'state.pth', 'without --resume'])
    assert not (tmp_path/'run').exists()

def test_a_damaged_state(shapes, shapes_run, tmp_path):
    shutil.copytree(shapes_run[0], tmp_path/'run')
    for data in ((tmp_path/'run'/'state.pth').read_bytes()[:5000], b'', b'<html>'):
        (tmp_path/'run'/'state.pth').write_bytes(data)
        fails('train', 'shapes', '--data', shapes, '--out', tmp_path/'run', *KEPT, '--resume', words=['state.pth', 'cannot be read'])
    torch.save({'model': {}}, tmp_path/'run'/'state.pth')
    fails('train', 'shapes', '--data', shapes, '--out', tmp_path/'run', *KEPT, '--resume', words=['state.pth', 'holds no run'])

@pytest.fixture(scope='module')
def coco_run(tmp_path_factory):
    "One epoch of two on data of one's own, as if it had been stopped"
    folder = tmp_path_factory.mktemp('coco')
    one_json(folder/'set', make_shapes(6, seed=2))
    with pytest.MonkeyPatch.context() as m:
        m.setattr('maskrcnn_edu.learner.SaveState.after_epoch', stop_after(1))
        done = cli('train', 'coco', '--data', folder/'set', '--out', folder/'run', '--epochs', 2, '--device', 'cpu')
    assert done.exit_code == 130 and '--resume' in done.stderr, done.stderr
    return folder

def stop_after(n):
    from maskrcnn_edu.learner import SaveState
    save = SaveState.after_epoch
    def after_epoch(self):
        save(self)
        if self.epoch + 1 == n: raise KeyboardInterrupt
    return after_epoch

def other_names(found): found['categories'][0]['name'] = 'box'
def fewer_objects(found): found['annotations'].pop()
def moved(found): found['annotations'][0]['segmentation'] = dict(size=[128, 128], counts=[2000, 700, 128 * 128 - 2700])

OTHERS = {
    'the same': (lambda folder: None, [], None),
    'other classes': (lambda folder: edit(folder/'annotations.json', other_names), [], ['knows the classes square, circle, triangle', 'have box, circle, triangle']),
    'an object less': (lambda folder: edit(folder/'annotations.json', fewer_objects), [], ['images that are not these', '--data']),
    'an object moved': (lambda folder: edit(folder/'annotations.json', moved), [], ['images that are not these']),
    'a pixel': (lambda folder: Image.fromarray(np.asarray(Image.open(first_image(folder))) ^ 1).save(first_image(folder)), [], ['images that are not these']),
    'another place': (lambda folder: None, [], None),
    'a seed': (lambda folder: None, ['--seed', 3], ['--epochs 2 --seed 0']),
    'epochs': (lambda folder: None, ['--epochs', 4], ['--epochs 2 --seed 0']),
    'other weights': (lambda folder: None, ['--start', 'shapes'], ['--epochs 2 --seed 0']),
}

@pytest.mark.parametrize('kind', OTHERS)
def test_resume_of_another_run(coco_run, tmp_path, kind):
    "One sentence, nothing trained, nothing written; the same data in another place are the same"
    change, options, words = OTHERS[kind]
    shutil.copytree(coco_run, tmp_path/'all')
    folder, out = tmp_path/'all'/'set', tmp_path/'all'/'run'
    change(folder)
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    args = ['train', 'coco', '--data', folder, '--out', out, '--epochs', 2, '--device', 'cpu', '--resume', *options]
    if words is None: assert len(history(out)) == 1 and ok(*args) and len(history(out)) == 2
    else:
        done = fails(*args, words=['--resume', out, *words])
        assert {p.name: p.read_bytes() for p in out.iterdir()} == before and 'valid_loss' not in done.stdout

def test_resume_of_an_older_version(coco_run, tmp_path):
    "Classes and numbers are compared with those of the weights; that the data cannot be compared is said"
    shutil.copytree(coco_run, tmp_path/'all')
    folder, out = tmp_path/'all'/'set', tmp_path/'all'/'run'
    state = torch.load(out/'state.pth', weights_only=True)
    del state['same']
    torch.save(state | dict(n_epochs=2, seed=0), out/'state.pth')
    args = ['train', 'coco', '--data', folder, '--out', out, '--device', 'cpu', '--resume', '--epochs']
    fails(*args, 4, words=['--epochs 2 --seed 0'])
    edit(folder/'annotations.json', other_names)
    fails(*args, 2, words=['knows the classes square'])
    edit(folder/'annotations.json', lambda found: found['categories'][0].update(name='square'))
    assert 'older version' in ok(*args, 2).stdout and len(history(out)) == 2

def test_resume_with_another_start(coco_run, tmp_path):
    "Begun from weights: the same name is asked for"
    out = tmp_path/'run'
    args = ['train', 'coco', '--data', coco_run/'set', '--out', out, '--epochs', 1, '--device', 'cpu']
    ok(*args, '--start', 'shapes')
    fails(*args, '--resume', words=['--start shapes', 'say the same'])
    ok(*args, '--start', 'shapes', '--resume')

# ---- evaluate

def test_evaluate_prints_pure_json(shapes, shapes_run):
    "As a program: stdout is json and nothing else, and stderr has no warnings that a user can do nothing about"
    process = command('evaluate', '--weights', shapes_run[0]/'weights.safetensors', '--data', shapes, '--json')
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0 and 'Warning' not in err, err
    scores = strict(out)
    assert SCORES <= set(scores) and scores == dict(split='valid') | strict((shapes_run[0]/'scores.json').read_text())
    assert 'images: 3 (--split valid)' in err

def test_evaluate_of_a_zip_and_without_json(shapes, shapes_run, tmp_path):
    weights = shapes_run[0]/'weights.safetensors'
    done = ok('evaluate', '--weights', weights, '--data', zipped(shapes, tmp_path/'set.zip'), '--json')
    assert strict(done.stdout) == dict(split='valid') | strict((shapes_run[0]/'scores.json').read_text())
    done = ok('evaluate', '--weights', weights, '--data', shapes)
    assert done.stdout.startswith('box_ap 0.') and len(done.stdout.splitlines()) == 1

def test_evaluate_takes_all_images_where_there_is_no_split(any_weights, tmp_path):
    folder = one_json(tmp_path/'set', make_shapes(2, seed=3), name='annotations_a.json')
    write_coco(make_shapes(1, seed=4), tmp_path/'more', 'x', CLASSES)
    shutil.copy(tmp_path/'more'/'annotations'/'x.json', folder/'annotations_b.json')
    shutil.copytree(tmp_path/'more'/'images', folder/'images', dirs_exist_ok=True)
    taken = lambda *split: tuple(strict(ok('evaluate', '--weights', any_weights, '--data', folder, '--json', *split).stdout)[k] for k in ('images', 'split'))
    assert taken() == taken('--split', 'all') == (3, 'all') and taken('--split', 'valid') == (1, 'valid') and taken('--split', 'train') == (2, 'train')

def test_evaluate_takes_the_part_that_is_asked_for(any_weights, shapes):
    taken = lambda *split: tuple(strict(ok('evaluate', '--weights', any_weights, '--data', shapes, '--json', *split).stdout)[k] for k in ('images', 'split'))
    assert [taken(), taken('--split', 'train'), taken('--split', 'all')] == [(3, 'valid'), (12, 'train'), (15, 'all')]
    assert cli('evaluate', '--weights', any_weights, '--data', shapes, '--split', 'test').exit_code == 2

def test_evaluate_nuclei(nuclei, nuclei_run, tmp_path):
    weights = nuclei_run[0]/'weights.safetensors'
    scores = strict(ok('evaluate', '--weights', weights, '--data', nuclei, '--json').stdout)
    assert SCORES | {'dsb', 'ap_by_iou'} <= set(scores) and len(scores['ap_by_iou']) == 10
    assert scores['images'] == 6 and scores['split'] == 'all'      # no split comes with them
    scores = strict(ok('evaluate', '--weights', weights, '--data', nuclei, '--json', '--split', 'valid').stdout)
    assert scores == dict(split='valid') | strict((nuclei_run[0]/'scores.json').read_text())
    assert scores == strict(ok('evaluate', '--weights', weights, '--data', zipped(nuclei, tmp_path/'n.zip'), '--json', '--split', 'valid').stdout)

@pytest.mark.parametrize('packed', [False, True])
def test_evaluate_nuclei_in_coco_layout(nuclei_run, tmp_path, packed):
    folder = one_json(tmp_path/'set', [replace(s, instances=s.instances[[0]]) for s in make_shapes(1, seed=1)], ['background', 'nucleus', *CLASSES[2:]])
    def change(found):
        found['categories'] = found['categories'][:1]
        for a in found['annotations']: a['category_id'] = 1
    edit(folder/'annotations.json', change)
    data = zipped(folder, tmp_path/'set.zip') if packed else folder
    scores = strict(ok('evaluate', '--weights', nuclei_run[0]/'weights.safetensors', '--data', data, '--json').stdout)
    assert SCORES <= set(scores) and scores['images'] == 1

def test_nuclei_with_a_list(nuclei, nuclei_run, tmp_path):
    "A list of the split beside them: valid is taken, and the kinds are scored alone"
    shutil.copytree(nuclei, tmp_path/'n')
    names = sorted(p.name for p in (tmp_path/'n'/'stage1_train').iterdir())
    rows = [dict(id=n, kind='bright' if i % 2 else 'dark') for i, n in enumerate(names)]
    (tmp_path/'dsb2018_split.json').write_text(json.dumps(dict(train=rows[:4], valid=rows[4:])))
    run = lambda *split: strict(ok('evaluate', '--weights', nuclei_run[0]/'weights.safetensors', '--data', tmp_path/'n', '--json', *split).stdout)
    assert (run()['images'], run()['split'], set(run()['by_kind'])) == (2, 'valid', {'bright', 'dark'})
    assert run('--split', 'train')['images'] == 4 and run('--split', 'all')['images'] == 6

# ---- classes of model and data

@pytest.fixture(scope='module')
def shipped(): return load_weights('shapes')[0]

def as_dataset(samples, classes):
    named = {f'{i}': s for i, s in enumerate(samples)}
    return InstanceDataset(map(Row, named), classes, lambda row: (named[row.name], []))

class Row(NamedTuple): name: str

def in_order(samples, order, extra=()):
    "The same objects, the classes in another order, with others that have no object"
    names = ['background', *[n for n in (*order, *extra)]]
    numbers = [0, *(names.index(c) for c in CLASSES[1:])]
    return as_dataset([replace(s, instances=renumber(s.instances, numbers)) for s in samples], names)

@settings(max_examples=12, deadline=None)
@given(order=st.permutations(CLASSES[1:]), extra=st.lists(st.sampled_from(['shapes', 'cat', 'dog']), unique=True), crowds=st.lists(st.booleans(), min_size=6, max_size=6))
def test_the_order_of_classes_never_changes_a_score(shipped, found_before, order, extra, crowds):
    samples, found = found_before
    samples = [replace(s, instances=replace(s.instances, labels=s.instances.labels * np.where(np.arange(len(s.instances)) == 0, -1 if c else 1, 1))) for s, c in zip(samples, crowds)]
    want = evaluate(shipped, as_dataset(samples, CLASSES), found=found)
    data = in_order(samples, order, extra)
    assert [s.instances.labels.tolist() for s in with_classes(data, CLASSES)] == [s.instances.labels.tolist() for s in samples]
    assert evaluate(shipped, in_classes_of('w', CLASSES, data), found=found) == want

@pytest.fixture(scope='module')
def found_before(shipped):
    from maskrcnn_edu.learner import predict_instances
    samples = make_shapes(6, seed=77)
    return samples, [predict_instances(shipped, s.image) for s in samples]

@pytest.mark.parametrize('ours, theirs, numbers', [
    (CLASSES, CLASSES, [0, 1, 2, 3]), (CLASSES, ['background', 'circle', 'square', 'triangle'], [0, 2, 1, 3]), (CLASSES, ['background', 'shapes', 'Square', ' circle ', 'cat'], [0, 0, 1, 2, 0]),
    (['background', 'T cell', 'cell'], ['background', 't_cell', 'Cell', 'T-Cell'], [0, 1, 2, 1]), (['background', 'Cell', 'cell'], ['background', 'cell', 'CELL'], [0, 2, 1]),
    (['background', 'nucleus'], ['background', 'object'], [0, 1]), (['background', 'a', 'b'], ['background', 'object'], [0, 0]), (['background', 'nucleus'], ['background', 'cell'], [0, 0]), (CLASSES, ['background', 'background'], [0, 0])])
def test_classes_are_matched_by_name(ours, theirs, numbers): assert match_classes(ours, theirs) == numbers

def test_what_has_no_partner_is_said(capsys):
    data = as_dataset([replace(s, instances=renumber(s.instances, [0, 1, 3, 2])) for s in make_shapes(4, seed=3)], ['background', 'Square', 'cat', 'circle'])
    n = sum((s.instances.labels == 2).sum() for s in data)
    assert class_notes(data, CLASSES) == ["'Square' of the data is taken for 'square' of the model", f"the model does not know 'cat': its {n} objects are left out", "no object of 'triangle' in the data: no score for it"]
    out = in_classes_of('w', CLASSES, data)
    assert {abs(l) for s in out for l in s.instances.labels} <= {1, 2} and out.classes == CLASSES and 'cat' in capsys.readouterr().out
    assert class_notes(as_dataset(make_shapes(9, seed=3), CLASSES), CLASSES) == []
    for names, words in ((['background', 'cat', 'dog', 'cow'], 'w: detects square, circle, triangle, and the data have cat, dog, cow'), ([*CLASSES[:2], 'cat', 'dog'], 'no object of square')):
        with pytest.raises(DataError, match=words): in_classes_of('w', CLASSES, as_dataset([replace(s, instances=s.instances[s.instances.labels == 2]) for s in data], names))

def test_evaluate_matches_by_name(tmp_path):
    "Another order, a category that is none (Roboflow), other spelling: the scores of the same data; nothing in common: exit 1"
    folder = one_json(tmp_path/'set', make_shapes(5, seed=77))
    run = lambda: strict(ok('evaluate', '--weights', 'shapes', '--data', folder, '--json').stdout)
    want, whole = run(), (folder/'annotations.json').read_text()
    assert want['mask_ap'] > .8
    def turned(found):
        numbers = {1: 7, 2: 3, 3: 5}
        for c in found['categories']: c.update(id=numbers[c['id']])
        for a in found['annotations']: a['category_id'] = numbers[a['category_id']]
    def roboflow(found): found['categories'].insert(0, dict(id=0, name='shapes', supercategory='none'))
    def spelled(found):
        for c in found['categories']: c['name'] = c['name'].upper()
    for change in (turned, roboflow, spelled):
        (folder/'annotations.json').write_text(whole)
        edit(folder/'annotations.json', change)
        assert run() == want, change
    assert "'SQUARE' of the data is taken for 'square'" in cli('evaluate', '--weights', 'shapes', '--data', folder).stderr
    def others(found):
        for c in found['categories']: c['name'] += ' of wood'
    edit(folder/'annotations.json', others)
    fails('evaluate', '--weights', 'shapes', '--data', folder, words=['square, circle, triangle', 'SQUARE of wood', 'rename'])
    one = one_json(tmp_path/'one', squares(3), CLASSES[:2])
    done = ok('evaluate', '--weights', 'shapes', '--data', one, '--json')
    assert "no object of 'circle'" in done.stderr and strict(done.stdout)['per_class']['circle']['mask_ap'] is None

# ---- predict

@pytest.fixture(scope='module')
def pictures(tmp_path_factory):
    "Two of the same stem, RGBA, grey, 16 bit, sizes that are no multiple of 64, hardly a picture, one without objects"
    folder = tmp_path_factory.mktemp('pictures')
    big = make_shapes(1, seed=8, size=400)[0].image
    for d in 'ab': (folder/d).mkdir()
    kinds = {'a/x.png': big[:128, :128], 'b/x.png': np.dstack([big[:100, :150], np.full((100, 150), 200, np.uint8)]), 'x_2.png': big[:90, :90],
        'grey.png': big[:77, :203, 0], 'deep.png': big[:64, :65, 1].astype(np.uint16) * 16, 'large.jpg': big[:333, :397], 'strip.png': big[:3, :300], 'empty.png': EMPTY.image}
    for name, pixels in kinds.items(): Image.fromarray(pixels).save(folder/name)
    return {folder/name: pixels.shape[:2] for name, pixels in kinds.items()}

def check_prediction(out, stem, size, coco, image):
    h, w = size
    with Image.open(out/f'{stem}_overlay.png') as im: assert im.size == (w, h)
    with Image.open(out/f'{stem}_labels.tif') as im:
        assert im.mode == 'I;16' and im.size == (w, h)
        labels = np.asarray(im)
    found = coco.loadAnns(coco.getAnnIds(image['id']))
    assert (image['height'], image['width']) == size and set(np.unique(labels)) - {0} == set(range(1, len(found) + 1))
    for i, a in enumerate(found, 1):
        mask = coco_mask.decode(a['segmentation'])
        assert (mask == (labels == i)).all() and mask.sum() == a['area'] and 0 < a['score'] <= 1 and a['category_id'] in coco.cats
        ys, xs = np.nonzero(mask)
        assert np.allclose(a['bbox'], [xs.min(), ys.min(), xs.max() + 1 - xs.min(), ys.max() + 1 - ys.min()])
    rows = list(csv.DictReader((out/f'{stem}.csv').open()))
    assert [int(r['id']) for r in rows] == list(range(1, len(found) + 1)) and [int(r['area']) for r in rows] == [a['area'] for a in found] and {r['image'] for r in rows} <= {stem}
    outlines = read_geojson(out/f'{stem}.geojson', size, CLASSES)
    assert len(outlines) == len(found) and np.array_equal(outlines.label_map() > 0, labels > 0)
    return len(found)

def test_predict(any_weights, pictures, tmp_path):
    out = tmp_path/'found'
    done = ok('predict', *pictures, '--weights', any_weights, '--out', out, '--min-score', 0)
    stems = ['x', 'x_2', 'x_2_2', 'grey', 'deep', 'large', 'strip', 'empty']
    assert sorted(p.name for p in out.iterdir()) == sorted(['instances.json', *(f'{s}{end}' for s in stems for end in ('_overlay.png', '_labels.tif', '.csv', '.geojson'))])
    coco = COCO(out/'instances.json')
    assert [c['name'] for c in coco.loadCats(coco.getCatIds())] == CLASSES[1:] and len(coco.anns) == len(set(coco.anns))
    counts = [check_prediction(out, s, size, coco, image) for s, size, image in zip(stems, pictures.values(), coco.dataset['images'], strict=True)]
    assert counts[0] > 1 and sum(counts) == len(coco.anns)
    assert done.stdout.splitlines() == [f'{s}: {n} objects' for s, n in zip(stems, counts)]

def test_predict_nothing(any_weights, pictures, tmp_path):
    ok('predict', *pictures, '--weights', any_weights, '--out', tmp_path/'found', '--min-score', 1)
    found = json.loads((tmp_path/'found'/'instances.json').read_text())
    assert found['annotations'] == [] and len(found['images']) == len(pictures) and len(found['categories']) == 3
    assert not np.asarray(Image.open(tmp_path/'found'/'x_labels.tif')).any() and (tmp_path/'found'/'x.csv').read_text().count('\n') == 1

def test_predict_what_was_asked_for(any_weights, pictures, tmp_path):
    deep, large = (next(p for p in pictures if p.name == n) for n in ('deep.png', 'large.jpg'))
    ok('predict', deep, large, '--weights', any_weights, '--out', tmp_path/'found', '--min-score', 0, '--format', 'csv', '--format', 'submission', '--splash', '--pixel-size', .5, '--tile', 192)
    assert sorted(p.name for p in (tmp_path/'found').iterdir()) == ['deep.csv', 'deep_splash.png', 'large.csv', 'large_splash.png', 'submission.csv']
    table = list(csv.DictReader((tmp_path/'found'/'deep.csv').open()))
    assert table and all(float(r['area_um2']) == float(r['area']) / 4 for r in table)
    assert max(float(r['max_0']) for r in table) > 255 and 'max_1' not in table[0]   # 16 bits of one channel, as the camera stored them
    assert cli('predict', deep, '--weights', any_weights, '--format', 'xls').exit_code == 2 and cli('predict', deep, '--weights', any_weights, '--pixel-size', 0).exit_code == 2

def test_predict_what_is_in_folders(any_weights, pictures, tmp_path, monkeypatch):
    "A folder, a zip and a pattern stand for the pictures in them; our own results are no pictures; each picture once"
    make = lambda name, value: (tmp_path/name).parent.mkdir(parents=True, exist_ok=True) or Image.fromarray(np.full((40, 50, 3), value, np.uint8)).save(tmp_path/name)
    for i, name in enumerate(['plates/p1/A01.png', 'plates/p2/A01.png', 'flat/a.png', 'flat/B.png', 'flat/a_overlay.png', 'flat/a_splash.png', 'flat/sub/c.png']): make(name, 50 + i)
    (tmp_path/'flat'/'notes.txt').write_text('x')
    (tmp_path/'empty').mkdir()
    with zipfile.ZipFile(tmp_path/'z.zip', 'w') as z: z.write(tmp_path/'flat'/'a.png', 'inside/z.png')
    named = lambda *a: [p.relative_to(tmp_path).as_posix() if p.is_relative_to(tmp_path) else p.name for p in pictures_of([tmp_path/x for x in a])]
    assert named('plates') == ['plates/p1/A01.png', 'plates/p2/A01.png'] and named('flat') == ['flat/B.png', 'flat/a.png'] and named('z.zip') == ['z.png']
    assert named('flat/a.png', 'flat', 'flat/../flat/a.png') == ['flat/a.png', 'flat/B.png'] and named('flat/[aB].p?g') == ['flat/B.png', 'flat/a.png'] and named('none.png') == ['none.png']
    for bad in ('empty', 'flat/*.jpg'):
        fails('predict', tmp_path/bad, '--weights', any_weights, '--out', tmp_path/'found', words=[tmp_path/bad, 'no '])
    done = ok('predict', tmp_path/'plates', '--weights', any_weights, '--out', tmp_path/'found')
    images = json.loads((tmp_path/'found'/'instances.json').read_text())['images']
    assert [(r['file_name'], r['name']) for r in images] == [('p1/A01.png', 'A01'), ('p2/A01.png', 'A01_2')] and {'A01.csv', 'A01_2.csv'} <= {p.name for p in (tmp_path/'found').iterdir()}
    assert 'its results are called A01_2' in done.stderr

def test_predict_names_that_meet(any_weights, tmp_path):
    "Case, signs that Windows forbids, very long names; results in the folder of the pictures leave the pictures alone"
    names = ['a.png', 'A.png', 'x.png', 'x_overlay.png', 'x_labels.tif', '10:45.png', 'con.png', 'é' * 120 + '.png']
    for i, name in enumerate(names): Image.fromarray(np.full((30, 40, 3), 30 + i, np.uint8)).save(tmp_path/name)
    before = {n: (tmp_path/n).read_bytes() for n in names}
    done = ok('predict', *(tmp_path/n for n in names), '--weights', any_weights, '--out', tmp_path, '--format', 'csv', '--format', 'overlay', '--format', 'labels', '--splash')
    assert {n: (tmp_path/n).read_bytes() for n in names} == before
    said = [line.rpartition(': ')[0] for line in done.stdout.splitlines()]
    assert said == ['a', 'A_2', 'x_2', 'x_overlay', 'x_labels', '10_45', 'con_', 'é' * 100]
    files = {p.name for p in tmp_path.iterdir()} - set(names)
    assert files == {n + end for n in said for end in ('.csv', '_overlay.png', '_splash.png', '_labels.tif')} and len({f.casefold() for f in files}) == len(files)

def test_predict_measures_what_is_stored(any_weights, tmp_path):
    "Colours and grey with transparency of 12 bits, in PNG as in TIFF; a turned picture is measured as it is shown"
    import imagecodecs
    rng = np.random.default_rng(0)
    deep = (rng.integers(0, 4096, (60, 70, 4)) // 16 * 16).astype(np.uint16)
    deep[..., 3] = 65535
    upright = rng.integers(0, 255, (60, 90, 3)).astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 3
    for name, x in dict(rgb=deep[..., :3], rgba=deep, la=deep[..., 2:], grey=deep[..., 0]).items(): (tmp_path/f'{name}.png').write_bytes(imagecodecs.png_encode(np.ascontiguousarray(x)))
    tifffile.imwrite(tmp_path/'tif.tif', deep[..., :3], photometric='rgb')
    np.save(tmp_path/'npy.npy', deep[..., :3])
    Image.fromarray(upright).save(tmp_path/'up.png'), Image.fromarray(upright[::-1, ::-1]).save(tmp_path/'turned.png', exif=exif)
    names = ['rgb', 'rgba', 'la', 'grey', 'tif', 'npy', 'up', 'turned']
    ok('predict', *(next(tmp_path.glob(f'{n}.*')) for n in names), '--weights', any_weights, '--out', tmp_path/'found', '--min-score', 0, '--format', 'csv', '--format', 'labels')
    for n, want in dict(rgb=deep[..., :3], rgba=deep[..., :3], la=deep[..., 2], grey=deep[..., 0], tif=deep[..., :3], npy=deep[..., :3], up=upright, turned=upright).items():
        labels, rows = tifffile.imread(tmp_path/'found'/f'{n}_labels.tif'), list(csv.DictReader((tmp_path/'found'/f'{n}.csv').open()))
        assert rows and ('mean_1' in rows[0]) == (want.ndim == 3)
        for r in rows:
            inside = np.atleast_3d(want)[labels == int(r['id'])]
            assert np.allclose([float(r[f'mean_{c}']) for c in range(inside.shape[1])], inside.mean(0), rtol=1e-5), n

def test_predict_of_a_file_that_is_read_in_pieces(any_weights, tmp_path, monkeypatch):
    "The same objects and measurements, whether a deep TIFF is read at once or in pieces"
    from maskrcnn_edu.tiles import open_picture
    pixels = (make_shapes(1, seed=8, size=400)[0].image[:300, :350].astype(np.uint16) * 16)
    tifffile.imwrite(tmp_path/'x.tif', pixels, photometric='rgb', tile=(64, 64), compression='zlib')
    args = ['predict', tmp_path/'x.tif', '--weights', any_weights, '--min-score', 0, '--tile', 192, '--out']
    ok(*args, tmp_path/'whole')
    monkeypatch.setattr('maskrcnn_edu.train.open_picture', lambda path: open_picture(path, most=1000))
    ok(*args, tmp_path/'pieces')
    whole, pieces = (list(csv.DictReader((tmp_path/d/'x.csv').open())) for d in ('whole', 'pieces'))
    assert whole == pieces and max(float(r['max_0']) for r in whole) > 255

def test_predict_reads_everything_first(any_weights, pictures, tmp_path):
    "The last of a batch has five channels, is cut off in its last strip, or is a stack: nothing is written for the first"
    good = next(iter(pictures))
    tifffile.imwrite(tmp_path/'five.tif', np.zeros((5, 60, 70), np.uint8), photometric='minisblack', metadata=dict(axes='CYX'))
    tifffile.imwrite(tmp_path/'stack.tif', np.zeros((7, 60, 70), np.uint8), photometric='minisblack', metadata=dict(axes='ZYX'))
    tifffile.imwrite(tmp_path/'whole.tif', np.random.default_rng(0).integers(0, 255, (300, 300, 3)).astype(np.uint8), photometric='rgb', rowsperstrip=16, compression='zlib')
    (tmp_path/'cut.tif').write_bytes((tmp_path/'whole.tif').read_bytes()[:-3000])
    for bad, word in (('five.tif', '5 channels'), ('cut.tif', ''), ('stack.tif', '7')):
        fails('predict', good, tmp_path/bad, '--weights', any_weights, '--out', tmp_path/'found', words=[tmp_path/bad, word])
        assert not (tmp_path/'found').exists()

def test_predict_that_is_stopped(any_weights, pictures, tmp_path, monkeypatch):
    from maskrcnn_edu import train
    once, calls = train.predict_file, []
    def stopped(*args):
        calls.append(1)
        if len(calls) == 3: raise KeyboardInterrupt
        return once(*args)
    monkeypatch.setattr(train, 'predict_file', stopped)
    done = cli('predict', *pictures, '--weights', any_weights, '--out', tmp_path/'found')
    assert done.exit_code == 130 and '2 pictures are done' in done.stderr and 'Traceback' not in done.stderr
    assert sorted(p.name for p in (tmp_path/'found').iterdir()) == sorted(n + end for n in ('x', 'x_2') for end in ('_overlay.png', '_labels.tif', '.csv', '.geojson'))

# ---- a disk that is full, a hand that is on the keys

@pytest.fixture
def full(monkeypatch):
    "From now on no file can be written"
    def write_bytes(self, data):
        with open(self, 'wb') as f: f.write(data[:len(data) // 2])
        raise OSError(errno.ENOSPC, 'No space left on device', str(self))
    monkeypatch.setattr(Path, 'write_bytes', write_bytes)

def no_parts(folder): return not [p for p in folder.rglob('*') if 'part' in p.name or p.name.startswith('.')]

def test_a_full_disk(any_weights, shapes, pictures, tmp_path, full):
    for args in (['predict', *pictures, '--weights', any_weights, '--out', tmp_path/'found'], ['train', 'shapes', '--data', shapes, '--out', tmp_path/'run', '--epochs', 1],
            ['convert', any_weights, '--out', tmp_path/'w.safetensors'], ['check', shapes, '--repair', tmp_path/'copy'], ['trace', next(iter(pictures)), '--out', tmp_path/'t.html']):
        fails(*args, words=['no space left on device'])
        assert no_parts(tmp_path), args
    assert not (tmp_path/'w.safetensors').exists() and not (tmp_path/'copy').exists() and not (tmp_path/'t.html').exists()
    assert not list((tmp_path/'found').iterdir())

def test_a_full_disk_while_the_state_is_saved(shapes, tmp_path, monkeypatch):
    def sync(number): raise OSError(errno.ENOSPC, 'No space left on device')
    monkeypatch.setattr(os, 'fsync', sync)
    fails('train', 'shapes', '--data', shapes, '--out', tmp_path/'run', '--epochs', 1, words=['no space left on device'])
    assert no_parts(tmp_path) and not (tmp_path/'run'/'state.pth').exists()

@pytest.mark.parametrize('command, place', [('evaluate', 'open_for'), ('check', 'examine'), ('convert', 'convert'), ('trace', 'trace_page')])
def test_stopped_by_hand(any_weights, shapes, pictures, tmp_path, monkeypatch, command, place):
    def stopped(*args, **kwargs): raise KeyboardInterrupt
    monkeypatch.setattr(f'maskrcnn_edu.train.{place}', stopped)
    args = dict(evaluate=['--weights', any_weights, '--data', shapes], check=[shapes], convert=[any_weights, '--out', tmp_path/'w'], trace=[next(iter(pictures)), '--out', tmp_path/'t'])[command]
    done = cli(command, *args)
    assert done.exit_code == 130 and 'Stopped; nothing is half written' in done.stderr and 'Traceback' not in done.stderr and not list(tmp_path.iterdir())

def test_too_little_memory(any_weights, shapes, monkeypatch):
    def hungry(*args, **kwargs): raise MemoryError
    monkeypatch.setattr('maskrcnn_edu.train.open_for', hungry)
    fails('evaluate', '--weights', any_weights, '--data', shapes, words=['memory is not enough'])

def test_paths_that_are_no_files(any_weights, shapes, pictures, tmp_path):
    "Missing, or a folder where a file is meant, for every command"
    (tmp_path/'folder').mkdir()
    picture, none, folder = next(iter(pictures)), tmp_path/'none', tmp_path/'folder'
    for bad in (none, folder):
        for args in (['evaluate', '--weights', bad, '--data', shapes], ['evaluate', '--weights', any_weights, '--data', bad], ['predict', picture, '--weights', bad, '--out', tmp_path/'out'],
                ['predict', bad, '--weights', any_weights, '--out', tmp_path/'out'], ['convert', bad, '--out', tmp_path/'w'], ['trace', bad, '--out', tmp_path/'t'], ['trace', picture, '--weights', bad, '--out', tmp_path/'t'],
                ['train', 'coco', '--data', bad, '--out', tmp_path/'out'], ['train', 'nuclei', '--data', bad, '--out', tmp_path/'out'], ['train', 'coco', '--data', shapes, '--start', bad, '--out', tmp_path/'out']):
            fails(*args, words=[bad])
    for args in (['convert', any_weights, '--out', folder], ['trace', picture, '--out', folder]): fails(*args, words=[folder])
    assert [p.name for p in tmp_path.iterdir()] == ['folder'] and not list(folder.iterdir())
    done = cli('check', none)
    assert done.exit_code == 1 and 'none' in done.output and 'Traceback' not in done.output

def test_options_of_other_commands(shapes, tmp_path): fails('train', 'shapes', '--data', shapes, '--class-from', 'kind', '--out', tmp_path/'run', words=['--class-from', 'train coco'])

# ---- terminals that know few letters

@pytest.mark.parametrize('encoding', ['cp1252', 'ascii'])
def test_terminals_that_know_few_letters(any_weights, tmp_path, encoding):
    "Names and messages that the terminal cannot show: question marks, no traceback"
    folder = one_json(tmp_path/'é 核', make_shapes(3, seed=3))
    for name in ('é', '核'): Image.fromarray(np.zeros((40, 50, 3), np.uint8)).save(tmp_path/f'{name}.png')
    (tmp_path/'壊れた.png').write_bytes(b'\x89PNG')
    def run(*args):
        program = [sys.executable, '-W', 'ignore', '-c', 'from maskrcnn_edu.train import app; app()', *map(str, args)]
        done = subprocess.run(program, env=os.environ | dict(PYTHONIOENCODING=encoding, PYTHONUTF8='0', MASKRCNN_EDU_BACKEND=backend()), capture_output=True)
        assert b'Traceback' not in done.stderr and b'UnicodeEncodeError' not in done.stderr, done.stderr
        return done
    done = run('predict', tmp_path/'é.png', tmp_path/'核.png', '--weights', any_weights, '--out', tmp_path/'out', '--min-score', 1)
    assert done.returncode == 0 and {'é.csv', '核.csv', '核_overlay.png'} <= {p.name for p in (tmp_path/'out').iterdir()} and done.stdout.count(b'0 objects') == 2
    assert run('predict', tmp_path/'壊れた.png', '--weights', any_weights).returncode == 1
    if encoding == 'cp1252': assert run('evaluate', '--weights', any_weights, '--data', folder).returncode == 0
    else: assert run('train', '--help').returncode == 0

# ---- the models that ship

def test_shipped_shapes(tmp_path):
    "By name, on drawings that it has not seen; test_weights.py asks for the promised scores"
    paths = [tmp_path/f'{s.name}.png' for s in (*make_shapes(4, seed=77), EMPTY)]
    samples = [*make_shapes(4, seed=77), EMPTY]
    for p, s in zip(paths, samples): Image.fromarray(s.image).save(p)
    ok('predict', *paths, '--weights', 'shapes', '--out', tmp_path/'found')
    coco = COCO(tmp_path/'found'/'instances.json')
    for i, s in enumerate(samples, 1):
        found = coco.loadAnns(coco.getAnnIds(i))
        assert sorted(a['category_id'] for a in found) == sorted(s.instances.labels)
        if found: assert (coco_mask.iou([a['segmentation'] for a in found], s.instances.rles(), [0] * len(s.instances)).max(0) > .75).all()

def test_shipped_nuclei(tmp_path):
    centres = [(y, x) for y in (30, 75, 120) for x in (30, 80, 130, 180)]
    masks = discs(150, 210, centres)
    pixels = np.random.default_rng(0).normal(20, 4, (150, 210)) + 90 * np.any(masks, 0)
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(tmp_path/'round.png')
    ok('predict', tmp_path/'round.png', '--weights', 'nuclei', '--out', tmp_path/'found')
    labels = np.asarray(Image.open(tmp_path/'found'/'round_labels.tif'))
    ious = [max((((labels == i) & m).sum() / ((labels == i) | m).sum() for i in range(1, labels.max() + 1)), default=0) for m in masks]
    assert sum(iou > .7 for iou in ious) >= 10, ious

# ---- bad input

def first_image(folder): return sorted((folder/'images').glob('*.png'))[1]

def damage(folder): first_image(folder).write_bytes(first_image(folder).read_bytes()[:100])
def remove(folder): first_image(folder).unlink()
def train_json(folder): return folder/'annotations'/'train.json'
def with_json(change): return lambda folder: edit(train_json(folder), change)
def mask_size(found): found['annotations'][0]['segmentation']['size'] = [64, 64]

BAD = {
    'damaged png': (damage, ['classic_5_0001.png', 'cannot be read']),
    'missing image': (remove, ['classic_5_0001.png', 'missing']),
    'no annotations': (with_json(lambda f: f.pop('annotations')), ['train.json', "'annotations' is missing"]),
    'unknown category': (with_json(lambda f: f['annotations'][0].update(category_id=77)), ['train.json', 'unknown category 77']),
    'duplicate id': (with_json(lambda f: f['images'][1].update(id=1)), ['train.json', 'image id 1 appears twice']),
    'mask size': (with_json(mask_size), ['classic_5_0000.png', '64x64', '128x128']),
    'no json': (lambda folder: train_json(folder).write_text('{'), ['train.json', 'not a readable json']),
    'no jsons': (lambda folder: shutil.rmtree(folder/'annotations'), ['annotations.json']),
}

@pytest.mark.parametrize('what', ['shapes', 'coco'])
@pytest.mark.parametrize('kind', BAD)
def test_bad_data(shapes, tmp_path, what, kind):
    spoil, words = BAD[kind]
    shutil.copytree(shapes, tmp_path/'set')
    spoil(tmp_path/'set')
    fails('train', what, '--data', tmp_path/'set', '--out', tmp_path/'run', '--epochs', 1, words=words)
    assert not (tmp_path/'run').exists()

def test_bad_data_in_evaluate(any_weights, shapes, tmp_path):
    shutil.copytree(shapes, tmp_path/'set')
    (tmp_path/'set'/'images'/'empty_valid.png').write_bytes(b'\x89PNG')
    fails('evaluate', '--weights', any_weights, '--data', tmp_path/'set', '--json', words=['empty_valid.png', 'cannot be read'])
    fails('evaluate', '--weights', any_weights, '--data', tmp_path/'nowhere', words=['nowhere'])

@pytest.mark.parametrize('what', ['shapes', 'coco', 'nuclei'])
def test_zip_that_climbs_out(tmp_path, what):
    with zipfile.ZipFile(tmp_path/'evil.zip', 'w') as z: z.writestr('../../evil.txt', 'x'), z.writestr('annotations.json', '{}')
    fails('train', what, '--data', tmp_path/'evil.zip', '--out', tmp_path/'a'/'run', words=['evil.zip', 'climbs out'])
    assert [p.name for p in tmp_path.iterdir()] == ['evil.zip'] and not list(Path(os.environ['MASKRCNN_EDU_CACHE']).rglob('evil*'))

@pytest.mark.parametrize('what', ['shapes', 'coco', 'nuclei'])
def test_neither_folder_nor_zip(tmp_path, what):
    (tmp_path/'set.zip').write_bytes(b'PK nothing')
    fails('train', what, '--data', tmp_path/'set.zip', '--out', tmp_path/'run', words=['set.zip', 'neither a folder nor a zip'])
    fails('train', what, '--data', tmp_path/'nowhere', '--out', tmp_path/'run', words=['nowhere', 'no such folder or file'])
    assert not (tmp_path/'run').exists()

def test_bad_nuclei(nuclei, tmp_path):
    shutil.copytree(nuclei, tmp_path/'set')
    mask = sorted(tmp_path.rglob('masks/*.png'))[0]
    Image.fromarray(np.zeros((9, 9), np.uint8)).save(mask)
    fails('train', 'nuclei', '--data', tmp_path/'set', '--out', tmp_path/'run', words=[mask.name, '9x9'])
    (tmp_path/'none').mkdir()
    fails('train', 'nuclei', '--data', tmp_path/'none', '--out', tmp_path/'run', words=['none', 'images'])
    assert not (tmp_path/'run').exists()

def test_other_classes_than_the_shapes(tmp_path):
    folder = one_json(tmp_path/'set', squares(3), CLASSES[:2])
    fails('train', 'shapes', '--data', folder, '--out', tmp_path/'run', words=['square', 'train coco'])

@pytest.mark.parametrize('args, words', [(['--epochs', 0], ['--epochs 0']), (['--epochs', -3], ['--epochs -3']), (['--device', 'nonsense'], ['--device nonsense']),
    (['--device', 'cuda:99'], ['--device cuda:99']), (['--pretrained'], ['pretrained', 'cannot be downloaded', 'pretrained=False'])])
@pytest.mark.parametrize('what', ['shapes', 'nuclei'])
def test_bad_options(shapes, nuclei, tmp_path, monkeypatch, what, args, words):
    monkeypatch.setenv('TORCH_HOME', str(tmp_path/'torch'))
    monkeypatch.setenv('https_proxy', 'http://127.0.0.1:9')   # no way to the internet
    fails('train', what, '--data', dict(shapes=shapes, nuclei=nuclei)[what], '--out', tmp_path/'run', *args, words=words)
    assert not (tmp_path/'run').exists()

def test_options_that_are_missing(any_weights, tmp_path):
    fails('train', 'coco', words=['--data'])
    fails('predict', tmp_path/'x.png', '--weights', any_weights, '--device', 'nonsense', words=['--device nonsense'])
    fails('evaluate', '--weights', any_weights, '--device', 'nonsense', words=['--device nonsense'])
    assert cli('train', 'cats').exit_code == 2 and cli('predict').exit_code == 2

def spoiled_weights(folder, good):
    "Files that are not what --weights wants, each with what the sentence must say"
    (folder/'text.safetensors').write_text('hello')
    (folder/'cut.safetensors').write_bytes(good.read_bytes()[:50_000])
    save_file({'x': torch.zeros(1)}, folder/'other.safetensors')
    config = json.dumps(dict(n_classes=4) | {'layers': [2, 2, 2, 2]})
    save_file({'x': torch.zeros(1)}, folder/'misfit.safetensors', dict(format='maskrcnn_edu', config=config, classes=json.dumps(CLASSES)))
    save_file({'x': torch.zeros(1)}, folder/'strange.safetensors', dict(format='maskrcnn_edu', config='{"wings": 2}', classes='[]'))
    return {'text': 'not a safetensors weight file', 'cut': 'not a safetensors weight file', 'other': 'another program', 'misfit': 'do not fit', 'strange': 'header', 'nowhere': 'no such weight file'}

def test_bad_weights(any_weights, shapes, pictures, tmp_path):
    for name, words in spoiled_weights(tmp_path, any_weights).items():
        file = tmp_path/f'{name}.safetensors'
        fails('predict', *pictures, '--weights', file, '--out', tmp_path/'found', words=[file, words])
        fails('evaluate', '--weights', file, '--data', shapes, '--json', words=[file, words])
    assert not (tmp_path/'found').exists()

def test_folder_that_cannot_be_written(any_weights, shapes, pictures, tmp_path):
    (tmp_path/'file').write_text('')
    for out in (tmp_path/'file'/'run', tmp_path/'file'):
        fails('train', 'shapes', '--data', shapes, '--out', out, words=[out, 'cannot be written', '--out'])
        fails('predict', *pictures, '--weights', any_weights, '--out', out, words=[out, 'cannot be written', '--out'])
    assert (tmp_path/'file').read_text() == ''

def test_bad_pictures(any_weights, pictures, tmp_path):
    "One bad picture, and nothing is written for the good ones either"
    (tmp_path/'bad.png').write_bytes(next(iter(pictures)).read_bytes()[:60])
    for bad, word in (('bad.png', 'cannot be read'), ('none.png', 'missing')):
        fails('predict', *pictures, tmp_path/bad, '--weights', any_weights, '--out', tmp_path/'found', words=[tmp_path/bad, word])
    assert not (tmp_path/'found').exists()

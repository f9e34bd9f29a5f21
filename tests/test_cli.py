"The command line on tiny data: what it leaves, what it prints, how it fails, and how it stops and goes on"
import csv, json, math, os, shutil, signal, subprocess, sys, time, zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from maskrcnn_edu.checkpoints import load_weights, save_weights
from maskrcnn_edu.core import set_seed
from maskrcnn_edu.cuda import backend
from maskrcnn_edu.data import CLASSES, DataError, Sample, load_splits, make_shapes, write_coco
from maskrcnn_edu.mask_rcnn import MaskRCNN, SHAPES
from maskrcnn_edu.results import read_geojson
from maskrcnn_edu.train import SHAPES_RECIPE, app, coco_recipe, fit, train_shapes

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
    write_coco([*make_shapes(n_valid - 1, seed=6), replace(EMPTY, name='empty_valid')], folder, 'valid', CLASSES)
    return folder

def one_json(folder, samples, classes=CLASSES, name='annotations.json'):
    "images/ and annotations.json"
    write_coco(samples, folder, 'x', classes)
    shutil.move(folder/'annotations'/'x.json', folder/name)
    (folder/'annotations').rmdir()
    return folder

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
    train, _ = load_splits(shapes)
    recipe = coco_recipe(train)
    assert recipe.config.n_classes == 4 and recipe.slots == 8 and recipe.item_tfms[0].size == 128
    assert recipe.config.rpn.sizes[0][0] < 40 < 64 <= recipe.config.rpn.sizes[-1][0]   # the shapes are 40 to 64 pixels, and are seen at 0.8 to 1.25 of it

def test_only_background_trains(tmp_path):
    write_coco([replace(EMPTY, name=f'e{i}') for i in range(4)], tmp_path/'set', 'train', CLASSES)
    write_coco([replace(EMPTY, name='v')], tmp_path/'set', 'valid', CLASSES)
    ok('train', 'shapes', '--data', tmp_path/'set', '--out', tmp_path/'run', '--epochs', 1)
    assert all(float(row[k]) == 0 for row in history(tmp_path/'run') for k in ('t_box', 't_mask', 't_rpn'))
    assert strict((tmp_path/'run'/'scores.json').read_text())['mask_ap'] is None

def test_same_seed_same_losses(shapes, tmp_path):
    "The functions of the last notebook, called with a shorter recipe"
    train, valid = load_splits(shapes)
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
    monkeypatch.setattr('maskrcnn_edu.train.load_splits', stopped)
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

def test_resume_with_other_data_or_a_damaged_state(shapes, shapes_run, tmp_path):
    shutil.copytree(shapes_run[0], tmp_path/'run')
    other = one_json(tmp_path/'set', [replace(s, instances=s.instances[s.instances.labels == 1]) for s in make_shapes(4, seed=1)], CLASSES[:2])
    fails('train', 'coco', '--data', other, '--out', tmp_path/'run', *KEPT, '--resume', words=['state.pth', 'does not fit'])
    (tmp_path/'run'/'state.pth').write_bytes((tmp_path/'run'/'state.pth').read_bytes()[:5000])
    fails('train', 'shapes', '--data', shapes, '--out', tmp_path/'run', *KEPT, '--resume', words=['state.pth', 'cannot be read'])

# ---- evaluate

def test_evaluate_prints_pure_json(shapes, shapes_run):
    "As a program: stdout is json and nothing else, and stderr has no warnings that a user can do nothing about"
    process = command('evaluate', '--weights', shapes_run[0]/'weights.safetensors', '--data', shapes, '--json')
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0 and 'Warning' not in err, err
    scores = strict(out)
    assert SCORES <= set(scores) and scores == strict((shapes_run[0]/'scores.json').read_text())

def test_evaluate_of_a_zip_and_without_json(shapes, shapes_run, tmp_path):
    weights = shapes_run[0]/'weights.safetensors'
    done = ok('evaluate', '--weights', weights, '--data', zipped(shapes, tmp_path/'set.zip'), '--json')
    assert strict(done.stdout) == strict((shapes_run[0]/'scores.json').read_text())
    done = ok('evaluate', '--weights', weights, '--data', shapes)
    assert done.stdout.startswith('box_ap 0.') and len(done.stdout.splitlines()) == 1

def test_evaluate_takes_all_images_where_there_is_no_split(any_weights, tmp_path):
    folder = one_json(tmp_path/'set', make_shapes(2, seed=3), name='annotations_a.json')
    write_coco(make_shapes(1, seed=4), tmp_path/'more', 'x', CLASSES)
    shutil.copy(tmp_path/'more'/'annotations'/'x.json', folder/'annotations_b.json')
    shutil.copytree(tmp_path/'more'/'images', folder/'images', dirs_exist_ok=True)
    assert strict(ok('evaluate', '--weights', any_weights, '--data', folder, '--json').stdout)['images'] == 3

def test_evaluate_nuclei(nuclei, nuclei_run, tmp_path):
    weights = nuclei_run[0]/'weights.safetensors'
    scores = strict(ok('evaluate', '--weights', weights, '--data', nuclei, '--json').stdout)
    assert SCORES | {'dsb', 'ap_by_iou'} <= set(scores) and len(scores['ap_by_iou']) == 10
    assert scores == strict((nuclei_run[0]/'scores.json').read_text())
    assert scores == strict(ok('evaluate', '--weights', weights, '--data', zipped(nuclei, tmp_path/'n.zip'), '--json').stdout)

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
    folder = one_json(tmp_path/'set', [replace(s, instances=s.instances[s.instances.labels == 1]) for s in make_shapes(3, seed=1)], CLASSES[:2])
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

def test_weights_of_another_number_of_classes(any_weights, tmp_path):
    folder = one_json(tmp_path/'set', [replace(s, instances=s.instances[s.instances.labels == 1]) for s in make_shapes(2, seed=1)], CLASSES[:2])
    fails('evaluate', '--weights', any_weights, '--data', folder, words=[any_weights, '4 classes', '2 (background, square)'])

def test_folder_that_cannot_be_written(any_weights, shapes, pictures, tmp_path):
    (tmp_path/'file').write_text('')
    for out in (tmp_path/'file'/'run', tmp_path/'file'):
        fails('train', 'shapes', '--data', shapes, '--out', out, words=[out, 'cannot be written', '--out'])
        fails('predict', *pictures, '--weights', any_weights, '--out', out, words=[out, 'cannot be written', '--out'])
    assert (tmp_path/'file').read_text() == ''

def test_bad_pictures(any_weights, pictures, tmp_path):
    "One bad picture, and nothing is written for the good ones either"
    (tmp_path/'bad.png').write_bytes(next(iter(pictures)).read_bytes()[:60])
    for bad, word in (('bad.png', 'cannot be read'), ('none.png', 'missing'), ('.', 'cannot be read')):
        fails('predict', *pictures, tmp_path/bad, '--weights', any_weights, '--out', tmp_path/'found', words=[tmp_path/bad, word])
    assert not (tmp_path/'found').exists()

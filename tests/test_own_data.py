"Data of one's own: four layouts written from the same images read alike, faults are named and left out, and everything trains"
import csv, json, math, shutil, struct, zipfile, zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from PIL import Image
from scipy.ndimage import label as components
from skimage.draw import ellipse
from typer.testing import CliRunner

from maskrcnn_edu.checkpoints import load_weights
from maskrcnn_edu.data import CLASSES, DataError, Instances, Sample, load_splits, make_shapes, png_bytes, read_coco, runs, tight, write_atomic, write_coco
from maskrcnn_edu.own_data import (LAYOUTS, Finding, draw_coco, draw_via, examine, fault_table, fold, most_in_a_window, open_dataset, open_valid, propose, read_labels,
    notes, own_anchors, recognise, repair, scan)
from maskrcnn_edu.train import app

def whole(instances):
    "Only objects in one piece and without holes, as a polygon or a label can tell them, of more than a sliver"
    one = [components(c, np.ones((3, 3)))[1] == 1 and components(~np.pad(c, 1))[1] == 1 and min(c.shape) > 4 for c in instances.crops]
    return instances[np.array(one, bool)]

SAMPLES = [replace(s, instances=whole(s.instances)) for s in make_shapes(5, seed=11, level='crowded')]
EMPTY = Sample(np.full((128, 128, 3), 90, np.uint8), SAMPLES[0].instances[[]], 'empty')
SAMPLES.append(EMPTY)
OBJECT = ['background', 'object']

@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv('MASKRCNN_EDU_CACHE', str(tmp_path/'cache'))
    monkeypatch.setenv('COLUMNS', '200')

# ---- writers: each puts samples into a folder in its layout

def save(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)

def outline(mask):
    "Corners of the outline along the edges of the pixels, x1 y1 x2 y2 …"
    m, steps = np.pad(mask, 1), {}
    for y, x in np.argwhere(m):   # the object on the right hand
        if not m[y - 1, x]: steps.setdefault((x, y), []).append((x + 1, y))
        if not m[y, x + 1]: steps.setdefault((x + 1, y), []).append((x + 1, y + 1))
        if not m[y + 1, x]: steps.setdefault((x + 1, y + 1), []).append((x, y + 1))
        if not m[y, x - 1]: steps.setdefault((x, y + 1), []).append((x, y))
    here = start = min(steps)
    points, before = [], None
    while here != start or before is None:
        choice = steps[here]
        turn = lambda p: np.cross([here[0] - before[0], here[1] - before[1], 0], [p[0] - here[0], p[1] - here[1], 0])[2]
        following = choice[0] if len(choice) == 1 or before is None else max(choice, key=lambda p: -turn(p))   # pixels that meet in a corner belong together
        choice.remove(following)
        points.append(here)
        before, here = here, following
    return (np.array(points) - 1).astype(float).ravel().tolist()

def full(instances): return zip(instances.labels, instances.masks())

def coco_rle_json(samples, folder): write_coco(samples, folder, 'x', CLASSES); shutil.move(folder/'annotations'/'x.json', folder/'annotations.json'); (folder/'annotations').rmdir()

def change_json(path, change):
    found = json.loads(path.read_text())
    change(found)
    path.write_text(json.dumps(found))

def coco_polygons(samples, folder):
    coco_rle_json(samples, folder)
    masks = [m for s in samples for m in s.instances.masks()]
    change_json(folder/'annotations.json', lambda d: [a.update(segmentation=[outline(m)]) for a, m in zip(d['annotations'], masks, strict=True)])

def coco_plain_runs(samples, folder):
    coco_rle_json(samples, folder)
    counts = [runs(c, o, s.instances.size) for s in samples for c, o in zip(s.instances.crops, s.instances.origins)]
    def change(d):
        for a, c in zip(d['annotations'], counts, strict=True): a.update(segmentation=dict(size=[128, 128], counts=c))
        d['annotations'].append(dict(id=999, image_id=1, category_id=1, iscrowd=1, bbox=[0, 0, 9, 9], segmentation=dict(size=[128, 128], counts=[0, 128 * 128])))
    change_json(folder/'annotations.json', change)

def kaggle(samples, folder):
    for s in samples:
        save(folder/'stage1_train'/s.name/'images'/f'{s.name}.png', s.image)
        for i, (_, m) in enumerate(full(s.instances)): save(folder/'stage1_train'/s.name/'masks'/f'{s.name}{i:03}.png', m * 255)

def masks_in_class_folders(samples, folder):
    for s in samples:
        save(folder/'images'/f'{s.name}.png', s.image)
        for i, (k, m) in enumerate(full(s.instances)): save(folder/'masks'/s.name/CLASSES[k]/f'{i:03}.png', m * 255)

def masks_with_class_names(samples, folder):
    for s in samples:
        save(folder/'images'/f'{s.name}.png', s.image)
        for i, (k, m) in enumerate(full(s.instances)): save(folder/'masks'/s.name/f'{CLASSES[k]}_{i:03}.png', m * 255)

def label_png(samples, folder):
    for s in samples:
        save(folder/'images'/f'{s.name}.png', s.image)
        save(folder/'labels'/f'{s.name}.png', (s.instances.label_map() * 300).astype(np.uint16))

def label_tiff(samples, folder):
    for s in samples:
        save(folder/'images'/f'{s.name}.jpg', s.image)
        save(folder/'masks'/f'{s.name}.tif', s.instances.label_map().astype(np.int32))

def via_rows(samples, regions):
    return {f'{s.name}.png123': dict(filename=f'{s.name}.png', size=123, file_attributes={}, regions=regions(
        [dict(shape_attributes=dict(name='polygon', all_points_x=outline(m)[::2], all_points_y=outline(m)[1::2]), region_attributes=dict(kind=CLASSES[k])) for k, m in full(s.instances)])) for s in samples}

def via_1(samples, folder):
    for s in samples: save(folder/f'{s.name}.png', s.image)
    write_atomic(folder/'via_region_data.json', json.dumps(via_rows(samples, lambda r: {str(i): x for i, x in enumerate(r)})).encode())

def via_2(samples, folder):
    for s in samples: save(folder/'images'/f'{s.name}.png', s.image)
    write_atomic(folder/'project.json', json.dumps(dict(_via_settings={}, _via_img_metadata=via_rows(samples, list), _via_attributes={})).encode())

WRITERS = {coco_rle_json: 'coco', coco_polygons: 'coco', coco_plain_runs: 'coco', kaggle: 'mask folders', masks_in_class_folders: 'mask folders', masks_with_class_names: 'mask folders',
    label_png: 'label maps', label_tiff: 'label maps', via_1: 'via', via_2: 'via'}
each = pytest.mark.parametrize('write', WRITERS, ids=lambda w: w.__name__)
ONE_CLASS = (kaggle, label_png, label_tiff)

def zipped(folder, path):
    with zipfile.ZipFile(path, 'w') as z:
        for p in sorted(folder.rglob('*')):
            if p.is_file(): z.write(p, p.relative_to(folder))
    return path

# ---- the same images, whatever the layout

def same(found, samples, write):
    found = {s.name: s for s in found}
    assert sorted(found) == sorted(s.name for s in samples)
    for s in samples:
        f = found[s.name]
        order = np.lexsort(f.instances.boxes.T[:2]), np.lexsort(s.instances.boxes.T[:2])
        a, b = f.instances[order[0]], s.instances[order[1]]
        assert (a.masks() == b.masks()).all() and (a.boxes == b.boxes).all(), (write.__name__, s.name)
        assert a.labels.tolist() == ([1] * len(b) if write in ONE_CLASS else b.labels.tolist())
        if write is not label_tiff: assert (f.image == s.image).all()

@each
@pytest.mark.parametrize('packed', [False, True])
def test_layouts_read_alike(write, packed, tmp_path):
    folder = tmp_path/'set'
    write(SAMPLES, folder)
    path = zipped(folder, tmp_path/'set.zip') if packed else folder
    assert recognise(path) == WRITERS[write]
    train, valid = open_dataset(path, seed=3, valid=.34)
    assert (len(train), len(valid)) == (4, 2) and train.classes == valid.classes == (OBJECT if write in ONE_CLASS else CLASSES if 'coco' in write.__name__ else ['background', *sorted(CLASSES[1:])])
    named = [replace(s, instances=replace(s.instances, labels=np.array([train.classes.index(CLASSES[k]) if write not in ONE_CLASS else 1 for k in s.instances.labels], np.int64))) for s in SAMPLES]
    same([*train, *valid], named, write)
    left = {kaggle: 'without objects', masks_in_class_folders: 'without objects', masks_with_class_names: 'without objects', coco_plain_runs: 'ignored'}
    assert [f.action.split(' an ')[-1].split('image ')[-1] for f in examine(path)] == ([left[write]] if write in left else [])
    again, _ = open_dataset(path, seed=3, valid=.34)
    assert again.names == train.names and open_dataset(path, seed=4, valid=.34)[0].names != train.names

@each
def test_halves_in_folders(write, tmp_path):
    write(SAMPLES[:3], tmp_path/'set'/'train'), write(SAMPLES[3:], tmp_path/'set'/'val')
    train, valid = open_dataset(tmp_path/'set')
    assert sorted(train.names) == sorted(s.name for s in SAMPLES[:3]) and sorted(valid.names) == sorted(s.name for s in SAMPLES[3:])
    assert open_valid(tmp_path/'set').names == valid.names and recognise(tmp_path/'set') == WRITERS[write]
    assert sum(len(s.instances) for s in train) == sum(len(s.instances) for s in SAMPLES[:3])

def test_a_third_part_is_named(tmp_path):
    for name, part in (('train', SAMPLES[:3]), ('valid', SAMPLES[3:5]), ('test', SAMPLES[5:])): coco_rle_json(part, tmp_path/'set'/name)
    assert [(f.file, f.action) for f in examine(tmp_path/'set')] == [('test', 'not used')] and len(open_dataset(tmp_path/'set')[0]) == 3

def test_two_jsons(tmp_path):
    write_coco(SAMPLES[:4], tmp_path/'set', 'instances_train', CLASSES), write_coco(SAMPLES[4:], tmp_path/'set', 'instances_val', CLASSES)
    assert [len(d) for d in open_dataset(tmp_path/'set')] == [4, 2] == [len(d) for d in load_splits(tmp_path/'set')]

def test_the_split_is_that_of_load_splits(tmp_path):
    coco_rle_json(SAMPLES, tmp_path/'set')
    for a, b in zip(open_dataset(tmp_path/'set', 5), load_splits(tmp_path/'set', 5)): assert a.names == b.names

def test_nothing_fits(tmp_path):
    (tmp_path/'set').mkdir(), (tmp_path/'set'/'notes.txt').write_text('x')
    for f in (recognise, open_dataset, scan):
        with pytest.raises(DataError) as e: f(tmp_path/'set')
        for words in (*LAYOUTS.values(), 'notes.txt'): assert words in str(e.value)
    assert [f.stops for f in examine(tmp_path/'set')] == [True] and 'Looked for' in fault_table(examine(tmp_path/'set'))

# ---- shapes of VIA, label maps

def test_via_shapes():
    size = (20, 30)
    assert np.argwhere(draw_via(dict(name='rect', x=3, y=4, width=5, height=2), size)).tolist() == [[y, x] for y in (4, 5) for x in range(3, 8)]
    for cy, cx, ry, rx in ((10, 12, 6, 6), (9.5, 14, 4, 11), (8, 9, 7.3, 2.2)):
        rows = np.zeros(size, bool)
        rows[ellipse(cy - .5, cx - .5, ry, rx, size)] = True
        ours = draw_via(dict(name='ellipse', cx=cx, cy=cy, rx=rx, ry=ry), size)
        assert (ours != rows).sum() <= 2   # skimage leaves out what lies on the line itself
    turned = draw_via(dict(name='ellipse', cx=15, cy=10, rx=9, ry=3, theta=math.pi / 2), size)
    assert (turned == draw_via(dict(name='ellipse', cx=15, cy=10, rx=3, ry=9), size)).all()
    assert (draw_via(dict(name='circle', cx=15, cy=10, r=4), size) == draw_via(dict(name='ellipse', cx=15, cy=10, rx=4, ry=4), size)).all()

@pytest.mark.parametrize('shape, words', [(dict(name='point', cx=1, cy=1), 'point'), (dict(name='circle', cx=1, cy=1, r='a'), 'not numbers'), (dict(name='rect', x=1, y=1, width=0, height=3), 'without area'),
    (dict(name='polygon', all_points_x=[1, 2], all_points_y=[1, 2]), 'three points'), (dict(name='polygon', all_points_x=[1, 2, 3], all_points_y=[1, 2]), 'not numbers'),
    (dict(name='polygon', all_points_x=[1, 2, math.nan], all_points_y=[1, 2, 4]), 'not numbers'), ({}, 'None')])
def test_bad_via_shapes(shape, words):
    with pytest.raises(ValueError, match=words): draw_via(shape, (9, 9))

@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 2**32 - 1))
@settings(max_examples=100, deadline=None)
def test_an_outline_is_its_mask(h, w, seed):
    mask = np.random.default_rng(seed).random((h, w)) < .7
    mask = components(mask)[0] == 1
    mask = ~np.isin(lab := components(~np.pad(mask, 1))[0], lab[0, 0])[1:-1, 1:-1] if mask.any() else mask
    if mask.any(): assert (draw_coco([outline(mask)], (h, w)) == mask).all()

@pytest.mark.parametrize('mode', ['L', 'P', 'I;16', 'I', 'F', 'RGB', 'RGBA', '1'])
def test_label_maps_of_any_depth(mode, tmp_path):
    x = np.zeros((9, 9), np.uint8)
    x[1:4, 1:4], x[5:8, 5:8] = 1, (1 if mode == '1' else 7)
    kinds = {'I;16': np.uint16, 'I': np.int32, 'F': np.float32}
    if mode == 'P': im = Image.fromarray(x, 'L').convert('P'); im.putdata(x.ravel().tolist())
    elif mode[:3] == 'RGB': im = Image.fromarray(np.dstack([x * 20, x * 3, x] + [np.full_like(x, 255)] * (mode == 'RGBA')))
    elif mode == '1': im = Image.fromarray(x > 0)
    else: im = Image.fromarray(x.astype(kinds.get(mode, np.uint8)))
    im.save(tmp_path/'a.tif')
    found = read_labels(tmp_path/'a.tif')
    assert len(np.unique(found)) == len(np.unique(x)) and ((found > 0) == (x > 0)).all()

def test_label_map_in_jpeg_is_refused(tmp_path):
    label_png(SAMPLES[:2], tmp_path/'set')
    p = tmp_path/'set'/'labels'/f'{SAMPLES[0].name}.png'
    Image.fromarray(SAMPLES[0].instances.label_map().astype(np.uint8)).save(p.with_suffix('.jpg')), p.unlink()
    with pytest.raises(DataError, match='JPEG'): open_dataset(tmp_path/'set')

def test_one_number_in_pieces_is_named(tmp_path):
    label_png(SAMPLES[:2], tmp_path/'set')
    save(tmp_path/'set'/'labels'/f'{SAMPLES[0].name}.png', (SAMPLES[0].instances.label_map() > 0).astype(np.uint8) * 255)
    assert ['one number in' in f.fault for f in examine(tmp_path/'set')] == [True]

# ---- the doctor

def plant(folder):
    "A sound COCO folder of ten images and a split, and faults put into it: fault -> (file, words)"
    samples = [replace(s, instances=s.instances) for s in make_shapes(10, seed=21)]
    write_coco(samples[:7], folder, 'train', CLASSES), write_coco(samples[7:], folder, 'valid', CLASSES)
    file = lambda i: f'images/{samples[i].name}.png'
    found = json.loads((folder/'annotations'/'train.json').read_text())
    first = lambda i: next(a for a in found['annotations'] if a['image_id'] == i + 1)
    rows, names = found['annotations'], {}
    def add(i, **kw):
        rows.append(dict(id=1000 + len(rows), image_id=i + 1, category_id=1, iscrowd=0) | kw)
        return rows[-1]['id']
    square = lambda x, y, s: [[x, y, x + s, y, x + s, y + s, x, y + s]]
    def named(key, i, *words): names[key] = (file(i), *words)
    named('empty mask', 0, f"annotation {add(0, segmentation=dict(size=[128, 128], counts=[128 * 128]))}: empty mask")
    named('box outside', 0, f"annotation {add(0, segmentation=square(3, 3, 9), bbox=[300, 5, 10, 10])}: box outside the image")
    named('box without area', 1, f"annotation {add(1, segmentation=square(3, 3, 9), bbox=[3, 3, 0, 9])}: box without area")
    names['unknown category'] = ('annotations/train.json', f"annotation {add(1, segmentation=square(3, 3, 9), category_id=77)} has the unknown category 77")
    first_id = first(2)['id']
    rows.append(dict(id=first_id, image_id=3, category_id=1, iscrowd=0, segmentation=square(2, 2, 7)))
    names['duplicate annotation id'] = ('annotations/train.json', f'annotation id {first_id} appears twice')
    named('mask size', 2, f"annotation {add(2, segmentation=dict(size=[20, 30], counts=[0, 600]))}: the mask is 20x30 but the image is 128x128")
    found['images'].append(dict(id=1, file_name='other.png', height=128, width=128))
    names['duplicate image id'] = ('annotations/train.json', 'image id 1 appears twice')
    found['images'].append(dict(id=500, file_name='gone.png', height=128, width=128))
    names['missing image'] = ('images/gone.png', 'the image is missing')
    (folder/file(3)).write_bytes((folder/file(3)).read_bytes()[:len((folder/file(3)).read_bytes()) * 2 // 3])
    named('truncated image', 3, 'cannot be read')
    save(folder/'images'/'stray.png', make_shapes(1, seed=77)[0].image)
    names['orphan'] = ('images/stray.png', 'an image without an entry')
    named('two points', 4, f"annotation {add(4, segmentation=[[3, 4, 5, 6]])}: polygon of less than three points")
    named('nan', 4, f"annotation {add(4, segmentation=[[3, 4, 9, 4, math.nan, 9]])}: coordinates that are not numbers")
    named('text', 4, f"annotation {add(4, segmentation=[[3, 4, 9, 4, 'x', 9]])}: coordinates that are not numbers")
    named('twice', 5, f"annotation {add(5, segmentation=first(5)['segmentation'], category_id=first(5)['category_id'])} is annotation {first(5)['id']} again")
    named('one pixel', 5, f"annotation {add(5, segmentation=dict(size=[128, 128], counts=[5, 1, 128 * 128 - 6]))}: object of one pixel")
    named('thin', 5, f"annotation {add(5, segmentation=[[0, 0, 90, 0, 90, 1, 0, 1]])}: very thin, 1x90 pixels")
    deep = samples[6].image.astype(np.uint16)[..., 0] * 16
    Image.fromarray(deep).save(folder/file(6))
    named('16 bit', 6, 'more than 8 bits')
    save(folder/'images'/'alpha.png', np.dstack([make_shapes(1, seed=80)[0].image, np.full((128, 128), 200, np.uint8)]))
    names['alpha'] = ('images/alpha.png', 'an alpha channel')
    for n, (name, seed) in enumerate((('alpha.png', None), ('Case.png', 81), ('case.png', 82), ('leak.png', None))):
        found['images'].append(dict(id=600 + n, file_name=name, height=128, width=128))
        if seed: save(folder/'images'/name, make_shapes(1, seed=seed)[0].image)
    names['case'] = ('images/case.png', 'its name is that of Case.png')
    save(folder/'images'/'leak.png', samples[8].image)   # compressed anew: other bytes, the same pixels
    named('leak', 8, 'the same picture as images/leak.png in train')
    (folder/'annotations'/'train.json').write_text(json.dumps(found))
    return names

def test_every_planted_fault_is_named(tmp_path):
    names = plant(tmp_path/'set')
    assert len(names) >= 18
    found = examine(tmp_path/'set')
    for key, (file, *words) in names.items():
        assert [f for f in found if f.file == file and all(w in f.fault for w in words)], f'{key}: {file} {words}\n{fault_table(found)}'
    beside = [f for f in found if not any(f.file == file and all(w in f.fault for w in words) for file, *words in names.values())]
    assert not beside, fault_table(beside)
    table = fault_table(found)
    assert all(f.file in table for f in found) and f'{len(found)} faults' in table
    with pytest.raises(DataError, match='stop the training.*check'): open_dataset(tmp_path/'set')

def test_repaired_folder_is_sound_and_keeps_every_sound_object(tmp_path):
    plant(tmp_path/'set')
    before = {p: p.read_bytes() for p in (tmp_path/'set').rglob('*') if p.is_file()}
    listed = repair(tmp_path/'set', tmp_path/'out')
    assert before == {p: p.read_bytes() for p in (tmp_path/'set').rglob('*') if p.is_file()}
    assert {f.fault.split(': ')[-1].split(',')[0] for f in examine(tmp_path/'out')} <= {'very thin', 'more than 8 bits a channel', 'an alpha channel'}
    rows = list(csv.DictReader((tmp_path/'out'/'faults.csv').open()))
    assert [(r['file'], r['fault'], r['action']) for r in rows] == [(f.file, f.fault, f.action) for f in listed] and len(rows) == len(examine(tmp_path/'set'))
    train, valid = open_dataset(tmp_path/'out')
    source = make_shapes(10, seed=21)
    got = {s.name: s.instances for s in [*train, *valid]}
    for i, s in enumerate(source):
        if i in (3, 8): assert s.name not in got   # damaged; shared with train
        else:
            rles = lambda o: {r['counts'] for r in o.rles()}
            assert rles(s.instances) <= rles(got[s.name]), s.name
    assert {'leak', 'alpha', 'Case', 'case_2'} <= set(train.names) and len(train) == 10 and len(valid) == 2
    with pytest.raises(DataError, match='is there already'): repair(tmp_path/'set', tmp_path/'out')

@each
def test_repair_of_any_layout_keeps_everything(write, tmp_path):
    write(SAMPLES, tmp_path/'set')
    repair(tmp_path/'set', tmp_path/'out')
    a, b = open_dataset(tmp_path/'set'), open_dataset(tmp_path/'out')
    assert examine(tmp_path/'out') == [] and a[0].classes == b[0].classes
    for s in [*a[0], *a[1]]:
        t = next(t for t in [*b[0], *b[1]] if t.name == s.name)
        assert (s.image == t.image).all() and (s.instances.masks() == t.instances.masks()).all() and (s.instances.labels == t.instances.labels).all()

def one_fault(tmp_path, write, spoil, file, words, stops):
    write(SAMPLES, tmp_path/'set')
    spoil(tmp_path/'set')
    found = [f for f in examine(tmp_path/'set') if 'no mask files' not in f.fault]
    assert [(f.file, f.stops) for f in found] == [(file, stops)] and words in found[0].fault, fault_table(found)

S = SAMPLES[0].name
@pytest.mark.parametrize('write, spoil, file, words, stops', [
    (kaggle, lambda p: save(p/'stage1_train'/S/'masks'/'x.png', np.zeros((128, 128), np.uint8)), f'stage1_train/{S}/images/{S}.png', 'mask x.png: empty mask', False),
    (kaggle, lambda p: save(p/'stage1_train'/S/'masks'/'x.png', np.ones((9, 7), np.uint8)), f'stage1_train/{S}/images/{S}.png', 'mask x.png: the mask is 9x7 but the image is 128x128', True),
    (kaggle, lambda p: (p/'stage1_train'/S/'images'/f'{S}.png').unlink(), f'stage1_train/{S}/images', 'missing', True),
    (kaggle, lambda p: (p/'stage1_train'/S/'masks'/'x.png').write_bytes(b'\x89PNG'), f'stage1_train/{S}/images/{S}.png', 'mask x.png: the mask cannot be read', True),
    (masks_in_class_folders, lambda p: (p/'images'/f'{S}.png').unlink(), f'masks/{S}', 'masks of no image', True),
    (label_png, lambda p: (p/'labels'/f'{S}.png').unlink(), f'images/{S}.png', 'without an entry', False),
    (label_png, lambda p: (p/'images'/f'{S}.png').unlink(), f'labels/{S}.png', 'label map of no image', True),
    (label_png, lambda p: save(p/'labels'/f'{S}.png', np.ones((9, 9), np.uint8)), f'labels/{S}.png', 'the label map is 9x9', True),
    (label_png, lambda p: (p/'labels'/f'{S}.png').write_bytes(b'\x89PNG'), f'labels/{S}.png', 'cannot be read', True),
    (via_1, lambda p: (p/f'{S}.png').unlink(), f'{S}.png', 'missing', True),
    (via_1, lambda p: (p/f'{S}.png').write_bytes(b'nothing'), f'{S}.png', 'cannot be read', True),
    (via_1, lambda p: save(p/'stray.png', np.zeros((9, 9), np.uint8)), 'stray.png', 'without an entry', False),
    (via_1, lambda p: change_json(p/'via_region_data.json', lambda d: d[f'{S}.png123']['regions']['0']['region_attributes'].clear()), f'{S}.png', 'region 0 has no class', True),
    (via_2, lambda p: change_json(p/'project.json', lambda d: d['_via_img_metadata'][f'{S}.png123']['regions'].append('x')), f'images/{S}.png', '1 regions that are none', False),
    (via_2, lambda p: change_json(p/'project.json', lambda d: d['_via_img_metadata'][f'{S}.png123']['regions'][0].update(shape_attributes=[3])), f'images/{S}.png', 'region 0: ', False),
    (coco_polygons, lambda p: change_json(p/'annotations.json', lambda d: d['annotations'][0].update(segmentation=[3, 4, 9, 4, 9, 9])), f'images/{S}.png', 'annotation 1: numbers where a list', False),
    (coco_polygons, lambda p: change_json(p/'annotations.json', lambda d: d['annotations'][0].update(segmentation={})), f'images/{S}.png', 'annotation 1: no segmentation', False),
    (via_2, lambda p: change_json(p/'project.json', lambda d: d['_via_img_metadata'].update(again=d['_via_img_metadata'][f'{S}.png123'])), 'project.json', 'appears twice', True)],
    ids=lambda x: x.__name__ if callable(x) and x.__name__ != '<lambda>' else x if isinstance(x, str) and ' ' in x else '')
def test_faults_of_the_other_layouts(tmp_path, write, spoil, file, words, stops): one_fault(tmp_path, write, spoil, file, words, stops)

def deep_png(pixels):
    "A PNG of 16 bits a channel in colour, which PIL cannot write"
    chunk = lambda kind, data: struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))
    rows = b''.join(b'\0' + row.astype('>u2').tobytes() for row in pixels)
    return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', struct.pack('>IIBBBBB', *pixels.shape[1::-1], 16, 2, 0, 0, 0)) + chunk(b'IDAT', zlib.compress(rows)) + chunk(b'IEND', b'')

def test_notes_about_image_files(tmp_path):
    rgb = SAMPLES[0].image
    (tmp_path/'deep.png').write_bytes(deep_png(rgb.astype(np.uint16) * 256))
    Image.fromarray(rgb).save(tmp_path/'turned.jpg', exif=(exif := Image.Exif()).__setitem__(274, 6) or exif)
    Image.fromarray(rgb).save(tmp_path/'plain.jpg'), Image.fromarray(rgb).save(tmp_path/'plain.png'), Image.fromarray(rgb[..., 0]).save(tmp_path/'grey.tif')
    found = {p.name: [fault for fault, _ in notes(p)] for p in tmp_path.glob('*.*')}
    assert found == {'deep.png': ['more than 8 bits a channel'], 'turned.jpg': ['turned by a note in its head (EXIF)'], 'plain.jpg': [], 'plain.png': [], 'grey.tif': []}

def test_a_lenient_pass_after_a_json_that_cannot_be_read(tmp_path):
    write_coco(SAMPLES[:3], tmp_path/'set', 'train', CLASSES), write_coco(SAMPLES[3:], tmp_path/'set', 'valid', CLASSES)
    (tmp_path/'set'/'annotations'/'train.json').write_text('{"images": [')
    (tmp_path/'set'/'images'/f'{SAMPLES[4].name}.png').unlink()
    found = examine(tmp_path/'set')
    assert 'not a readable json' in found[0].fault and any('missing' in f.fault and SAMPLES[4].name in f.file for f in found)

def test_same_picture_is_never_on_both_sides(tmp_path):
    twins = [replace(SAMPLES[0], name=f'twin{i}') for i in range(6)]
    coco_rle_json([*SAMPLES[1:4], *twins], tmp_path/'set')
    for seed in range(6):
        train, valid = open_dataset(tmp_path/'set', seed, valid=.4)
        assert len(train) + len(valid) == 9 and len({n[:4] == 'twin' for n in train.names} & {n[:4] == 'twin' for n in valid.names if n[:4] == 'twin'}) in (0, 1)
        assert not (any(n[:4] == 'twin' for n in train.names) and any(n[:4] == 'twin' for n in valid.names))

def test_many_alike_are_folded():
    many = [Finding(f'{i}.png', 'an alpha channel', 'ignored') for i in range(50)] + [Finding('x', 'annotation 3: empty mask', 'object dropped')]
    assert len(fold(many)) == 5 and '47 more' in fault_table(many) and '51 faults' in fault_table(many) and fault_table([]) == 'no faults'

# ---- the command line

def cli(*args): return CliRunner().invoke(app, [str(a) for a in args])

def trained(data, out):
    done = cli('train', 'coco', '--data', data, '--out', out, '--epochs', 2, '--device', 'cpu')
    assert done.exit_code == 0, f'{done.stdout}\n{done.stderr}'
    rows = list(csv.DictReader((out/'history.csv').open()))
    assert len(rows) == 2 and all(math.isfinite(float(r[k])) for r in rows for k in r if 'loss' in k or k[:2] in ('t_', 'v_'))
    assert json.loads((out/'scores.json').read_text())['images'] > 0 and 'proposed: sizes' in done.stdout
    return done, load_weights(out/'weights.safetensors')[1]

@pytest.mark.parametrize('write, packed', [(coco_polygons, False), (kaggle, True), (masks_in_class_folders, False), (label_png, True), (via_1, False)], ids=lambda x: getattr(x, '__name__', str(x)))
def test_every_layout_trains_two_epochs(write, packed, tmp_path):
    write(SAMPLES, tmp_path/'set')
    data = zipped(tmp_path/'set', tmp_path/'set.zip') if packed else tmp_path/'set'
    done, classes = trained(data, tmp_path/'run')
    assert len(classes) == (2 if write in ONE_CLASS else 4) and f'{data}: {WRITERS[write]}' in done.stdout
    done = cli('evaluate', '--weights', tmp_path/'run'/'weights.safetensors', '--data', data, '--json', '--device', 'cpu')
    assert done.exit_code == 0 and json.loads(done.stdout)['images'] == 6

def test_check_and_repair_and_train(tmp_path):
    names = plant(tmp_path/'set')
    done = cli('check', tmp_path/'set')
    assert done.exit_code == 1 and all(file in done.stdout for file, *_ in names.values()) and 'stop the training' in done.stdout
    done = cli('train', 'coco', '--data', tmp_path/'set', '--out', tmp_path/'run')
    assert done.exit_code == 1 and 'maskrcnn-edu check' in done.stderr and not (tmp_path/'run').exists()
    done = cli('check', tmp_path/'set', '--repair', tmp_path/'clean')
    assert done.exit_code == 0 and 'faults.csv' in done.stdout
    assert cli('check', tmp_path/'clean').exit_code == 0
    assert trained(tmp_path/'clean', tmp_path/'run')[1] == CLASSES
    done = cli('check', tmp_path/'set', '--repair', tmp_path/'clean')
    assert done.exit_code == 1 and 'is there already' in done.stderr
    done = cli('check', tmp_path/'nowhere')
    assert done.exit_code == 1 and 'no such folder or file' in done.stdout + done.stderr

# ---- proposals

def test_proposal_for_small_and_large_objects(tmp_path):
    def scaled(k, name):
        return [Sample(np.kron(s.image, np.ones((k, k, 1), np.uint8)), Instances.from_masks(np.kron(s.instances.masks(), np.ones((1, k, k), np.uint8)), s.instances.labels), f'{name}{s.name}') for s in make_shapes(6, seed=2)]
    proposals = {}
    for k in (1, 6):
        write_coco(scaled(k, 'a'), tmp_path/str(k), 'train', CLASSES), write_coco(scaled(k, 'b'), tmp_path/str(k), 'valid', CLASSES)
        proposals[k] = propose(read_coco(tmp_path/str(k)/'annotations'/'train.json'))
    small = [replace(s, instances=replace(s.instances, boxes=s.instances.boxes / 5)) for s in make_shapes(6, seed=2)]
    tiny = propose(small)
    assert proposals[1].enlarge == 1 and proposals[1].crop == 128 and proposals[6].enlarge < 1 and tiny.enlarge >= 3
    for p in (*proposals.values(), tiny):
        assert p.reach[.5] > .9 and p.reach[.7] > p.reach['paper'][.7] or p.reach[.7] > .9
        assert p.config['enlarge'] == p.enlarge and len(p.config['rpn']['sizes']) == 5 and sorted(p.sizes) == list(p.sizes) and all(r[-1] == '.' for r in p.reasons)
    assert 'enlarge' in str(tiny.reasons)

def test_one_odd_object_does_not_bend_the_anchors():
    boxes = torch.tensor(np.concatenate([s.instances.boxes for s in make_shapes(8, seed=2)]))
    odd = torch.tensor([[0., 0, 100, 1], [5, 5, 6, 90]])
    assert own_anchors(torch.cat([boxes, odd])) == own_anchors(boxes) and len(own_anchors(odd)[0]) == 5

def test_proposal_without_objects():
    p = propose([EMPTY] * 3)
    assert p.enlarge == 1 and len(p.sizes) == 5 and p.slots == 8 and p.n_detections == 20

@given(st.integers(1, 30), st.integers(10, 60), st.integers(0, 9999))
@settings(max_examples=60, deadline=None)
def test_the_fullest_window(n, side, seed):
    rng = np.random.default_rng(seed)
    corner = rng.integers(0, 90, (n, 2))
    boxes = np.concatenate([corner, corner + rng.integers(2, 20, (n, 2))], 1).astype(np.float32)
    objects = Instances((100, 100), boxes, np.ones(n, np.int64), [np.ones((1, 1), bool)] * n, corner)
    exact = max(((boxes[:, 0] < x + side) & (boxes[:, 2] > x) & (boxes[:, 1] < y + side) & (boxes[:, 3] > y)).sum() for x in range(0, 100, 3) for y in range(0, 100, 3))
    assert most_in_a_window(objects, side) <= n and most_in_a_window(objects, side) >= exact / 4 and most_in_a_window(objects, 300) == n

"Data of any layout opened, examined, split and repaired: the same images read alike, every fault named, nothing lost in silence"
import base64, csv, io, json, math, os, re, shutil, struct, unicodedata, warnings, zipfile, zlib
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from hypothesis import given, settings, strategies as st
from PIL import Image, ImageOps
from scipy import ndimage
from skimage.draw import disk, ellipse

from fuzz import mutations, one_sentence, within
from maskrcnn_edu.data import (CLASSES, DataError, Fault, LEVELS, Sample, examine, fault_table, make_shapes, open_dataset, open_part, recognise,
    repair, write_coco)
from maskrcnn_edu.data.doctor import inspect
from maskrcnn_edu.data.masks import draw_segmentation, runs
from maskrcnn_edu.data.opening import fold
from maskrcnn_edu.data.recommend import anchors_for, most_in_a_window, recommend
from maskrcnn_edu.data.sources import FILE_PROGRAMS, JSON_PROGRAMS, LAYOUTS, scan
from maskrcnn_edu.data.truth import RIM, RING, cut_object, fit_box, is_void, suspicions, twice
from maskrcnn_edu.data.records import ObjectRecord
from maskrcnn_edu.instances import Instances

def whole(instances):
    "Only objects in one piece and without holes, as a polygon or a label can tell them, of more than a sliver"
    one = [ndimage.label(c, np.ones((3, 3)))[1] == 1 and ndimage.label(~np.pad(c, 1))[1] == 1 and min(c.shape) > 4
           for c in instances.crops]
    return instances[np.array(one, bool)]

SAMPLES = [replace(s, instances=whole(s.instances)) for s in make_shapes(5, seed=11, level='crowded')]
EMPTY = Sample(np.full((128, 128, 3), 90, np.uint8), SAMPLES[0].instances[[]], 'empty')
SAMPLES.append(EMPTY)
OBJECT = ['background', 'object']

@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv('MASKRCNN_EDU_CACHE', str(tmp_path/'cache'))
    (tmp_path/'cache').mkdir()

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
        turn = lambda p: (here[0] - before[0]) * (p[1] - here[1]) - (here[1] - before[1]) * (p[0] - here[0])
        following = choice[0] if len(choice) == 1 or before is None else max(choice, key=lambda p: -turn(p))   # pixels that meet in a corner belong together
        choice.remove(following)
        points.append(here)
        before, here = here, following
    return (np.array(points) - 1).astype(float).ravel().tolist()

def full(instances): return zip(instances.labels, instances.masks())

def change_json(path, change):
    found = json.loads(path.read_text())
    change(found)
    path.write_text(json.dumps(found))

def dump(path, found):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found))

def coco_rle(samples, folder):
    shutil.move(write_coco(samples, folder, 'x', CLASSES), folder/'annotations.json')
    (folder/'annotations').rmdir()

def coco_polygons(samples, folder):
    coco_rle(samples, folder)
    masks = [m for s in samples for m in s.instances.masks()]
    change_json(folder/'annotations.json', lambda d: [a.update(segmentation=[outline(m)]) for a, m in zip(d['annotations'], masks, strict=True)])

def coco_plain_runs(samples, folder):
    coco_rle(samples, folder)
    counts = [runs(c, o, s.instances.size) for s in samples for c, o in zip(s.instances.crops, s.instances.origins)]
    change_json(folder/'annotations.json', lambda d: [a.update(segmentation=dict(size=[128, 128], counts=c)) for a, c in zip(d['annotations'], counts, strict=True)])

def kaggle(samples, folder):
    for s in samples:
        save(folder/'stage1_train'/s.name/'images'/f'{s.name}.png', s.image)
        (folder/'stage1_train'/s.name/'masks').mkdir()
        for i, (_, m) in enumerate(full(s.instances)): save(folder/'stage1_train'/s.name/'masks'/f'{s.name}{i:03}.png', m * 255)

def masks_in_class_folders(samples, folder):
    for s in samples:
        save(folder/'images'/f'{s.name}.png', s.image)
        (folder/'masks'/s.name).mkdir(parents=True)
        for i, (k, m) in enumerate(full(s.instances)): save(folder/'masks'/s.name/CLASSES[k]/f'{i:03}.png', m * 255)

def masks_with_class_names(samples, folder):
    for s in samples:
        save(folder/'images'/f'{s.name}.png', s.image)
        (folder/'masks'/s.name).mkdir(parents=True)
        for i, (k, m) in enumerate(full(s.instances)): save(folder/'masks'/s.name/f'{CLASSES[k]}_{i:03}.png', m * 255)

def label_png(samples, folder):
    for s in samples:
        save(folder/'images'/f'{s.name}.png', s.image)
        save(folder/'labels'/f'{s.name}.png', (s.instances.label_map() * 300).astype(np.uint16))

def label_tiff(samples, folder):
    for s in samples:
        save(folder/'images'/f'{s.name}.png', s.image)
        save(folder/'masks'/f'{s.name}.tif', s.instances.label_map().astype(np.int32))

def via_rows(samples, regions):
    shape = lambda m: dict(name='polygon', all_points_x=outline(m)[::2], all_points_y=outline(m)[1::2])
    return {f'{s.name}.png123': dict(filename=f'{s.name}.png', size=123, file_attributes={}, regions=regions(
        [dict(shape_attributes=shape(m), region_attributes=dict(kind=CLASSES[k])) for k, m in full(s.instances)])) for s in samples}

def via_1(samples, folder):
    for s in samples: save(folder/f'{s.name}.png', s.image)
    dump(folder/'via_region_data.json', via_rows(samples, lambda r: {str(i): x for i, x in enumerate(r)}))

def via_2(samples, folder):
    for s in samples: save(folder/'images'/f'{s.name}.png', s.image)
    dump(folder/'project.json', dict(_via_settings={}, _via_img_metadata=via_rows(samples, list), _via_attributes={}))

def labelme(samples, folder):
    for s in samples:
        save(folder/f'{s.name}.png', s.image)
        shapes = [dict(label=CLASSES[k], points=np.reshape(outline(m), (-1, 2)).tolist(), group_id=None, shape_type='polygon', flags={}) for k, m in full(s.instances)]
        dump(folder/f'{s.name}.json', dict(version='5.0.1', flags={}, shapes=shapes, imagePath=f'{s.name}.png', imageData=None, imageHeight=128, imageWidth=128))

def yolo(samples, folder):
    for s in samples:
        save(folder/'images'/f'{s.name}.png', s.image)
        (folder/'labels').mkdir(exist_ok=True)
        (folder/'labels'/f'{s.name}.txt').write_text('\n'.join(f"{k - 1} {' '.join(str(v / 128) for v in outline(m))}" for k, m in full(s.instances)))
    (folder/'data.yaml').write_text(f'names: {CLASSES[1:]}\nnc: 3\n')

def voc(samples, folder):
    for s in samples:
        save(folder/'JPEGImages'/f'{s.name}.png', s.image)
        numbers = s.instances.label_map().astype(np.uint8)
        classes = np.r_[0, s.instances.labels].astype(np.uint8)[numbers]
        for kind, x in (('SegmentationObject', numbers), ('SegmentationClass', classes)):
            (folder/kind).mkdir(exist_ok=True)
            im = Image.fromarray(x, 'L').convert('P')
            im.putdata(x.ravel().tolist())
            im.putpalette(np.random.default_rng(0).integers(0, 256, 768).astype(np.uint8).tobytes())
            im.save(folder/kind/f'{s.name}.png')
    (folder/'labelmap.txt').write_text('\n'.join(f'{c}:0,0,0::' for c in CLASSES))

WRITERS = {coco_rle: 'coco', coco_polygons: 'coco', coco_plain_runs: 'coco', kaggle: 'mask folders', masks_in_class_folders: 'mask folders', masks_with_class_names: 'mask folders',
    label_png: 'label maps', label_tiff: 'label maps', via_1: 'via', via_2: 'via', labelme: 'labelme', yolo: 'yolo', voc: 'voc'}
each = pytest.mark.parametrize('write', WRITERS, ids=lambda w: w.__name__)
ONE_CLASS = (kaggle, label_png, label_tiff)
SORTED = (masks_in_class_folders, masks_with_class_names, via_1, via_2, labelme)

def zipped(folder, path, slash='/'):
    with zipfile.ZipFile(path, 'w') as z:
        for p in sorted(folder.rglob('*')):
            info = zipfile.ZipInfo(p.relative_to(folder).as_posix().replace('/', slash))
            info.filename = p.relative_to(folder).as_posix().replace('/', slash)
            if p.is_file(): z.writestr(info, p.read_bytes())
    return path

def silent(f, *args, **kw):
    "No reader warns; pycocotools itself does"
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        warnings.filterwarnings('ignore', '.*__array__')
        return f(*args, **kw)

# ---- the same images, whatever the layout

def same(found, samples, write, classes):
    found = {s.name: s for s in found}
    assert sorted(found) == sorted(s.name for s in samples)
    for s in samples:
        f = found[s.name]
        a, b = (i[np.lexsort(i.boxes.T[:2])] for i in (f.instances, s.instances))
        assert (f.image == s.image).all() and (a.masks() == b.masks()).all() and (a.boxes == b.boxes).all(), (write.__name__, s.name)
        assert [classes[k] for k in a.labels] == (['object'] * len(b) if write in ONE_CLASS else [CLASSES[k] for k in b.labels])

@each
@pytest.mark.parametrize('packed', [False, True], ids=['folder', 'zip'])
def test_layouts_read_alike(write, packed, tmp_path):
    write(SAMPLES, tmp_path/'set')
    path = zipped(tmp_path/'set', tmp_path/'set.zip') if packed else tmp_path/'set'
    assert recognise(path) == WRITERS[write]
    train, valid = silent(open_dataset, path, seed=3, valid=.34)
    assert (len(train), len(valid)) == (4, 2)
    assert train.classes == valid.classes == (OBJECT if write in ONE_CLASS else ['background', *sorted(CLASSES[1:])] if write in SORTED else CLASSES)
    same([*train, *valid], SAMPLES, write, train.classes)
    said = ["the class is the attribute 'kind' of a region"] if write in (via_1, via_2) else ['no mask files'] if WRITERS[write] == 'mask folders' and packed else []
    assert [f.fault for f in examine(path)] == said   # a zip has no empty folders
    again, _ = open_dataset(path, seed=3, valid=.34)
    assert again.names == train.names and any(open_dataset(path, seed=n, valid=.34)[0].names != train.names for n in (4, 5, 6))

@each
def test_halves_in_folders(write, tmp_path):
    write(SAMPLES[:3], tmp_path/'set'/'train'), write(SAMPLES[3:], tmp_path/'set'/'val')
    train, valid = open_dataset(tmp_path/'set')
    assert sorted(train.names) == sorted(s.name for s in SAMPLES[:3]) and sorted(valid.names) == sorted(s.name for s in SAMPLES[3:])
    same([*train, *valid], SAMPLES, write, train.classes)
    part, taken = open_part(tmp_path/'set')
    assert taken == 'valid' and part.names == valid.names and recognise(tmp_path/'set') == WRITERS[write]
    assert sorted(open_part(tmp_path/'set', 'all')[0].names) == sorted(s.name for s in SAMPLES) and open_part(tmp_path/'set', 'train')[0].names == train.names

def test_parts_of_data_without_a_split(tmp_path):
    coco_rle(SAMPLES, tmp_path/'set')
    whole_set, taken = open_part(tmp_path/'set')
    assert taken == 'all' and len(whole_set) == 6 and open_part(tmp_path/'set', 'valid')[0].names == open_dataset(tmp_path/'set')[1].names

def test_a_third_part_is_named(tmp_path):
    for name, part in (('train', SAMPLES[:3]), ('valid', SAMPLES[3:5]), ('test', SAMPLES[5:])): coco_rle(part, tmp_path/'set'/name)
    assert [(f.file, f.action) for f in examine(tmp_path/'set')] == [('test', 'not used')] and len(open_dataset(tmp_path/'set')[0]) == 3

def test_a_half_that_nobody_annotated_stops(tmp_path):
    label_png(SAMPLES[:3], tmp_path/'set'/'train'), save(tmp_path/'set'/'val'/'images'/'a.png', SAMPLES[4].image)
    assert [(f.file, f.stops) for f in examine(tmp_path/'set')] == [('val', True)]

def test_two_jsons_and_one_to_test(tmp_path):
    for part, split in ((SAMPLES[:3], 'instances_train'), (SAMPLES[3:5], 'instances_val'), (SAMPLES[5:], 'instances_test')): write_coco(part, tmp_path/'set', split, CLASSES)
    assert [len(d) for d in open_dataset(tmp_path/'set')] == [3, 2]
    assert [(f.file, f.action) for f in examine(tmp_path/'set') if 'json' in f.file] == [('annotations/instances_test.json', 'not used')]
    (tmp_path/'set'/'annotations'/'instances_train.json').rename(tmp_path/'set'/'annotations'/'mine.json'), (tmp_path/'set'/'annotations'/'instances_val.json').unlink()
    assert len(scan(tmp_path/'set').halves['all']) == 3   # a json to test is nothing to learn from

def test_two_jsons_of_the_same_pictures_are_one_image_each(tmp_path):
    coco_case(tmp_path/'set', lambda d: d.update(annotations=d['annotations'][::2]), json_name='annotations/one.json')
    coco_case(tmp_path/'set', lambda d: d.update(annotations=d['annotations'][1::2]), json_name='annotations/two.json')
    found, taken = open_part(tmp_path/'set')
    assert [len(s.instances) for s in found] == [2, 2, 2] and taken == 'all'

def test_nothing_fits(tmp_path):
    (tmp_path/'set').mkdir(), (tmp_path/'set'/'notes.txt').write_text('x')
    for f in (recognise, open_dataset, scan):
        with pytest.raises(DataError) as e: f(tmp_path/'set')
        for words in (*(l.looks for l in LAYOUTS), 'notes.txt'): assert words in str(e.value)
    assert [f.stops for f in examine(tmp_path/'set')] == [True] and [f.stops for f in examine(tmp_path/'nowhere')] == [True]

@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_an_outline_is_its_mask(h, w, seed):
    "The writers of this file are right"
    mask = ndimage.label(np.random.default_rng(seed).random((h, w)) < .7)[0] == 1
    mask = ndimage.binary_fill_holes(mask)
    if mask.any(): assert (draw_segmentation([outline(mask)], (h, w)).mask == mask).all()

# ---- cases: what people have; each is examined, repaired and opened again

H, W = 96, 128

def picture(i):
    "A noisy picture with two bright rectangles; every one is different"
    x = np.random.default_rng(i).integers(20, 90, (H, W, 3)).astype(np.uint8)
    for m in masks(i): x[m] = 200 + x[m] // 8
    return x

def masks(i):
    out = np.zeros((2, H, W), bool)
    out[0, 10 + i:34 + i, 8:32], out[1, 50:80, 70 + i:100 + i] = True, True   # 576 and 900 pixels
    return out

def corners(mask):
    (y1, x1), (y2, x2) = np.argwhere(mask).min(0).tolist(), (np.argwhere(mask).max(0) + 1).tolist()
    return [x1, y1, x2, y1, x2, y2, x1, y2]

def coco_case(folder, change=lambda d: None, place='images', json_name='annotations.json', keep=lambda path, x: Image.fromarray(x).save(path), suffix='png', pictures=range(3)):
    "Three pictures with two cells each, as polygons, and a change"
    (folder/place).mkdir(parents=True, exist_ok=True)
    for i in pictures: keep(folder/place/f'img_{i}.{suffix}', picture(i))
    rows = [dict(id=i + 1, file_name=f'img_{i}.{suffix}', height=H, width=W) for i in pictures]
    objects = [dict(id=2 * i + k + 1, image_id=i + 1, category_id=1, iscrowd=0, segmentation=[corners(m)], area=int(m.sum()),
                    bbox=[*corners(m)[:2], corners(m)[4] - corners(m)[0], corners(m)[5] - corners(m)[1]]) for i in pictures for k, m in enumerate(masks(i))]
    found = dict(images=rows, annotations=objects, categories=[dict(id=1, name='cell')])
    change(found)
    dump(folder/json_name, found)

def every(kind, **values): return lambda d: [row.update({k: v(row) if callable(v) else v for k, v in values.items()}) for row in d[kind]]

def as_runs(a, **more):
    m = np.zeros((H, W), bool)
    x1, y1, _, _, x2, y2, _, _ = a['segmentation'][0]
    m[y1:y2, x1:x2] = True
    return dict(size=[H, W], counts=runs(m, (0, 0), (H, W))) | more

def packed(a):
    objects = Instances.from_masks([draw_segmentation(a['segmentation'], (H, W)).mask], [1])
    return objects.rles()[0]

TURNS = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_270}   # from upright to stored

def turned(path, x, orientation=6, stored=False, **more):
    "A JPEG or PNG whose EXIF turns it; what is stored is x itself, or x once turned upright"
    exif = Image.Exif()
    exif[274] = orientation
    im = Image.fromarray(x)
    (im if stored else im.transpose(TURNS[orientation])).save(path, exif=exif, **more)

def deep_png(path, x):
    "A PNG of 16 bits a channel in colour, which PIL cannot write"
    chunk = lambda kind, data: struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))
    rows = b''.join(b'\0' + (row.astype(np.uint16) * 16).astype('>u2').tobytes() for row in x)
    path.write_bytes(b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', struct.pack('>IIBBBBB', *x.shape[1::-1], 16, 2, 0, 0, 0)) + chunk(b'IDAT', zlib.compress(rows)) + chunk(b'IEND', b''))

def tiff(dtype, grey=True): return lambda path, x: tifffile.imwrite(path, (x[..., 0] if grey else x).astype(dtype))

def with_nan(path, x):
    y = x[..., 0].astype(np.float32)
    y[:5, :7] = np.nan
    tifffile.imwrite(path, y)

def folder_case(folder, images='images', masks_name='masks', mask=lambda path, m: Image.fromarray(m * np.uint8(255)).save(path), suffix='png', keep=lambda path, x: Image.fromarray(x).save(path), inside=False, ending='png'):
    "A mask file an object"
    for i in range(3):
        place = folder/f'img_{i}'/images if inside else folder/images
        where = folder/f'img_{i}'/masks_name if inside else folder/masks_name/f'img_{i}'
        place.mkdir(parents=True, exist_ok=True), where.mkdir(parents=True, exist_ok=True)
        keep(place/f'img_{i}.{ending}', picture(i))
        for k, m in enumerate(masks(i)): mask(where/f'mask_{k}.{suffix}', m)

def label_case(folder, write, suffix='png', keep=lambda path, x: Image.fromarray(x).save(path), ending='png', name='{}'):
    "A label map an image"
    (folder/'images').mkdir(parents=True), (folder/'labels').mkdir()
    for i in range(3):
        keep(folder/'images'/f'img_{i}.{ending}', picture(i))
        write(folder/'labels'/f"{name.format(f'img_{i}')}.{suffix}", masks(i)[0] * 1 + masks(i)[1] * 2)

def via_case(folder, keep=lambda path, x: Image.fromarray(x).save(path), suffix='png', attributes=dict(type='cell')):
    folder.mkdir(parents=True)
    rows = {}
    for i in range(3):
        keep(folder/f'img_{i}.{suffix}', picture(i))
        regions = [dict(shape_attributes=dict(name='polygon', all_points_x=corners(m)[::2], all_points_y=corners(m)[1::2]), region_attributes=attributes) for m in masks(i)]
        rows[str(i)] = dict(filename=f'img_{i}.{suffix}', size=1, regions=regions, file_attributes={})
    dump(folder/'via.json', rows)

def rgba_mask(path, m): Image.fromarray(np.dstack([np.full((*m.shape, 3), 255, np.uint8), m * np.uint8(255)])).save(path)

def void(path, numbers):
    rim = ndimage.binary_dilation(numbers > 0, iterations=2) & ~ndimage.binary_erosion(numbers > 0, iterations=3)
    Image.fromarray(np.where(rim, 255, numbers).astype(np.uint8)).save(path)

def white(path, numbers): Image.fromarray(np.array([[255, 255, 255], [200, 30, 30], [30, 30, 200]], np.uint8)[numbers]).save(path)

def smooth(path, numbers): Image.fromarray((numbers * 100).astype(np.uint8)).resize((W // 2, H // 2), 0).resize((W, H), Image.Resampling.BICUBIC).save(path)

def twice_listed(d):
    "A row in images for each object"
    d['images'] = [dict(d['images'][a['image_id'] - 1], id=a['id']) for a in d['annotations']]
    for a in d['annotations']: a['image_id'] = a['id']

def two_halves(folder, split='{}2017'):
    for k, half in enumerate(('train', 'val')):
        coco_case(folder, place=f'images/{split.format(half)}', json_name=f'annotations/instances_{split.format(half)}.json', pictures=range(3 * k, 3 * k + 3),
                  change=lambda d: [row.update({'image_id' if 'bbox' in row else 'id': row.get('image_id', row['id'])}) for row in d['images']])

def roboflow(folder):
    for k, half in enumerate(('train', 'valid')):
        coco_case(folder, place=half, json_name=f'{half}/_annotations.coco.json', pictures=range(3 * k, 3 * k + 3),
                  change=lambda d: d.update(categories=[dict(id=0, name='cells', supercategory='none'), dict(id=1, name='cell', supercategory='cells')]))

def blank(folder):
    coco_case(folder, keep=lambda path, x: Image.fromarray(x * 0).save(path), change=lambda d: d.update(annotations=d['annotations'][:1]))

def half_crowds(d):
    for a in d['annotations'][::2]: a.update(iscrowd=1, segmentation=as_runs(a))

def backslashes(folder):
    coco_case(folder/'x')
    zipped(folder/'x', folder/'set.zip', '\\')
    shutil.rmtree(folder/'x')
    return folder/'set.zip'

def rename_nfd(folder):
    coco_case(folder, every('images', file_name=lambda r: unicodedata.normalize('NFC', r['file_name'].replace('img', 'é'))))
    for p in (folder/'images').iterdir(): p.rename(p.with_name(unicodedata.normalize('NFD', p.name.replace('img', 'é'))))

case = lambda f, *a, **k: partial(f, *a, **k)
TWO = [2, 2, 2]
CASES = {   # name: (writes into a folder, objects of each image, words that the doctor says, or '')
    'base': (coco_case, TWO, ''),
    'backslash': (case(coco_case, change=every('images', file_name=lambda r: 'images\\' + r['file_name'])), TWO, ''),
    'windows_path': (case(coco_case, change=every('images', file_name=lambda r: 'C:\\data\\' + r['file_name'])), TWO, ''),
    'background_upper': (case(coco_case, change=lambda d: d['categories'].insert(0, dict(id=0, name='_Background_'))), TWO, 'taken as no class'),
    'category_spaces': (case(coco_case, change=lambda d: (d['categories'].extend([dict(id=2, name='cell '), dict(id=3, name='Cell')]), d['annotations'][0].update(category_id=2), d['annotations'][1].update(category_id=3))), TWO, 'are alike'),
    'gaps': (case(coco_case, change=lambda d: (every('categories', id=90)(d), every('annotations', category_id=90)(d), d['categories'].insert(0, dict(id=7, name='nothing')))), TWO, "no object of the class 'nothing'"),
    'zero_boxes': (case(coco_case, change=every('annotations', bbox=[0, 0, 0, 0])), TWO, 'box taken from the mask'),
    'null_sizes': (case(coco_case, change=every('images', height=None, width=None)), TWO, ''),
    'zero_sizes': (case(coco_case, change=every('images', height=0, width=0)), TWO, ''),
    'string_ids': (case(coco_case, change=every('images', id=lambda r: str(r['id']))), TWO, ''),
    'float_ids': (case(coco_case, change=every('annotations', image_id=lambda r: float(r['image_id']), category_id='1')), TWO, ''),
    'flat_polygon': (case(coco_case, change=every('annotations', segmentation=lambda a: a['segmentation'][0])), TWO, ''),
    'pairs': (case(coco_case, change=every('annotations', segmentation=lambda a: np.reshape(a['segmentation'], (-1, 2)).tolist())), TWO, ''),
    'stray_point': (case(coco_case, change=every('annotations', segmentation=lambda a: [*a['segmentation'], [3, 4]])), TWO, 'the piece left out'),
    'rle': (case(coco_case, change=every('annotations', segmentation=as_runs)), TWO, ''),
    'rle_in_a_list': (case(coco_case, change=every('annotations', segmentation=lambda a: [as_runs(a)])), TWO, ''),
    'rle_bytes_repr': (case(coco_case, change=every('annotations', segmentation=lambda a: dict(packed(a), counts=repr(packed(a)['counts'].encode())))), TWO, ''),
    'row_per_object': (case(coco_case, change=twice_listed), TWO, 'the same file under two ids'),
    'ev_crowd': (case(coco_case, change=half_crowds), TWO, ''),
    'nfd_names': (rename_nfd, TWO, ''),
    'cvat_subset_Train': (case(coco_case, place='images/Train', json_name='annotations/instances_Train.json'), TWO, ''),
    'cvat_subset_default': (case(coco_case, place='images/default', json_name='annotations/instances_default.json'), TWO, ''),
    'cvat_two_subsets': (two_halves, TWO * 2, ''),
    'roboflow': (roboflow, TWO * 2, 'taken as no class'),
    'same_pictures': (blank, [1, 0, 0], 'all images are the same picture'),
    'zip_backslash': (backslashes, TWO, ''),
    'exif_coco': (case(coco_case, keep=case(turned, quality=95), suffix='jpg'), TWO, 'turned upright'),
    **{f'exif_{o}': (case(coco_case, keep=case(turned, orientation=o), suffix='png'), TWO, 'turned upright') for o in TURNS},
    **{f'exif_{o}_kept_as_stored': (case(coco_case, keep=case(turned, orientation=o, stored=True), suffix='png'), TWO, 'kept as stored') for o in (5, 6, 7, 8)},
    'exif_via': (case(via_case, keep=case(turned, quality=95), suffix='jpg'), TWO, 'turned upright'),
    'exif_masks_upright': (case(folder_case, keep=turned), TWO, 'turned upright'),
    'exif_masks_as_stored': (case(folder_case, keep=case(turned, stored=True)), TWO, 'kept as stored'),
    'exif_labels_as_stored': (case(label_case, write=lambda p, x: Image.fromarray(x.astype(np.uint8)).save(p), keep=case(turned, stored=True)), TWO, 'kept as stored'),
    'rgb16_png_data': (case(coco_case, keep=deep_png), TWO, 'uint16'),
    'img_f64': (case(coco_case, keep=tiff(np.float64), suffix='tif'), TWO, 'float64'),
    'img_i64': (case(coco_case, keep=tiff(np.int64), suffix='tif'), TWO, 'int64'),
    'img_f16': (case(coco_case, keep=tiff(np.float16), suffix='tif'), TWO, 'float16'),
    'img_nan': (case(coco_case, keep=with_nan, suffix='tif'), TWO, 'NaN'),
    'img_npy': (case(coco_case, keep=lambda path, x: np.save(path, x), suffix='npy'), TWO, ''),
    'img_alpha': (case(coco_case, keep=lambda path, x: Image.fromarray(np.dstack([x, x[..., :1]])).save(path)), TWO, 'opacity'),
    'kag_upper': (case(folder_case, images='Images', masks_name='Masks', inside=True), TWO, ''),
    'msk_alpha': (case(folder_case, mask=rgba_mask), TWO, ''),
    'msk_i64': (case(folder_case, mask=lambda p, m: tifffile.imwrite(p, m.astype(np.int64)), suffix='tif'), TWO, ''),
    'msk_jpg': (case(folder_case, mask=lambda p, m: Image.fromarray(m * np.uint8(255)).save(p, quality=60), suffix='jpg'), TWO, ''),
    'msk_inverted': (case(folder_case, mask=lambda p, m: Image.fromarray(~m * np.uint8(255)).save(p)), TWO, 'fills 9'),
    'msk_two_objects': (case(folder_case, mask=lambda p, m: Image.fromarray((masks(int(p.parent.name[-1])).any(0)) * np.uint8(255)).save(p.with_name('mask.png'))), [1, 1, 1], 'in 2 pieces'),
    'lab_u32': (case(label_case, write=lambda p, x: tifffile.imwrite(p, (x * 1_500_000_000).astype(np.uint32)), suffix='tif'), TWO, ''),
    'lab_f64': (case(label_case, write=lambda p, x: tifffile.imwrite(p, x.astype(np.float64)), suffix='tif'), TWO, ''),
    'lab_la': (case(label_case, write=lambda p, x: Image.fromarray(np.dstack([x, np.full_like(x, 255)]).astype(np.uint8), 'LA').save(p)), TWO, ''),
    'lab_suffix': (case(label_case, write=lambda p, x: Image.fromarray(x.astype(np.uint8)).save(p), name='{}_cp_masks'), TWO, ''),
    'lab_white_ground': (case(label_case, write=white), TWO, 'read as background'),
    'lab_voc_void': (case(label_case, write=void), TWO, 'taken as no object'),
    'lab_antialiased': (case(label_case, write=smooth), None, 'a thin rim around other objects'),
    'lab_same_id_pieces': (case(label_case, write=lambda p, x: Image.fromarray(((x > 0) * 1 + (np.arange(W) > 110) * (np.arange(H)[:, None] > 85) * 2).astype(np.uint8)).save(p)), TWO, 'in 2 pieces'),
}

def read(path):
    source = scan(path)
    faults = inspect(source)
    return source, faults

def kind_of(fault): return re.sub(r'[\d.]+', '#', fault.fault.rpartition(': ')[2])

@pytest.mark.parametrize('name', CASES)
def test_examined_repaired_and_opened_again(name, tmp_path):
    "What was repaired has the same pixels and objects, and no fault that was not there before"
    write, counts, words = CASES[name]
    path = write(tmp_path/'set') or tmp_path/'set'
    source, before = silent(read, path)
    assert not [f for f in before if f.stops], fault_table(before)
    assert before == examine(path) and words in fault_table(before), fault_table(before)
    if not words: assert before == [] or all('the class is' in f.fault for f in before), fault_table(before)
    if counts: assert [len(s.instances) for s in source.samples.values()] == counts
    silent(repair, path, tmp_path/'out')
    again, after = silent(read, tmp_path/'out')
    assert {kind_of(f) for f in after} <= {kind_of(f) for f in before}, fault_table(after)
    assert again.layout == 'coco' and again.classes == source.classes and len(again.samples) == len(source.samples)
    for a, b in zip(source.samples.values(), again.samples.values()):
        assert a.image.dtype == b.image.dtype == np.uint8 and (a.image == b.image).all()
        assert (a.instances.masks() == b.instances.masks()).all() and (a.instances.labels == b.instances.labels).all() and (a.instances.boxes == b.instances.boxes).all()

@pytest.mark.parametrize('name', [n for n in CASES if n.startswith('exif')])
def test_turned_pictures_have_their_objects_on_bright_pixels(name, tmp_path):
    "exif_coco, exif_via and the six other orientations: the masks lie where the picture is bright"
    CASES[name][0](tmp_path/'set')
    for i, s in enumerate(read(tmp_path/'set')[0].samples.values()):
        assert s.instances.masks().sum((1, 2)).tolist() == [576, 900] and s.image.shape[:2] == s.instances.size == (H, W)
        inside = s.instances.masks().any(0)
        assert s.image[inside].mean() > 195 and s.image[~inside].mean() < 95
        if 'coco' not in name and 'via' not in name: assert (s.image == picture(i)).all()

def test_square_pictures_are_turned_too(tmp_path):
    "A size that fits both ways is that of the upright picture"
    for o in TURNS:
        x = np.random.default_rng(o).integers(0, 255, (64, 64, 3)).astype(np.uint8)
        (tmp_path/f's{o}'/'images').mkdir(parents=True)
        turned(tmp_path/f's{o}'/'images'/'a.png', x, o)
        dump(tmp_path/f's{o}'/'annotations.json', dict(images=[dict(id=1, file_name='a.png', height=64, width=64)], categories=[dict(id=1, name='c')],
            annotations=[dict(id=1, image_id=1, category_id=1, segmentation=[[3, 3, 20, 3, 20, 9, 3, 9]])]))
        assert (next(iter(read(tmp_path/f's{o}')[0].samples.values())).image == x).all()

def test_deep_pictures_are_scaled_alike(tmp_path):
    "rgb16_png_data: the same pixels as in a TIFF"
    CASES['rgb16_png_data'][0](tmp_path/'png')
    coco_case(tmp_path/'tif', keep=lambda path, x: tifffile.imwrite(path, x.astype(np.uint16) * 16, photometric='rgb'), suffix='tif')
    for a, b in zip(*(read(tmp_path/k)[0].samples.values() for k in ('png', 'tif'))):
        assert (a.image == b.image).all() and a.image.min() == 0 and a.image.max() == 255

@each
def test_repair_of_any_layout_keeps_everything(write, tmp_path):
    write(SAMPLES, tmp_path/'set')
    before = {p: p.read_bytes() for p in (tmp_path/'set').rglob('*') if p.is_file()}
    silent(repair, tmp_path/'set', tmp_path/'out')
    assert before == {p: p.read_bytes() for p in (tmp_path/'set').rglob('*') if p.is_file()} and examine(tmp_path/'out') == []
    a, b = open_dataset(tmp_path/'set'), open_dataset(tmp_path/'out')
    assert a[0].classes == b[0].classes
    for s in [*a[0], *a[1]]:
        t = next(t for t in [*b[0], *b[1]] if t.name == s.name)
        assert (s.image == t.image).all() and (s.instances.masks() == t.instances.masks()).all() and (s.instances.labels == t.instances.labels).all()
    with pytest.raises(DataError, match='is there already'): repair(tmp_path/'set', tmp_path/'out')

# ---- nothing to learn from

@each
def test_no_object_stops_in_every_layout(write, tmp_path):
    write([replace(s, instances=s.instances[[]]) for s in SAMPLES], tmp_path/'set')
    assert any(f.stops for f in examine(tmp_path/'set'))
    for f in (open_dataset, open_part, partial(repair, out=tmp_path/'out')):
        with pytest.raises(DataError): silent(f, tmp_path/'set')
    assert not (tmp_path/'out').exists()

@each
def test_a_half_without_an_object_stops_in_every_layout(write, tmp_path):
    write(SAMPLES[:3], tmp_path/'set'/'train'), write([replace(s, instances=s.instances[[]]) for s in SAMPLES[3:]], tmp_path/'set'/'val')
    found = [f for f in examine(tmp_path/'set') if f.stops]
    assert len(found) == 1 and (found[0].fault == 'no object in valid' or found[0].file == 'val' and write in (yolo, masks_in_class_folders, masks_with_class_names))
    with pytest.raises(DataError): open_dataset(tmp_path/'set')

def spoil_coco(folder): change_json(folder/'annotations.json', lambda d: [a.update(segmentation=[[1, 2, 3, 4]]) for a in d['annotations'][:-3]])
def spoil_via(folder): change_json(folder/'via_region_data.json', lambda d: [r['shape_attributes']['all_points_x'].append(5) for row in list(d.values())[:-2] for r in row['regions'].values()])
def spoil_labelme(folder):
    for p in sorted(folder.glob('*.json'))[:-2]: change_json(p, lambda d: [s.update(shape_type='line') for s in d['shapes']])
def spoil_masks(folder):
    for p in sorted(folder.rglob('masks/*.png'))[:-3]: Image.fromarray(np.zeros((128, 128), np.uint8)).save(p)
def spoil_yolo(folder):
    for p in sorted((folder/'labels').glob('*.txt'))[:-2]: p.write_text('\n'.join(' '.join(line.split()[:5]) for line in p.read_text().splitlines()))

@pytest.mark.parametrize('write, spoil', [(coco_polygons, spoil_coco), (via_1, spoil_via), (labelme, spoil_labelme), (kaggle, spoil_masks), (yolo, spoil_yolo)], ids=lambda f: f.__name__)
def test_most_objects_dropped_stops(write, spoil, tmp_path):
    write(SAMPLES, tmp_path/'set')
    spoil(tmp_path/'set')
    found = [f for f in examine(tmp_path/'set') if f.stops]
    assert len(found) == 1 and 'cannot be used' in found[0].fault and found[0].file == '.', fault_table(found)
    with pytest.raises(DataError, match='cannot be used'): repair(tmp_path/'set', tmp_path/'out')

def test_only_crowds_stop_and_some_do_not(tmp_path):
    "all_crowd"
    coco_case(tmp_path/'all', change=every('annotations', iscrowd=1, segmentation=as_runs)), coco_case(tmp_path/'some', change=half_crowds)
    assert [f.fault for f in examine(tmp_path/'all')] == ['all 6 objects are crowds (iscrowd 1), which are not learned'] and examine(tmp_path/'some') == []
    assert sorted(k for s in open_part(tmp_path/'some')[0] for k in s.instances.labels) == [-1] * 3 + [1] * 3

def test_a_half_that_twins_leave_without_objects_stops(tmp_path):
    "The only object of valid is in a picture that train has too"
    write_coco(SAMPLES[:3], tmp_path/'set', 'train', CLASSES)
    write_coco([replace(SAMPLES[0], name='again'), EMPTY], tmp_path/'set', 'valid', CLASSES)
    found = examine(tmp_path/'set')
    assert [f.fault for f in found if f.stops] == [f'no object in valid: none of the {len(SAMPLES[0].instances)} can be used'] and any(f.action == 'left out of valid' for f in found)
    with pytest.raises(DataError): repair(tmp_path/'set', tmp_path/'out')

def test_one_picture_with_objects_is_named(tmp_path):
    for n, (samples, words) in enumerate((([SAMPLES[0]], 'only one image'), ([SAMPLES[0], EMPTY], 'only one image has objects'), ([SAMPLES[0], replace(SAMPLES[0], name='b')], 'all images are the same picture'))):
        coco_rle(samples, tmp_path/str(n))
        assert words in [f.fault for f in examine(tmp_path/str(n))] and not any(f.stops for f in examine(tmp_path/str(n)))
        with pytest.raises(DataError): open_dataset(tmp_path/str(n))

# ---- truth that looks wrong

def of(numbers): return Instances.from_label_map(np.asarray(numbers, int))

def scene(name):
    x = np.zeros((60, 80), int)
    if name == 'inverted': x[:] = 1; x[disk((30, 40), 9)] = 0
    elif name == 'inverted, large': x[:] = 1; x[ellipse(30, 40, 28, 38)] = 0
    elif name == 'fills': x[2:, 2:] = 1
    elif name == 'rim': x[10:30, 10:30] = 2; x[11:29, 11:29] = 1
    elif name == 'ring': x[4:56, 4:76] = 3; x[8:52, 8:38], x[8:52, 42:72] = 1, 2
    elif name == 'pieces': x[5:15, 5:15] = x[5:15, 60:70] = 1
    elif name == 'three pieces': x[5:15, 5:15] = x[5:15, 60:70] = x[40:50, 30:40] = 1
    elif name == 'smooth': x[:] = np.array(Image.fromarray((np.pad(np.ones((15, 20), np.uint8), ((10, 5), (10, 10))) * 200)).resize((80, 60), Image.Resampling.BILINEAR))
    return x

@pytest.mark.parametrize('name, words', [('inverted', 'fills 9'), ('inverted, large', 'fills'), ('fills', 'fills 9'), ('rim', RING[0]), ('ring', RING[0]), ('pieces', 'in 2 pieces'), ('three pieces', 'in 3 pieces'), ('smooth', RIM[0])])
def test_suspicious_truth_is_named(name, words):
    said = [f for found in suspicions(of(scene(name))).values() for f, _ in found]
    assert any(words in f for f in said), said

@pytest.mark.parametrize('name', ['touching', 'hidden', 'nucleus', 'in front', 'near', 'crumb', 'border'])
def test_what_is_right_is_not_named(name):
    x = np.zeros((60, 80), int)
    if name == 'touching': x[10:30, 10:30], x[10:30, 30:50], x[30:50, 10:50] = 1, 2, 3
    elif name == 'hidden': x[20:30, 5:75] = 1; x[5:55, 30:50] = 2              # a thread behind a nucleus, in two pieces
    elif name == 'nucleus': x[disk((30, 40), 25)] = 1; x[disk((30, 40), 12)] = 2
    elif name == 'in front': x[10:50, 10:50] = 1; x[25:35, 25:35], x[12:22, 12:22] = 2, 3
    elif name == 'near': x[10:30, 10:30] = x[10:30, 32:50] = 1                 # two pixels apart
    elif name == 'crumb': x[10:40, 10:40] = 1; x[50, 70] = 1
    elif name == 'border': x[:40, :30] = 1; x[50:, 60:] = 2
    assert suspicions(of(x)) == {}

@pytest.mark.parametrize('level', LEVELS)
def test_no_false_alarm_on_shapes(level):
    "Shapes hide each other: slivers, pieces and holes are right there"
    for size, n in ((128, 200), (256, 60)):
        for s in make_shapes(n, seed=77, size=size, level=level): assert suspicions(s.instances) == {} and twice(s.instances) == []

def test_void_is_a_band_with_contact():
    "lab_voc_void: 255 is void where it is a rim of any width, and an object where it is a cell among cells"
    for width in (1, 3, 5, 7):
        x = np.zeros((120, 160), int)
        x[disk((50, 50), 30)], x[disk((80, 120), 25)] = 1, 2
        rim = ndimage.binary_dilation(x > 0, iterations=(width + 1) // 2) & ~ndimage.binary_erosion(x > 0, iterations=width // 2 + 1)
        x[rim] = 255
        assert is_void(of(x), 2), width
    tissue = np.array([[51, 102], [153, 255]]).repeat(30, 0).repeat(30, 1)
    assert not is_void(of(tissue), 3)
    alone = np.zeros((60, 60), int)
    alone[5:20, 5:20], alone[40, 5:55] = 1, 255                                # a thread far from the cell
    assert not is_void(of(alone), 1)

def test_an_object_is_cut_with_its_box():
    draw = partial(draw_segmentation, [[10, 10, 30, 10, 30, 20, 10, 20]])
    assert cut_object(ObjectRecord('a', 'x', draw), (40, 50)).box.tolist() == [10, 10, 30, 20]
    for bbox, words in (([1, 2, 3], 'not four'), ('text', 'not four'), ([math.nan] * 4, 'not four'), ([10, 10, 0, 5], 'without area'), ([200, 10, 9, 9], 'outside'), ([10, 10, 90, 90], 'reaches out'), ([1, 1, 3, 3], 'does not fit')):
        box, fault = fit_box(bbox, np.array([10., 10, 30, 20]), (40, 50))
        assert words in fault[0] and box.tolist() == [10, 10, 30, 20]
    assert fit_box([7, 8, 24, 13], np.array([10., 10, 30, 20]), (40, 50)) [1] is None

# ---- programs that are not read

def program_json(name):
    return {'VIA 3': dict(project={}, config={}, attribute={}, file={}, metadata={}, view={}), 'Label Studio': [dict(id=1, data=dict(image='a.png'), annotations=[])],
        'COCO panoptic': dict(images=[], annotations=[dict(segments_info=[], file_name='a.png', image_id=1)], categories=[]), 'COCO results': [dict(image_id=1, category_id=1, score=.5, segmentation={})],
        'Supervisely': dict(description='', tags=[], size=dict(height=1, width=1), objects=[]), 'Labelbox': [dict(data_row=dict(id='x'), projects={})],
        'Segment Anything': dict(image=dict(image_id=1, file_name='a.jpg'), annotations=[dict(segmentation={})]), 'CreateML': [dict(image='a.png', annotations=[dict(label='x', coordinates={})])],
        'Datumaro': dict(info={}, categories={}, items=[]), 'GeoJSON (QuPath and others)': dict(type='FeatureCollection', features=[])}[name]

@pytest.mark.parametrize('program', JSON_PROGRAMS, ids=lambda p: p.name)
def test_jsons_of_other_programs_are_named(program, tmp_path):
    dump(tmp_path/'set'/'export.json', program_json(program.name)), save(tmp_path/'set'/'a.png', SAMPLES[0].image)
    found = examine(tmp_path/'set')
    assert len(found) == 1 and found[0].stops and found[0].file == 'export.json' and program.name in found[0].fault and found[0].action == program.advice

@pytest.mark.parametrize('row', FILE_PROGRAMS, ids=lambda r: r[2])
def test_files_of_other_programs_are_named(row, tmp_path):
    pattern, word, name, advice = row
    (tmp_path/'set'/'deep').mkdir(parents=True)
    (tmp_path/'set'/'deep'/pattern.replace('*', 'x')).write_bytes(b'<' * (word[:1] != b'<') + word + b' and so on'), save(tmp_path/'set'/'a.png', SAMPLES[0].image)
    found = examine(tmp_path/'set')
    assert len(found) == 1 and found[0].stops and name in found[0].fault and found[0].action == advice and found[0].file.startswith('deep/x')

@pytest.mark.parametrize('write', [via_1, labelme], ids=lambda w: w.__name__)
def test_a_damaged_json_beside_others_is_named(write, tmp_path):
    write(SAMPLES, tmp_path/'set')
    (tmp_path/'set'/'broken.json').write_text('{"shapes": [')
    assert [(f.file, f.stops) for f in examine(tmp_path/'set') if 'the class is' not in f.fault] == [('broken.json', True)]

def test_an_empty_json_is_one_sentence(tmp_path):
    "empty_json"
    coco_case(tmp_path/'set')
    (tmp_path/'set'/'annotations.json').write_bytes(b'')
    assert [str(f) for f in examine(tmp_path/'set')] == ['annotations.json: this is not a readable json (it is empty); export it again']
    zipped(tmp_path/'set', tmp_path/'set.zip')
    assert [f.file for f in examine(tmp_path/'set.zip')] == ['annotations.json']

def test_a_colon_in_the_folder_is_no_end_of_the_name(tmp_path):
    "folder_colon"
    coco_case(tmp_path/'my: data', change=every('annotations', segmentation=lambda a: dict(size=[9, 9], counts=[81])))
    assert {f.file for f in examine(tmp_path/'my: data')} == {'images/img_0.png', 'images/img_1.png', 'images/img_2.png', '.'}
    label_case(tmp_path/'m: x', lambda p, x: Image.fromarray(x[:9, :9].astype(np.uint8)).save(p))
    assert {f.file for f in examine(tmp_path/'m: x')} == {'labels/img_0.png', 'labels/img_1.png', 'labels/img_2.png', '.'}

# ---- the doctor: faults planted in a sound set

def plant(folder):
    "A sound COCO folder of ten images and a split, and faults put into it: fault -> (file, words)"
    samples = make_shapes(10, seed=21)
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
    names['missing image'] = ('annotations/train.json', 'gone.png: the image is missing')
    (folder/file(3)).write_bytes((folder/file(3)).read_bytes()[:len((folder/file(3)).read_bytes()) * 2 // 3])
    named('truncated image', 3, 'cannot be read')
    save(folder/'images'/'stray.png', make_shapes(1, seed=77)[0].image)
    names['orphan'] = ('images/stray.png', 'an image without an entry')
    named('two points', 4, f"annotation {add(4, segmentation=[[3, 4, 5, 6]])}: mask cannot be decoded (polygon of less than three points)")
    named('nan', 4, f"annotation {add(4, segmentation=[[3, 4, 9, 4, math.nan, 9]])}: mask cannot be decoded (coordinates that are not numbers)")
    named('text', 4, f"annotation {add(4, segmentation=[[3, 4, 9, 4, 'x', 9]])}: mask cannot be decoded (coordinates that are not numbers)")
    named('twice', 5, f"annotation {add(5, segmentation=first(5)['segmentation'], category_id=first(5)['category_id'])} is annotation {first(5)['id']} again")
    named('one pixel', 5, f"annotation {add(5, segmentation=dict(size=[128, 128], counts=[5, 1, 128 * 128 - 6]))}: object of one pixel")
    named('thin', 5, f"annotation {add(5, segmentation=[[0, 0, 90, 0, 90, 1, 0, 1]])}: very thin, 1x90 pixels")
    named('pieces', 6, f"annotation {add(6, segmentation=[*square(1, 1, 5), *square(120, 120, 5)])}: in 2 pieces")
    Image.fromarray(samples[6].image.astype(np.uint16)[..., 0] * 16).save(folder/file(6))
    named('16 bit', 6, 'numbers of the type uint16')
    save(folder/'images'/'alpha.png', np.dstack([make_shapes(1, seed=80)[0].image, np.arange(128 * 128).reshape(128, 128).astype(np.uint8)]))
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
    assert len(names) >= 20
    found = silent(examine, tmp_path/'set')
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
    left = {kind_of(f) for f in examine(tmp_path/'out')}
    assert left <= {'object of one pixel', 'very thin, #x# pixels', 'numbers of the type uint#', 'opacity (an alpha channel)', 'in # pieces that do not touch'}, left
    rows = list(csv.DictReader((tmp_path/'out'/'faults.csv').open()))
    assert [(r['file'], r['fault'], r['action']) for r in rows] == [(f.file, f.fault, f.action) for f in listed] and len(rows) == len(examine(tmp_path/'set'))
    assert all(r['action'].startswith('left out') for r, f in zip(rows, listed) if f.stops)
    train, valid = open_dataset(tmp_path/'out')
    got = {s.name: s.instances for s in [*train, *valid]}
    for i, s in enumerate(make_shapes(10, seed=21)):
        if i in (3, 8): assert s.name not in got   # damaged; shared with train
        else: assert {r['counts'] for r in s.instances.rles()} <= {r['counts'] for r in got[s.name].rles()}, s.name
    assert {'leak', 'alpha', 'Case', 'case_2'} <= set(train.names) and len(train) == 10 and len(valid) == 2

S = SAMPLES[0].name
FAULTS = {   # one fault in a set that has no other
    'an empty mask': (kaggle, lambda p: save(p/'stage1_train'/S/'masks'/'x.png', np.zeros((128, 128), np.uint8)), f'stage1_train/{S}/images/{S}.png', 'mask x.png: empty mask', False),
    'a mask of another size': (kaggle, lambda p: save(p/'stage1_train'/S/'masks'/'x.png', np.ones((9, 7), np.uint8)), f'stage1_train/{S}/images/{S}.png', 'mask x.png: the mask is 9x7 but the image is 128x128', True),
    'no image': (kaggle, lambda p: (p/'stage1_train'/S/'images'/f'{S}.png').unlink(), f'stage1_train/{S}/images', 'missing', True),
    'a damaged mask': (kaggle, lambda p: (p/'stage1_train'/S/'masks'/'x.png').write_bytes(b'\x89PNG\r\n\x1a\n123'), f'stage1_train/{S}/images/{S}.png', 'mask x.png: the image cannot be read', True),
    'masks of no image': (masks_in_class_folders, lambda p: (p/'images'/f'{S}.png').unlink(), f'masks/{S}', 'masks of no image', True),
    'no label map': (label_png, lambda p: (p/'labels'/f'{S}.png').unlink(), f'images/{S}.png', 'without an entry', False),
    'a label map of no image': (label_png, lambda p: (p/'images'/f'{S}.png').unlink(), f'labels/{S}.png', 'label map of no image', True),
    'a label map of another size': (label_png, lambda p: save(p/'labels'/f'{S}.png', np.ones((9, 9), np.uint8)), f'labels/{S}.png', 'the label map is 9x9', True),
    'a damaged label map': (label_png, lambda p: (p/'labels'/f'{S}.png').write_bytes(b'\x89PNG'), f'labels/{S}.png', 'cannot be read', True),
    'no image of VIA': (via_1, lambda p: (p/f'{S}.png').unlink(), 'via_region_data.json', f'{S}.png: the image is missing', True),
    'a damaged image': (via_1, lambda p: (p/f'{S}.png').write_bytes(b'nothing'), f'{S}.png', 'cannot be read', True),
    'an image too many': (via_1, lambda p: save(p/'stray.png', np.zeros((9, 9), np.uint8)), 'stray.png', 'without an entry', False),
    'a region without class': (via_1, lambda p: change_json(p/'via_region_data.json', lambda d: d[f'{S}.png123']['regions']['0']['region_attributes'].clear()), f'{S}.png', 'region 0 has no class', True),
    'a region that is text': (via_2, lambda p: change_json(p/'project.json', lambda d: d['_via_img_metadata'][f'{S}.png123']['regions'].append('x')), f'images/{S}.png', '1 regions that are none', False),
    'a shape that is a list': (via_2, lambda p: change_json(p/'project.json', lambda d: d['_via_img_metadata'][f'{S}.png123']['regions'][0].update(shape_attributes=[3])), f'images/{S}.png', 'region 0: ', False),
    'no segmentation': (coco_polygons, lambda p: change_json(p/'annotations.json', lambda d: d['annotations'][0].update(segmentation={})), f'images/{S}.png', 'annotation 1: mask cannot be decoded', False),
    'an image of another size': (coco_polygons, lambda p: save(p/'images'/f'{S}.png', np.zeros((50, 60), np.uint8)), f'images/{S}.png', 'the image is 50x60 pixels', True),
    'an object of the background': (coco_polygons, lambda p: change_json(p/'annotations.json', lambda d: (d['categories'].append(dict(id=9, name='background')), d['annotations'][0].update(category_id=9))), f'images/{S}.png', 'an object of the class background', False),
    'a point of LabelMe': (labelme, lambda p: change_json(p/f'{S}.json', lambda d: d['shapes'][0].update(shape_type='point')), f'{S}.png', 'shape 0: a point', False),
    'a line of YOLO': (yolo, lambda p: (p/'labels'/f'{SAMPLES[1].name}.txt').write_text('0 .1 .1 .2 .1 .2 .2\nx y'), f'labels/{SAMPLES[1].name}.txt', 'line 2 is no class', False),
}

@pytest.mark.parametrize('name', FAULTS)
def test_one_fault_is_named_once(name, tmp_path):
    write, spoil, file, words, stops = FAULTS[name]
    write(SAMPLES, tmp_path/'set')
    spoil(tmp_path/'set')
    found = [f for f in silent(examine, tmp_path/'set') if 'the class is' not in f.fault]
    assert [(f.file, f.stops) for f in found] == [(file, stops)] and words in found[0].fault, fault_table(found)

def test_masks_in_another_tree_are_named_by_their_file(tmp_path):
    for half in ('train', 'val'):
        label_png(SAMPLES[:3] if half == 'train' else SAMPLES[3:], tmp_path/half)
        for kind in ('images', 'labels'): (tmp_path/'set'/kind).mkdir(parents=True, exist_ok=True), shutil.move(tmp_path/half/kind, tmp_path/'set'/kind/half)
    assert examine(tmp_path/'set') == [] and [len(d) for d in open_dataset(tmp_path/'set')] == [3, 3]
    save(tmp_path/'set'/'labels'/'train'/f'{S}.png', np.ones((9, 9), np.uint8))
    assert [f.file for f in examine(tmp_path/'set')] == [f'labels/train/{S}.png']

def test_paths_from_the_working_folder(tmp_path, monkeypatch):
    label_png(SAMPLES[:3], tmp_path/'set')
    save(tmp_path/'set'/'labels'/f'{S}.png', np.ones((9, 9), np.uint8))
    for here, path in ((tmp_path, 'set'), (tmp_path/'set', '.')):
        monkeypatch.chdir(here)
        assert [f.file for f in examine(path)] == [f'labels/{S}.png']

def test_a_lenient_pass_after_a_json_that_cannot_be_read(tmp_path):
    write_coco(SAMPLES[:3], tmp_path/'set', 'train', CLASSES), write_coco(SAMPLES[3:], tmp_path/'set', 'valid', CLASSES)
    (tmp_path/'set'/'annotations'/'train.json').write_text('{"images": [')
    (tmp_path/'set'/'images'/f'{SAMPLES[4].name}.png').unlink()
    found = examine(tmp_path/'set')
    assert any('not a readable json' in f.fault for f in found) and any('missing' in f.fault and SAMPLES[4].name in f.fault for f in found)

def test_many_alike_are_folded():
    many = [Fault(f'{i}.png', 'an alpha channel', 'ignored') for i in range(50)] + [Fault('x', 'annotation 3: empty mask', 'object dropped')]
    assert len(fold(many)) == 5 and '47 more' in fault_table(many) and '51 faults' in fault_table(many) and fault_table([]) == 'no faults'

# ---- splits

def test_same_picture_is_never_on_both_sides(tmp_path):
    twins = [replace(SAMPLES[0], name=f'twin{i}') for i in range(6)]
    coco_rle([*SAMPLES[1:4], *twins], tmp_path/'set')
    for seed in range(6):
        train, valid = open_dataset(tmp_path/'set', seed, valid=.4)
        assert len(train) + len(valid) == 9 and not (any(n[:4] == 'twin' for n in train.names) and any(n[:4] == 'twin' for n in valid.names))
        assert len({n[:4] if n[:4] == 'twin' else n for n in valid.names}) == 2   # of four different pictures

@given(st.lists(st.booleans(), min_size=2, max_size=9).filter(lambda x: sum(x) > 1), st.integers(0, 99), st.sampled_from([.1, .2, .5]))
@settings(max_examples=80, deadline=None)
def test_both_halves_have_objects_where_two_pictures_have(has, seed, valid):
    from maskrcnn_edu.data.doctor import Source
    from maskrcnn_edu.data.opening import halves_of
    from maskrcnn_edu.data.records import ImageRecord
    records = [ImageRecord(str(i), Path(str(i))) for i in range(len(has))]
    samples = {r: Sample(None, SAMPLES[0].instances[:int(h)], r.name) for r, h in zip(records, has)}
    source = Source(Path('x'), Path('x'), 'coco', dict(all=records), OBJECT, [], samples, {r: r for r in records})
    halves = halves_of(source, seed, valid)
    assert all(source.count(half) > 0 for half in halves.values()) and sorted(r.name for half in halves.values() for r in half) == [r.name for r in records]
    assert len(halves['valid']) == max(1, round(valid * len(has))) and halves == halves_of(source, seed, valid)

# ---- numbers for the data

def test_numbers_for_small_and_large_objects():
    def scaled(k): return [Sample(np.kron(s.image, np.ones((k, k, 1), np.uint8)), Instances.from_masks(np.kron(s.instances.masks(), np.ones((1, k, k), np.uint8)), s.instances.labels), s.name) for s in make_shapes(6, seed=2)]
    tiny = recommend([replace(s, instances=replace(s.instances, boxes=s.instances.boxes / 5)) for s in make_shapes(6, seed=2)])
    one, six = recommend(scaled(1)), recommend(scaled(6))
    assert one.enlarge == 1 and one.crop == 128 and six.enlarge < 1 and tiny.enlarge >= 3 and 'enlarge' in str(tiny.reasons)
    for p in (one, six, tiny):
        assert p.reach[.5] > .9 and p.reach[.7] > p.reach['paper'][.7] or p.reach[.7] > .9
        assert p.config['enlarge'] == p.enlarge and len(p.config['rpn']['sizes']) == 5 and sorted(p.sizes) == list(p.sizes) and all(r[-1] == '.' for r in p.reasons)

def test_the_numbers_of_one_set_are_those_of_before():
    p = recommend(make_shapes(12, 3, 256))
    assert (p.enlarge, p.crop, p.slots, p.n_rois, p.n_masks, p.n_detections, p.bs, p.epochs) == (1.0, 256, 8, 32, 4, 20, 4, 100)
    q = recommend(make_shapes(12, 3, 256, 'crowded'))
    assert (q.slots, q.n_rois, q.n_masks, q.n_detections) == (16, 32, 8, 20)

def test_one_odd_object_does_not_bend_the_anchors():
    boxes = torch.tensor(np.concatenate([s.instances.boxes for s in make_shapes(8, seed=2)]))
    odd = torch.tensor([[0., 0, 100, 1], [5, 5, 6, 90]])
    assert anchors_for(torch.cat([boxes, odd])) == anchors_for(boxes) and len(anchors_for(odd)[0]) == 5

def test_numbers_without_objects_and_without_crowds():
    p = recommend([EMPTY] * 3)
    assert p.enlarge == 1 and len(p.sizes) == 5 and p.slots == 8 and p.n_detections == 20
    crowd = [replace(s, instances=replace(s.instances, labels=-s.instances.labels)) for s in SAMPLES]
    assert recommend(crowd).slots == 8 and recommend([*SAMPLES, *crowd]).slots == recommend(SAMPLES).slots

@given(st.integers(1, 30), st.integers(10, 60), st.integers(0, 9999))
@settings(max_examples=60, deadline=None)
def test_the_fullest_window(n, side, seed):
    rng = np.random.default_rng(seed)
    corner = rng.integers(0, 90, (n, 2))
    boxes = np.concatenate([corner, corner + rng.integers(2, 20, (n, 2))], 1).astype(np.float32)
    objects = Instances((100, 100), boxes, np.ones(n, np.int64), [np.ones((1, 1), bool)] * n, corner)
    exact = max(((boxes[:, 0] < x + side) & (boxes[:, 2] > x) & (boxes[:, 1] < y + side) & (boxes[:, 3] > y)).sum() for x in range(0, 100, 3) for y in range(0, 100, 3))
    assert exact / 4 <= most_in_a_window(objects, side) <= n and most_in_a_window(objects, 300) == n

# ---- bytes changed at random: a sentence or a right answer, whatever the file

def fuzz_places():
    "Layout -> (writer, the file that is changed)"
    name = SAMPLES[1].name
    return dict(coco=(coco_polygons, 'annotations.json'), via=(via_2, 'project.json'), labelme=(labelme, f'{name}.json'), yolo=(yolo, f'labels/{name}.txt'),
        yaml=(yolo, 'data.yaml'), picture=(coco_rle, f'images/{name}.png'), label_map=(label_png, f'labels/{name}.png'), mask=(kaggle, f'stage1_train/{name}/masks/{name}000.png'))

MUTATIONS = int(os.environ.get('MASKRCNN_EDU_FUZZ', 100))

@pytest.mark.parametrize('place', fuzz_places())
def test_changed_bytes_are_examined(place, tmp_path):
    write, name = fuzz_places()[place]
    write(SAMPLES[1:4], tmp_path/'set')
    data, outside = (tmp_path/'set'/name).read_bytes(), lambda: sorted(p for p in tmp_path.iterdir())
    before = outside()
    for changed in mutations(data, MUTATIONS, seed=17):
        (tmp_path/'set'/name).write_bytes(changed)
        with within(10): found = silent(examine, tmp_path/'set')
        assert all(isinstance(f, Fault) and f.file and f.fault and f.action and '\n' not in f'{f.file}{f.action}' for f in found), found
        if not any(f.stops for f in found):
            try: silent(open_part, tmp_path/'set')
            except DataError as e: one_sentence(e, 'set')
    assert outside() == before

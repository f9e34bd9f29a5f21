"COCO, VIA, LabelMe, YOLO and Pascal VOC as people have them: read right, or refused in one sentence; json values changed at random"
import copy, json, random, warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw
from pycocotools.coco import COCO

from maskrcnn_edu.data import DataError, examine, open_dataset, open_part, repair
from maskrcnn_edu.data.coco import category_of, id_key, is_crowd, read_coco_json
from maskrcnn_edu.data.masks import polygon_mask
from maskrcnn_edu.data.programs import draw_shape, draw_yolo, read_labelme, read_voc, read_yolo
from maskrcnn_edu.data.via import class_attribute, draw_via, read_via_json

AREAS = (576, 900)
def boxes(i): return [(10 + 5 * i, 12, 34 + 5 * i, 36), (70, 40, 100, 70)]
def corners(b): return [b[0], b[1], b[2], b[1], b[2], b[3], b[0], b[3]]
def picture(i):
    im = np.full((96, 128, 3), 20 + i, np.uint8)
    for x1, y1, x2, y2 in boxes(i): im[y1:y2, x1:x2] = 200
    return im
def mask(b):
    m = np.zeros((96, 128), np.uint8)
    m[b[1]:b[3], b[0]:b[2]] = 1
    return m
def counts(m):
    x = m.T.ravel()
    edges = np.flatnonzero(np.diff(x, prepend=0, append=0))
    return np.diff(edges, prepend=0, append=len(x)).tolist()

def put(folder, place=lambda i: f'images/img_{i}.png'):
    for i in range(3):
        (folder/place(i)).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture(i)).save(folder/place(i))

def coco(folder, change=lambda f: None, seg=lambda b: [list(map(float, corners(b)))], place=lambda i: f'images/img_{i}.png', file='annotations.json'):
    put(folder, place)
    rows = [dict(id=2 * i + j + 1, image_id=i + 1, category_id=1, segmentation=seg(b), bbox=[b[0], b[1], b[2] - b[0], b[3] - b[1]], area=0, iscrowd=0)
            for i in range(3) for j, b in enumerate(boxes(i))]
    found = dict(images=[dict(id=i + 1, file_name=f'img_{i}.png', height=96, width=128) for i in range(3)], annotations=rows, categories=[dict(id=1, name='cell')])
    change(found)
    (folder/file).parent.mkdir(parents=True, exist_ok=True)
    (folder/file).write_text(json.dumps(found))
    return folder

def set_all(key, **values):
    def change(found):
        for row in found[key]: row.update({k: v(row) if callable(v) else v for k, v in values.items()})
    return change

def areas(folder): return [tuple(int(c.sum()) for c in s.instances.crops) for s in open_part(folder, 'all')[0]]
def said(folder): return [str(f).replace(str(folder), '') for f in examine(folder)]
def stops(folder): return [f for f in examine(folder) if f.stops]


# COCO: how a mask is written
SEGMENTATIONS = dict(
    polygon=lambda b: [corners(b)], flat=lambda b: corners(b), pairs=lambda b: [list(map(list, zip(corners(b)[::2], corners(b)[1::2])))],
    flat_pairs=lambda b: list(map(list, zip(corners(b)[::2], corners(b)[1::2]))), points=lambda b: [dict(x=x, y=y) for x, y in zip(corners(b)[::2], corners(b)[1::2])],
    nested=lambda b: [[[corners(b)]]], text=lambda b: json.dumps([corners(b)]), closed=lambda b: [corners(b) + corners(b)[:2]], numbers_as_text=lambda b: [list(map(str, corners(b)))],
    runs=lambda b: dict(size=[96, 128], counts=counts(mask(b))), runs_in_a_list=lambda b: [dict(size=[96, 128], counts=counts(mask(b)))],
    runs_as_text=lambda b: dict(size=['96', '128'], counts=str(counts(mask(b)))), runs_without_size=lambda b: dict(counts=counts(mask(b))),
    runs_as_floats=lambda b: dict(size=[96., 128.], counts=[float(c) for c in counts(mask(b))]))

@pytest.mark.parametrize('kind', SEGMENTATIONS)
def test_a_mask_in_any_spelling(tmp_path, kind):
    "Case flat_polygon and its kind"
    assert areas(coco(tmp_path, seg=SEGMENTATIONS[kind])) == [AREAS] * 3
    assert not stops(tmp_path) and ('as text' in ''.join(said(tmp_path))) == (kind == 'numbers_as_text')

@pytest.mark.parametrize('stray', [[64., 48.], [1, 2, 3], [1, 2, 3, 4], [None, 2, 3, 4, 5, 6], ['a', 1, 2, 3, 4, 5], [float('nan')] * 6])
def test_a_stray_piece_costs_no_object(tmp_path, stray):
    "Case stray_point and its kind"
    coco(tmp_path, seg=lambda b: [corners(b), stray])
    assert areas(tmp_path) == [AREAS] * 3 and sum('the piece left out' in s for s in said(tmp_path)) == 6

@pytest.mark.parametrize('seg', [[], None, {}, [[]], 'text', 7, dict(size=[96, 128], counts=[100, 50, 20]), dict(size=[96, 128], counts='\x01\x02'), [[1, 2]]])
def test_without_a_mask_nothing_is_learned(tmp_path, seg):
    "Cases boxes_only, big_rle_wrong_sum and their kind"
    coco(tmp_path, seg=lambda b: seg)
    assert any('none of the 6 can be used' in str(f) for f in stops(tmp_path))
    with pytest.raises(DataError, match='no object'): repair(tmp_path, tmp_path/'out')
    assert not (tmp_path/'out').exists()


# COCO: ids, sizes, boxes, classes
SAME = dict(
    ids_as_text=lambda f: [r.update(id=str(r['id'])) for r in f['images']], zero_padded=lambda f: [r.update(id=f"{r['id']:06d}") for r in f['images']],
    whole_floats=lambda f: [r.update(image_id=float(r['image_id']), category_id=1.0) for r in f['annotations']],
    words=lambda f: ([r.update(id=f"i{r['id']}") for r in f['images']], [r.update(image_id=f"i{r['image_id']}") for r in f['annotations']]),
    no_sizes=set_all('images', height=None, width=None), zero_sizes=set_all('images', height=0, width=0), sizes_as_text=set_all('images', height='96', width='128'),
    missing_sizes=lambda f: [(r.pop('height'), r.pop('width')) for r in f['images']],
    category_by_name=set_all('annotations', category_id='cell'), no_crowd=set_all('annotations', iscrowd='0'), null_crowd=set_all('annotations', iscrowd=None),
    no_box=lambda f: [r.pop('bbox') for r in f['annotations']], same_name=lambda f: (f['categories'].append(dict(id=2, name='cell')), f['annotations'][0].update(category_id=2)))

@pytest.mark.parametrize('kind', SAME)
def test_the_same_said_otherwise(tmp_path, kind):
    "Cases string_ids, null_sizes, zero_sizes and their kind: no fault"
    coco(tmp_path, SAME[kind])
    assert areas(tmp_path) == [AREAS] * 3 and said(tmp_path) == [] and open_part(tmp_path, 'all')[0].classes == ['background', 'cell']

@pytest.mark.parametrize('bbox', [[0, 0, 0, 0], [5, 5, 0, 9], [500, 500, 9, 9], 'wrong', [1, 2], [float('nan')] * 4, ['1', '2', '3', '4'], [0, 0, -4, -4], [60, 80, 9, 9]])
def test_a_box_costs_no_object(tmp_path, bbox):
    "Case zero_boxes and its kind: the box of the mask"
    coco(tmp_path, set_all('annotations', bbox=bbox))
    both = open_part(tmp_path, 'all')[0]
    assert areas(tmp_path) == [AREAS] * 3 and all(s.instances.boxes.tolist() == [list(map(float, b)) for b in boxes(i)] for i, s in enumerate(both))
    assert sum('box taken from the mask' in s for s in said(tmp_path)) == 6

@pytest.mark.parametrize('change,words', [
    (set_all('annotations', category_id=None), "category_id is null.*in VIA"),                                               # case via_coco_null
    (lambda f: (f['categories'].append(dict(id=2, name='dot')), f['annotations'][0].update(category_id=9)), 'unknown category 9; take one of'),
    (lambda f: f['annotations'][0].update(image_id=9), 'of image 9, which is not in the list'), (lambda f: f.update(categories=[]), 'no categories'),
    (lambda f: f['annotations'].append(7), 'is no row'), (lambda f: f['images'][0].update(file_name=''), "file name ''"),      # case empty_name
    (lambda f: f['images'][1].update(id=1), 'image id 1 appears twice'), (set_all('images', height=128, width=96), '96x128.*says 128x96'),
    (lambda f: f['images'][0].update(file_name='img_9.png'), 'is missing')])
def test_what_a_person_must_mend_stops(tmp_path, change, words):
    coco(tmp_path, change)
    with pytest.raises(DataError, match=words): open_dataset(tmp_path)

def test_the_only_class_is_taken_and_said(tmp_path):
    coco(tmp_path, set_all('annotations', category_id=0))
    assert areas(tmp_path) == [AREAS] * 3 and sum("taken as 'cell', the only one" in s for s in said(tmp_path)) == 6

@pytest.mark.parametrize('name,above', [('cells-x1', 'cells-x1'), ('_background_', 'none'), ('Background', None), ('BACKGROUND', '')])
def test_categories_that_are_none(tmp_path, name, above):
    "Cases roboflow, background_upper"
    coco(tmp_path, lambda f: (f['categories'].insert(0, dict(id=0, name=name)), f['categories'][1].update(supercategory=above)))
    assert open_part(tmp_path, 'all')[0].classes == ['background', 'cell'] and any('taken as no class' in s for s in said(tmp_path))

def test_categories_with_gaps_or_alike_are_said(tmp_path):
    "Cases gaps, ev_roboflow, category_spaces"
    coco(tmp_path, lambda f: (f.update(categories=[dict(id=90, name='b'), dict(id=0, name='nothing'), dict(id=7, name='B ')]), [r.update(category_id=(7, 90)[i % 2]) for i, r in enumerate(f['annotations'])]))
    both = open_part(tmp_path, 'all')[0]
    assert both.classes == ['background', 'nothing', 'B ', 'b'] and both[0].instances.labels.tolist() == [2, 3]
    assert any("no object of the class 'nothing'" in s for s in said(tmp_path)) and any("'B ', 'b' are alike" in s for s in said(tmp_path))

def test_crowds(tmp_path):
    "Cases all_crowd, ev_crowd: kept with a negative label; nothing but crowds is nothing to learn"
    coco(tmp_path/'half', lambda f: [r.update(iscrowd=i % 2) for i, r in enumerate(f['annotations'])])
    assert [s.instances.labels.tolist() for s in open_part(tmp_path/'half', 'all')[0]] == [[1, -1]] * 3
    repair(tmp_path/'half', tmp_path/'clean')
    assert [a['iscrowd'] for a in json.loads((tmp_path/'clean/annotations.json').read_text())['annotations']] == [0, 1] * 3
    for mark in (1, True, 'true', '1'):
        folder = coco(tmp_path/f'all{mark}{type(mark)}', set_all('annotations', iscrowd=mark))
        with pytest.raises(DataError, match='all 6 objects are crowds .iscrowd 1.*write iscrowd 0'): open_dataset(folder)
    assert is_crowd(dict(iscrowd='true')) and not is_crowd(dict(iscrowd='false')) and not is_crowd({})

def test_rows_of_one_file_are_one_image(tmp_path):
    "Case row_per_object"
    def change(f):
        for a in f['annotations']: a['image_id'] += 10 * a['id']
        f['images'] = [dict(id=a['image_id'], file_name=f"img_{(a['image_id'] % 10) - 1}.png") for a in f['annotations']]
    assert areas(coco(tmp_path, change)) == [AREAS] * 3 and sum('the same file under two ids' in s for s in said(tmp_path)) == 3

def test_empty_and_broken_jsons(tmp_path):
    "Cases empty_json, no_annotations"
    with pytest.raises(DataError, match='no object'): open_dataset(coco(tmp_path/'none', lambda f: f.update(annotations=[])))
    for name, text in (('empty', ''), ('cut', '{"images": ['), ('html', '<html>'), ('binary', '\0\1\2'), ('deep', '[' * 100_000)):
        (coco(tmp_path/name)/'annotations.json').write_text(text)
        with pytest.raises(DataError, match='annotations.json: this is not a readable json.*export it again'): open_dataset(tmp_path/name)
    folder = coco(tmp_path/'bom')
    (folder/'annotations.json').write_bytes(b'\xef\xbb\xbf' + (folder/'annotations.json').read_bytes())
    assert areas(folder) == [AREAS] * 3

def test_against_pycocotools(tmp_path):
    coco(tmp_path)
    theirs, ours = COCO(tmp_path/'annotations.json'), read_coco_json(tmp_path/'annotations.json')
    for r, i in zip(ours.images, theirs.getImgIds()):
        for o, a in zip(r.objects, theirs.loadAnns(theirs.getAnnIds(i))): assert (o.draw((96, 128)).mask == theirs.annToMask(a)).all()
    assert id_key('007') == id_key(7.0) == 7 and id_key(True) is None and id_key('12345678901234567890') == 12345678901234567890
    assert category_of(dict(category_id=5), {1: 'a', 2: 'b'})[0] is None


# VIA
def via(folder, regions, place=lambda i: f'img_{i}.png', **more):
    put(folder, place)
    rows = {f'img_{i}.png1': dict(filename=f'img_{i}.png', size=1, **({} if (r := regions(i)) is None else dict(regions=r))) for i in range(3)}
    (folder/'via_region_data.json').write_text(json.dumps(more | rows if not more else dict(_via_img_metadata=rows, **more)))
    return folder

def region(b, tags=dict(type='cell'), **shape):
    xs, ys = corners(b)[::2], corners(b)[1::2]
    return dict(shape_attributes=dict(name='polygon', all_points_x=xs, all_points_y=ys) | shape, region_attributes=tags)

def regions(tags=dict(type='cell'), **shape): return lambda i: [region(b, tags, **shape) for b in boxes(i)]

@pytest.mark.parametrize('kind', ['list', 'dict', 'project', 'in images'])
def test_via_of_any_version(tmp_path, kind):
    make = (lambda i: {str(j): r for j, r in enumerate(regions()(i))}) if kind == 'dict' else regions()
    via(tmp_path, make, **(dict(_via_settings={}) if kind == 'project' else {}), **(dict(place=lambda i: f'images/img_{i}.png') if kind == 'in images' else {}))
    assert areas(tmp_path) == [AREAS] * 3 and open_part(tmp_path, 'all')[0].classes == ['background', 'cell']

def test_via_without_regions_is_an_image_without_objects(tmp_path):
    "Case via_missing_regions"
    assert areas(via(tmp_path, lambda i: None if i == 1 else regions()(i))) == [AREAS, (), AREAS] and not stops(tmp_path)

@pytest.mark.parametrize('tags,classes', [(dict(Class='a', q='x'), ['a']), (dict(label='a', name='x'), ['a']), (dict(kind='a', q='x'), ['a']), (dict(anything='a'), ['a']), (dict(a=''), ['a']),
    (dict(t=dict(a=True, b=False)), ['a']), ({}, ['object']), (dict(type=' a '), ['a'])])
def test_the_class_of_a_region(tmp_path, tags, classes):
    "Cases via_attr_key, via_quality_first and their kind"
    assert open_part(via(tmp_path, regions(tags)), 'all')[0].classes[1:] == classes

def test_a_class_that_only_a_person_knows(tmp_path):
    "Case via_quality_first"
    via(tmp_path, regions(dict(focus='sharp', species='mouse')))
    with pytest.raises(DataError, match='any of the attributes focus, species; say which with --class-from'): open_dataset(tmp_path)
    assert open_dataset(tmp_path, class_from='species')[0].classes == ['background', 'mouse']
    with pytest.raises(DataError, match='--class-from x: no region has this attribute; there are focus, species'): open_dataset(tmp_path, class_from='x')
    with pytest.raises(DataError, match='several classes ticked .a, b.'): open_dataset(via(tmp_path/'ticks', regions(dict(t=dict(a=1, b=1)))))

def test_names_alike_are_said(tmp_path):
    "Case via_typos"
    via(tmp_path, lambda i: [region(b, dict(name=n)) for b, n in zip(boxes(i), ('Cell', 'cell '))])
    assert any("'Cell', 'cell' are alike" in s for s in said(tmp_path))

def test_via_numbers(tmp_path):
    "Cases via_numbers_text, via_ragged"
    via(tmp_path/'text', lambda i: [region(b, all_points_x=[str(x) for x in corners(b)[::2]]) for b in boxes(i)])
    assert areas(tmp_path/'text') == [AREAS] * 3 and sum('coordinates written as text' in s for s in said(tmp_path/'text')) == 6
    via(tmp_path/'ragged', lambda i: [region(boxes(i)[0], all_points_x=[1, 2, 3, 4, 5]), region(boxes(i)[1])])
    assert sum('5 x but 4 y; object dropped' in s for s in said(tmp_path/'ragged')) == 3 and areas(tmp_path/'ragged') == [(900,)] * 3

@pytest.mark.parametrize('shape', [dict(name='point', cx=1, cy=1), dict(name='circle', cx=1, cy=1, r=0), dict(name='rect', x=1, y=1, width='a', height=2), {}, dict(name='polygon'), dict(name='ellipse', cx=1, cy=1, rx=2)])
def test_shapes_without_area(shape):
    with pytest.raises(ValueError): draw_via(shape, (9, 9))

def test_exif_of_via(tmp_path):
    "Case exif_via: a browser shows a phone's picture upright, and so do we"
    via(tmp_path, regions())
    exif = Image.Exif(); exif[274] = 6
    for i in range(3):
        (tmp_path/f'img_{i}.png').unlink()
        Image.fromarray(np.rot90(picture(i))).save(tmp_path/f'img_{i}.jpg', exif=exif, quality=95)
    text = (tmp_path/'via_region_data.json').read_text().replace('.png"', '.jpg"')
    (tmp_path/'via_region_data.json').write_text(text)
    for s in open_part(tmp_path, 'all')[0]: assert s.image.shape == (96, 128, 3) and all(s.image[m > 0].mean() > 190 for m in s.instances.masks())


# other programs
def labelme(folder, **change):
    put(folder, lambda i: f'img_{i}.png')
    for i in range(3):
        shapes = [dict(label='cell', points=np.reshape(corners(b), (-1, 2)).tolist(), shape_type='polygon', group_id=None) for b in boxes(i)]
        (folder/f'img_{i}.json').write_text(json.dumps(dict(version='5', shapes=shapes, imagePath=f'img_{i}.png', imageData=None) | change))
    return folder

def test_labelme(tmp_path):
    "Case labelme: read"
    assert areas(labelme(tmp_path/'a')) == [AREAS] * 3 and said(tmp_path/'a') == []
    assert areas(labelme(tmp_path/'b', imagePath='..\\old\\img.png')) == [AREAS] * 3                        # the picture beside the json
    pieces = [dict(label='x', points=[[1, 1], [5, 5]], shape_type='rectangle', group_id=1), dict(label='x', points=[[10, 10], [14, 14]], shape_type='rectangle', group_id=1)]
    assert [o.draw((96, 128)).mask.sum() for o in read_labelme(labelme(tmp_path/'c', shapes=pieces)).images[0].objects] == [32]
    with pytest.raises(ValueError, match='has no area'): draw_shape(dict(points=[[1, 1], [2, 2]], shape_type='line'), (9, 9))

@pytest.mark.parametrize('names', ['names: [cell, dot]', 'names:\n  0: cell\n  1: dot\n', 'train: x\nval: y\nnames: ["cell", "dot"]'])
@pytest.mark.parametrize('places', [('images/train', 'labels/train', 'images/val', 'labels/val'), ('train/images', 'train/labels', 'valid/images', 'valid/labels')])
def test_yolo(tmp_path, names, places):
    (tmp_path/'data.yaml').write_text(names)
    for images, labels in (places[:2], places[2:]):
        put(tmp_path, lambda i: f'{images}/{images[:1]}{i}.png')
        (tmp_path/labels).mkdir(parents=True, exist_ok=True)
        for i in range(3):
            lines = [f'{j} ' + ' '.join(str(v / (128, 96)[k % 2]) for k, v in enumerate(corners(b))) for j, b in enumerate(boxes(i))]
            (tmp_path/labels/f'{images[:1]}{i}.txt').write_text('\n'.join(lines))
    train, valid = open_dataset(tmp_path)
    assert train.classes == ['background', 'cell', 'dot'] and len(train) == len(valid) == 3
    assert train[0].instances.labels.tolist() == [1, 2] and areas(tmp_path)[:3] == [AREAS] * 3

def test_yolo_boxes_are_no_masks(tmp_path):
    put(tmp_path)
    (tmp_path/'labels').mkdir()
    for i in range(3): (tmp_path/f'labels/img_{i}.txt').write_text('0 .5 .5 .2 .2\n')
    with pytest.raises(DataError, match='none of the 3 can be used'): open_dataset(tmp_path)
    with pytest.raises(ValueError, match='no shares'): draw_yolo([5, 5, 90, 5, 90, 90], (96, 128))
    assert list(read_yolo(tmp_path)) == ['all']

@pytest.mark.parametrize('colours', [False, True])
def test_voc(tmp_path, colours):
    "Objects by number, classes by number or by colour; 255 is void"
    table = [(0, 0, 0), (128, 0, 0), (0, 128, 0)]
    put(tmp_path, lambda i: f'JPEGImages/{i}.png')
    for d in ('SegmentationObject', 'SegmentationClass', 'ImageSets/Segmentation'): (tmp_path/d).mkdir(parents=True)
    if colours: (tmp_path/'labelmap.txt').write_text('# label:color_rgb:parts:actions\nbackground:0,0,0::\ncell:128,0,0::\ndot:0,128,0::\n')
    for i in range(3):
        numbers = mask(boxes(i)[0]) + 2 * mask(boxes(i)[1])
        objects = Image.fromarray(np.where(np.arange(96)[:, None] == 0, 255, numbers).astype(np.uint8), 'P')
        objects.putpalette(list(range(256)) * 3)
        objects.save(tmp_path/f'SegmentationObject/{i}.png')
        kinds = Image.fromarray(np.uint8(table)[numbers]) if colours else Image.fromarray(np.uint8([0, 15, 7])[numbers], 'P')
        if not colours: kinds.putpalette(list(range(256)) * 3)
        kinds.save(tmp_path/f'SegmentationClass/{i}.png')
    (tmp_path/'ImageSets/Segmentation/train.txt').write_text('0\n1\n'); (tmp_path/'ImageSets/Segmentation/val.txt').write_text('2\n')
    train, valid = open_dataset(tmp_path)
    assert (len(train), len(valid)) == (2, 1) and areas(tmp_path) == [AREAS] * 3
    assert [train.classes[k] for k in train[0].instances.labels] == (['cell', 'dot'] if colours else ['person', 'car'])
    assert set(read_voc(tmp_path)) == {'train', 'valid'}

def test_polygons_against_pillow():
    rng = np.random.default_rng(0)
    from scipy.ndimage import binary_dilation, binary_erosion
    for _ in range(100):
        angle = np.sort(rng.uniform(0, 2 * np.pi, rng.integers(3, 9)))
        xy = np.stack([40 + 25 * np.cos(angle), 30 + 20 * np.sin(angle)], 1)
        im = Image.new('1', (80, 60)); ImageDraw.Draw(im).polygon([tuple(p) for p in xy], fill=1)
        theirs, ours = np.asarray(im), polygon_mask(xy.ravel().tolist(), (60, 80)).astype(bool)
        assert ours[binary_erosion(theirs, iterations=2)].all() and not ours[~binary_dilation(theirs, iterations=2)].any()


# anything at all in a json
BAD = [None, True, -1, 0, 1.5, 1e300, float('nan'), '', 'x', '7', 'é', '../..', '/etc/passwd', [], {}, [[]], [1, 2], [[1, 2], [3, 4], [5, 6]], '[1,2]', "b'x'", 10**30, {'a': 1}, ['x'],
       [None], [[None] * 8], 'a\0b', 'x' * 5000]

def paths(x, at=()):
    yield at
    for k, v in x.items() if isinstance(x, dict) else enumerate(x) if isinstance(x, list) else (): yield from paths(v, at + (k,))

def mutate(found, rng):
    found = copy.deepcopy(found)
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        places = [p for p in paths(found) if p]
        if not places: break
        at = rng.choice(places)
        x = found
        for k in at[:-1]: x = x[k]
        act = rng.random()
        if act < .15 and isinstance(x, dict): x.pop(at[-1])
        elif act < .25 and isinstance(x, list): x.append(copy.deepcopy(x[at[-1]]))
        else: x[at[-1]] = copy.deepcopy(rng.choice(BAD))
    return found

@pytest.mark.parametrize('kind', ['polygons', 'runs', 'via', 'labelme'])
def test_values_changed_at_random(tmp_path, kind):
    "100 changes: read, or refused in a sentence; no other error, no warning, nothing outside of the output"
    folder = dict(polygons=lambda f: coco(f), runs=lambda f: coco(f, seg=SEGMENTATIONS['runs']), via=lambda f: via(f, regions()), labelme=lambda f: labelme(f))[kind](tmp_path/'set')
    file = folder/dict(polygons='annotations.json', runs='annotations.json', via='via_region_data.json', labelme='img_0.json')[kind]
    right, rng, opened = json.loads(file.read_text()), random.Random(0), 0
    with warnings.catch_warnings():
        warnings.simplefilter('error', RuntimeWarning)
        for n in range(100):
            file.write_text(json.dumps(mutate(right, rng)))
            assert all(str(f) for f in examine(folder))
            try: open_dataset(folder); opened += 1
            except DataError as e: assert len(str(e)) < 6000
            try: repair(folder, tmp_path/f'out{n}')
            except DataError: assert not (tmp_path/f'out{n}').exists()
    assert 20 < opened < 100 and {p.name.rstrip('0123456789') for p in tmp_path.iterdir()} <= {'set', 'out'}

def test_subsets_with_an_underscore_in_their_name(tmp_path):
    "Case cvat_subset_* and its kind: the same file names in each job"
    for job in ('job_1', 'job_2'): coco(tmp_path, place=lambda i: f'images/{job}/img_{i}.png', file=f'annotations/instances_{job}.json')
    for job in ('job_1', 'job_2'):
        read = read_coco_json(tmp_path/f'annotations/instances_{job}.json')
        assert not read.faults and {r.path.parent.name for r in read.images} == {job}

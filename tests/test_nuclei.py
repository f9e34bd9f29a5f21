"Nuclei: Kaggle's layout through the one reader, splits, run lengths, and the real set where it is"
import csv, hashlib, json, pickle, zipfile
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image
from pycocotools import mask as coco_mask

from maskrcnn_edu.data import DataError, InstanceDataset, Instances, examine, make_shapes, open_dataset, shapes_folder
from maskrcnn_edu.data.opening import RecordReader
from maskrcnn_edu.nuclei import (dsb_table, find_nuclei, load_nuclei, nuclei_source, read_split, remove_overlaps, rle_decode, rle_encode,
    submission_csv)

ZIP = find_nuclei()
real = pytest.mark.skipif(ZIP is None, reason='the zip of nuclei is not here; set MASKRCNN_EDU_NUCLEI to its path')
IDS = ['a1', 'b2', 'c3']

def read_nuclei(path):
    "All images of a set, read when asked for"
    source = nuclei_source(path)
    records = [r for half in source.halves.values() for r in half]
    return InstanceDataset(records, source.classes, RecordReader(source.classes), faults=source.faults)

def kaggle(folder, prefix='stage1_train/'):
    "Three images of two sizes with 2, 1 and 0 nuclei"
    for i, name in enumerate(IDS):
        h, w = (20, 30) if i else (16, 16)
        for kind in ('images', 'masks'): (folder/prefix/name/kind).mkdir(parents=True)
        Image.fromarray(np.full((h, w, 4), 50 * i + 20, np.uint8)).save(folder/prefix/name/'images'/f'{name}.png')
        for j in range(2 - i):
            mask = np.zeros((h, w), np.uint8)
            mask[2 + 5 * j:5 + 5 * j, 3:9] = 255
            Image.fromarray(mask).save(folder/prefix/name/'masks'/f'{j}.png')
    return folder

def zipped(folder, path):
    with zipfile.ZipFile(path, 'w') as z:
        for p in sorted(folder.rglob('*')): z.write(p, p.relative_to(folder))
    return path

@pytest.fixture
def folder(tmp_path): return kaggle(tmp_path/'set')

@pytest.fixture(params=['folder', 'zip', 'inner', 'bare zip'])
def source(request, tmp_path):
    "The layouts that people have"
    folder = kaggle(tmp_path/'set', '' if request.param == 'bare zip' else 'stage1_train/')
    if request.param == 'inner': return folder/'stage1_train'
    return zipped(folder, tmp_path/'set.zip') if 'zip' in request.param else folder

def test_layouts(source):
    ds = read_nuclei(source).preload()
    assert ds.names == IDS and ds.classes == ['background', 'nucleus'] and [s.image.shape for s in ds] == [(16, 16, 3), (20, 30, 3), (20, 30, 3)]
    assert [s.instances.boxes.tolist() for s in ds] == [[[3, 2, 9, 5], [3, 7, 9, 10]], [[3, 2, 9, 5]], []]
    assert all((s.instances.labels == 1).all() and s.instances.scores is None for s in ds)
    assert not [f for f in ds.faults if f.stops]

def test_reader_travels_to_other_processes(source):
    ds = pickle.loads(pickle.dumps(read_nuclei(source)))
    assert len(ds[0].instances) == 2

@pytest.mark.parametrize('mode', ['L', 'RGB', 'RGBA', 'P', 'LA', '1', 'I;16'])
def test_image_and_mask_kinds(folder, mode):
    pixels = np.zeros((16, 16), np.uint16 if mode == 'I;16' else np.uint8)
    pixels[4:8, 5:9] = 60000 if mode == 'I;16' else 255
    im = Image.fromarray(pixels) if mode == 'I;16' else Image.fromarray(pixels).convert(mode)
    for place in ('images/a1.png', 'masks/0.png'): im.save(folder/'stage1_train/a1'/place)
    s = read_nuclei(folder)[0]
    assert s.image.dtype == np.uint8 and s.image.shape == (16, 16, 3) and s.image.max() == 255
    assert (s.instances.masks()[0] == (pixels > 0)).all() and s.instances.boxes[0].tolist() == [5, 4, 9, 8]

@pytest.mark.parametrize('place,damage,words', [('images/a1.png', lambda b: b[:40], 'cannot be read'), ('masks/0.png', lambda b: b'', 'is empty'),
    ('masks/0.png', lambda b: b[:50], 'cannot be read')])
def test_damage(folder, tmp_path, place, damage, words):
    file = folder/'stage1_train/a1'/place
    file.write_bytes(damage(file.read_bytes()))
    for source in (folder, zipped(folder, tmp_path/'set.zip')):
        with pytest.raises(DataError, match=f'{file.name}.*{words}'): read_nuclei(source).preload()
        assert any(words in f.fault and f.stops for f in examine(source))

def test_damaged_member_of_a_zip(folder, tmp_path):
    path = zipped(folder, tmp_path/'set.zip')
    with zipfile.ZipFile(path) as z: start = z.getinfo('stage1_train/a1/masks/0.png').header_offset + 80
    data = bytearray(path.read_bytes())
    data[start:start + 8] = bytes(8)
    path.write_bytes(data)
    with pytest.raises(DataError, match='zip is damaged.*a1/masks/0.png.*make it again'): read_nuclei(path)

def test_mask_of_another_size(folder):
    Image.fromarray(np.full((5, 6), 255, np.uint8)).save(folder/'stage1_train/a1/masks/0.png')
    with pytest.raises(DataError, match='0.png: the mask is 5x6 but the image is 16x16'): read_nuclei(folder).preload()

def test_empty_mask_is_reported(folder):
    Image.fromarray(np.zeros((16, 16), np.uint8)).save(folder/'stage1_train/a1/masks/0.png')
    ds = read_nuclei(folder)
    assert len(ds[0].instances) == 1 and [f.fault for f in ds.faults if f.action == 'object dropped'] == ['mask 0.png: empty mask']

def test_not_nuclei(tmp_path, folder):
    with pytest.raises(DataError, match='no such'): read_nuclei(tmp_path/'none')
    with pytest.raises(DataError, match='no layout that is known'): read_nuclei(tmp_path/'set'/'stage1_train'/'a1'/'masks')
    (tmp_path/'x.zip').write_text('x')
    with pytest.raises(DataError, match='neither'): read_nuclei(tmp_path/'x.zip')
    Image.new('L', (4, 4)).save(folder/'stage1_train/a1/images/second.png')
    with pytest.raises(DataError, match='a1/images: 2 images with the same masks; leave one'): load_nuclei(folder)

def test_zip_that_climbs_out(folder, tmp_path):
    path = zipped(folder, tmp_path/'set.zip')
    with zipfile.ZipFile(path, 'a') as z: z.writestr('../out.png', 'x')
    with pytest.raises(DataError, match='climbs out'): read_nuclei(path)

def test_macos_litter_is_ignored(folder):
    for p in ('__MACOSX/stage1_train/a1/images', 'stage1_train/a1/images'):
        (folder/p).mkdir(parents=True, exist_ok=True)
        (folder/p/'._a1.png').write_bytes(b'litter')
    assert read_nuclei(folder).names == IDS

def split_json(path, train, valid):
    path.write_text(json.dumps({k: [{'id': i, 'kind': 'fluorescence'} for i in v] for k, v in (('train', train), ('valid', valid))}))
    return path

def test_splits(folder, tmp_path):
    train, valid, kinds = load_nuclei(folder)
    assert (len(train), len(valid)) == (2, 1) and set(kinds.values()) == {'unknown'} and load_nuclei(folder)[1].names == valid.names
    split_json(folder/'dsb2018_split.json', ['c3', 'a1'], ['b2'])
    train, valid, kinds = load_nuclei(folder)
    assert (train.names, valid.names, kinds) == (['c3', 'a1'], ['b2'], {i: 'fluorescence' for i in IDS})
    with pytest.raises(DataError, match='1 images.*zz'): load_nuclei(folder, split=split_json(tmp_path/'s.json', ['a1', 'zz'], ['b2']))
    with pytest.raises(DataError, match='a1 is in both'): read_split(split_json(tmp_path/'s.json', ['a1'], ['a1']))
    with pytest.raises(DataError, match='no such'): read_split(tmp_path/'none.json')
    for text, words in (('{', 'not a readable json'), ('[]', 'not a split'), ('{"train": [1]}', 'not a split')):
        (tmp_path/'s.json').write_text(text)
        with pytest.raises(DataError, match=words): read_split(tmp_path/'s.json')

def test_a_split_of_another_set_beside_it_is_left_alone(folder):
    "dsb2018_split.json beside one's own images must not stop them"
    split_json(folder/'dsb2018_split.json', ['x', 'y'], ['z'])
    train, valid, _ = load_nuclei(folder)
    assert (len(train), len(valid)) == (2, 1)

masks = hnp.arrays(bool, st.tuples(st.integers(1, 9), st.integers(1, 11)))

@given(masks)
@settings(max_examples=300, deadline=None)
def test_rle_round_trip(mask):
    text = rle_encode(mask)
    assert (rle_decode(text, mask.shape) == mask).all()
    numbers = np.array(text.split(), int)
    covered = [p for s, n in numbers.reshape(-1, 2) for p in range(s, s + n)]
    assert covered == (np.flatnonzero(mask.T.ravel()) + 1).tolist()  # Kaggle's rule, word by word
    assert numbers[1::2].sum() == coco_mask.area(coco_mask.encode(np.asfortranarray(mask, np.uint8)))

@pytest.mark.parametrize('text', ['1', '0 1', '9 2', '5 -1', '1 2 3'])
def test_bad_rle(text):
    with pytest.raises(DataError): rle_decode(text, (3, 3))

@given(hnp.arrays(bool, st.tuples(st.integers(0, 5), st.integers(1, 9), st.integers(1, 11))), st.integers(0, 6), st.sampled_from([0, .25, .5, 1]))
@settings(max_examples=200, deadline=None)
def test_no_pixel_twice(m, min_area, min_share):
    scores = np.linspace(.9, .1, len(m))
    found = Instances.from_masks(m, np.arange(len(m)) + 1, scores)
    alone = remove_overlaps(found, min_area, min_share)
    left = [m[i] & ~m[:i].any(0) for i in range(len(m))]  # better scores come first
    expected = [(i, x) for i, x in enumerate(left) if x.sum() >= max(min_area, 1) and x.sum() >= min_share * m[i].sum()]
    assert alone.labels.tolist() == [i + 1 for i, _ in expected] and np.allclose(alone.scores, scores[[i for i, _ in expected]])
    assert (alone.masks() == np.array([x for _, x in expected], bool).reshape(-1, *m.shape[1:])).all()

def test_submission(tmp_path):
    a, b = (s.instances for s in make_shapes(2, seed=1))
    a, nothing = replace(a, scores=np.linspace(.9, .5, len(a))), b[[False] * len(b)]
    rows = list(csv.reader(submission_csv(tmp_path/'deep'/'s.csv', {'a': a, 'none': nothing, 'b': b}).open()))
    assert rows[0] == ['ImageId', 'EncodedPixels'] and ['none', ''] in rows
    for name, x in (('a', a), ('b', b)):
        decoded = [rle_decode(r[1], x.size) for r in rows if r[0] == name]
        assert (np.array(decoded) == remove_overlaps(x).masks()).all() and np.sum(decoded, 0).max() == 1

def test_table_by_kind(folder):
    ds = read_nuclei(folder)
    right = {s.name: replace(s.instances, scores=np.ones(len(s.instances))) for s in ds}
    table = dsb_table(ds, right, {'a1': 'x', 'b2': 'y', 'c3': 'y'})
    assert table['dsb'] == 1 and {k: v['images'] for k, v in table['by_kind'].items()} == {'x': 1, 'y': 2}
    half = right | {'a1': right['a1'][[0]]}
    table = dsb_table(ds, half, {'a1': 'x', 'b2': 'y', 'c3': 'y'})
    assert table['by_kind']['x']['dsb'] == .5 and table['by_kind']['y']['dsb'] == 1 and table['dsb'] == pytest.approx(2.5 / 3)
    with pytest.raises(ValueError, match='1 images have no prediction, such as a1'): dsb_table(ds, {k: half[k] for k in ('b2', 'c3')})
    json.dumps(table, allow_nan=False)

@real
def test_real_set():
    train, valid, kinds = load_nuclei(ZIP)
    assert (len(train), len(valid)) == (504, 80) and not set(train.names) & set(valid.names)
    assert Counter(kinds[i] for i in valid.names) == {'fluorescence': 65, 'histology': 13, 'brightfield': 2}
    assert sum(len(r.objects) for d in (train, valid) for r in d.records) == 25666
    biggest = max(train.records + valid.records, key=lambda r: len(r.objects))
    s = next(d for d in (train, valid) if biggest in d.records)
    s = s[s.records.index(biggest)]
    assert len(s.instances) == len(biggest.objects) == 375 and s.image.shape == (603, 1272, 3)
    assert [int(c.sum()) for c in s.instances.crops] == [int(coco_mask.area(r)) for r in s.instances.rles()]

@real
def test_real_masks_against_a_plain_reading():
    ds = read_nuclei(ZIP)
    with zipfile.ZipFile(ZIP) as z:
        names = sorted(z.namelist())
        for i in (0, 100, 300):
            inside = [n for n in names if f'/{ds.names[i]}/' in n and n.endswith('.png')]
            image, = (n for n in inside if '/images/' in n)
            with z.open(image) as f: assert (ds[i].image == np.array(Image.open(f))[..., :3]).all()
            masks, files = ds[i].instances.masks(), [n for n in inside if '/masks/' in n]
            assert len(masks) == len(files)
            for name, mask in zip(files, masks):
                with z.open(name) as f: assert (np.array(Image.open(f)) > 0).tolist() == (mask > 0).tolist()

@real
def test_the_same_bytes_as_before_the_data_room():
    "Digests of what training is given, recorded when each layout had a reader of its own"
    *both, kinds = load_nuclei(ZIP)
    assert [digest(d) for d in both] == ['545ad7c7837b0f3d38b8', 'a30c4d696a0278ffe51a']
    assert hashlib.sha256(str(sorted(kinds.items())).encode()).hexdigest()[:20] == '95fe753b4f2e6e908f00'

def test_the_same_shapes_as_before_the_data_room():
    assert [digest(d) for d in open_dataset(shapes_folder())] == ['ad7d694a5dacf8d8c5ff', '75e5b05136fa7bebd4db']

def digest(dataset):
    "Of pixels, labels, boxes and masks, in their order"
    h = hashlib.sha256(str(dataset.classes).encode())
    for s in dataset:
        h.update(s.name.encode())
        for x in (s.image, s.instances.labels, s.instances.boxes, s.instances.origins, *s.instances.crops):
            x = np.ascontiguousarray(x)
            h.update(str((x.shape, x.dtype.str)).encode())
            h.update(x.tobytes())
    return h.hexdigest()[:20]

"Bad input to the data reader, and properties of masks, each against code that we did not write"
import io, json, shutil, stat, zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image, features
from pycocotools import mask as coco_mask
from skimage.draw import polygon2mask

from maskrcnn_edu.data import (CLASSES, LEVELS, DataError, Instances, InstanceDataset, check, coco_rle, load_splits, make_shapes,
    make_shapes_data, open_data, png_bytes, read_coco, read_image, runs, shapes_folder, write_coco)

SAMPLES = make_shapes(3, seed=9)

@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch): monkeypatch.setenv('MASKRCNN_EDU_CACHE', str(tmp_path/'cache'))

@pytest.fixture
def coco(tmp_path): return write_coco(SAMPLES, tmp_path/'set', 'annotations_all', CLASSES)

def edit(path, change):
    found = json.loads(path.read_text())
    change(found)
    path.write_text(json.dumps(found))
    return path

def images(path): return sorted((path.parent.parent/'images').glob('*.png'))

def fails(path, *words):
    with pytest.raises(DataError) as e: read_coco(path).preload()
    for w in words: assert w in str(e.value), str(e.value)

def faults(path, *words):
    ds = read_coco(path).preload()
    assert len(ds.faults) == 1
    for w in words: assert w in str(ds.faults[0])
    return ds

# -- what stops the reading

@pytest.mark.parametrize('key', ['images', 'annotations', 'categories'])
def test_missing_key(coco, key): fails(edit(coco, lambda d: d.pop(key)), coco.name, f"'{key}'")

def test_not_json(coco):
    coco.write_text('{"images": [')
    fails(coco, coco.name, 'not a readable json')

def test_binary_is_not_json(coco):
    coco.write_bytes(b'\xff\xfe\x00garbage')
    fails(coco, coco.name, 'not a readable json')

def test_no_json(tmp_path): fails(tmp_path/'none.json', 'none.json', 'no such file')

def test_unknown_category(coco):
    fails(edit(coco, lambda d: d['annotations'][1].update(category_id=77)), coco.name, 'annotation 2', '77')

def test_unknown_image(coco):
    fails(edit(coco, lambda d: d['annotations'][1].update(image_id=77)), coco.name, 'annotation 2', '77')

@pytest.mark.parametrize('kind', ['images', 'annotations', 'categories'])
def test_duplicate_id(coco, kind): fails(edit(coco, lambda d: d[kind][1].update(id=1)), coco.name, 'id 1', 'twice')

@pytest.mark.parametrize('kind,key', [('images', 'file_name'), ('annotations', 'image_id'), ('annotations', 'category_id'), ('annotations', 'id')])
def test_missing_field(coco, kind, key): fails(edit(coco, lambda d: d[kind][0].pop(key)), coco.name, f"'{key}'")

def test_missing_image(coco):
    file = images(coco)[1]
    file.unlink()
    fails(coco, file.name, 'missing')

@pytest.mark.parametrize('damage', [lambda b: b[:len(b) // 2], lambda b: b'', lambda b: b'not a png', lambda b: b[:60] + bytes(40) + b[100:]])
def test_damaged_png(coco, damage):
    file = images(coco)[1]
    file.write_bytes(damage(file.read_bytes()))
    fails(coco, file.name, 'cannot be read')
    assert any('cannot be read' in f.fault for f in check(coco.parent.parent))

def test_mask_of_another_size(coco):
    rle = coco_mask.encode(np.asfortranarray(np.ones((20, 30), np.uint8)))
    rle['counts'] = rle['counts'].decode()
    fails(edit(coco, lambda d: d['annotations'][0].update(segmentation=rle)), images(coco)[0].name, '20x30', '128x128')

def test_image_of_another_size(coco):
    images(coco)[0].write_bytes(png_bytes(np.zeros((64, 100, 3), np.uint8)))
    fails(coco, images(coco)[0].name, '64x100', '128x128')

# -- what is mended or left out, and reported

def n_objects(ds): return sum(len(s.instances) for s in ds)
N = sum(len(s.instances) for s in SAMPLES)

@pytest.mark.parametrize('segmentation,words', [
    (dict(size=[128, 128], counts=[128 * 128]), 'empty mask'), ([[500, 500, 510, 500, 510, 510]], 'empty mask'), ([], 'no segmentation'),
    (None, 'no segmentation'), ([[3, 4, 5, 6]], 'less than three points'), ([[3, 4, 5, 6, float('nan'), 3]], 'far outside'),
    ([[3, 4, 1e12, 6, 5, 3]], 'far outside'), (dict(size=[128, 128], counts=[5, 5]), 'add up'), (dict(size=[128, 128], counts='~~'), 'no run length'), (dict(size=[128, 128], counts=''), 'decoded'),
    (dict(size=[128, 128], counts='aa'), 'add up'), (dict(size=[128, 128], counts=[-5, 128 * 128 + 5]), 'add up'), (dict(size=[128, 128], counts='(('), 'no run length'),
    ('text', 'decoded'), ([['a', 'b', 'c', 'd', 'e', 'f']], 'decoded'), (dict(counts=[1, 2]), 'decoded')])
def test_bad_mask(coco, segmentation, words):
    ds = faults(edit(coco, lambda d: d['annotations'][0].update(segmentation=segmentation)), images(coco)[0].name, 'annotation 1', words, 'dropped')
    assert n_objects(ds) == N - 1 and len(ds) == 3

def set_box(box): return lambda d: d['annotations'][0].update(bbox=box, segmentation=[[100, 100, 150, 100, 150, 120, 100, 120]])

def test_box_reaches_out(coco):
    ds = faults(edit(coco, set_box([100, 100, 50, 20])), 'annotation 1', 'reaches out', 'clipped')
    assert ds[0].instances.boxes[0].tolist() == [100, 100, 128, 120] and n_objects(ds) == N

@pytest.mark.parametrize('box', [[200, 10, 20, 20], [-30, 10, 20, 20], [10, 10, 0, 5], [10, 10, -5, 5]])
def test_box_outside(coco, box):
    ds = faults(edit(coco, set_box(box)), 'annotation 1', 'outside', 'dropped')
    assert n_objects(ds) == N - 1

def test_xyxy_by_mistake(coco):
    ds = faults(edit(coco, lambda d: d['annotations'][0].update(bbox=[1, 1, 3, 3])), 'does not fit', 'from the mask')
    assert (ds[0].instances.boxes == SAMPLES[0].instances.boxes).all()

@pytest.mark.parametrize('box', [[1, 2, 3], 'text', [None] * 4, [float('nan'), 1, 2, 3]])
def test_broken_box(coco, box):
    ds = faults(edit(coco, lambda d: d['annotations'][0].update(bbox=box)), 'annotation 1', 'not four numbers', 'from the mask')
    assert (ds[0].instances.boxes == SAMPLES[0].instances.boxes).all()

def test_crowd_is_skipped(coco):
    assert n_objects(faults(edit(coco, lambda d: d['annotations'][0].update(iscrowd=1)), 'crowd', 'skipped')) == N - 1

def test_image_without_objects_is_kept(coco):
    ds = read_coco(edit(coco, lambda d: d.update(annotations=[]))).preload()
    assert len(ds) == 3 and ds.faults == [] and ds[0].instances.masks().shape == (0, 128, 128) and ds[0].instances.boxes.shape == (0, 4)
    assert ds[0].instances.label_map().max() == 0 and ds[0].instances.rles() == [] and len(ds[0].instances.window(0, 0, 9, 9)) == 0

def test_faults_are_counted_once(coco):
    ds = read_coco(edit(coco, lambda d: d['annotations'][0].update(iscrowd=1)), cache=False)
    ds.preload().preload()
    assert len(ds.faults) == 1 and ds.subset([0]).faults == ds.faults

# -- folders, zips and splits

def zipped(folder, path, prefix=''):
    with zipfile.ZipFile(path, 'w') as z:
        for p in sorted(Path(folder).rglob('*')):
            if p.is_file(): z.write(p, prefix + p.relative_to(folder).as_posix())
    return path

@pytest.mark.parametrize('prefix', ['', 'myset/'])
def test_zip(coco, tmp_path, prefix):
    train, valid = load_splits(zipped(coco.parent.parent, tmp_path/'set.zip', prefix), valid=.34)
    assert sorted(train.names + valid.names) == [s.name for s in SAMPLES] and len(valid) == 1
    assert n_objects(train) + n_objects(valid) == N

@pytest.mark.parametrize('name', ['../outside.txt', 'a/../../outside.txt', '/outside.txt', '..\\outside.txt', 'c:/outside.txt'])
def test_zip_climbs_out(tmp_path, name):
    with zipfile.ZipFile(tmp_path/'bad.zip', 'w') as z: z.writestr('inside.txt', 'x'), z.writestr(name, 'x')
    before = set(tmp_path.rglob('*'))
    with pytest.raises(DataError, match='climbs out.*nothing was unpacked'): open_data(tmp_path/'bad.zip')
    left = [p for p in set(tmp_path.rglob('*')) - before if p.is_file()]
    assert left == []

def test_zip_with_a_link(tmp_path):
    link = zipfile.ZipInfo('link')
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(tmp_path/'bad.zip', 'w') as z: z.writestr(link, '/etc')
    with pytest.raises(DataError, match='climbs out'): open_data(tmp_path/'bad.zip')

def test_damaged_zip(coco, tmp_path):
    path = zipped(coco.parent.parent, tmp_path/'set.zip')
    data = bytearray(path.read_bytes())
    data[60:3000] = bytes(2940)
    path.write_bytes(data)
    with pytest.raises(DataError, match='set.zip.*damaged'): open_data(path)

def test_not_a_zip_and_not_there(tmp_path):
    (tmp_path/'a.zip').write_text('x')
    with pytest.raises(DataError, match='neither'): open_data(tmp_path/'a.zip')
    with pytest.raises(DataError, match='no such'): open_data(tmp_path/'b.zip')
    with pytest.raises(DataError, match='annotations'): load_splits(tmp_path)

def test_layouts(tmp_path):
    root = tmp_path/'set'
    path = write_coco(SAMPLES, root, 'all', CLASSES)
    shutil.move(path, root/'annotations.json'), shutil.rmtree(root/'annotations')
    train, valid = load_splits(root)
    again, _ = load_splits(root)
    assert (len(train), len(valid)) == (2, 1) and train.names == again.names and not set(train.names) & set(valid.names)
    write_coco(SAMPLES[:2], root, 'train', CLASSES), write_coco(SAMPLES[2:], root, 'val', CLASSES)
    assert [len(d) for d in load_splits(root)] == [2, 1]

def test_splits_must_agree(tmp_path):
    write_coco(SAMPLES[:2], tmp_path, 'train', CLASSES)
    edit(write_coco(SAMPLES[2:], tmp_path, 'valid', CLASSES), lambda d: d['categories'][0].update(name='box'))
    with pytest.raises(DataError, match='differ'): load_splits(tmp_path)

def test_category_ids_with_gaps(coco):
    def change(d):
        for c in d['categories']: c['id'] = c['id'] * 7
        for a in d['annotations']: a['category_id'] = a['category_id'] * 7
    ds = read_coco(edit(coco, change))
    assert ds.classes == CLASSES and (ds[0].instances.labels == SAMPLES[0].instances.labels).all()

@pytest.mark.parametrize('mode', ['L', 'RGB', 'RGBA', 'P', 'LA', '1', 'I;16', 'I', 'F', 'CMYK'])
def test_image_kinds(mode, tmp_path):
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
    deep = {'I;16': np.uint16, 'I': np.int32, 'F': np.float32}
    im = Image.fromarray(grey.astype(deep[mode]) * 10) if mode in deep else Image.fromarray(grey).convert(mode)
    im.save(tmp_path/'a.tif')
    image = read_image(tmp_path/'a.tif')
    assert image.shape == (8, 8, 3) and image.dtype == np.uint8 and image.max() > 200 and (image[..., 0] == image[..., 1]).all()

# -- the shapes

def test_committed_shapes_are_what_the_seed_draws(tmp_path):
    make_shapes_data(tmp_path)
    folder = Path(__file__).parent.parent/'shapes_data'
    ours, theirs = ({p.relative_to(f) for p in f.rglob('*') if p.is_file()} for f in (tmp_path, folder))
    assert ours == theirs and len(ours) == 602
    for p in ours:
        if p.suffix == '.png': assert (read_image(tmp_path/p) == read_image(folder/p)).all()
        else: assert (tmp_path/p).read_bytes() == (folder/p).read_bytes()
    # the pixels are ours; their packing is zlib's, so the bytes agree where the committed files survive a rewrite
    probe = sorted(p for p in ours if p.suffix == '.png')[0]
    if png_bytes(read_image(folder/probe)) != (folder/probe).read_bytes(): pytest.skip(f"another zlib here ({features.version('zlib')})")
    assert all((tmp_path/p).read_bytes() == (folder/p).read_bytes() for p in ours)

def test_shapes_folder_is_drawn_again_where_it_is_missing(tmp_path, monkeypatch):
    import maskrcnn_edu
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(maskrcnn_edu, '__file__', str(tmp_path/'site'/'maskrcnn_edu'/'__init__.py'))
    folder = shapes_folder()
    assert folder.parent == tmp_path/'cache' and folder == shapes_folder()
    assert [len(d) for d in load_splits(folder)] == [500, 100]

def test_the_classic_set_is_the_classic_set():
    train, valid = load_splits(Path(__file__).parent.parent/'shapes_data')
    assert len(train) == 500 and len(valid) == 100 and train.classes == CLASSES
    for s in [*train, *valid]:
        assert s.image.shape == (128, 128, 3) and 1 <= len(s.instances) <= 4
        assert (s.instances.masks().sum(0) <= 1).all() and (s.instances.masks().sum((1, 2)) > 0).all()
    assert train.faults == valid.faults == []

@pytest.mark.parametrize('level', LEVELS)
def test_levels(level):
    a, b = make_shapes(20, seed=3, size=160, level=level), make_shapes(20, seed=3, size=160, level=level)
    assert all((x.image == y.image).all() and (x.instances.label_map() == y.instances.label_map()).all() for x, y in zip(a, b))
    assert {s.image.shape for s in a} == {(160, 160, 3)} and max(len(s.instances) for s in a) <= LEVELS[level].n_max

def test_too_small_images_are_refused():
    with pytest.raises(ValueError, match='size=40'): make_shapes(1, seed=0, size=40)

# -- properties

masks = hnp.arrays(bool, st.tuples(st.integers(0, 4), st.integers(1, 9), st.integers(1, 11)))

@given(masks)
@settings(max_examples=200, deadline=None)
def test_masks_and_rles_round_trip(m):
    got = Instances.from_masks(m, np.ones(len(m)))
    assert (got.masks() == m).all()
    assert all((coco_mask.decode(r) == x).all() for r, x in zip(got.rles(), m))
    theirs = [coco_mask.encode(np.asfortranarray(x.astype(np.uint8))) for x in m]
    assert [r['counts'] for r in got.rles()] == [t['counts'].decode() for t in theirs]
    for box, t in zip(got.boxes, theirs):
        x, y, w, h = coco_mask.toBbox(t)
        assert box.tolist() == ([x, y, x + w, y + h] if w else [0, 0, 0, 0])

@given(masks, st.integers(-5, 12), st.integers(-5, 12), st.integers(1, 9), st.integers(1, 9))
@settings(max_examples=300, deadline=None)
def test_a_window_is_a_slice(m, y, x, h, w):
    labels = np.arange(len(m)) + 1
    got = Instances.from_masks(m, labels, scores=labels / 10).window(y, x, h, w)
    padded = np.pad(m, ((0, 0), (20, 20), (20, 20)))[:, y + 20:, x + 20:][:, :h, :w]
    padded = np.pad(padded, ((0, 0), (0, h - padded.shape[1]), (0, w - padded.shape[2])))
    seen = padded.any((1, 2))
    expected = Instances.from_masks(padded[seen].reshape(-1, h, w), labels[seen])
    assert got.size == (h, w) and (got.masks() == expected.masks()).all() and (got.boxes == expected.boxes).all()
    assert (got.labels == labels[seen]).all() and np.allclose(got.scores, labels[seen] / 10)

@given(masks, st.randoms())
@settings(max_examples=200, deadline=None)
def test_label_map_gives_each_pixel_to_the_best(m, random):
    scores = np.array([random.random() for _ in m])
    got = Instances.from_masks(m, np.ones(len(m)), scores).label_map()
    rank = np.empty(len(m), int)
    rank[np.lexsort([np.arange(len(m)), scores.astype(np.float32)])] = np.arange(len(m)) + 1  # of two equals the later wins
    expected = np.where(m.any(0), (m * rank[:, None, None]).argmax(0) + 1, 0) if len(m) else np.zeros(m.shape[1:])
    assert (got == expected).all()

@given(hnp.arrays(np.int32, st.tuples(st.integers(1, 9), st.integers(1, 9)), elements=st.integers(0, 70000)))
@settings(max_examples=200, deadline=None)
def test_label_map_round_trip(label_map):
    got = Instances.from_label_map(label_map, label=3)
    ids = np.unique(label_map[label_map > 0])
    assert len(got) == len(ids) and (got.labels == 3).all()
    assert (got.label_map() == np.searchsorted(ids, label_map) + (label_map > 0) - np.where(label_map > 0, 0, np.searchsorted(ids, 0))).all()

@given(st.lists(st.tuples(st.integers(2, 38), st.integers(2, 28)), min_size=3, max_size=8, unique=True))
@settings(max_examples=200, deadline=None)
def test_polygons_against_skimage(points):
    "Two rasterisers may differ on the outline, so they must agree away from it"
    from skimage.morphology import dilation, footprint_rectangle
    points = np.array(points, float)
    centre = points.mean(0)
    points = points[np.argsort(np.arctan2(*(points - centre).T))]  # star-shaped: no self-crossing
    ours = coco_mask.decode(coco_rle([points.ravel().tolist()], (30, 40), ''))
    theirs = polygon2mask((30, 40), points[:, ::-1])
    from skimage.draw import line
    edge = np.zeros((30, 40), bool)
    for a, b in zip(points.astype(int), np.roll(points, -1, 0).astype(int)): edge[line(a[1], a[0], b[1], b[0])] = True
    assert not ((ours != theirs) & ~dilation(edge, footprint_rectangle((3, 3)))).any()

def test_polygons_with_a_second_part(coco):
    parts = [[10, 10, 20, 10, 20, 20, 10, 20], [40, 40, 50, 40, 50, 50, 40, 50]]
    ds = read_coco(edit(coco, lambda d: d['annotations'][0].update(segmentation=parts, bbox=None)))
    expected = np.zeros((128, 128))
    expected[10:20, 10:20] = expected[40:50, 40:50] = 1
    assert (ds[0].instances.masks()[0] == expected).all() and ds[0].instances.boxes[0].tolist() == [10, 10, 50, 50]

def test_uncompressed_rle(coco):
    s = SAMPLES[0].instances
    counts = runs(s.crops[0], s.origins[0], s.size)
    ds = read_coco(edit(coco, lambda d: d['annotations'][0].update(segmentation=dict(size=[128, 128], counts=counts))))
    assert (ds[0].instances.masks() == s.masks()).all()

def test_pycocotools_reads_what_we_write(coco):
    import contextlib
    from pycocotools.coco import COCO
    with contextlib.redirect_stdout(io.StringIO()): api = COCO(str(coco))
    for i, s in enumerate(SAMPLES, 1):
        anns = api.loadAnns(api.getAnnIds(i))
        assert (np.stack([api.annToMask(a) for a in anns]) == s.instances.masks()).all()
        assert [a['area'] for a in anns] == s.instances.masks().sum((1, 2)).tolist()

def test_same_samples_same_bytes(tmp_path):
    for d in 'ab': write_coco(SAMPLES, tmp_path/d, 'train', CLASSES)
    files = [p.relative_to(tmp_path/'a') for p in (tmp_path/'a').rglob('*') if p.is_file()]
    assert len(files) == 4 and all((tmp_path/'a'/p).read_bytes() == (tmp_path/'b'/p).read_bytes() for p in files)

def test_subset_and_cache(coco):
    ds = read_coco(coco)
    assert ds[0] is ds[0] and ds.subset([2, 0])[1] is ds[0] and ds.subset([2, 0]).names == [SAMPLES[2].name, SAMPLES[0].name]
    fresh = read_coco(coco, cache=False)
    assert fresh[0] is not fresh[0] and isinstance(fresh.subset([0]), InstanceDataset) and fresh.subset([0]).store is None
    with pytest.raises(IndexError): ds[3]

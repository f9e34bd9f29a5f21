"Masks, label maps and folders of them: every spelling and type comes back to the pixel, or one sentence says why not"
import io, json, shutil, warnings
from pathlib import Path

import imagecodecs
import numpy as np
import pytest
import tifffile
from hypothesis import given, settings, strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image
from pycocotools import mask as coco_mask
from scipy import ndimage
from skimage.draw import ellipse, line, polygon2mask

from fuzz import mutations, one_sentence, within
from maskrcnn_edu.data import DataError, Instances, examine, open_dataset
from maskrcnn_edu.data.folders import label_pairs, mask_class, plain_stem, read_label_folders, read_mask_folders
from maskrcnn_edu.data.label_maps import read_label_map
from maskrcnn_edu.data.masks import draw_ellipse, draw_file, draw_segmentation, has_flat_greys, polygon_mask, runs, unpack_counts

CASES = 40   # of each format in the suite; 1,000 of each were run once

@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch): monkeypatch.setenv('MASKRCNN_EDU_CACHE', str(tmp_path/'cache'))

# ---- masks and label maps at random

def random_mask(rng):
    "(H,W) bool with at least one pixel: one pixel, the whole picture, noise, rings, pieces, half planes"
    h, w = rng.integers(1, 40, 2)
    m, kind = np.zeros((h, w), bool), rng.integers(6)
    y, x = np.mgrid[:h, :w]
    if kind == 1: m[:] = True
    elif kind == 2: m = rng.random((h, w)) < rng.random()
    elif kind == 3:
        d = np.hypot(y - rng.integers(h), x - rng.integers(w))
        m = (d < 15) & (d > rng.integers(0, 8))
    elif kind == 4:
        for cy, cx in zip(rng.integers(0, h, 4), rng.integers(0, w, 4)): m |= abs(y - cy) + abs(x - cx) < 4
    elif kind == 5: m = x * rng.random() > y * rng.random()
    if not m.any(): m[rng.integers(h), rng.integers(w)] = True
    return m

def random_labels(rng):
    "(H,W) int: touching pieces, numbered 1 to at most 250"
    h, w = rng.integers(2, 40, 2)
    m = ndimage.label(rng.random((h, w)) < rng.uniform(.2, .8))[0]
    if rng.random() < .3: m = (np.mgrid[:h, :w] // rng.integers(3, 9)).sum(0) + 1   # no background, all touch
    return np.where(m <= 250, m, 0)

def same_objects(a, b):
    "The same objects and the same background, whatever their numbers are"
    pairs = np.unique(np.stack([a.ravel(), b.ravel()]), axis=1)
    return a.shape == b.shape and ((a == 0) == (b == 0)).all() and all(len(np.unique(p)) == pairs.shape[1] for p in pairs)

def counts_of(m): return runs(m, (0, 0), m.shape)
def packed_of(m): return coco_mask.encode(np.asfortranarray(m, np.uint8))['counts'].decode()

RLE = {
    'packed': lambda m: dict(size=list(m.shape), counts=packed_of(m)),
    'uncompressed': lambda m: dict(size=list(m.shape), counts=counts_of(m)),
    'list as text': lambda m: dict(size=list(m.shape), counts=str(counts_of(m))),
    'bytes as text': lambda m: dict(size=list(m.shape), counts=str(packed_of(m).encode())),
    'inside a list': lambda m: [dict(size=list(m.shape), counts=packed_of(m))],
    'numbers as text': lambda m: dict(size=list(map(str, m.shape)), counts=list(map(str, counts_of(m)))),
    'floats': lambda m: dict(size=list(map(float, m.shape)), counts=list(map(float, counts_of(m)))),
    'without size': lambda m: dict(counts=counts_of(m)),
    'all of it as text': lambda m: json.dumps(dict(size=list(m.shape), counts=packed_of(m))),
}

def rle_comes_back(name, n, seed=0):
    rng = np.random.default_rng(seed)
    for _ in range(n):
        m = random_mask(rng)
        found = draw_segmentation(RLE[name](m), m.shape)
        assert found.notes == () and (found.mask == m).all()

@pytest.mark.parametrize('name', RLE)
def test_run_lengths_come_back(name): rle_comes_back(name, CASES)

def pillow(x, path, mode=None, **kwargs): (Image.fromarray(x) if mode is None else Image.fromarray(x).convert(mode)).save(path, **kwargs)
def two_colours(m, path):
    im = Image.fromarray(m.astype(np.uint8))
    im.putpalette([0, 0, 0, 128, 0, 0])
    im.save(path)

MASK_FILES = {
    'png 255': ('png', lambda m, p: pillow(m * np.uint8(255), p)),
    'png 1': ('png', lambda m, p: pillow(m * np.uint8(1), p)),
    'png bits': ('png', lambda m, p: pillow(m, p)),
    'png 16': ('png', lambda m, p: p.write_bytes(imagecodecs.png_encode(m * np.uint16(40000)))),
    'png palette': ('png', two_colours),
    'png red': ('png', lambda m, p: pillow(np.dstack([m * np.uint8(255), m * np.uint8(0), m * np.uint8(0)]), p)),
    'png LA': ('png', lambda m, p: pillow(m * np.uint8(255), p, 'LA')),
    'png RGBA, opaque': ('png', lambda m, p: pillow(m * np.uint8(255), p, 'RGBA')),
    'png RGBA, white on transparent': ('png', lambda m, p: pillow(np.dstack([np.full((*m.shape, 3), 255, np.uint8), m * np.uint8(255)]), p)),
    'bmp': ('bmp', lambda m, p: pillow(m * np.uint8(255), p)),
    'gif': ('gif', lambda m, p: pillow(m * np.uint8(255), p)),
    'webp, lossless': ('webp', lambda m, p: pillow(m * np.uint8(255), p, 'RGB', lossless=True)),
} | {f'tif {k}': ('tif', lambda m, p, k=k: tifffile.imwrite(p, m.astype(k), photometric='minisblack')) for k in ('?', 'u1', 'u2', 'u4', 'u8', 'i1', 'i4', 'i8', 'f2', 'f4', 'f8')} | {
    'tif lzw': ('tif', lambda m, p: tifffile.imwrite(p, m * np.uint8(255), compression='lzw')),
    'tif planar': ('tif', lambda m, p: tifffile.imwrite(p, np.stack([m * np.uint8(255)] * 3), photometric='rgb', planarconfig='separate')),
} | {f'npy {k}': ('npy', lambda m, p, k=k: np.save(p, m.astype(k))) for k in ('?', 'u1', 'i8', 'f4')}

def file_comes_back(name, n, folder, seed=0):
    rng, (suffix, write) = np.random.default_rng(seed), MASK_FILES[name]
    path = Path(folder)/f'mask.{suffix}'
    for _ in range(n):
        m = random_mask(rng)
        write(m, path)
        with warnings.catch_warnings(action='error'): found = draw_file(path, m.shape)
        assert found.mask.shape == m.shape and (found.mask == m).all(), m.astype(int)

@pytest.mark.parametrize('name', MASK_FILES)
def test_mask_files_come_back(name, tmp_path): file_comes_back(name, CASES, tmp_path)

def indexed(x, path, **kwargs):
    im = Image.fromarray(x.astype(np.uint8))
    im.putpalette(np.random.default_rng(0).integers(0, 9, 768).tolist())   # many colours are alike
    im.save(path, **kwargs)

def colours(x):
    "A colour for each number, black for 0"
    k = np.arange(int(x.max()) + 1)
    return np.stack([k % 16 * 16, k // 16, (k > 0) * 9], 1).astype(np.uint8)[x]

LABEL_FILES = {f'npy {k}': ('npy', lambda x, p, k=k: np.save(p, x.astype(k))) for k in ('u1', 'u2', 'u4', 'u8', 'i2', 'i4', 'i8', 'f2', 'f4', 'f8', '>u2')} | {
    f'tif {k}': ('tif', lambda x, p, k=k: tifffile.imwrite(p, x.astype(k), photometric='minisblack')) for k in ('u1', 'u2', 'u4', 'u8', 'i2', 'i4', 'i8', 'f2', 'f4', 'f8')} | {
    'npy i4 from 0 on -1': ('npy', lambda x, p: np.save(p, (np.pad(x, 1) - 1).astype('i4'))),
    'tif f4 from 0 on -1': ('tif', lambda x, p: tifffile.imwrite(p, (np.pad(x, 1) - 1).astype('f4'))),
    'tif u4, large numbers': ('tif', lambda x, p: tifffile.imwrite(p, (x * 17_000_000).astype('u4'))),
    'npy u8, beyond int64': ('npy', lambda x, p: np.save(p, np.where(x > 0, x.astype('u8') + np.uint64(2**63), np.uint64(0)))),
    'tif lzw': ('tif', lambda x, p: tifffile.imwrite(p, x.astype('u2'), compression='lzw', predictor=True)),
    'tif planar RGB': ('tif', lambda x, p: tifffile.imwrite(p, np.moveaxis(colours(x), -1, 0), photometric='rgb', planarconfig='separate')),
    'png 8': ('png', lambda x, p: pillow(x.astype('u1'), p)),
    'png 16': ('png', lambda x, p: pillow((x * 250).astype('u2'), p)),
    'png palette': ('png', indexed),
    'gif': ('gif', lambda x, p: indexed(x, p, optimize=False)),
    'png LA': ('png', lambda x, p: pillow(x.astype('u1'), p, 'LA')),
    'png RGB': ('png', lambda x, p: pillow(colours(x), p)),
    'png RGBA': ('png', lambda x, p: pillow(np.dstack([colours(x), (x > 0) * np.uint8(255)]), p)),
    'png RGB 16, red': ('png', lambda x, p: p.write_bytes(imagecodecs.png_encode(np.dstack([x * 250, x * 0, x * 0]).astype('u2')))),
    'webp, lossless': ('webp', lambda x, p: pillow(colours(x), p, lossless=True)),
}

def labels_come_back(name, n, folder, seed=0):
    rng, (suffix, write) = np.random.default_rng(seed), LABEL_FILES[name]
    path = Path(folder)/f'map.{suffix}'
    for _ in range(n):
        x = random_labels(rng)
        if name in ('png RGBA', 'tif planar RGB', 'png RGB', 'webp, lossless'): x[0, 0] = 0   # without black the ground is guessed, and said
        write(x, path)
        if 'from 0' in name: x = np.pad(x, 1)
        with warnings.catch_warnings(action='error'): found = read_label_map(path, x.shape)
        assert len(found.notes) == ('from 0' in name) and found.numbers.dtype == np.int64 and same_objects(x, found.numbers), x
        ids = np.unique(found.numbers[found.numbers > 0])
        for i, m in zip(ids, Instances.from_label_map(found.numbers).masks(), strict=True): assert (m == (found.numbers == i)).all()

@pytest.mark.parametrize('name', LABEL_FILES)
def test_label_maps_come_back(name, tmp_path): labels_come_back(name, CASES, tmp_path)

# ---- run lengths and outlines against code that we did not write

masks = hnp.arrays(bool, st.tuples(st.integers(0, 4), st.integers(1, 9), st.integers(1, 11)))

@given(masks)
@settings(max_examples=200, deadline=None)
def test_masks_and_rles_round_trip(m):
    got = Instances.from_masks(m, np.ones(len(m)))
    theirs = [coco_mask.encode(np.asfortranarray(x, np.uint8)) for x in m]
    assert (got.masks() == m).all() and [r['counts'] for r in got.rles()] == [t['counts'].decode() for t in theirs]
    for box, t, x in zip(got.boxes, theirs, m):
        assert unpack_counts(t['counts'].decode()) == counts_of(x)
        left, top, w, h = coco_mask.toBbox(t)
        assert box.tolist() == ([left, top, left + w, top + h] if w else [0, 0, 0, 0])

@given(st.lists(st.tuples(st.integers(2, 38), st.integers(2, 28)), min_size=3, max_size=8, unique=True))
@settings(max_examples=200, deadline=None)
def test_polygons_against_skimage(points):
    "Two rasterisers may differ on the outline, so they must agree away from it"
    points = np.array(points, float)
    centre = points.mean(0)
    points = points[np.argsort(np.arctan2(*(points - centre).T))]   # star-shaped: no self-crossing
    ours, theirs = polygon_mask(points.ravel().tolist(), (30, 40)), polygon2mask((30, 40), points[:, ::-1])
    edge = np.zeros((30, 40), bool)
    for a, b in zip(points.astype(int), np.roll(points, -1, 0).astype(int)): edge[line(a[1], a[0], b[1], b[0])] = True
    assert not ((ours != theirs) & ~ndimage.binary_dilation(edge, np.ones((3, 3)))).any()

@given(st.lists(st.floats(-50, 90), min_size=6, max_size=30).filter(lambda x: len(x) % 2 == 0))
@settings(max_examples=200, deadline=None)
def test_polygons_are_those_of_pycocotools(numbers):
    "Also such as cross themselves or leave the picture; painted by us, without the warning of their decoder"
    with warnings.catch_warnings(action='ignore'): theirs = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects([numbers], 20, 30)))
    with warnings.catch_warnings(action='error'): assert (polygon_mask(numbers, (20, 30)) == theirs).all()

def test_ellipses_against_skimage():
    rng = np.random.default_rng(0)
    for _ in range(100):
        (x, y), (rx, ry), angle = rng.uniform(8, 22, 2), rng.uniform(1.5, 9, 2), rng.uniform(-4, 4)
        theirs = np.zeros((30, 32), bool)
        theirs[ellipse(y - .5, x - .5, ry, rx, theirs.shape, -angle)] = True
        assert (draw_ellipse((x, y), (rx, ry), angle, theirs.shape) == theirs).all()

# ---- spellings of one square, and what cannot be read

SQUARE = [4, 4, 10, 4, 10, 10, 4, 10]
PAIRS = [[4, 4], [10, 4], [10, 10], [4, 10]]

@pytest.mark.parametrize('segmentation, notes', [
    ([SQUARE], 0), (SQUARE, 0), (PAIRS, 0), ([PAIRS], 0), ([[PAIRS]], 0), ([[SQUARE]], 0), ([dict(x=x, y=y) for x, y in PAIRS], 0),
    ([[dict(x=x, y=y) for x, y in PAIRS]], 0), (json.dumps([SQUARE]), 0), ([SQUARE, SQUARE], 0), (list(map(str, SQUARE)), 1), ([list(map(str, SQUARE))], 1), (list(map(float, SQUARE)), 0),
    ([SQUARE, [7, 7]], 1), ([[7, 7], SQUARE], 1), ([SQUARE, [7, 7], [8, 8]], 1), ([SQUARE, [1, 1, 3, 3]], 1), ([SQUARE, []], 0), ([SQUARE, [1, 1, 3, 1, 3, 3, 1]], 1),
    ([SQUARE, 'text'], 1), ([SQUARE, None], 1), ([SQUARE, 7, 8], 1), ([SQUARE, [1, 1, 'x', 1, 3, 3]], 1), ([PAIRS, [7, 7]], 1), ([SQUARE, [1, 1, None, 1, 3, 3]], 1), ([SQUARE, dict(size=[20, 30], counts=[5, 5])], 1),
    ([SQUARE, dict(counts=None)], 1), ([SQUARE, dict(points=3)], 1), ([SQUARE, [float('nan')] * 6], 1), ([SQUARE, [1e300, 0, 0, 1e300, 5, 5]], 1)], ids=str)
def test_spellings_of_a_polygon(segmentation, notes):
    "Kinds of flat_polygon and stray_point: the square is read from all of them, and what is left out is named"
    found = draw_segmentation(segmentation, (20, 30))
    expected = np.zeros((20, 30))
    expected[4:10, 4:10] = 1
    assert (found.mask == expected).all() and len(found.notes) == notes

@pytest.mark.parametrize('segmentation, words', [
    ([], 'no segmentation'), (None, 'no segmentation'), ({}, 'neither a polygon nor run lengths'), (7, 'no segmentation'), ([[]], 'no segmentation'), ([[3, 4, 5, 6]], 'less than three points'),
    ([3, 4], 'less than three points'), ([[3, 4, 5, 6, float('nan'), 3]], 'not numbers'), ([[3, 4, 9, 4, 'x', 9]], 'not numbers'), ([[3, 4, 1e12, 6, 5, 3]], 'far outside'),
    ([[-2000, 0, 2000, 9] * 100], 'far outside'), (dict(size=[20, 30], counts=[5, 5]), 'add up'), (dict(size=[20, 30], counts='~~'), 'no run length'), (dict(size=[20, 30], counts='aa'), 'add up'),
    (dict(size=[20, 30], counts=''), 'add up'), (dict(size=[20, 30], counts=[-5, 605]), 'add up'), (dict(size=[20, 30], counts='(('), 'no run length'), ('text', 'text'),
    (dict(counts=[1, 2]), 'add up'), (dict(counts=[599, 1.5]), 'add up'), (dict(counts=[True, 599]), 'add up'), (dict(counts='1,2'), 'add|damaged'), (dict(counts="b'zz"), 'damaged'),
    (dict(counts="b'\\xff'"), 'damaged|decode'), (dict(counts=5), 'no list'), (dict(counts='o' * 10**6), '60 bits'), (dict(counts=[[600]]), 'add up'), (json.loads('[' * 500 + ']' * 500), 'brackets'),
    ('[' * 5000, 'text'), (dict(counts=[10**400]), 'add up'), ([[10**400] * 6], 'numbers|far')], ids=lambda x: str(x)[:30])
def test_bad_masks(segmentation, words):
    "Kinds of big_rle_wrong_sum and boxes_only: one reason, at once"
    with within(2), warnings.catch_warnings(action='error'), pytest.raises(ValueError, match=words): draw_segmentation(segmentation, (20, 30))

def test_masks_of_another_size_stop():
    for size in ([30, 20], [20, 31], ['20', 31.0]):
        with pytest.raises(DataError, match='the mask is .* but the image is 20x30'): draw_segmentation(dict(size=size, counts=[0, 600]), (20, 30))
    for size in (None, 'x', [20], [None, 30], 7): assert draw_segmentation(dict(size=size, counts=[0, 600]), (20, 30)).mask.all()

@given(st.recursive(st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5) | st.sampled_from([SQUARE, 'b\'', '12', [3, 4]]),
                    lambda x: st.lists(x, max_size=4) | st.dictionaries(st.sampled_from(['counts', 'size', 'x', 'y']), x, max_size=3), max_leaves=12))
@settings(max_examples=300, deadline=None)
def test_any_json_is_a_mask_or_a_reason(value):
    try: found = draw_segmentation(value, (20, 30))
    except ValueError as e: assert str(e) and '\n' not in str(e)
    else: assert found.mask.shape == (20, 30) and set(np.unique(found.mask)) <= {0, 1}

# ---- data sets as people have them: two squares of 576 and 900 pixels in each of three images

H, W = 120, 130
A, B = np.zeros((H, W), bool), np.zeros((H, W), bool)
A[10:34, 8:32] = B[60:90, 70:100] = True
LABELS = A * 1 + B * 2
NAMES = 'img_0', 'img_1', 'img_2'
GOOD = [[576, 900]] * 3

def put_images(folder, names=NAMES, where='images'):
    for i, name in enumerate(names):
        path = folder/where.format(name)/f'{name}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(i).integers(0, 99, (H, W, 3), dtype=np.uint8)).save(path)

def areas(folder):
    train, valid = open_dataset(folder)
    return train.classes, [sorted(int(c.sum()) for c in s.instances.crops) for s in [*train, *valid]]

def said(folder): return [f'{f.fault}; {f.action}' for f in examine(folder)]

def stops(folder, words):
    assert any(words in f.fault and f.stops for f in examine(folder)), said(folder)
    with pytest.raises(DataError, match=words): open_dataset(folder)

def label_set(folder, write, suffix='png', name='{}', x=LABELS):
    put_images(folder)
    (folder/'labels').mkdir()
    for n in NAMES: write(x, folder/'labels'/f'{name.format(n)}.{suffix}')
    return folder

def squeezed(x): return np.where(x == 2, 3_000_000_000, x)
def stack(x, p): tifffile.imwrite(p, np.stack([x, x * 0, x]).astype('u2'), photometric='minisblack')
def png16(*channels): return lambda x, p: p.write_bytes(imagecodecs.png_encode(np.dstack([x * k for k in channels]).astype('u2')))
def tif16(x, p): tifffile.imwrite(p, np.dstack([np.where(x == 2, 310, x * 300), x * 0, x * 0]).astype('u2'), photometric='rgb')
def with_ground(*colour): return lambda x, p: pillow(np.array([colour, (200, 0, 0), (0, 150, 60)], np.uint8)[x], p)

@pytest.mark.parametrize('suffix, write, notes', [
    pytest.param('tif', lambda x, p: tifffile.imwrite(p, x.astype('f8')), '', id='lab_f64'),
    pytest.param('tif', lambda x, p: tifffile.imwrite(p, squeezed(x).astype('u4')), '', id='lab_u32'),
    pytest.param('png', lambda x, p: pillow(x.astype('u1'), p, 'LA'), '', id='lab_la'),
    pytest.param('png', png16(300, 0, 0), '', id='lab_rgb16_png'),
    pytest.param('tif', tif16, '', id='lab_rgb16_tif'),
    pytest.param('png', with_ground(255, 255, 255), 'no black background', id='lab_white_ground'),
    pytest.param('png', with_ground(90, 91, 92), 'no black background', id='grey ground'),
    pytest.param('png', with_ground(0, 0, 0), '', id='black ground'),
    pytest.param('npy', lambda x, p: np.save(p, x.astype('i8')), '', id='npy i8'),
    pytest.param('npy', lambda x, p: np.save(p, np.where(x, x, np.nan)), 'no number', id='NaN as ground'),
    pytest.param('tif', lambda x, p: tifffile.imwrite(p, (x - (x == 0)).astype('i2')), 'negative numbers; read as background', id='-1 as ground'),
    pytest.param('tif', lambda x, p: tifffile.imwrite(p, (x - 1).astype('i2')), '0 as an object', id='-1 as ground, objects from 0'),
    pytest.param('npy', lambda x, p: np.save(p, (x - 1).astype('i8')), '0 as an object', id='npy, objects from 0'),
    pytest.param('npy', lambda x, p: np.save(p, np.choose(x, (-7, 0, 2**63 - 1))), 'numbered anew', id='objects 0 and the largest'),
    pytest.param('tif', lambda x, p: tifffile.imwrite(p, (x - 1).astype('f4')), '0 as an object', id='float, objects from 0'),
    pytest.param('npy', lambda x, p: np.save(p, np.where(x, x - 1, np.nan).astype('f2')), '(NaN); read as background, and 0 as an object', id='NaN as ground, objects from 0'),
    pytest.param('npy', lambda x, p: np.save(p, np.where((x == 0) & (np.arange(W) > 64), np.nan, x - 1.)), '(NaN) and negative', id='NaN and -1 as ground, objects from 0'),
    pytest.param('npy', lambda x, p: np.save(p, np.where(ndimage.binary_dilation(x, iterations=2) & (x == 0), -1, x)), 'negative numbers; read as background', id='0 as ground, -1 around objects'),
    pytest.param('npy', lambda x, p: np.save(p, np.where(np.arange(W) == 50, -3, x)), 'negative numbers; read as background', id='0 as ground, -3 along a line'),
    pytest.param('png', png16(0, 0, 300), '', id='16 bits in blue'),
    pytest.param('png', indexed, '', id='palette'),
    pytest.param('png', lambda x, p: indexed(x, p, transparency=0), '', id='palette, transparent ground'),
    pytest.param('gif', indexed, '', id='gif'),
    pytest.param('png', lambda x, p: pillow(np.dstack([colours(np.where(x, x, 3 + np.arange(W) % 9)), (x > 0) * np.uint8(255)]), p), 'no black background|', id='colours below what is transparent'),
    pytest.param('tif', lambda x, p: tifffile.imwrite(p, x.astype('f2'), compression='zlib'), '', id='f16'),
])
def test_label_maps_that_are_read(suffix, write, notes, tmp_path):
    "lab_f64, lab_u32, lab_la, lab_rgb16_png, lab_rgb16_tif, lab_white_ground and their kind: two objects an image"
    assert areas(label_set(tmp_path/'set', write, suffix)) == (['background', 'object'], GOOD)
    if '|' not in notes: assert [notes in s for s in said(tmp_path/'set')] == [True] * 3 * bool(notes)

@pytest.mark.parametrize('suffix, write, words', [
    pytest.param('tif', stack, 'planes', id='lab_stack'),
    pytest.param('tif', lambda x, p: tifffile.imwrite(p, np.stack([x, x * 0, x]).astype('u1'), photometric='minisblack'), 'planes', id='stack of 8 bits'),
    pytest.param('tif', lambda x, p: tifffile.imwrite(p, np.stack([x, x * 0]).astype('u1'), metadata=dict(axes='ZYX')), '2 planes|stack', id='stack of two'),
    pytest.param('npy', lambda x, p: np.save(p, np.stack([x, x * 0, x, x], -1).astype('u2')), '4 planes', id='npy of four'),
    pytest.param('png', png16(300, 5, 0), 'planes', id='two channels of 16 bits'),
    pytest.param('jpg', lambda x, p: pillow((x * 90).astype('u1'), p), 'JPEG', id='jpeg'),
    pytest.param('webp', lambda x, p: pillow(colours(x), p), 'WebP', id='webp'),
    pytest.param('npy', lambda x, p: np.save(p, x / 255), 'fractions', id='divided by 255'),
    pytest.param('tif', lambda x, p: tifffile.imwrite(p, ndimage.zoom(x.astype('f4'), 1, order=1) + .25), 'fractions', id='shifted'),
    pytest.param('npy', lambda x, p: np.save(p, x * 1e300), 'beyond', id='huge floats'),
    pytest.param('png', lambda x, p: pillow(x[:50].astype('u1'), p), '50x130', id='another size'),
    pytest.param('png', lambda x, p: pillow(x.T.astype('u1'), p), '130x120', id='turned'),
    pytest.param('npy', lambda x, p: np.save(p, x.astype(complex)), 'complex', id='complex'),
    pytest.param('png', lambda x, p: p.write_bytes(b''), 'empty', id='empty file'),
])
def test_label_maps_that_stop(suffix, write, words, tmp_path):
    "lab_stack and its kind: one sentence"
    label_set(tmp_path/'set', write, suffix)
    assert any(f.stops and f.file.startswith('labels/img_0') for f in examine(tmp_path/'set'))
    with pytest.raises(DataError, match=words): open_dataset(tmp_path/'set')

@pytest.mark.parametrize('name', [pytest.param('{}_masks', id='lab_suffix'), '{}_cp_masks', '{}_label', 'mask_{}', '{}-labels', 'LABEL_{}', '{}.png_mask', '{}.ome', '{}'])
def test_names_of_label_maps(name, tmp_path):
    "lab_suffix and its kind: matched by what is left of the name"
    assert areas(label_set(tmp_path/'set', lambda x, p: pillow(x.astype('u1'), p), name=name))[1] == GOOD

@pytest.mark.parametrize('name', ['labels', 'Label_Maps', 'masks', 'groundtruth', 'Ground_Truth', 'ground truth', 'gt', 'GT', 'segmentation', 'Segmentations', 'annotations'])
@pytest.mark.parametrize('halves', [False, True])
def test_folders_of_label_maps(name, halves, tmp_path):
    folder = label_set(tmp_path/'set', lambda x, p: pillow(x.astype('u1'), p))
    (folder/'labels').rename(folder/name)
    if halves:
        for where in ('images', name):
            for half, n in (('train', 'img_0'), ('train', 'img_1'), ('val', 'img_2')):
                (folder/where/half).mkdir(exist_ok=True)
                shutil.move(folder/where/f'{n}.png', folder/where/half/f'{n}.png')
    assert areas(folder) == (['background', 'object'], GOOD)
    if halves: assert [len(x) for x in open_dataset(folder)] == [2, 1]

def test_a_folder_without_pictures_holds_no_label_maps(tmp_path):
    put_images(tmp_path/'set')
    (tmp_path/'set'/'annotations').mkdir()
    for name in ('readme.txt', 'notes.csv'):
        (tmp_path/'set'/'annotations'/name).write_text('x')
        with pytest.raises(DataError, match='no layout that is known'): open_dataset(tmp_path/'set')

def test_label_maps_that_could_be_of_two_images():
    images, maps = [Path(n) for n in ('a_1.png', 'a_2.png', 'b.png')], [Path(n) for n in ('a_1_masks.png', 'mask_a_1.png', 'a_2_mask.tif', 'c.png')]
    assert label_pairs(images, maps) == {Path('a_2.png'): Path('a_2_mask.tif')}
    assert plain_stem(Path('cell_7_cp_masks.png')) == plain_stem(Path('img-cell_7.tif')) == ('cell', '7') and plain_stem(Path('mask.png')) == ('mask',)

def test_label_map_with_pieces_voids_and_rims(tmp_path):
    "lab_same_id_pieces, lab_voc_void, lab_antialiased: named"
    x = LABELS.copy()
    x[100:110, 5:20] = 1
    label_set(tmp_path/'a', lambda x, p: pillow(x.astype('u1'), p), x=x)
    assert ['object 1: in 2 pieces' in s for s in said(tmp_path/'a')] == [True] * 3 and areas(tmp_path/'a')[1] == [[726, 900]] * 3
    void = np.where(ndimage.binary_dilation(LABELS, np.ones((3, 3))) & (LABELS == 0), 255, LABELS)
    label_set(tmp_path/'b', lambda x, p: indexed(x, p), x=void)
    assert ['object 255' in s and 'no object' in s for s in said(tmp_path/'b')] == [True] * 3 and areas(tmp_path/'b')[1] == GOOD
    soft = Image.fromarray((LABELS * 100).astype('u1')[::2, ::2]).resize((W, H), Image.BILINEAR)
    label_set(tmp_path/'c', lambda x, p: pillow(x, p), x=np.asarray(soft))
    assert ['thin rim' in s and 'smoothly' in s for s in said(tmp_path/'c')] == [True] * 3

def mask_set(folder, write, suffix='png', names=NAMES, mask='mask_{i}', kaggle=False, upper=False):
    images, masks = ('{}/images', '{}/masks') if kaggle else ('images', 'masks/{}')
    if upper: images, masks = images.replace('images', 'Images'), masks.replace('masks', 'Masks')
    put_images(folder, names, images)
    for n in names:
        for i, m in enumerate((A, B)):
            path = folder/masks.format(n)/f'{mask.format(i=i, name=n)}.{suffix}'
            path.parent.mkdir(parents=True, exist_ok=True)
            write(m, path)
    return folder

def png255(m, p): pillow(m * np.uint8(255), p)
def on_transparent(*colour): return lambda m, p: pillow(np.dstack([np.full((H, W, 3), colour, np.uint8), m * np.uint8(255)]), p)
def jpeg(m, p): pillow(m * np.uint8(255), p, quality=60)

@pytest.mark.parametrize('suffix, write, off', [
    pytest.param('png', on_transparent(255, 255, 255), 0, id='msk_alpha'),
    pytest.param('png', on_transparent(0, 0, 0), 0, id='black on transparent'),
    pytest.param('png', on_transparent(200, 30, 30), 0, id='red on transparent'),
    pytest.param('tif', lambda m, p: tifffile.imwrite(p, m.astype('i8')), 0, id='msk_i64'),
    pytest.param('tif', lambda m, p: tifffile.imwrite(p, m.astype('u8') * 255), 0, id='u64'),
    pytest.param('tif', lambda m, p: tifffile.imwrite(p, np.where(m, .9, .01).astype('f4')), 0, id='probabilities'),
    pytest.param('npy', lambda m, p: np.save(p, np.where(m, 1, np.nan)), 0, id='NaN around'),
    pytest.param('png', lambda m, p: pillow(np.asarray(Image.fromarray(m * np.uint8(255)).resize((W // 2, H // 2), 2).resize((W, H), 2)), p), 25, id='soft'),
    pytest.param('png', lambda m, p: pillow(ndimage.gaussian_filter(m * 255., 3).astype('u1'), p), 40, id='blurred'),
    pytest.param('jpg', jpeg, 8, id='jpeg'),
    pytest.param('png', lambda m, p: [pillow(m * np.uint8(255), b := io.BytesIO(), format='JPEG', quality=60), Image.open(b).save(p)], 8, id='jpeg, saved again as png'),
    pytest.param('webp', lambda m, p: pillow(m * np.uint8(255), p, 'RGB', quality=50), 8, id='webp')])
@pytest.mark.parametrize('kaggle', [False, True], ids=['images and masks', 'kaggle'])
def test_mask_files_that_are_read(suffix, write, off, kaggle, tmp_path):
    "msk_alpha, msk_i64, msk_jpg_nuclei and their kind, in both layouts"
    classes, found = areas(mask_set(tmp_path/'set', write, suffix, kaggle=kaggle))
    assert classes == ['background', 'object'] and abs(np.array(found) - GOOD).max() <= off, found
    assert not [f for f in examine(tmp_path/'set') if f.stops]

def test_kaggle_in_capitals(tmp_path):
    "kag_upper"
    assert areas(mask_set(tmp_path/'a', png255, kaggle=True, upper=True))[1] == GOOD
    assert areas(mask_set(tmp_path/'b', png255, upper=True))[1] == GOOD
    shutil.move(tmp_path/'a', tmp_path/'c'/'stage1_train')
    assert areas(tmp_path/'c')[1] == GOOD

def test_inverted_masks_are_named(tmp_path):
    "msk_inverted"
    found = said(mask_set(tmp_path/'set', lambda m, p: png255(~m, p)))
    assert len(found) == 6 and all('of the picture' in s and 'inverted' in s for s in found)

def test_one_mask_of_several_objects_is_named(tmp_path):
    "msk_two_objects"
    put_images(tmp_path/'set')
    for n in NAMES:
        (tmp_path/'set'/'masks'/n).mkdir(parents=True)
        png255(A | B, tmp_path/'set'/'masks'/n/'mask.png')
    assert ['in 2 pieces' in s for s in said(tmp_path/'set')] == [True] * 3

@pytest.mark.parametrize('names, mask, classes', [
    pytest.param(('alpha', 'beta', 'gamma'), '{name}_{i}', ['object'], id='msk_named_by_image'),
    (('alpha', 'beta', 'gamma'), '{name}_mask_{i}', ['object']), (('alpha 1', 'alpha 2', 'beta'), 'alpha_{i}', ['object']), (('Zelle', 'Kern', 'Rand'), 'zelle_{i}', None),
    (NAMES, 'instance_{i}', ['object']), (NAMES, 'mask{i}', ['object']), (NAMES, 'Label-{i}', ['object']), (NAMES, 'nucleus_{i}', ['nucleus']), (NAMES, 'red cell {i}', ['red cell']),
    (('細胞', '核', '膜'), '{name}_{i}', ['object']), (NAMES, '{i}', ['object'])])
def test_a_picture_is_no_class(names, mask, classes, tmp_path):
    "msk_named_by_image and its kind: the name of a picture, and words like mask, are no class"
    found, sizes = areas(mask_set(tmp_path/'set', png255, names=names, mask=mask))
    assert sizes == GOOD and (classes is None or found == ['background', *classes])

def test_class_of_a_mask():
    root = Path('masks/a')
    kind = lambda name, image='a': mask_class(root/name, root, image)
    assert kind('cell/3.png') == 'cell' and kind('cell_3.png') == 'cell' and kind('masks/3.png') is None and kind('3.png') is None
    assert kind('plate_3.png', 'plate_12') is None and kind('Plate 3/1.png', 'plate 3') is None

def test_names_of_folders_in_any_spelling(tmp_path):
    "A Mac writes an accent as a letter of its own"
    put_images(tmp_path/'set', ('Zelle_é', 'b', 'c', 'plate.1'))
    for n in ('Zelle_e\u0301', 'B', 'c.png', 'Plate.1'):
        (tmp_path/'set'/'masks'/n).mkdir(parents=True)
        for i, m in enumerate((A, B)): png255(m, tmp_path/'set'/'masks'/n/f'{i}.png')
    assert areas(tmp_path/'set')[1] == [[576, 900]] * 4 and not said(tmp_path/'set')

@pytest.mark.parametrize('write, words', [
    (lambda m, p: np.save(p.with_suffix('.npy'), LABELS.astype('u1')), 'label map'),
    (lambda m, p: np.save(p.with_suffix('.npy'), (LABELS * 50).astype('u2')), 'label map'),
    (lambda m, p: png255(m[:40], p), 'the mask is 40x130 but the image is 120x130'),
    (lambda m, p: tifffile.imwrite(p.with_suffix('.tif'), np.stack([m, ~m, m]).astype('u1') * 255, photometric='minisblack'), 'planes'),
    (lambda m, p: p.write_bytes(b'\x89PNG'), 'cannot be read'), (lambda m, p: p.write_bytes(b''), 'empty')])
def test_mask_files_that_stop(write, words, tmp_path):
    stops(mask_set(tmp_path/'set', write), words)

def test_soft_edges_are_slopes_and_label_maps_are_flat():
    "A blurred mask is a mask, also with all 256 levels in it; two objects of two pixels across are a label map"
    y, x = np.mgrid[:256, :256]
    for r in (20, 40, 90):
        for shape in (np.hypot(y - 128, x - 128) < r, (abs(y - 128) < r) & (abs(x - 128) < r)):
            for blur in (.5, 1, 3, r / 4, r * .6): assert not has_flat_greys(ndimage.gaussian_filter(shape * 255., blur).astype(np.uint8)), (r, blur)
            for quality in (20, 60, 95):
                pillow(shape * np.uint8(255), b := io.BytesIO(), format='JPEG', quality=quality)
                assert not has_flat_greys(np.asarray(Image.open(b)))
    rng = np.random.default_rng(0)
    for n in (2, 5, 40, 200):
        for r in (2, 5, 12):
            labels = np.zeros((256, 256), int)
            for k, (cy, cx) in enumerate(rng.integers(0, 256, (n, 2)), 1): labels[np.hypot(y - cy, x - cx) <= r] = k
            assert has_flat_greys(labels), (n, r)
    assert not has_flat_greys(np.zeros((0, 5))) and not has_flat_greys(np.ones((1, 1)))

def test_pictures_without_masks_and_masks_without_pictures(tmp_path):
    folder = mask_set(tmp_path/'set', png255)
    shutil.rmtree(folder/'masks'/'img_1'), (folder/'images'/'img_2.png').unlink()
    records = read_mask_folders(folder)
    assert {(Path(f.file).name, f.stops): f.fault for f in records.faults} == {('img_1.png', False): 'no mask files', ('img_2', True): 'masks of no image'}
    folder = mask_set(tmp_path/'nested', png255, kaggle=True)
    (folder/'img_1'/'images'/'img_1.png').unlink(), put_images(folder/'img_2', ['other'])
    assert sorted(f.fault for f in read_mask_folders(folder).faults) == ['2 images with the same masks', 'the image is missing']
    folder = label_set(tmp_path/'maps', lambda x, p: pillow(x.astype('u1'), p))
    (folder/'images'/'img_1.png').unlink()
    assert [f.fault for f in read_label_folders(folder/'images', folder/'labels').faults] == ['label map of no image']

def test_masks_of_which_some_have_a_class(tmp_path):
    folder = mask_set(tmp_path/'set', png255, mask='cell_{i}')
    (folder/'masks'/'img_1'/'cell_0.png').rename(folder/'masks'/'img_1'/'0.png')
    assert areas(folder) == (['background', 'object'], GOOD) and '1 of 6 masks have no class' in said(folder)[0]

# ---- the same through COCO

def coco_set(folder, segmentation, **more):
    put_images(folder)
    rows = [dict(id=2 * i + j + 1, image_id=i, category_id=1, iscrowd=0, segmentation=segmentation(m, box), **more) for i in range(3) for j, (m, box) in enumerate(((A, (8, 10, 32, 34)), (B, (70, 60, 100, 90))))]
    found = dict(images=[dict(id=i, file_name=f'{n}.png', height=H, width=W) for i, n in enumerate(NAMES)], annotations=rows, categories=[dict(id=1, name='cell')])
    (folder/'annotations.json').write_text(json.dumps(found))
    return folder

def square(box):
    x1, y1, x2, y2 = box
    return [x1, y1, x2, y1, x2, y2, x1, y2]

@pytest.mark.parametrize('segmentation, notes', [
    pytest.param(lambda m, b: square(b), 0, id='flat_polygon'), pytest.param(lambda m, b: [square(b), [50, 50]], 6, id='stray_point'),
    pytest.param(lambda m, b: [square(b), [50, 50, 60, 60]], 6, id='open piece'), pytest.param(lambda m, b: [square(b), square(b)[:7]], 6, id='odd number'),
    pytest.param(lambda m, b: [square(b), ['a'] * 6], 6, id='piece of text'), pytest.param(lambda m, b: [np.reshape(square(b), (4, 2)).tolist()], 0, id='nested pairs'),
    pytest.param(lambda m, b: RLE['bytes as text'](m), 0, id='rle_bytes_repr'), pytest.param(lambda m, b: RLE['list as text'](m), 0, id='list as text'),
    pytest.param(lambda m, b: dict(size=[H, W], counts='b"' + packed_of(m).replace('\\', '\\\\') + '"'), 0, id='other quotes'), pytest.param(lambda m, b: RLE['inside a list'](m), 0, id='rle in a list')])
def test_annotations_that_are_read(segmentation, notes, tmp_path):
    "flat_polygon, stray_point, rle_bytes_repr and their kind: no object is lost"
    assert areas(coco_set(tmp_path/'set', segmentation)) == (['background', 'cell'], GOOD)
    found = examine(tmp_path/'set')
    assert len(found) == notes and all('left out' in f.action and not f.stops for f in found)

@pytest.mark.parametrize('segmentation, words', [
    pytest.param(lambda m, b: dict(size=[H, W], counts=[10**9, 5, 7]), 'add up', id='big_rle_wrong_sum'), pytest.param(lambda m, b: [], 'no segmentation', id='boxes_only'),
    pytest.param(lambda m, b: None, 'no segmentation', id='null'), pytest.param(lambda m, b: dict(size=[H, W], counts=packed_of(m)[:-1]), 'add up', id='cut text'),
    pytest.param(lambda m, b: {}, 'neither', id='nothing'), pytest.param(lambda m, b: [[1, 2]], 'three points', id='points')])
def test_annotations_of_which_nothing_is_left_stop(segmentation, words, tmp_path):
    "big_rle_wrong_sum, boxes_only and their kind: each is named, and nothing is trained on"
    folder = coco_set(tmp_path/'set', segmentation, bbox=[8, 10, 24, 24])
    assert sum(words in s and 'object dropped' in s for s in said(folder)) == 6
    stops(folder, 'no object: none of the 6 can be used')

# ---- damaged files

def fuzz_files(folder, n, read, files):
    "How many mutations were read and how many refused; each within ten seconds, silent, nothing written beside"
    counts = [0, 0]
    for k, (suffix, write) in enumerate(files.values()):
        sound, path = folder/f'sound.{suffix}', folder/f'damaged.{suffix}'
        write(LABELS[::4, ::4], sound)
        for data in mutations(sound.read_bytes(), -(-n // len(files)), seed=k):
            path.write_bytes(data)
            before = sorted(folder.iterdir())
            with within(10), warnings.catch_warnings(action='error'):
                try: read(path), counts.__setitem__(0, counts[0] + 1)
                except DataError as e:
                    one_sentence(e, path.name)
                    counts[1] += 1
            assert sorted(folder.iterdir()) == before
        path.unlink(), sound.unlink()
    return counts

SOME_MASKS = {k: (s, lambda x, p, w=w: w(x > 0, p)) for k, (s, w) in MASK_FILES.items() if k in ('png 255', 'png palette', 'png RGBA, white on transparent', 'png 16', 'tif u2', 'tif lzw', 'npy f4', 'gif')}
SOME_LABELS = {k: v for k, v in LABEL_FILES.items() if k in ('png 8', 'png RGB', 'png palette', 'tif u2', 'tif lzw', 'tif f4', 'npy i8', 'tif planar RGB')}

def test_damaged_mask_files(tmp_path):
    size = LABELS[::4, ::4].shape
    def read(path): assert draw_file(path, size).mask.shape == size
    assert min(fuzz_files(tmp_path, 100, read, SOME_MASKS)) > 5

def test_damaged_label_maps(tmp_path):
    size = LABELS[::4, ::4].shape
    def read(path):
        found = read_label_map(path, size).numbers
        assert found.shape == size and found.min() >= 0 and len(Instances.from_label_map(found)) <= found.size
    assert min(fuzz_files(tmp_path, 100, read, SOME_LABELS)) > 5

def test_pictures_that_differ_in_case_have_maps_of_their_own(tmp_path):
    from maskrcnn_edu.data.folders import label_pairs
    images, maps = [Path('images/A.png'), Path('images/a.png')], [Path('labels/A.tif'), Path('labels/a.tif')]
    assert label_pairs(images, maps) == dict(zip(images, maps)) == label_pairs(images[::-1], maps)
    assert label_pairs([Path('images/IMG.PNG')], [Path('labels/img.png')])

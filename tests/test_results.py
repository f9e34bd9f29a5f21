"Files that people use: what is written comes back the same, for any masks; bad files are named in one sentence"
import importlib.util, itertools, json, os, unicodedata
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pandas as pd
import pytest
import tifffile
from hypothesis import given, settings, strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image
from pycocotools.coco import COCO
from skimage.measure import label as count_through, regionprops_table
from fuzz import mutations, one_sentence, within
from test_colours import ENOUGH, apart

from maskrcnn_edu.data import CLASSES, DataError, Instances, from_coco, make_shapes
from maskrcnn_edu.nuclei import remove_overlaps, submission_csv
from maskrcnn_edu.results import (ENDINGS, PALETTE, SMALL, TOGETHER, Format, about, colour_numbers, colour_splash, fill, geometry, measurements, neighbours, overlay,
    process_video, read_frames, read_geojson, read_labels, read_submission, rings, safe_stem, to_coco, unique_names, write_csv, write_geojson, write_labels, write_results, write_together)

ENOUGH_EXAMPLES = settings(max_examples=int(os.environ.get('EXAMPLES', 60)), deadline=None)   # 1,000 for a note
sides = st.one_of(st.integers(1, 12), st.integers(1, 70))

@st.composite
def masks(draw, most=4):
    "Up to `most` masks of one size, each with a pixel at least: noise, so holes and touching corners; pieces far apart; cells that touch; a single pixel; the whole image"
    size, n = (draw(sides), draw(sides)), draw(st.integers(0, most))
    out = np.zeros((n, *size), bool)
    for i in range(n):
        kind, rng = draw(st.sampled_from(['noise', 'dense', 'pixel', 'full', 'pieces', 'cells', 'ring'])), np.random.default_rng(draw(st.integers(0, 2**32)))
        y, x = np.mgrid[:size[0], :size[1]]
        if kind in ('noise', 'dense'): out[i] = rng.random(size) < (.5 if kind == 'noise' else .86)
        if kind == 'full': out[i] = True
        if kind == 'pieces': out[i] = np.kron(rng.random((9, 9)) < .2, np.ones((8, 8)))[:size[0], :size[1]]
        if kind == 'cells': out[i] = (y // 5 + x // 7) % most == i                     # that share borders and corners
        if kind == 'ring': out[i] = abs(np.hypot(y - size[0] / 2, x - size[1] / 2) - min(size) / 3) < 2
        if not out[i].any(): out[i, draw(st.integers(0, size[0] - 1)), draw(st.integers(0, size[1] - 1))] = True
    return out

def objects(m, scored=True):
    rng = np.random.default_rng(len(m))
    return Instances.from_masks(m, rng.integers(1, 4, len(m)), rng.random(len(m)) if scored else None)

def same(a, b): return a.size == b.size and len(a) == len(b) and np.array_equal(a.masks(), b.masks())

def alike(a, b): return same(a, b) and np.array_equal(a.labels, b.labels) and (a.scores is None) == (b.scores is None) and (a.scores is None or np.array_equal(a.scores, b.scores))

@pytest.fixture(scope='module')
def place(tmp_path_factory): return tmp_path_factory.mktemp('results')

# ---- there and back

@ENOUGH_EXAMPLES
@given(m=masks(), scored=st.booleans())
def test_geojson_there_and_back(place, m, scored):
    t = objects(m, scored)
    back = read_geojson(write_geojson(place/'x.geojson', t, CLASSES), t.size, CLASSES)
    assert same(back, t) and np.array_equal(back.labels, t.labels)
    if len(t): assert alike(back, t)
    assert (read_geojson(place/'x.geojson', t.size).labels == 1).all()

@ENOUGH_EXAMPLES
@given(m=masks(), scored=st.booleans())
def test_coco_there_and_back(place, m, scored):
    t = objects(m, scored)
    found = {'x': t, 'x_2': t[::-1], 'none': t[[]]}
    (place/'c.json').write_text(json.dumps(to_coco(found, dict(x='a/x.png', x_2='b/x.png', none='none.tif'), CLASSES)))
    back, classes = from_coco(place/'c.json')
    assert classes == CLASSES and list(back) == list(found)
    for n in found: assert same(back[n], found[n]) and np.array_equal(back[n].labels, found[n].labels) and np.allclose(back[n].boxes, found[n].boxes, atol=.006)
    if len(t): assert alike(back['x'], t)
    assert [(r['file_name'], r['name']) for r in json.loads((place/'c.json').read_text())['images']] == [('a/x.png', 'x'), ('b/x.png', 'x_2'), ('none.tif', 'none')]
    coco = COCO(place/'c.json')
    assert all((coco.annToMask(a) == x).all() for a, x in zip(coco.loadAnns(coco.getAnnIds(1)), t.masks()))

@ENOUGH_EXAMPLES
@given(m=masks())
def test_labels_there_and_back(place, m):
    "A map has room for one object a pixel: what is left of each object after that must come back"
    t = objects(m)
    stored = tifffile.imread(write_labels(place/'x.tif', t))
    assert stored.dtype == np.uint16 and stored.shape == t.size and np.array_equal(stored, t.label_map())
    with Image.open(place/'x.tif') as im: assert np.array_equal(np.asarray(im), stored)
    assert same(read_labels(place/'x.tif'), Instances.from_label_map(stored))
    alone = remove_overlaps(t, min_area=1, min_share=0)
    assert same(read_labels(write_labels(place/'x.tif', alone)), alone)

@ENOUGH_EXAMPLES
@given(m=masks())
def test_submission_there_and_back(place, m):
    found = {'a': objects(m), 'b': objects(m)[[]]}
    back = read_submission(submission_csv(place/'s.csv', found), {n: f.size for n, f in found.items()})
    assert list(back) == ['a', 'b'] and all(same(back[n], remove_overlaps(f)) for n, f in found.items())

def test_more_objects_than_16_bits(tmp_path):
    y, x = np.divmod(np.arange(70_000), 280)
    many = Instances((250, 280), np.stack([x, y, x + 1, y + 1], 1).astype(np.float32), np.ones(70_000, np.int64), [np.ones((1, 1), bool)] * 70_000, np.stack([y, x], 1))
    stored = tifffile.imread(write_labels(tmp_path/'x.tif', many))
    assert stored.dtype == np.uint32 and np.array_equal(stored.ravel(), np.arange(1, 70_001)) and len(read_labels(tmp_path/'x.tif')) == 70_000
    assert tifffile.imread(write_labels(tmp_path/'y.tif', many[:65_535])).dtype == np.uint16

def test_numbers_agree_in_all_files(tmp_path):
    "An object without pixels, and one that lies behind another: numbers are not moved up"
    m = np.zeros((4, 6, 6), bool)
    m[0, 1:3, 1:3] = m[1, 1:3, 1:3] = m[3, 4:, 4:] = True   # the third has no pixel
    t = Instances.from_masks(m, [1, 1, 1, 2], [.5, .9, .8, .7])
    paths = write_results(tmp_path, 'x', np.zeros((6, 6, 3), np.uint8), t, CLASSES)
    assert [p.name for p in paths] == ['x_overlay.png', 'x_labels.tif', 'x.csv', 'x.geojson']
    table = pd.read_csv(tmp_path/'x.csv')
    assert table.id.tolist() == [1, 2, 3, 4] and table.area.tolist() == [4, 4, 0, 4] and table['class'].tolist() == ['square'] * 3 + ['circle'] and table.solidity.isna().tolist() == [False, False, True, False]
    assert set(np.unique(tifffile.imread(tmp_path/'x_labels.tif'))) == {0, 2, 4}
    assert [f['properties']['id'] for f in json.loads((tmp_path/'x.geojson').read_text())['features']] == [1, 2, 4]

# ---- measurements

NAMES = {'area': 'area', 'centroid-0': 'centroid_y', 'bbox-1': 'x1', 'axis_major_length': 'major_axis', 'eccentricity': 'eccentricity', 'solidity': 'solidity',
    'perimeter': 'perimeter', 'intensity_mean-1': 'mean_b', 'intensity_min-0': 'min_a', 'intensity_std-0': 'sd_a', 'intensity_max-1': 'max_b'}

@ENOUGH_EXAMPLES
@given(blobs=hnp.arrays(bool, st.tuples(sides, sides)), seed=st.integers(0, 99))
def test_measurements_are_those_of_the_whole_map(blobs, seed):
    labels, image = count_through(blobs, connectivity=1), np.random.default_rng(seed).integers(0, 60_000, (*blobs.shape, 2)).astype(np.uint16)
    theirs = pd.DataFrame(regionprops_table(labels, image, {k.partition('-')[0]: 0 for k in NAMES})).rename(columns=NAMES)
    ours = measurements(image, Instances.from_label_map(labels), ['background', 'blob'], channels=('a', 'b'))
    assert len(ours) == labels.max()
    for c in NAMES.values(): assert np.allclose(ours[c].to_numpy(float), theirs[c].to_numpy(float), rtol=1e-9, equal_nan=True), c

def test_measurements_of_grey_and_in_micrometres(tmp_path):
    m = np.zeros((1, 8, 9), bool)
    m[0, 2:4, 3:6] = True
    t, image = Instances.from_masks(m, [2]), np.arange(72.).reshape(8, 9)
    row = measurements(image, t, CLASSES, pixel_size=.5).iloc[0]
    assert (row['class'], row.area, row.area_um2, row.centroid_y, row.centroid_y_um, row.perimeter_um * 2) == ('circle', 6, 1.5, 2.5, 1.25, row.perimeter)
    assert (row.mean_0, row.min_0, row.max_0) == (image[2:4, 3:6].mean(), 21, 32) and np.isnan(row.score)
    write_csv(tmp_path/'a'/'x.csv', measurements(image, t[[]], CLASSES))
    assert (tmp_path/'a'/'x.csv').read_text().count('\n') == 1
    for bad in (0, -1, float('nan'), float('inf')):
        with pytest.raises(DataError, match='pixel_size'): measurements(image, t, CLASSES, pixel_size=bad)
    with pytest.raises(DataError, match='8x8 pixels but the objects are of one of 8x9'): measurements(image[:, :8], t, CLASSES)

# ---- outlines

def area(r): return float((r[:-1, 0] * r[1:, 1] - r[1:, 0] * r[:-1, 1]).sum()) / 2

@ENOUGH_EXAMPLES
@given(m=hnp.arrays(bool, st.tuples(sides, sides)))
def test_rings_are_simple_and_exact(m):
    pieces = count_through(m, connectivity=1)
    for k in range(1, pieces.max() + 1):
        outer, *holes = rings(pieces == k)
        assert area(outer) > 0 and all(area(h) < 0 for h in holes) and area(outer) + sum(map(area, holes)) == (pieces == k).sum()
        ground = count_through(np.pad(pieces != k, 1, constant_values=True), connectivity=1)   # a corner joins no ground either
        assert len(holes) == ground.max() - 1
        for r in (outer, *holes):
            steps = np.diff(r, axis=0)
            assert (r[0] == r[-1]).all() and len(np.unique(r[:-1], axis=0)) == len(r) - 1
            assert ((steps != 0).sum(1) == 1).all() and ((steps[1:] * steps[:-1]).sum(1) == 0).all()   # corners only, right angles only
    shape = geometry(m, (0, 0))
    assert shape['type'] == ('Polygon' if pieces.max() == 1 else 'MultiPolygon') and (shape['type'] == 'Polygon' or len(shape['coordinates']) == pieces.max())

@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(3, 6))
def test_polygons_of_any_angle(seed, n):
    "As a person draws them, also out of the image: even-odd at the centres, one pixel after the other"
    points, size, out = np.random.default_rng(seed).uniform(-8, 18, (n, 2)), (9, 10), np.zeros((9, 10), bool)
    crop, y, x = fill([points], size)
    out[y:y + crop.shape[0], x:x + crop.shape[1]] = crop
    for (r, c) in np.ndindex(size):
        px, py, odd = c + .5, r + .5, False
        for (x1, y1), (x2, y2) in zip(points, np.roll(points, -1, 0)):
            if (y1 <= py) != (y2 <= py) and x1 + (py - y1) / (y2 - y1) * (x2 - x1) < px: odd = not odd
        assert out[r, c] == odd, (r, c)

def test_what_qupath_reads_and_writes(tmp_path):
    s = make_shapes(1, seed=3)[0]
    t = Instances.from_masks(s.instances.masks(), s.instances.labels, np.full(len(s.instances), .9))
    found = json.loads(write_geojson(tmp_path/'x.geojson', t, CLASSES, kind='annotation').read_text())
    assert found['type'] == 'FeatureCollection' and len(found['features']) == len(t)
    for i, f in enumerate(found['features'], 1):
        p = f['properties']
        assert f['type'] == 'Feature' and p['objectType'] == 'annotation' and p['name'] == str(i) and p['classification']['name'] in CLASSES and len(p['classification']['color']) == 3
        assert p['measurements'] == dict(score=.9, area=p['area']) and (p['id'], p['class'], p['score']) == (i, p['classification']['name'], .9)
        f['properties'] = {k: p[k] for k in ('objectType', 'name', 'classification', 'measurements')} | dict(isLocked=True)   # QuPath keeps what it knows
    (tmp_path/'q.geojson').write_text(json.dumps(found['features']))   # and may write a plain list
    assert alike(read_geojson(tmp_path/'q.geojson', t.size, CLASSES), t)
    assert about(dict(properties=7)) == (None, None)

def test_polygons_out_of_the_image(tmp_path):
    square = lambda x, y, n: [[x, y], [x + n, y], [x + n, y + n], [x, y + n], [x, y]]
    features = [dict(type='Feature', geometry=dict(type='Polygon', coordinates=[square(*s)])) for s in ((-2, -2, 4), (50, 50, 4), (-1e8, -1e8, 2e8), (3, 3, .2))]
    (tmp_path/'x.geojson').write_text(json.dumps(dict(type='FeatureCollection', features=features)))
    back = read_geojson(tmp_path/'x.geojson', (6, 7))
    assert back.masks().sum((1, 2)).tolist() == [4, 42] and back.scores is None

BAD_GEOJSON = {'{': 'not a readable json', '{"type": "x"}': 'no GeoJSON', '[7]': 'feature 1 is a feature without geometry', '[{"geometry": {"type": "Point", "coordinates": [1, 2]}}]': 'feature 1 is a Point',
    '[{"geometry": {"type": "Polygon", "coordinates": []}}]': 'no rings', '[{"geometry": {"type": "Polygon", "coordinates": [[[1, "a"], [2, 3], [4, 5]]]}}]': 'no rings',
    '[{"geometry": {"type": "Polygon", "coordinates": [[[0, 0], [2, 0], [2, 1e99]]]}}]': 'no rings', '[' * 9999: 'not a readable json', '[{"geometry": {"type": "Polygon", "coordinates": [[[0, 0], [2, 0], [2, ' + '9' * 400 + ']]]}}]': 'no rings', '[{"geometry": {"type": "Polygon", "coordinates": [[[0, 0], [2, 0], [2, 1]]]}}]': 'class None'}

@pytest.mark.parametrize('text', BAD_GEOJSON)
def test_bad_geojson(tmp_path, text):
    (tmp_path/'bad.geojson').write_text(text)
    with pytest.raises(DataError, match=f'bad.geojson.*{BAD_GEOJSON[text]}'): read_geojson(tmp_path/'bad.geojson', (5, 5), CLASSES)
    with pytest.raises(DataError, match='none.geojson.*no such file'): read_geojson(tmp_path/'none.geojson', (5, 5))

# ---- other bad files

def test_bad_label_maps(tmp_path):
    tifffile.imwrite(tmp_path/'fractions.tif', np.full((4, 5), .5, np.float32))
    tifffile.imwrite(tmp_path/'good.tif', np.arange(20, dtype=np.uint16).reshape(4, 5))
    (tmp_path/'cut.tif').write_bytes((tmp_path/'good.tif').read_bytes()[:60])
    Image.fromarray(np.zeros((4, 5), np.uint8)).save(tmp_path/'blurred.jpg')
    for name, words in {'fractions.tif': 'fractions', 'blurred.jpg': 'blurs', 'cut.tif': '', 'none.tif': ''}.items():
        with pytest.raises(DataError, match=words) as e: read_labels(tmp_path/name)
        one_sentence(e.value, name)
    assert len(read_labels(tmp_path/'good.tif')) == 19
    Image.fromarray(np.arange(6, dtype=np.uint16).reshape(2, 3)).save(tmp_path/'good.png')
    assert len(read_labels(tmp_path/'good.png')) == 5

def test_bad_coco(tmp_path):
    t = objects(np.ones((1, 3, 4), bool))
    def written(**change):
        found = to_coco({'x': t}, {'x': 'x.png'}, CLASSES)
        found['annotations'][0].update(change)
        (tmp_path/'c.json').write_text(json.dumps(found))
        return from_coco(tmp_path/'c.json')[0]['x']
    for change, words in ((dict(image_id=9), 'annotation 1'), (dict(category_id=9), 'annotation 1'), (dict(segmentation=dict(size=[3, 4], counts='\\x01')), 'decoded'),
            (dict(segmentation=dict(size=[9, 9], counts='0<')), '9x9'), (dict(segmentation=[[1, 2]]), 'decoded'), (dict(segmentation=7), 'no segmentation')):
        with pytest.raises(DataError, match=f'c.json.*{words}'): written(**change)
    assert written(segmentation=[[0, 0, 4, 0, 4, 3, 0, 3]]).masks().all() and written(segmentation=dict(size=[3, 4], counts=[0, 12])).masks().all()
    assert written(iscrowd=1).labels.tolist() == [-t.labels[0]] and written(bbox='wrong').boxes.tolist() == [[0, 0, 4, 3]] and written(score=None).scores is None

def test_bad_submission(tmp_path):
    for text, words in (('a,b\n1,2\n', 'first line'), ('ImageId,EncodedPixels\ny,1 2\n', 'image y is not known'), ('ImageId,EncodedPixels\nx,1 2 3\n', 'pairs'), ('', 'not a readable csv'), ('ImageId,EncodedPixels\nx,1 2.5\n', 'image x'),
            ('ImageId,EncodedPixels\nx,1 99999999999999999999\n', 'image x'), ('ImageId,EncodedPixels\nx,12 2\n', 'outside')):
        (tmp_path/'s.csv').write_text(text)
        with pytest.raises(DataError, match=f's.csv: .*{words}'): read_submission(tmp_path/'s.csv', dict(x=(3, 4)))
    with pytest.raises(DataError, match='none.csv.*no such file'): read_submission(tmp_path/'none.csv', {})

# ---- pictures

def test_any_two_colours_can_be_told_apart():
    hexes = ['#%02x%02x%02x' % tuple(c) for c in PALETTE]
    assert min(apart(a, b) for a, b in itertools.combinations(hexes, 2)) > ENOUGH

@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(1, 400))
def test_neighbours_have_other_colours(seed, n):
    "In a plane divided among cells, where each touches some"
    rng = np.random.default_rng(seed)
    points = rng.uniform(0, 60, (n, 2))
    cells = ((np.mgrid[:60, :60].reshape(2, -1, 1) - points.T[:, None])**2).sum(0).argmin(1).reshape(60, 60) + 1
    i, j = neighbours(cells, 1).T
    slowly = {(min(a, b) - 1, max(a, b) - 1) for dy, dx in ((0, 1), (1, 0), (1, 1), (1, -1)) for a, b in zip(cells[:60 - dy, max(-dx, 0):60 - max(dx, 0)].ravel().tolist(), cells[dy:, max(dx, 0):60 - max(-dx, 0)].ravel().tolist()) if a != b}
    assert set(zip(i.tolist(), j.tolist())) == slowly
    colours = colour_numbers(cells, n)
    assert set(colours) <= set(range(len(PALETTE)))
    if n <= 150: assert (colours[i] != colours[j]).all()   # cells of 20 pixels and more; with smaller ones ten cells may lie within two pixels of each other

@ENOUGH_EXAMPLES
@given(m=masks())
def test_overlay_and_splash_touch_the_objects_only(m):
    t, image = objects(m), np.random.default_rng(1).integers(0, 256, (*m.shape[1:], 3)).astype(np.uint8)
    before, outside = image.copy(), t.label_map() == 0
    over, splash = overlay(image, t), colour_splash(image, t)
    assert over.shape == splash.shape == image.shape and over.dtype == splash.dtype == np.uint8 and np.array_equal(image, before)
    assert (over[outside] == image[outside]).all() and (splash[~outside] == image[~outside]).all() and (splash[outside].max(1, initial=0) == splash[outside].min(1, initial=255)).all()
    assert overlay(image, t, CLASSES).shape == image.shape and np.array_equal(overlay(image, t[[]], CLASSES), image)
    if m.shape[1] > 2 and m.shape[2] > 2 and len(m) == 1 and m.all(): assert all(tuple(over[p]) in set(map(tuple, PALETTE)) for p in ((0, 0), (-1, -1), (0, -1)))

def test_what_cannot_be_drawn_upon():
    t = objects(np.ones((1, 5, 6), bool))
    for bad in (np.zeros((5, 6), np.uint8), np.zeros((5, 6, 4), np.uint8), np.zeros((5, 6, 3))):
        for f in (overlay, colour_splash):
            with pytest.raises(DataError, match='uint8'): f(bad, t)
    with pytest.raises(DataError, match='5x5'): overlay(np.zeros((5, 5, 3), np.uint8), t)

# ---- films

def film(n=3, size=(10, 14)): return [np.full((*size, 3), 40 * i, np.uint8) for i in range(n)]

def mark(frame): return Instances.from_masks(np.pad(np.ones((1, 4, 4), bool), ((0, 0), (2, frame.shape[0] - 6), (3, frame.shape[1] - 7))), [1])

@pytest.mark.parametrize('out', ['x.gif', 'x.tif', 'frames'])
@pytest.mark.parametrize('source', ['x.gif', 'x.tif', 'frames', 'grey.tif'])
def test_films(tmp_path, source, out):
    (tmp_path/'in').mkdir()
    path, frames = tmp_path/'in'/source, film()
    if source == 'frames':
        path.mkdir()
        for i, f in enumerate(frames): Image.fromarray(f).save(path/f'{i}.png')
        (path/'notes.txt').write_text('no picture')
    elif source == 'grey.tif': tifffile.imwrite(path, np.stack(frames)[..., 0], photometric='minisblack')
    else: iio.imwrite(path, np.stack(frames), **(dict(duration=50) if source == 'x.gif' else dict(photometric='rgb')))
    assert [f[0, 0].tolist() for f in read_frames(path)] == [[40 * i] * 3 for i in range(3)]
    assert process_video(path, tmp_path/'out'/out, mark, lambda image, f: 255 - overlay(image, f, alpha=0)) == 3
    back = list(read_frames(tmp_path/'out'/out))
    assert len(back) == 3 and all(b.shape == f.shape and abs(b[0, 0].astype(int) - (255 - f[0, 0])).max() < 3 for b, f in zip(back, frames))
    assert [p.name for p in (tmp_path/'out').iterdir()] == [out]
    if (source, out) == ('x.gif', 'x.gif'): assert iio.immeta(tmp_path/'out'/out)['duration'] == 50

def test_a_film_that_stops_half_way_leaves_nothing(tmp_path):
    iio.imwrite(tmp_path/'in.gif', np.stack(film()))
    def tired(frame):
        if frame.max() > 50: raise RuntimeError('enough')
        return mark(frame)
    for out in ('x.gif', 'x.tif'):
        with pytest.raises(RuntimeError, match='enough'): process_video(tmp_path/'in.gif', tmp_path/out, tired)
    assert [p.name for p in tmp_path.iterdir()] == ['in.gif']

def test_bad_films(tmp_path, monkeypatch):
    (tmp_path/'empty').mkdir()
    (tmp_path/'bad.gif').write_bytes(b'GIF89a nothing')
    iio.imwrite(tmp_path/'in.gif', np.stack(film()))
    for path, words in (('empty', 'no pictures'), ('none.gif', 'no such file'), ('bad.gif', 'cannot be read'), ('none.tif', 'no such file')):
        with pytest.raises(DataError, match=f'{path}.*{words}'): process_video(tmp_path/path, tmp_path/'out.gif', mark)
    with pytest.raises(DataError, match='out.docx.*not a kind of film'): process_video(tmp_path/'in.gif', tmp_path/'out.docx', mark)
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
    for a, b in (('in.gif', 'out.mp4'), ('in.mp4', 'out.gif')):
        with pytest.raises(DataError, match='mp4.*pip install imageio-ffmpeg'): process_video(tmp_path/a, tmp_path/b, mark)
    assert sorted(p.name for p in tmp_path.iterdir()) == ['bad.gif', 'empty', 'in.gif']

def test_mp4(tmp_path):
    pytest.importorskip('imageio_ffmpeg')
    iio.imwrite(tmp_path/'in.gif', np.stack(film(6, (64, 96))), duration=100)
    assert process_video(tmp_path/'in.gif', tmp_path/'out.mp4', mark) == 6
    back = list(read_frames(tmp_path/'out.mp4'))
    assert len(back) == 6 and back[0].shape == (64, 96, 3) and abs(back[3][50, 50].astype(int) - 120).max() < 8
    assert process_video(tmp_path/'out.mp4', tmp_path/'again.tif', mark) == 6

# ---- all files

def test_formats(tmp_path):
    s = make_shapes(1, seed=4)[0]
    assert {f.value for f in SMALL} == {'overlay', 'labels', 'csv', 'geojson', 'coco'}
    files = {f: [p.name for p in write_results(tmp_path/f.value, 'x', s.image, s.instances, CLASSES, [f])] + [p.name for p in write_together(tmp_path/f.value, {'x': s.instances}, {'x': 'x.png'}, CLASSES, [f])] for f in Format}
    assert {f.value: n for f, n in files.items()} == dict(overlay=['x_overlay.png'], splash=['x_splash.png'], labels=['x_labels.tif'], csv=['x.csv'], geojson=['x.geojson'], coco=['instances.json'], submission=['submission.csv'])
    assert all((tmp_path/f.value/n).is_file() for f, [n] in files.items()) and np.array_equal(iio.imread(tmp_path/'splash'/'x_splash.png'), colour_splash(s.image, s.instances))
    with pytest.raises(ValueError, match='xls'): write_results(tmp_path, 'x', s.image, s.instances, CLASSES, ['xls'])
    write_results(tmp_path/'deep', 'x', s.image, s.instances, CLASSES, ['csv'], pixel_size=2, intensity=s.image[..., 0] * 256.)
    table = pd.read_csv(tmp_path/'deep'/'x.csv')
    assert table.image.tolist() == ['x'] * len(table) and 'mean_0' in table and 'mean_1' not in table and np.allclose(table.area_um2, 4 * table.area)

def test_names():
    assert list(unique_names(['a/x.png', 'b/x.png', 'x_2.png', 'y.tif'])) == ['x', 'x_2', 'x_2_2', 'y'] and unique_names([]) == {}
    assert list(unique_names(['a.png', 'A.png', 'ä.png', unicodedata.normalize('NFD', 'Ä') + '.png', 'ß.png', 'SS.png'])) == ['a', 'A_2', 'ä', unicodedata.normalize('NFD', 'Ä') + '_2', 'ß', 'SS_2']
    assert list(unique_names(['10:45.png', '10/45.png', 'a?b*.png', 'x .png', 'x..png', 'nul.png', 'COM1.x.tif', '\n.png', '   .png'])) == ['10_45', '45', 'a_b_', 'x', 'x_2', 'nul_', 'COM1.x_', '_', '__2']
    long = [f'{"é" * 125}{i}.png' for i in range(3)]
    assert all(len((n + e).encode()) < 255 for n in unique_names(long) for e in ENDINGS) and len(unique_names(long)) == 3
    assert safe_stem(os.fsdecode(b'plate\xff.png')) == 'plate\ufffd' and safe_stem('.png') == '.png'

@ENOUGH_EXAMPLES
@given(stems=st.lists(st.text('aAbß_12.:é\u0301', min_size=1, max_size=5) | st.sampled_from(['x', 'x_2', 'X_overlay', 'x_labels', 'submission', 'instances', 'con']), max_size=12), ends=st.lists(st.sampled_from(['.png', '.tif', '.JPG']), min_size=12, max_size=12))
def test_no_two_files_are_one(stems, ends):
    "Neither among the files that are written, nor with the pictures that lie there already, on systems where case and composition do not count"
    paths = [Path('here')/(s.strip('.') + e) for s, e in zip(stems, ends) if s.strip('.')]
    for out in ('here', 'there', None):
        names = unique_names(paths, out)
        files = [n + e for n in names for e in ENDINGS] + list(TOGETHER) + ([p.name for p in set(paths)] if out == 'here' else [])
        plain = [unicodedata.normalize('NFC', f).casefold() for f in dict.fromkeys(files[:len(names) * len(ENDINGS) + 2])] + [unicodedata.normalize('NFC', f).casefold() for f in set(files[len(names) * len(ENDINGS) + 2:])]
        written = plain[:len(names) * len(ENDINGS) + 2]
        assert len(names) == len(paths) and list(names.values()) == paths and len(set(written)) == len(written) and not set(written) & set(plain[len(written):])
        assert not any(c in '<>:"/\\|?*' for n in names for c in n)

def test_a_json_tells_plates_apart(tmp_path):
    t = objects(np.ones((1, 3, 4), bool))
    def names(*paths):
        named = unique_names(paths)
        return [r['file_name'] for r in to_coco(dict.fromkeys(named, t), named, CLASSES)['images']]
    assert names(tmp_path/'p1'/'A.png', tmp_path/'p2'/'A.png') == ['p1/A.png', 'p2/A.png'] and names(tmp_path/'p'/'A.png') == ['A.png']
    assert names(tmp_path/'A.png', tmp_path/'p'/'q'/'A.png') == ['A.png', 'p/q/A.png'] and names('A.png', 'b.png') == ['A.png', 'b.png'] and names() == []
    assert names('../x/A.png', tmp_path/'A.png')[0].endswith('x/A.png') and names(os.fsdecode(b'\xff.png')) == ['\ufffd.png']

# ---- bytes at random

READERS = {
    'x.geojson': lambda p: read_geojson(p, (40, 50), CLASSES), 'c.json': lambda p: from_coco(p), 's.csv': lambda p: read_submission(p, dict(x=(40, 50))),
    'x_labels.tif': lambda p: read_labels(p), 'x.png': lambda p: read_labels(p)}

def written(folder, name):
    s = Instances.from_label_map(np.kron(np.arange(20).reshape(4, 5), np.ones((10, 10), int)))
    s = Instances.from_masks(s.masks(), 1 + s.labels, np.full(len(s), .5))
    if name == 'x.geojson': write_geojson(folder/name, s, CLASSES)
    elif name == 'c.json': (folder/name).write_text(json.dumps(to_coco({'x': s}, {'x': 'x.png'}, CLASSES)))
    elif name == 's.csv': submission_csv(folder/name, {'x': s})
    elif name == 'x.png': Image.fromarray(s.label_map().astype(np.uint8)).save(folder/name)
    else: write_labels(folder/name, s)
    return (folder/name).read_bytes()

def tried(folder, name, n, seed=0):
    "How many of `n` damaged files are read, and how many are refused in a sentence; nothing else may happen"
    good, read, said = written(folder, name), 0, 0
    for raw in mutations(good, n, seed):
        (folder/name).write_bytes(raw)
        try:
            with within(10): READERS[name](folder/name)
            read += 1
        except DataError as e: one_sentence(e, name); said += 1
    return read, said

@pytest.mark.parametrize('name', READERS)
def test_bytes_at_random(tmp_path, name):
    read, said = tried(tmp_path, name, 100)
    assert said > 20

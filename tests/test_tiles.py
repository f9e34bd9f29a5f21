"Prediction in tiles, with a network that never errs: connected patches of one number, in what it is shown"
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings, strategies as st
from PIL import Image
from skimage.measure import label

from maskrcnn_edu.data.files import DataError
from maskrcnn_edu.data.images import Pixels, read_image, read_pixels, to_picture, to_uint8
from maskrcnn_edu.instances import Instances
from maskrcnn_edu.learner import stretch, turn
from maskrcnn_edu.tiles import (VIEWS, Picture, TiffPicture, cuts, extents, gather, is_cut, is_mine, merge, near_pairs, open_picture, picture_levels, placed, predict_flipped,
    predict_tiled, shared, tile_grid, turn_back, vote)


def see(model, piece):
    found = Instances.from_label_map(label(piece[..., 0], connectivity=2))
    classes = np.array([piece[..., 0][o[0]:, o[1]:][:c.shape[0], :c.shape[1]][c][0] % 3 + 1 for c, o in zip(found.crops, found.origins)], np.int64)
    return replace(found, labels=classes, scores=np.linspace(1, .5, len(found), dtype=np.float32))

def masks(found): return sorted((*map(int, o), int(l), c.shape, c.tobytes()) for c, o, l in zip(found.crops, found.origins, found.labels))
def whole(canvas): return see(None, canvas[..., None])

@st.composite
def canvases(draw):
    "Label maps: noise, rectangles that hide one another, and giants: frames and snakes that run through everything"
    h, w = draw(st.integers(1, 70)), draw(st.integers(1, 70))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    canvas = (rng.random((h, w)) < draw(st.sampled_from([0, .02, .3]))).astype(np.uint8) * rng.integers(1, 5, (h, w), np.uint8)
    for i in range(draw(st.integers(0, 12))):
        y, x = rng.integers(0, (h, w))
        canvas[y:y + rng.integers(1, 30), x:x + rng.integers(1, 30)] = i + 5
    if draw(st.booleans()): canvas[[h // 8, h - 1 - h // 8]] = canvas[:, [w // 8, w - 1 - w // 8]] = 100
    if draw(st.booleans()):
        for k, y in enumerate(range(0, h, 6)): canvas[y, :] = 101; canvas[y:y + 7, -1 if k % 2 else 0] = 101
    return canvas

@settings(max_examples=120, deadline=None)
@given(canvases(), st.integers(2, 40), st.data())
def test_tiles_are_not_seen(canvas, tile, data):
    overlap = data.draw(st.integers(1, tile - 1))
    if len(tile_grid(canvas.shape, tile, overlap)) > 60: tile, overlap = 30, 10
    found = predict_tiled(None, canvas, tile, overlap, predict=see)
    assert masks(found) == masks(whole(canvas)) and found.size == canvas.shape
    assert (np.diff(found.scores) <= 0).all()
    assert (found.boxes == np.array([[*e[[1, 0]], *e[[3, 2]]] for e in extents(found)]).reshape(-1, 4)).all()

@settings(max_examples=200, deadline=None)
@given(st.integers(1, 500), st.integers(2, 100), st.data())
def test_every_pixel_is_seen_and_has_one_owner(n, tile, data):
    overlap = data.draw(st.integers(1, tile - 1))
    row = cuts(n, tile, overlap)
    seen = np.zeros(n, int)
    for first, end, own, own_end in row:
        seen[first:end] += 1
        assert end - first == min(tile, n) and first <= own < own_end <= end
    assert seen.min() >= 1 and row[0][2] == 0 and row[-1][3] == n and all(a[3] == b[2] and a[1] - b[0] >= overlap for a, b in zip(row, row[1:]))

def test_whole_objects_are_whole_for_their_owner():
    "The argument of the lesson, for every object of every width at every place"
    for n, tile, overlap, rim in ((40, 16, 5, 1), (61, 20, 12, 3), (33, 10, 9, 1)):
        grid = tile_grid((1, n), tile, overlap)
        for x1 in range(n):
            for x2 in range(x1 + 1, n + 1):
                where = np.array([[0, x1, 1, x2]] * len(grid))
                boxes, cores = (np.array([t[k] for t in grid]) for k in (0, 1))
                mine, uncut = is_mine(where, cores), ~is_cut(where, boxes, (1, n), rim)
                assert mine.sum() == 1 and (not uncut.any() or uncut[mine][0]), (x1, x2)

@pytest.mark.parametrize('size', [(40, 40), (40, 300), (7, 3)])
def test_empty_picture(size):
    found = predict_tiled(None, np.zeros(size, np.uint8), 64, 16, predict=see)
    assert len(found) == 0 and found.size == size and found.scores.shape == (0,)

def test_small_picture_is_given_to_predict_as_it_is():
    seen, image = [], np.random.default_rng(0).integers(0, 255, (50, 64, 3)).astype(np.uint8)
    answer = replace(whole(np.eye(50, 64, dtype=np.uint8)), scores=np.float32([.7]))
    def predict(model, piece, **known): seen.append((piece, known)); return answer
    model = SimpleNamespace(config=SimpleNamespace(stretch=True))
    found = predict_tiled(model, image, 64, 16, predict=predict)
    assert len(seen) == 1 and (seen[0][0] == image).all() and seen[0][1] == {}
    assert masks(found) == masks(answer) and (found.boxes == answer.boxes).all()
    assert len(predict_tiled(model, image, 64, 16, min_score=.71, predict=predict)) == 0

@pytest.mark.parametrize('tile, overlap', [(64, 64), (64, 100), (64, 0), (64, -3)])
def test_overlap_that_makes_no_sense(tile, overlap):
    with pytest.raises(DataError, match=rf'^overlap={overlap}: [^.]*64[^.]*\.$'): predict_tiled(None, np.zeros((100, 100), np.uint8), tile, overlap, predict=see)

@pytest.mark.parametrize('shape', [(10,), (2, 3, 4, 5), (0, 5), (5, 0, 3)])
def test_what_is_no_picture(shape):
    with pytest.raises(DataError, match='image: a picture is'): predict_tiled(None, np.zeros(shape, np.uint8), predict=see)


def finds(*rows):
    "Rectangles: tile, y1, x1, y2, x2, score"
    rows = np.array(rows, float)
    where = rows[:, 1:5].astype(int)
    return Instances((1, 160), where[:, [1, 0, 3, 2]].astype(np.float32), np.ones(len(rows), int), [np.ones((b - a, d - c), bool) for a, c, b, d in where], where[:, :2], rows[:, 5].astype(np.float32)), rows[:, 0].astype(int)

GRID = tile_grid((1, 160), 100, 40)   # 0 to 100 and 60 to 160, the middle is 80

@pytest.mark.parametrize('rows, kept', [
    ([(0, 0, 70, 1, 85, .6), (1, 0, 71, 1, 86, .9)], [(70, 85)]),                  # the owner's, though the other is surer
    ([(0, 0, 75, 1, 86, .6), (1, 0, 74, 1, 85, .9)], [(74, 85)]),                  # each says that it is the other's: the surer one
    ([(0, 0, 74, 1, 85, .6), (1, 0, 75, 1, 86, .9)], [(75, 86)]),                  # each says that it is its own: the surer one
    ([(0, 0, 82, 1, 94, .9)], []),                                                 # the owner sees nothing there
    ([(0, 0, 90, 1, 100, .9), (1, 0, 91, 1, 120, .6)], [(91, 120)]),               # a part of what the owner sees whole
    ([(0, 0, 90, 1, 100, .9)], []),                                                # a part, and the owner sees nothing
    ([(0, 0, 20, 1, 99, .6), (1, 0, 62, 1, 140, .9)], [(20, 140)]),                # cut in both: one, from edge to edge, though each ends a little before the border
    ([(0, 0, 20, 1, 100, .6)], [(20, 100)]),                                       # cut, alone, mostly in its own core
    ([(0, 0, 70, 1, 78, .9), (0, 0, 71, 1, 79, .8)], [(70, 78), (71, 79)]),        # found twice by one pass: not ours to judge
])
def test_cases(rows, kept):
    merged = merge(*finds(*rows), GRID)
    assert sorted(map(tuple, extents(merged)[:, [1, 3]].tolist())) == kept

def test_two_tiles_that_agree_on_the_edge_of_what_lies_behind_their_border():
    grid, edge = tile_grid((160, 160), 100, 40), np.ones((20, 5), bool)   # the tiles on the right begin at column 60
    found = Instances((160, 160), np.zeros((2, 4), np.float32), np.ones(2, int), [edge, edge], np.array([[70, 60]] * 2), np.float32([.9, .8]))
    assert len(merge(found, np.array([1, 3]), grid)) == 0
    long = Instances((160, 160), np.zeros((2, 4), np.float32), np.ones(2, int), [np.ones((20, 90), bool)] * 2, np.array([[70, 10], [70, 60]]), np.float32([.9, .8]))
    assert extents(merge(long, np.array([0, 1]), grid)).tolist() == [[70, 10, 90, 150]]

def test_classes_are_not_mixed():
    found, tile = finds((0, 0, 70, 1, 79, .9), (1, 0, 70, 1, 92, .8))
    found.labels[:] = 1, 2
    assert len(merge(found, tile, GRID)) == 2
    found, tile = finds((0, 0, 20, 1, 100, .6), (1, 0, 60, 1, 140, .9))
    found.labels[:] = 1, 2
    assert len(merge(found, tile, GRID)) == 2

def test_masks_without_pixels_do_no_harm():
    found, tile = finds((0, 0, 10, 1, 20, .9), (1, 0, 120, 1, 130, .8))
    found.crops[0] = np.zeros((1, 10), bool)
    assert len(merge(placed(found, GRID[0], found.size), tile, GRID)) == 2

@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(0, 40), st.integers(5, 300))
def test_near_pairs_are_all_pairs(seed, n, side):
    rng = np.random.default_rng(seed)
    corner, group = rng.integers(0, side, (n, 2)), rng.integers(0, 3, n)
    where = np.concatenate([corner, corner + rng.integers(1, rng.integers(2, 100), (n, 2))], 1)
    meet = lambda a, b: max(a[0], b[0]) < min(a[2], b[2]) and max(a[1], b[1]) < min(a[3], b[3])
    assert near_pairs(where, group).tolist() == [[i, j] for i in range(n) for j in range(i + 1, n) if group[i] != group[j] and meet(where[i], where[j])]


@pytest.mark.parametrize('size', [(301, 400), (512, 300), (30, 31)])
def test_levels_are_those_of_stretch(size):
    image = np.random.default_rng(0).normal(60, 12, (*size, 3)).clip(0, 255).astype(np.uint8)
    assert picture_levels(image) == tuple(np.percentile(image[::2, ::2], (.5, 99.5))) and (stretch(image, levels=picture_levels(image)) == stretch(image)).all()

def test_models_get_8_bits_and_those_that_stretch_the_levels_of_the_picture():
    image, got = np.random.default_rng(0).integers(0, 200, (100, 120)).astype(np.uint16) * 300, []
    def predict(model, piece, **known): got.append((piece, known)); return whole(np.zeros(piece.shape[:2], np.uint8))
    for stretches in (True, False):
        got.clear()
        predict_tiled(SimpleNamespace(config=SimpleNamespace(stretch=stretches)), image, 64, 16, predict=predict)
        known = dict(levels=picture_levels(Picture(image))) if stretches else {}
        assert len(got) == 6 and all(p.dtype == np.uint8 and p.shape[2] == 3 and k == known for p, k in got)
        for (p, _), t in zip(got, tile_grid((100, 120), 64, 16)): assert (p == to_uint8(image)[t.box[0]:t.box[2], t.box[1]:t.box[3], None]).all()      # as a data set reads it

@pytest.mark.parametrize('shape', [(90, 70), (90, 70, 3), (90, 70, 5)])
@pytest.mark.parametrize('dtype', [np.uint8, np.uint16, np.int32, np.float32, bool])
def test_a_picture_in_pieces_is_the_picture(shape, dtype):
    stored = (np.random.default_rng(0).random(shape) * 250).astype(dtype)
    if dtype == np.float32: stored[:5, :7], stored[20], stored[60:, 3] = np.nan, np.inf, -np.inf
    picture, true = Picture(stored), to_picture(Pixels(stored, shape[2:] == (3,)))
    assert picture.shape == true.shape and picture.dtype == true.dtype and picture.ndim == 3 and (picture[:, :] == true).all() and (picture[3:40, 50:60] == true[3:40, 50:60]).all()

def test_holes_in_floats_do_not_reach_the_network():
    clean = np.random.default_rng(0).random((100, 120)).astype(np.float32) + 1
    holed, got = clean.copy(), []
    holed[:5, :7] = np.nan; holed[50] = np.inf; holed[70:73] = -np.inf
    def predict(model, piece, **known): got.append((piece, known)); return whole(np.zeros(piece.shape[:2], np.uint8))
    predict_tiled(SimpleNamespace(config=SimpleNamespace(stretch=True)), holed, 64, 16, predict=predict)
    assert all(np.isfinite(k['levels']).all() for _, k in got)
    box = tile_grid((100, 120), 64, 16)[0].box
    assert abs(got[0][0][8:49, :, 0].astype(int) - to_uint8(clean)[box[0]:box[2], box[1]:box[3]][8:49]).max() <= 2 and got[0][0][:5, :7].max() == 0 and got[0][0][50].min() == 255


PACKED = {'plain': {}, 'strips': dict(compression='zlib', rowsperstrip=7), 'one strip': dict(compression='lzw'), 'tiles': dict(compression='zlib', tile=(32, 48)), 'plain tiles': dict(tile=(32, 48)), 'big': dict(byteorder='>', bigtiff=True, tile=(16, 16))}

@pytest.mark.parametrize('how', PACKED)
@pytest.mark.parametrize('channels, dtype', [(0, np.uint8), (0, np.uint16), (0, np.float32), (3, np.uint8), (4, np.uint8), (3, np.uint16)])
def test_a_large_tiff_is_read_piece_by_piece(tmp_path, how, channels, dtype):
    image = np.random.default_rng(0).integers(0, 255, (101, 87, channels) if channels else (101, 87)).astype(dtype)
    tifffile.imwrite(tmp_path/'a.tif', image, **PACKED[how] | dict(photometric='rgb' if channels else 'minisblack') | (dict(extrasamples=['unassalpha']) if channels == 4 else {}))
    large, small, true = open_picture(tmp_path/'a.tif', 100), open_picture(tmp_path/'a.tif'), read_pixels(tmp_path/'a.tif').values
    assert isinstance(large, Picture) and isinstance(small, np.ndarray) and not isinstance(large.stored, np.ndarray) == (how != 'plain')
    assert large.shape == small.shape == (101, 87, 3) and large.dtype == np.uint8 and large.stored.shape == true.shape and large.stored.dtype == dtype
    for y1, x1, y2, x2 in ((0, 0, 101, 87), (33, 50, 34, 51), (100, 0, 101, 87), (3, 60, 90, 87)):
        assert (large.stored[y1:y2, x1:x2] == true[y1:y2, x1:x2]).all() and (large[y1:y2, x1:x2] == small[y1:y2, x1:x2]).all()
    assert picture_levels(large) == picture_levels(small)

def test_large_channels_one_after_the_other(tmp_path):
    image = np.random.default_rng(0).integers(0, 4095, (5, 60, 70)).astype(np.uint16)
    tifffile.imwrite(tmp_path/'a.tif', image, photometric='minisblack', metadata=dict(axes='CYX')), tifffile.imwrite(tmp_path/'rgb.tif', image[:3], photometric='rgb', planarconfig='separate')
    for name, n in (('a.tif', 5), ('rgb.tif', 3)):
        large, small = open_picture(tmp_path/name, 100), open_picture(tmp_path/name)
        assert isinstance(large.stored, np.memmap) and (large.stored[2:9, 3:50] == np.moveaxis(image, 0, -1)[2:9, 3:50, :n]).all() and (large[:, :] == small).all()

def test_what_can_only_be_read_at_once_is(tmp_path):
    image = np.random.default_rng(0).integers(0, 255, (60, 70, 3)).astype(np.uint8)
    write = lambda name, x, **k: tifffile.imwrite(tmp_path/name, x, **k)
    write('turned.tif', image, photometric='rgb', extratags=[(274, 3, 1, 6, True)]), write('white.tif', image[..., 0], photometric='miniswhite'), write('bits.tif', image[..., 0] > 99, photometric='minisblack')
    write('palette.tif', image[..., 0], photometric='palette', colormap=np.random.default_rng(0).integers(0, 65535, (3, 256)).astype(np.uint16)), Image.fromarray(image).convert('CMYK').save(tmp_path/'cmyk.tif')
    write('planes.tif', np.moveaxis(image, -1, 0), photometric='rgb', planarconfig='separate', compression='zlib')
    for name in ('turned.tif', 'white.tif', 'bits.tif', 'palette.tif', 'cmyk.tif', 'planes.tif'): assert isinstance(found := open_picture(tmp_path/name, 100), np.ndarray) and (found == read_image(tmp_path/name)).all(), name

def test_only_the_segments_asked_for_are_unpacked(tmp_path):
    tifffile.imwrite(tmp_path/'a.tif', np.ones((256, 256), np.uint8), compression='zlib', tile=(64, 64))
    stored, asked = open_picture(tmp_path/'a.tif', 100).stored, []
    stored.unpack = lambda i: asked.append(i) or stored.segment(i)
    assert isinstance(stored, TiffPicture) and stored[70:130, 10:60].all() and asked == [4, 8]

def test_a_tiff_in_plain_tiles_takes_little_memory(tmp_path):
    "What `read_pixels` says to do with a picture that does not fit."
    import tracemalloc
    tifffile.imwrite(tmp_path/'a.tif', shape=(6000, 7000, 3), dtype=np.uint8, tile=(256, 256), photometric='rgb', data=(np.full((256, 256, 3), i % 200, np.uint8) for i in range(24 * 28)))
    tracemalloc.start()
    picture = open_picture(tmp_path/'a.tif')
    piece = picture[3000:3512, 4000:4512]
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert isinstance(picture, Picture) and most < 3e7 and (piece == tifffile.imread(tmp_path/'a.tif')[3000:3512, 4000:4512]).all()

def test_other_pictures(tmp_path):
    image = np.random.default_rng(0).integers(0, 255, (20, 30, 3)).astype(np.uint8)
    Image.fromarray(image).save(tmp_path/'a.png'), np.save(tmp_path/'a.npy', image), np.save(tmp_path/'f.npy', image[..., 0] / 255), Image.fromarray(image).save(tmp_path/'lzw.tif', compression='tiff_lzw')
    for name in ('a.png', 'a.npy', 'f.npy', 'lzw.tif'):
        for most in (1, 10**6): assert (open_picture(tmp_path/name, most)[5:9, 2:20] == read_image(tmp_path/name)[5:9, 2:20]).all(), name
    assert isinstance(open_picture(tmp_path/'a.npy', 1).stored, np.memmap) and open_picture(tmp_path/'f.npy', 1).stored.dtype == float

@pytest.mark.parametrize('most', [1, 10**6])
@pytest.mark.parametrize('name, content', [('a.tif', b'no picture'), ('a.npy', b'no array'), ('a.png', b''), ('missing.tif', None), ('stack.tif', np.zeros((20, 30, 40), np.uint8)), ('chw.npy', np.zeros((3, 30, 40))), ('page.tif', b'<html></html>')])
def test_bad_files_get_one_sentence(tmp_path, name, content, most):
    if isinstance(content, bytes): (tmp_path/name).write_bytes(content)
    elif name.endswith('.npy'): np.save(tmp_path/name, content)
    elif content is not None: tifffile.imwrite(tmp_path/name, content, photometric='minisblack')
    with pytest.raises(DataError) as e: open_picture(tmp_path/name, most)
    assert str(e.value).startswith(f'{tmp_path/name}: ') and '\n' not in str(e.value) and str(e.value).count(name) == 1

def test_a_damaged_tile_is_one_sentence_when_it_is_reached(tmp_path):
    tifffile.imwrite(tmp_path/'a.tif', np.random.default_rng(0).integers(0, 255, (256, 256)).astype(np.uint8), compression='zlib', tile=(64, 64))
    with tifffile.TiffFile(tmp_path/'a.tif') as f: at = f.pages[0].dataoffsets[9]
    raw = bytearray((tmp_path/'a.tif').read_bytes())
    raw[at:at + 200] = bytes(200)
    (tmp_path/'a.tif').write_bytes(raw)
    picture = open_picture(tmp_path/'a.tif', 100)
    with pytest.raises(DataError, match=r'a\.tif: the image cannot be read'): picture[:, :]


@settings(max_examples=50, deadline=None)
@given(canvases(), st.sampled_from(VIEWS))
def test_turned_back(canvas, view):
    objects = whole(canvas)
    back = turn_back(turn(canvas[..., None], objects, *view)[1], *view)
    assert masks(back) == masks(objects) and (back.boxes == objects.boxes).all() and back.size == objects.size

@settings(max_examples=30, deadline=None)
@given(canvases(), st.sampled_from([VIEWS[:1], VIEWS[:2], VIEWS]))
def test_a_network_that_never_errs_says_the_same_from_all_sides(canvas, views):
    sure = lambda m, p, **k: replace(see(m, p), scores=np.ones(len(see(m, p)), np.float32))
    found = predict_flipped(None, canvas[..., None], views=views, predict=sure)
    assert masks(found) == masks(whole(canvas)) and np.allclose(found.scores, 1)
    tiled = predict_tiled(None, canvas, 40, 12, predict=lambda m, p, **k: predict_flipped(m, p, views=views, predict=sure, **k))
    assert masks(tiled) == masks(whole(canvas))

def test_what_one_look_sees_alone_counts_less():
    canvas, n = np.zeros((20, 20), np.uint8), []
    canvas[2:8, 3:9] = 1
    def once(model, piece, **known): n.append(1); return replace(see(model, piece * (len(n) == 1)), labels=np.ones(int(len(n) == 1), int), scores=np.full(int(len(n) == 1), .8, np.float32))
    found = predict_flipped(None, canvas[..., None], views=VIEWS, predict=once)
    assert len(n) == 8 and np.allclose(found.scores, .1) and (found.masks()[0] == canvas).all()

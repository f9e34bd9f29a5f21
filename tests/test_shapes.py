"The shapes and their objects: drawn alike everywhere, and properties of masks, each against code that we did not write"
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from hypothesis.extra import numpy as hnp
from pycocotools import mask as coco_mask

from maskrcnn_edu.data import CLASSES, LEVELS, Instances, make_shapes, open_dataset, write_coco
from maskrcnn_edu.data.opening import make_shapes_data, shapes_folder

@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch): monkeypatch.setenv('MASKRCNN_EDU_CACHE', str(tmp_path/'cache'))

def test_committed_shapes_are_what_the_seed_draws(tmp_path):
    committed = Path(__file__).parent.parent/'shapes_data'
    make_shapes_data(tmp_path/'again')
    files = {p.relative_to(tmp_path/'again') for p in (tmp_path/'again').rglob('*') if p.is_file()}
    assert len(files) == 602 and all((tmp_path/'again'/f).read_bytes() == (committed/f).read_bytes() for f in files)

def test_same_samples_same_bytes(tmp_path):
    paths = [write_coco(make_shapes(5, seed=3), tmp_path/n, 'train', CLASSES) for n in 'ab']
    assert paths[0].read_bytes() == paths[1].read_bytes()
    for p in (tmp_path/'a'/'images').iterdir(): assert p.read_bytes() == (tmp_path/'b'/'images'/p.name).read_bytes()

def test_shapes_folder_is_drawn_again_where_it_is_missing(tmp_path, monkeypatch):
    import maskrcnn_edu
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(maskrcnn_edu, '__file__', str(tmp_path/'site'/'maskrcnn_edu'/'__init__.py'))
    folder = shapes_folder()
    assert folder.parent == tmp_path/'cache' and folder == shapes_folder()
    assert [len(d) for d in open_dataset(folder)] == [500, 100]

def test_the_classic_set_is_the_classic_set():
    train, valid = open_dataset(Path(__file__).parent.parent/'shapes_data')
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

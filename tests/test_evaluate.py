"Edges of the evaluation that the notebook does not show"
import json, math

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from hypothesis.extra import numpy as hnp

from maskrcnn_edu.data import Instances, make_shapes
from maskrcnn_edu.evaluate import CocoEval, dsb_score, label_iou, match, mean_dsb

def things(*spans, width=40, scores=None):
    masks = np.array([[[a <= x < b for x in range(width)]] for a, b in spans], bool).reshape(-1, 1, width)
    return Instances.from_masks(masks, [1] * len(spans), scores=scores)

def test_perfect_detections_score_one():
    e = CocoEval(['background', 'square', 'circle', 'triangle'])
    for s in make_shapes(10, seed=4):
        found = s.instances[:]
        found.scores = np.full(len(found), .9, np.float32)
        e.add(s.instances, found)
    out = e.compute()
    one = pytest.approx(1)
    assert all(out[k] == one for k in ('box_ap', 'box_ap50', 'box_ap75', 'mask_ap', 'mask_ap50', 'mask_ap75'))
    assert all(v == one for c in out['per_class'].values() for v in c.values())
    assert out['sizes']['mask_ap_large'] is None and out['sizes']['mask_ap_medium'] == one  # no shape reaches 96² pixels
    json.dumps(out, allow_nan=False)

def test_nothing_found_and_images_without_objects():
    e = CocoEval(['background', 'thing', 'never'])
    e.add(things((0, 4)), things(scores=[]))
    e.add(things(), things(scores=[]))
    out = e.compute()
    assert out['mask_ap'] == 0 and out['per_class']['thing']['mask_ap'] == 0 and out['per_class']['never']['mask_ap'] is None
    assert set(e.pr_curve()) == {'thing'}

def test_inventions_on_an_empty_image_lower_ap():
    e = CocoEval(['background', 'thing'])
    e.add(things((0, 4)), things((0, 4), scores=[.5]))
    assert e.compute()['mask_ap'] == pytest.approx(1)
    e.add(things(), things((0, 4), scores=[.9]))
    assert e.compute()['mask_ap'] == pytest.approx(.5)

def test_no_truth_at_all_is_not_a_number():
    e = CocoEval(['background', 'thing'])
    e.add(things(), things((0, 4), scores=[.5]))
    assert math.isnan(e.compute()['mask_ap'])

def test_more_than_100_objects_count_where_asked():
    many = things(*[(3 * i, 3 * i + 2) for i in range(150)], width=500)
    found = things(*[(3 * i, 3 * i + 2) for i in range(150)], width=500, scores=np.linspace(.9, .1, 150))
    got = {}
    for n in (100, 1000):
        e = CocoEval(['background', 'thing'], max_dets=n)
        e.add(many, found)
        got[n] = e.compute()['mask_ap']
    assert got[1000] == pytest.approx(1) and abs(got[100] - 67 / 101) < 1e-9  # recall 2/3: 67 of 101 points

def test_bad_calls():
    e = CocoEval(['background', 'thing'])
    with pytest.raises(ValueError, match='scores'): e.add(things((0, 4)), things((0, 4)))
    with pytest.raises(ValueError, match='image'): e.add(things((0, 4)), things((0, 4), width=50, scores=[1]))
    with pytest.raises(ValueError, match='label maps'): dsb_score(np.zeros((3, 4)), np.zeros((4, 3)))
    with pytest.raises(ValueError, match='no image'): mean_dsb([])

def test_each_true_object_is_found_once():
    m = match(things((0, 10)), things((0, 10), (0, 9), scores=[.5, .9]))
    assert m.pairs.tolist() == [[0, 1]] and m.wrong.tolist() == [0] and m.missed.tolist() == []
    assert match(things(), things((0, 4), scores=[1])).wrong.tolist() == [0]
    assert match(things((0, 4)), things(scores=[])).missed.tolist() == [0]

maps = hnp.arrays(np.int32, (6, 7), elements=st.integers(0, 4))

@given(maps, maps)
@settings(max_examples=200, deadline=None)
def test_dsb_properties(a, b):
    ab, ba = dsb_score(a, b), dsb_score(b, a)
    assert ab == ba and list(ab.values()) == sorted(ab.values(), reverse=True) and set(dsb_score(a, a).values()) == {1.}
    iou = label_iou(a, b)
    for i, ga in enumerate(np.unique(a[a > 0])):
        for j, gb in enumerate(np.unique(b[b > 0])):
            assert iou[i, j] == ((a == ga) & (b == gb)).sum() / ((a == ga) | (b == gb)).sum()

"Edges of the evaluation that the notebook does not show"
import contextlib, io, json, math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import matplotlib
matplotlib.use('agg')
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from hypothesis.extra import numpy as hnp
from matplotlib import pyplot as plt
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from maskrcnn_edu.anchors import pyramid_anchors
from maskrcnn_edu.boxes import box_iou
from maskrcnn_edu.checkpoints import load_weights
from maskrcnn_edu.data import InstanceDataset, make_shapes
from maskrcnn_edu.evaluate import (ERRORS, IOUS, CocoEval, CocoMetrics, InstanceInterpretation, average_precision, compare, confusion_matrix, dsb_score, explain,
                                   image_score, label_iou, largest_first, match, mean_dsb, pair_iou, show_differences, split_errors)
from maskrcnn_edu.instances import Instances
from maskrcnn_edu.learner import instance_dls, mask_rcnn_learner
from maskrcnn_edu.mask_rcnn import SHAPES

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

def spoilt(image, rng, shift=7):
    "True objects moved, some lost, some named wrongly, some twice, some invented"
    truth, masks, labels = image.instances, [], []
    for i in rng.permutation(np.repeat(np.arange(len(truth)), rng.integers(0, 3, len(truth)))):
        o = truth[[i]].window(*rng.integers(-shift, shift + 1, 2), *truth.size)
        if len(o): masks.append(o.masks()[0]), labels.append(o.labels[0] if rng.random() < .8 else rng.integers(1, 4))
    for y, x in rng.integers(0, 100, (2, 2)):
        masks.append(np.zeros(truth.size, bool)), labels.append(rng.integers(1, 4))
        masks[-1][y:y + 20, x:x + 20] = True
    return Instances.from_masks(np.array(masks), labels, scores=rng.permutation(len(masks)) / 100 + rng.random() / 200)

def random_images(seed, n=6):
    rng = np.random.default_rng(seed)
    return [(s.instances, spoilt(s, rng)) for s in make_shapes(n, seed=seed, level='crowded')]

CLASSES = ['background', 'square', 'circle', 'triangle']

@pytest.mark.parametrize('kind', ['box', 'mask'])
def test_our_average_precision_is_that_of_pycocotools(kind):
    differences = []
    for seed in range(50):
        rng, images = np.random.default_rng(seed), random_images(seed, 3)
        images = [(replace(t, labels=np.where(rng.random(len(t)) < .2, -1, 1) * t.labels), f) for t, f in images]
        e = CocoEval(CLASSES, max_dets=4, sides=(14, 20))
        for t, f in images: e.add(t, f)
        compared = [compare(t, f, kind) for t, f in images]
        theirs = e.precision(kind)
        for k, a, t in np.ndindex(3, 4, 3):
            ours = average_precision(compared, k + 1, IOUS[4 * t], e.areas()[a], 4)
            assert np.isnan(ours) == (theirs[4 * t, :, k, a] == -1).all()
            if not np.isnan(ours): differences.append(abs(ours - theirs[4 * t, :, k, a].mean()))
    assert len(differences) > 500 and max(differences) < 1e-6 and np.ptp(differences) < 1e-6

def test_split_agrees_with_tide():
    reference = json.loads((Path(__file__).parent/'tide_reference.json').read_text())
    kinds = [k for r in reference['sets'] for k, n in r['count'].items() if n]
    assert set(kinds) == set(ERRORS), 'every kind must occur'
    for r in reference['sets']:
        split = split_errors([compare(t, f) for t, f in random_images(r['seed'])])
        assert split.table['count'].to_dict() == r['count'], r['seed']
        assert split.ap == pytest.approx(r['ap'], abs=.003)   # TIDE writes the 101 recalls as k/100, pycocotools as linspace: a recall of .07 may fall on either side
        assert split.table.gain.to_dict() == pytest.approx(r['gain'], abs=.003), r['seed']

def test_each_kind_of_error_alone():
    truth = things((0, 10), (20, 30))
    truth.labels[1] = 2
    cases = {'class': ((20, 30), 1), 'location': ((6, 16), 1), 'both': ((26, 36), 1), 'background': ((32, 39), 1)}
    for kind, (span, label) in cases.items():
        found = things((0, 10), span, scores=[.9, .8])
        found.labels[:] = 1, label
        kinds, meant = explain(compare(truth, found))
        assert kinds.tolist() == ['right', kind], kind
    doubled = things((0, 10), (0, 9), (20, 30), scores=[.9, .8, .7])
    doubled.labels[:] = 1, 1, 2
    assert explain(compare(truth, doubled))[0].tolist() == ['right', 'duplicate', 'right']
    split = split_errors([compare(truth, things((0, 10), scores=[.9]))])
    assert split.table['count'].to_dict() == dict.fromkeys(ERRORS, 0) | {'missed': 1} and split.ap == .5
    assert split.table.gain['missed'] == pytest.approx(.5)

def test_two_finds_of_one_object_mend_it_once():
    split = split_errors([compare(things((0, 10)), things((6, 16), (5, 15), scores=[.9, .8]))])
    assert split.table['count']['location'] == 2 and split.table['count']['missed'] == 0
    assert split.finds.mend.tolist() == [True, False] and split.table.gain['location'] == pytest.approx(1)

def test_everything_right_leaves_nothing_to_gain():
    images = [(s.instances, replace(s.instances, scores=np.full(len(s.instances), .9, np.float32))) for s in make_shapes(5, seed=3)]
    split = split_errors([compare(t, f) for t, f in images])
    assert split.ap == pytest.approx(1) and not split.table['count'].any() and np.allclose(split.table.gain, 0)

def test_images_without_objects_or_finds():
    nothing = things(), things(scores=[])
    invented = things(), things((0, 4), scores=[.9])
    missed = things((0, 4)), things(scores=[])
    split = split_errors([compare(*nothing), compare(*invented), compare(*missed)])
    assert split.table['count'].to_dict() == dict.fromkeys(ERRORS, 0) | {'background': 1, 'missed': 1} and split.ap == 0
    assert math.isnan(split_errors([compare(*nothing)]).ap)
    assert [image_score(compare(*x)) for x in (nothing, invented, missed)] == [1, 0, 0]
    assert confusion_matrix([compare(*x) for x in (nothing, invented, missed)], 2).tolist() == [[0, 1], [1, 0]]

def test_confusion_counts_every_object_and_every_sure_find_once():
    images = random_images(8, 20)
    m = confusion_matrix([compare(t, f) for t, f in images], 4, min_score=.05)
    assert m[1:].sum(1).tolist() == [sum((t.labels == k).sum() for t, _ in images) for k in (1, 2, 3)]
    assert m[:, 1:].sum(0).tolist() == [sum((f.labels[f.scores >= .05] == k).sum() for _, f in images) for k in (1, 2, 3)]
    assert m[0, 0] == 0

def test_the_largest_overlap_is_a_pair_first():
    iou = np.array([[.6, .9], [.7, .8]])
    assert largest_first(iou) == [(0, 1), (1, 0)] and iou.max() == .9
    assert largest_first(np.array([[.4]])) == [] and largest_first(np.zeros((0, 3))) == []

def test_what_lies_in_a_crowd_does_not_count():
    truth, found = labelled(things((0, 10), (20, 38)), 1, -1), things((0, 10), (21, 25), (30, 37), scores=[.9, .8, .7])
    c = compare(truth, found)
    assert explain(c)[0].tolist() == ['right', 'ignored', 'ignored'] and image_score(c) == 1
    assert split_errors([c]).table['count'].sum() == 0 and confusion_matrix([c], 2).tolist() == [[0, 0], [0, 1]]
    assert average_precision([c], 1) == pytest.approx(1)

def labelled(instances, *labels): return replace(instances, labels=np.array(labels))

def both(*parts):
    "Objects of several Instances in one"
    return Instances.from_masks(np.concatenate([p.masks() for p in parts]), np.concatenate([p.labels for p in parts]),
                                scores=None if parts[0].scores is None else np.concatenate([p.scores for p in parts]))

def herded(truth, rng):
    "Some true objects, and the others of their class in one outline, as a crowd"
    k = rng.permutation(4)[0]
    herd = (truth.labels == k) & (rng.random(len(truth)) < .7)
    if not herd.any(): return truth
    return both(truth[~herd], Instances.from_masks(truth[herd].masks().any(0)[None], [-k]))

def herds(seed, n=6):
    "Images in which about half of the objects of a class are a crowd, with what was found in them"
    rng = np.random.default_rng(seed)
    return [(herded(t, rng), f) for t, f in random_images(seed, n)]

def by_coco(images, kind, folder, max_dets=100, kept=True):
    "COCOeval on two files, with nothing of ours between but the pixels; 101 precisions by IoU, class and size"
    gt, dt = dict(images=[], annotations=[], categories=[dict(id=i, name=c) for i, c in enumerate(CLASSES) if i]), []
    for i, (truth, found) in enumerate(images, 1):
        gt['images'].append(dict(id=i, width=truth.size[1], height=truth.size[0]))
        for rows, objects in ((gt['annotations'], truth), (dt, found)):
            for mask, label, (x1, y1, x2, y2), score in zip(objects.masks(), objects.labels.tolist(), objects.boxes.astype(float).tolist(), [1] * len(truth) if objects is truth else found.scores.tolist()):
                rle = coco_mask.encode(np.asfortranarray(mask))
                row = dict(image_id=i, category_id=abs(label), segmentation=dict(size=rle['size'], counts=rle['counts'].decode()), score=score)
                if kind == 'box' or objects is truth: row['bbox'] = [x1, y1, x2 - x1, y2 - y1]
                if objects is truth: row |= dict(id=len(rows) + 1, iscrowd=int(label < 0), area=int(mask.sum()))
                if kept or label > 0: rows.append(row)
    for name, x in (('gt', gt), ('dt', dt)): (folder/name).write_text(json.dumps(x))
    with contextlib.redirect_stdout(io.StringIO()):
        api = COCO(folder/'gt')
        e = COCOeval(api, api.loadRes(str(folder/'dt')), dict(box='bbox', mask='segm')[kind])
        e.params.maxDets = [1, 10, max_dets]
        e.evaluate(), e.accumulate()
    return e.eval['precision'][..., 2]

@pytest.mark.parametrize('kind', ['box', 'mask'])
def test_crowds_are_those_of_pycocotools(kind, tmp_path):
    dropped = 0
    for seed in range(40):   # 240 images
        images, e = herds(seed), CocoEval(CLASSES)
        for t, f in images: e.add(t, f)
        theirs = by_coco(images, kind, tmp_path)
        assert np.abs(e.precision(kind) - theirs).max() < 1e-9, seed
        ap = theirs[..., 0][theirs[..., 0] > -1].mean()
        assert e.compute()[f'{kind}_ap'] == pytest.approx(ap, abs=1e-9)
        without = by_coco(images, kind, tmp_path, kept=False)[..., 0]
        dropped += abs(without[without > -1].mean() - ap) > 1e-3
    assert sum((t.labels < 0).sum() for s in range(40) for t, _ in herds(s)) > 80 and dropped > 10, 'crowds must matter'

def test_nine_crowds_among_hundreds_of_objects(tmp_path):
    images = [(t if i % 11 else herded(t, np.random.default_rng(i)), f) for i, (t, f) in enumerate(random_images(4, 100))]
    crowds, objects = (sum(int((s * t.labels > 0).sum()) for t, _ in images) for s in (-1, 1))
    assert 5 <= crowds <= 10 and objects > 400
    e, left_out = CocoEval(CLASSES), CocoEval(CLASSES)
    for t, f in images: e.add(t, f), left_out.add(t[t.labels > 0], f)
    theirs, without = by_coco(images, 'box', tmp_path), by_coco(images, 'box', tmp_path, kept=False)
    assert e.compute()['box_ap'] == pytest.approx(theirs[..., 0][theirs[..., 0] > -1].mean(), abs=1e-9)
    assert left_out.compute()['box_ap'] == pytest.approx(without[..., 0][without[..., 0] > -1].mean(), abs=1e-9)
    assert e.compute()['box_ap'] > left_out.compute()['box_ap'] + 1e-4

def verdict(images, masks_only=False):
    "Everything that is said of some images"
    e = CocoEval(CLASSES, sides=(14, 20))
    for t, f in images: e.add(t, f)
    kinds = ('mask',) if masks_only else ('box', 'mask')
    compared = {kind: [compare(t, f, kind) for t, f in images] for kind in kinds}
    splits, ms = [split_errors(c) for c in compared.values()], [match(t, f) for t, f in images]
    return dict(
        precision=[e.precision(k) for k in kinds],
        confusion=[confusion_matrix(c, 4, min_score=.03) for c in compared.values()],
        scores=[[image_score(x, m) for x in c for m in (0, .03)] for c in compared.values()],
        errors=[s.table.to_numpy() for s in splits], ap=[s.ap for s in splits],
        ours=[[average_precision(c, k, .5) for k in (1, 2, 3)] for c in compared.values()],
        counts=[[len(m.pairs), len(m.wrong), len(m.missed)] for m in ms],
        dsb=[[*dsb_score(t, f).values()] for t, f in images], objects=e.table()['', 'objects'].to_numpy())

def same(a, b): return all(np.array_equal(np.asarray(a[k]), np.asarray(b[k]), equal_nan=True) for k in a)

def test_what_is_found_in_a_crowd_changes_nothing():
    changed = tried = 0
    for seed in range(30):
        rng, images, more = np.random.default_rng(seed), herds(seed, 3), []
        for truth, found in images:
            crowds = np.flatnonzero(truth.labels < 0)
            if len(crowds):
                ys, xs = np.nonzero(truth[crowds].masks()[0])
                piece = np.zeros((3, *truth.size), np.uint8)     # three small pieces of the crowd, one under the other
                for mask, i in zip(piece, rng.integers(0, len(ys), 3)): mask[ys[i]:ys[i] + 6, xs[i]:xs[i] + 6] = 1
                piece *= truth[crowds].masks()[0]
                inside = Instances.from_masks(piece, -np.repeat(truth.labels[crowds[0]], 3), scores=rng.random(3) * 1e-4 + np.array([1, .04, 0]))
                tried += 3
                found = both(found, inside)
            more.append((truth, found))
        before, after = verdict(images, True), verdict(more, True)
        # of the nuclei score, what lies on top takes pixels from what is below: only crowds and finds apart from them
        before.pop('dsb'), after.pop('dsb')
        assert same(before, after), seed
        changed += not same({'p': before['precision']}, {'p': verdict([(t[t.labels > 0], f) for t, f in more], True)['precision']})
    assert tried > 60 and changed > 15, 'with the crowds dropped, they count'

def test_a_crowd_where_nothing_is_changes_nothing():
    for seed in range(20):
        images, more = random_images(seed, 3), []
        for truth, found in images:
            taken = truth.masks().any(0) | found.masks().any(0)
            corner = np.zeros((1, *truth.size), bool)
            corner[0, -8:, -8:] = True
            room = not (taken & corner[0]).any() and not (pair_iou(Instances.from_masks(corner, [-1]), found, 'box') > 0).any()
            more.append((both(Instances.from_masks(corner, [-1 - seed % 3]), truth) if room else truth, found))
        assert seed or any(len(a) < len(b) for (a, _), (b, _) in zip(images, more))
        assert same(verdict(images), verdict(more))

def total(x): return float(sum(np.nansum(np.asarray(part, float)) for part in x))

# precision, confusion, scores, errors, ap, ours, counts, dsb and objects of five sets of four images
BEFORE = [-1815.926556776557, 145.0, 0.17884249363405375, 116.07482069635535, 0.09637265924394638, 0.2891179777318391, 87.0, 0.7886446886446886, 88.0, -366.3810300810303, 125.0,
          1.3854254372293475, 96.00210444579257, 0.40444639702065444, 1.213339191061963, 76.0, 1.456042226196352, 72.0, -380.9031676656678, 135.0, 0.7918733745982506,
          100.96025955482855, 0.34959107632374964, 1.0487732289712488, 79.0, 1.2536975163212043, 80.0, -3431.332783882784, 148.0, 0.5505108033944508, 113.98176097075341,
          0.20063125360155062, 0.601893760804652, 87.0, 0.7757899127198349, 94.0, 436.29837662337644, 96.0, 0.9578163388911134, 75.13786950123585, 0.4433914820053434,
          1.3301744460160303, 59.0, 1.8427353341931345, 56.0]

def test_without_crowds_all_is_as_before():
    "Numbers of the program before it knew crowds, from the same images"
    got = [verdict(random_images(seed, 4)) for seed in range(5)]
    flat = [total(v[k]) for v in got for k in v]
    assert flat == pytest.approx(BEFORE, rel=1e-12)

def test_a_real_object_comes_before_the_crowd_around_it():
    "COCO: a find that can be right is right, also where it lies in a crowd"
    truth, found = labelled(things((10, 20), (0, 40)), 1, -1), things((10, 20), (30, 35), scores=[.9, .8])
    c, m = compare(truth, found), match(truth, found)
    assert m.pairs.tolist() == [[0, 0]] and m.ignored.tolist() == [1] and len(m.wrong) == len(m.missed) == 0
    assert confusion_matrix([c], 2).tolist() == [[0, 0], [0, 1]] and image_score(c) == 1
    assert explain(c)[0].tolist() == ['right', 'ignored'] and average_precision([c], 1) == pytest.approx(1)
    assert set(dsb_score(truth, found).values()) == {1.}

def test_a_crowd_takes_only_its_own_class():
    truth = labelled(things((0, 10), (20, 38)), 1, -1)
    found = labelled(things((0, 10), (21, 25), (30, 37), scores=[.9, .8, .7]), 1, 2, 1)
    c, m = compare(truth, found), match(truth, found)
    assert m.wrong.tolist() == [1] and m.ignored.tolist() == [2]
    assert explain(c)[0].tolist() == ['right', 'background', 'ignored']
    assert confusion_matrix([c], 3).tolist() == [[0, 0, 1], [0, 1, 0], [0, 0, 0]] and image_score(c) == .5

def test_a_find_in_a_crowd_of_its_class_is_not_called_by_a_wrong_name():
    truth = labelled(things((0, 10), (0, 30)), 2, -1)         # one of class 2 in a crowd of class 1
    c = compare(truth, things((0, 10), scores=[.9]))
    assert confusion_matrix([c], 3).tolist() == [[0, 0, 0], [0, 0, 0], [1, 0, 0]]
    assert explain(c)[0].tolist() == ['ignored'] and split_errors([c]).table['count'].to_dict() == dict.fromkeys(ERRORS, 0) | {'missed': 1}

def test_how_much_must_lie_in_the_crowd():
    truth, found = labelled(things((0, 20)), -1), things((13, 23), scores=[.9])   # 7 of 10 pixels
    c = compare(truth, found)
    assert c.iou.tolist() == [[.7]] and image_score(c) == pytest.approx(.5)       # from 0.5 to 0.7 ignored, from 0.75 wrong
    assert [round(v) for v in dsb_score(truth, found).values()] == [1] * 4 + [0] * 6   # above, not at, 0.7
    assert match(truth, found, .7).ignored.tolist() == [0] and match(truth, found, .75).wrong.tolist() == [0]

def test_images_of_crowds_only():
    truth = labelled(things((0, 20)), -1)
    nothing, inside, outside = things(scores=[]), things((3, 9), scores=[.9]), things((30, 35), scores=[.9])
    assert [image_score(compare(truth, f)) for f in (nothing, inside, outside)] == [1, 1, 0]
    assert [dsb_score(truth, f)[.5] for f in (nothing, inside, outside)] == [1, 1, 0]
    e = CocoEval(['background', 'thing'])
    e.add(truth, inside)
    assert math.isnan(e.compute()['mask_ap']) and e.table().loc['all', ('', 'objects')] == 0
    assert split_errors([compare(truth, inside)]).table['count'].sum() == 0

def test_a_crowd_takes_no_pixels_from_nuclei():
    truth = labelled(things((0, 10), (0, 30)), 1, -1)   # the crowd comes later and covers the object
    assert dsb_score(truth, things((0, 10), scores=[.9]))[.95] == 1
    assert dsb_score(truth, things(scores=[]))[.5] == 0

def test_a_crowd_is_drawn_as_such():
    truth, found = labelled(things((0, 10), (20, 38)), 1, -2), labelled(things((0, 10), (21, 25), scores=[.9, .8]), 1, 2)
    tall = lambda x: Instances.from_masks(x.masks().repeat(20, 1), x.labels, scores=x.scores)
    ax = show_differences(np.zeros((20, 40, 3), np.uint8), tall(truth), tall(found), names=['background', 'square', 'circle'])
    said = [x.get_text() for x in ax.texts]
    assert said == ['crowd of circle', '✓ square 0.90, IoU 1.00', '– circle 0.80, in a crowd']
    assert any(c.get_hatch() or getattr(c, 'hatches', [None])[0] for c in ax.collections) and ax.get_xlim() == (-.5, 39.5)
    plt.close('all')

def test_table_has_all_rows_and_columns():
    e = CocoEval(CLASSES, sides=(14, 20))
    for t, f in random_images(1): e.add(t, f)
    table, out = e.table(), e.compute()
    assert list(table.index) == ['all', *CLASSES[1:]] and table.loc['all', ('', 'objects')] == sum(len(t) for t, _ in random_images(1))
    assert table.loc['all', ('mask', 'AP')] == out['mask_ap'] and table.loc['circle', ('box', 'AP')] == out['per_class']['circle']['box_ap']
    assert table.loc['all', ('mask', 'small')] == out['sizes']['mask_ap_small'] and '<table' in table.to_html()


SIZES_BEFORE = ((16,), (32,), (64,), (96,), (128,))

@pytest.fixture(scope='module')
def tiny():
    "An untrained learner and its images"
    data = InstanceDataset([Named(s.name, s) for s in make_shapes(6, seed=2)], CLASSES, lambda r: (r.sample, []))
    config = SHAPES.change(rpn=dict(sizes=SIZES_BEFORE, ratios=(.5, 1., 2.)), backbone=dict(width=8, channels=16), head=dict(hidden=16, mask_channels=8), detection=dict(min_score=0.))
    coco = CocoMetrics(CLASSES, max_dets=config.detection.n_detections)
    learn = mask_rcnn_learner(instance_dls(data.subset(range(3)), data.subset(range(1, 6)), item_tfms=(), bs=2, device='cpu'), config, cbs=[coco], metrics=coco.metrics())
    return learn, data.subset(range(1, 6)), coco

class Named:
    "A record of a data set in memory"
    def __init__(self, name, sample): self.name, self.sample = name, sample

def test_interpretation_of_a_learner_and_of_a_model_agree(tiny):
    learn, data, _ = tiny
    a, b = InstanceInterpretation.from_learner(learn), InstanceInterpretation.from_model(learn.model, data)
    assert a.names == b.names == data.names and a.classes == CLASSES
    for x, y in zip(a.truths + a.founds, b.truths + b.founds):
        assert x.labels.tolist() == y.labels.tolist() and np.allclose(x.boxes, y.boxes, atol=1e-3) and len(x) == len(y)
    assert a.summary().equals(b.summary()) or np.allclose(a.summary(), b.summary(), atol=1e-4, equal_nan=True)
    assert (a.confusion_matrix(min_score=0) == b.confusion_matrix(min_score=0)).all()
    losses, order = a.top_losses()
    assert len(losses) == 5 and list(losses) == sorted(a.losses, reverse=True) and a.losses[order[0]] == losses[0]
    assert a.top_losses(2, largest=False)[0].tolist() == sorted(a.losses)[:2]
    with pytest.raises(ValueError, match='from_learner'): b.top_losses()

def test_every_picture_of_the_interpretation(tiny):
    interp = InstanceInterpretation.from_learner(tiny[0])
    for draw in (interp.pr_curves, interp.plot_confusion_matrix, interp.worst, interp.plot_top_losses, interp.error_anatomy, interp.coverage):
        draw()
        assert plt.gcf().axes[0].has_data(), draw
        plt.close('all')

def test_coverage_of_the_interpretation(tiny):
    interp = InstanceInterpretation.from_model(tiny[0].model, tiny[1])
    table = interp.coverage(plot=False)
    anchors = pyramid_anchors((128, 128), [(32 >> i, 32 >> i) for i in range(5)], SIZES_BEFORE)
    best = torch.cat([box_iou(torch.tensor(t.boxes), anchors).amax(1) for t in interp.truths])
    assert np.allclose(table.best, best, atol=1e-6) and table.recommended.mean() > table.best.mean()
    worse = interp.coverage(sizes=((4,),) * 5, plot=False)
    assert worse.recommended.max() < .1 and len(worse) == len(best)

def test_coverage_is_of_objects_only(tiny):
    data, rng = tiny[1], np.random.default_rng(0)
    crowd = lambda s: replace(s, instances=labelled(s.instances, -s.instances.labels[0], *s.instances.labels[1:]))
    interp, whole = (InstanceInterpretation.from_model(tiny[0].model, [f(data[i]) for i in range(5)], CLASSES) for f in (crowd, lambda s: s))
    table, all_rows = interp.coverage(plot=False), whole.coverage(plot=False)
    kept = all_rows[all_rows.object > 0]
    assert len(table) == len(all_rows) - 5 and table.object.tolist() == kept.object.tolist() and table.best.tolist() == kept.best.tolist()

def test_metrics_in_training_know_crowds():
    "Through loader and slots the same number as on the objects themselves; with the crowds dropped another"
    rng = np.random.default_rng(5)
    samples = [replace(s, instances=herded(s.instances, rng)) for s in make_shapes(30, seed=12, level='noise')]
    model, _ = load_weights('shapes')
    data = InstanceDataset([Named(s.name, s) for s in samples], CLASSES, lambda r: (r.sample, []))
    coco = CocoMetrics(CLASSES)
    learn = mask_rcnn_learner(instance_dls(data, data.subset(range(30)), item_tfms=(), bs=8, device='cpu'), model=model, cbs=[coco], metrics=coco.metrics())
    with learn.no_bar(): learn.validate()
    interp = InstanceInterpretation.from_model(learn.model, data)
    want, kept = interp.evaluation().compute(), sum((t.labels < 0).sum() for t in interp.truths)
    assert kept > 5 and [coco.value(n) for n in coco.names] == pytest.approx([want[n] for n in coco.names], abs=1e-9)
    assert [len(t) for t, _ in coco.pairs] == [len(s.instances) for s in samples]
    interp.truths = [t[t.labels > 0] for t in interp.truths]
    assert abs(interp.evaluation().compute()['mask_ap'] - want['mask_ap']) > .001

def test_metrics_of_the_learner_are_those_of_the_interpretation(tiny):
    learn, _, coco = tiny
    with learn.no_bar(): learn.validate()
    want = InstanceInterpretation.from_learner(learn).evaluation().compute()
    assert coco.value('mask_ap') == pytest.approx(want['mask_ap'], abs=1e-6) and coco.value('box_ap') == pytest.approx(want['box_ap'], abs=1e-6)
    assert len(coco.pairs) == 5 and not math.isnan(coco.value('mask_ap50'))


def one_rank(rank, file, folder):
    "A process with its part of the images: of five, padded to six"
    torch.distributed.init_process_group('gloo', init_method=f'file://{file}', rank=rank, world_size=2)
    images, part = random_images(4, 5), [[0, 1, 4], [2, 3, 0]][rank]
    coco = CocoMetrics(CLASSES)
    coco.learn = SimpleNamespace(dl=SimpleNamespace(idxs=part))
    coco.due, coco.pairs = True, [images[i] for i in part]
    coco.after_validate()
    (folder/f'{rank}.json').write_text(json.dumps(coco.scores))
    torch.distributed.destroy_process_group()

def test_two_processes_count_each_image_once(tmp_path):
    torch.multiprocessing.start_processes(one_rank, (tmp_path/'meet', tmp_path), nprocs=2, start_method='fork')  # a fresh process would import for a minute
    e = CocoEval(CLASSES)
    for t, f in random_images(4, 5): e.add(t, f)
    want = json.loads(json.dumps(e.compute(sizes=False)))
    assert [json.loads((tmp_path/f'{r}.json').read_text()) for r in (0, 1)] == [want, want] and want['mask_ap'] > 0

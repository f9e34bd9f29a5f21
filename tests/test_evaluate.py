"Edges of the evaluation that the notebook does not show"
import json, math
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

from maskrcnn_edu.anchors import pyramid_anchors
from maskrcnn_edu.boxes import box_iou
from maskrcnn_edu.data import InstanceDataset, Instances, make_shapes
from maskrcnn_edu.evaluate import (ERRORS, IOUS, CocoEval, CocoMetrics, InstanceInterpretation, average_precision, compare, confusion_matrix, dsb_score, explain,
                                   image_score, label_iou, largest_first, match, mean_dsb, split_errors)
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
        crowds = [rng.random(len(t)) < .2 for t, _ in images]
        e = CocoEval(CLASSES, max_dets=4, sides=(14, 20))
        for (t, f), crowd in zip(images, crowds): e.add(t, f, crowd)
        compared = [compare(t, f, kind, crowd) for (t, f), crowd in zip(images, crowds)]
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
    truth, found = things((0, 10), (20, 38)), things((0, 10), (21, 25), (30, 37), scores=[.9, .8, .7])
    c = compare(truth, found, crowd=[False, True])
    assert explain(c)[0].tolist() == ['right', 'ignored', 'ignored'] and image_score(c) == 1
    assert split_errors([c]).table['count'].sum() == 0 and confusion_matrix([c], 2).tolist() == [[0, 0], [0, 1]]
    assert average_precision([c], 1) == pytest.approx(1)

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

"Dialects: files of version 0.1, the sorting of Detectron, anchors of several sizes a level, a part for each box."
import json
from pathlib import Path
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from safetensors.torch import load, save

from maskrcnn_edu.boxes import encode, full_frame
from maskrcnn_edu.checkpoints import DIALECTS, SYSTEMS, WeightsError, load_weights, save_weights, translate
from maskrcnn_edu.dialects import detectron, detectron2, matterport
from maskrcnn_edu.dialects.base import build
from maskrcnn_edu.learner import predict_instances
from maskrcnn_edu.mask_rcnn import MaskRCNN, Parts
from test_checkpoints import checkpoint, small, written

recorded = json.loads((Path(__file__).parent/'recordings/dialects.json').read_text())
CLASSES = ['background', 'a', 'b', 'c', 'd']


def old_file(name, folder, **changes):
    "A converted checkpoint as version 0.1 wrote it: one flat list of numbers, and 37 rules."
    header = recorded[name]['header'] | changes
    state = {k: v.contiguous() for k, v in translate(checkpoint(name), SYSTEMS[name]).items()}
    meta = dict(format='maskrcnn_edu', config=json.dumps(header), classes=json.dumps(CLASSES))
    (folder/'old.safetensors').write_bytes(save(state, meta))
    return folder/'old.safetensors'


@pytest.mark.parametrize('name', SYSTEMS)
def test_a_file_of_version_01_gives_the_same_answers(name, tmp_path):
    model, names = load_weights(old_file(name, tmp_path))
    found = predict_instances(model, np.random.default_rng(1).integers(0, 255, (60, 50, 3)).astype(np.uint8))
    before = recorded[name]
    assert names == CLASSES and found.labels.tolist() == before['labels'] and len(found) == 5
    assert np.allclose(found.boxes, before['boxes'], rtol=0, atol=1e-3) and np.allclose(found.scores, before['scores'], rtol=0, atol=1e-5)
    assert np.allclose([c.sum() for c in found.crops], before['areas'], rtol=.01, atol=3)
    again, _ = load_weights(save_weights(model, tmp_path/'new.safetensors', names))
    assert again.config == model.config and again.door.numbers == dict(short_side=64, long_side=128) == model.door.numbers
    assert again.dialect == model.dialect and model.dialect in (name, 'detectron', 'torchvision')


def test_rules_that_no_program_has_are_refused(tmp_path):
    rules = recorded['detectron2']['header']['conventions'] | dict(nms_plus=1.)
    with pytest.raises(WeightsError, match=r'old\.safetensors: its header .*rules that are those of no program; convert'):
        load_weights(old_file('detectron2', tmp_path, conventions=rules))


def test_a_dialect_that_this_version_does_not_know(tmp_path):
    model = build(DIALECTS['detectron2'], DIALECTS['detectron2'].config.change(
        n_classes=5, backbone=dict(layers=(1, 1, 1, 1), width=4, channels=8), head=dict(hidden=16, mask_channels=8)))
    model.dialect = 'esperanto'
    file = save_weights(model, tmp_path/'w.safetensors', CLASSES)
    with pytest.raises(WeightsError, match="w.safetensors: speaks the dialect 'esperanto', .*detectron2"): load_weights(file)


def test_a_model_of_ours_has_no_dialect(tmp_path):
    model, names = load_weights('shapes')
    file = save_weights(model, tmp_path/'w.safetensors', names)
    assert b'dialect' not in file.read_bytes()[:4000] and load_weights(file)[0].config == model.config and not hasattr(model, 'door')


# ---- Detectron's order ----

def their_level(boxes, scores, n_pre, n_post, iou):
    "One level as its programs write it in NumPy: partition, sort, a greedy loop in the order of another sort, and the survivors in the first order."
    if n_pre >= len(scores): order = np.argsort(-scores)
    else:
        order = np.argpartition(-scores, n_pre)[:n_pre]
        order = order[np.argsort(-scores[order])]
    boxes, scores = boxes[order], scores[order]
    area = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    gone = np.zeros(len(boxes), bool)
    visit = scores.argsort()[::-1]
    for k, i in enumerate(visit):
        if gone[i]: continue
        for j in visit[k + 1:]:
            both = (np.minimum(boxes[i, 2:], boxes[j, 2:]) - np.maximum(boxes[i, :2], boxes[j, :2])).clip(0).prod()
            if both / (area[i] + area[j] - both) >= iou: gone[j] = True
    keep = np.flatnonzero(~gone)[:n_post]
    return boxes[keep], scores[keep]


def their_proposals(boxes, scores, level_sizes, n_pre, n_post, iou):
    start, out = 0, []
    for n in level_sizes:
        out.append(their_level(boxes[start:start + n], scores[start:start + n], n_pre, n_post, iou))
        start += n
    boxes, scores = (np.concatenate(x) for x in zip(*out))
    top = np.argsort(-scores)[:n_post]
    return boxes[top], scores[top]


@pytest.mark.parametrize('top', [3., 16., 25.])
@pytest.mark.parametrize('seed', range(3))
def test_detectron_ranks_by_the_score_and_its_sorting(seed, top):
    "With logits up to 25 most of the scores are exactly 1, and what is kept depends on the order that the sorts leave."
    g = torch.Generator().manual_seed(seed)
    level_sizes, size = (600, 150), (200, 240)
    corner = torch.rand(750, 2, generator=g) * torch.tensor([180., 150.])
    anchors = torch.cat([corner, corner + 10 + torch.rand(750, 2, generator=g) * 30], 1)
    logits = top - torch.rand(750, generator=g) * 8
    p = detectron.propose(logits, torch.zeros(750, 4), anchors, level_sizes, full_frame(size, anchors), n_pre=400, n_post=150)
    boxes, scores = their_proposals(anchors.numpy(), logits.sigmoid().numpy(), level_sizes, 400, 150, np.float32(.7))
    assert int(p.valid.sum()) == len(boxes)
    assert np.abs(p.boxes[p.valid].numpy() - boxes).max() < 1e-3 and np.array_equal(p.scores[p.valid].numpy(), scores)
    if top == 25.:
        assert (logits.sigmoid() == 1).float().mean() > .9
        ours = Parts().propose(logits, torch.zeros(750, 4), anchors, level_sizes, full_frame(size, anchors), n_pre=400, n_post=150)
        same = (torch.cdist(ours.boxes[ours.valid], p.boxes[p.valid], p=torch.inf) < 1e-3).any(1)
        assert same.float().mean() < .9, 'ranked by logits, other boxes are kept'


def test_the_sorting_under_vmap_and_without_enough_anchors():
    logits = torch.randn(2, 30) * 20
    each = torch.vmap(lambda s: torch.stack(detectron.rank_like_numpy(s, 20)))(logits.sigmoid())
    for one, both in zip(logits.sigmoid(), each): assert torch.equal(torch.stack(detectron.rank_like_numpy(one, 20)), both)
    order = detectron.rank_like_numpy(torch.tensor([.1, .9, .5]), 3).order
    assert order.tolist() == [1, 2, 0]
    print(torch.library.opcheck(detectron.rank_op, (logits, 20)))


# ---- anchors ----

@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(8, 200), min_size=1, max_size=3), st.lists(st.sampled_from([.5, 1., 2., 3.]), min_size=1, max_size=3, unique=True))
def test_detectron2_has_sizes_before_ratios(sizes, ratios):
    "Of several sizes a level: all ratios of the first, then of the second, as its generator loops; heights and widths are not rounded."
    expected = []
    for y in range(2):
        for x in range(3):
            for size in sizes:
                for ratio in ratios:
                    w = (size**2 / ratio) ** .5
                    h = ratio * w
                    expected.append([x * 4 - w / 2, y * 4 - h / 2, x * 4 + w / 2, y * 4 + h / 2])
    ours = detectron2.make_anchors((8, 12), [(2, 3)], [tuple(sizes)], tuple(ratios))
    torch.testing.assert_close(ours, torch.tensor(expected), atol=1e-3, rtol=1e-5)


# ---- units ----

@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([(256, 256), (800, 1024), (1024, 1024)]))
def test_pixels_to_units_and_back(seed, size):
    g = torch.Generator().manual_seed(seed)
    corner = torch.rand(20, 2, generator=g) * 900
    boxes = torch.cat([corner, corner + torch.rand(20, 2, generator=g) * 100], 1)
    assert (matterport.to_pixels(matterport.to_units(boxes, size), size) - boxes).abs().max() < 2e-4
    corners = torch.tensor([[0., 0, size[1], size[0]]])
    assert torch.allclose(matterport.to_units(corners, size), torch.tensor([[0., 0, 1, 1]]))


@pytest.mark.parametrize('name', DIALECTS)
def test_every_part_works_in_the_model(name):
    "Losses, gradients and detections of a small model of each dialect, pictures as they are; and one box swapped back for ours."
    torch.manual_seed(0)
    config = DIALECTS[name].config.change(
        n_classes=3, backbone=dict(layers=(1, 1, 1, 1), width=8, channels=16), head=dict(hidden=16, mask_channels=16, n_rois=12, n_masks=4),
        rpn=dict(n_pre=60, n_post=30, n_pre_predict=60, n_post_predict=30), detection=dict(min_score=0., n_detections=6))
    model = build(DIALECTS[name], config)
    images, boxes = torch.rand(2, 3, 64, 128), torch.tensor([[[10., 10, 60, 50]], [[70., 5, 120, 60]]])
    masks = torch.zeros(2, 1, 64, 128)
    masks[:, :, 10:50, 10:60] = 1
    losses = model(images, boxes, torch.tensor([[1], [2]]), masks)
    sum(losses.values()).backward()
    assert len(losses) == 5 and all(v.isfinite() for v in losses.values())
    found = model.eval().predict(images)
    assert found.boxes.shape == (2, 6, 4) and found.boxes.isfinite().all() and (found.labels > 0).any()
    model.parts = model.parts._replace(detect=MaskRCNN(config).parts.detect)
    assert model.predict(images).boxes.isfinite().all()


def test_sides_of_a_model_of_ours_are_refused():
    with pytest.raises(ValueError, match='shapes: a model of ours takes pictures as they are'): MaskRCNN.from_checkpoint('shapes', short_side=64)

@pytest.mark.parametrize('rule, sides, levels', [
    (detectron2.choose_level, (111.99, 112, 223.9999, 224, 447.99, 448), (0, 1, 1, 2, 2, 3)),
    (detectron.choose_level, (110.99, 111, 222.9999, 223, 446.99, 447), (0, 1, 2, 2, 2, 3)),
    (matterport.nearest_level, (79, 80, 158, 159, 316, 317), (0, 1, 1, 2, 2, 3))])
def test_levels_at_the_edges_of_each_rule(rule, sides, levels):
    "By hand: floor(4 + log2(side / 224 + 1e-8)); side + 1 and 1e-6; or the nearest, which turns at 224 √½ and 224 √2."
    boxes = torch.tensor([[0., 0., side, side] for side in sides])
    assert rule(boxes).tolist() == list(levels)

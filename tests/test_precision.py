"Coordinates keep 32 bits under mixed precision: every box of the diagram at 800 x 1344, with an object whose area no half can hold."
from contextlib import nullcontext
import pytest
import torch
import torchvision
from hypothesis import given, settings, strategies as st
from torchvision.models.detection._utils import BoxCoder, Matcher
from torchvision.models.detection.roi_heads import paste_masks_in_image

from maskrcnn_edu.boxes import box_area, box_iou, decode, encode, full_frame
from maskrcnn_edu.detections import detect, paste_masks, paste_soft
from maskrcnn_edu.dialects.detectron2 import DETECTRON2
from maskrcnn_edu.head_targets import crop_masks, head_targets, sample_rois
from maskrcnn_edu.mask_rcnn import MaskRCNN, MaskRCNNConfig, frame_of
from maskrcnn_edu.roi_align import roi_align, roi_align_torch
from maskrcnn_edu.rpn import RPN

SIZE = 800, 1344
kinds = pytest.mark.parametrize('kind', [torch.float16, torch.bfloat16], ids=['float16', 'bfloat16'])
BOX = torch.tensor([[[300., 100., 902., 700.]]])            # 602 x 600 pixels: 361,200 of them, a half ends at 65,504


def half(kind): return torch.autocast('cpu', kind)

def maps(kind=torch.float32, channels=8):
    torch.manual_seed(0)
    return [torch.randn(1, channels, -(-800 // s), 1344 // s).to(kind) for s in (4, 8, 16, 32, 64)]

@pytest.fixture(scope='module')
def rpn():
    torch.manual_seed(0)
    return RPN(8)

def asked(rpn, context=nullcontext(), kind=torch.float32):
    with context, torch.no_grad(): out = rpn(maps(kind), full_frame(SIZE, BOX, 1))
    return out


@kinds
def test_rpn(rpn, kind):
    plain, mixed = asked(rpn), asked(rpn, half(kind))
    assert torch.equal(mixed.anchors, plain.anchors) and {t.dtype for t in mixed[:3]} == {torch.float32}
    torch.testing.assert_close(mixed.deltas, plain.deltas, atol=.05, rtol=.05)     # the map's own precision


@kinds
def test_rpn_targets(rpn, kind):
    noise, label = torch.rand(1, len(asked(rpn).anchors)), torch.ones(1, 1).long()
    plain = rpn.targets(asked(rpn), BOX, label, noise)
    with half(kind): mixed = rpn.targets(asked(rpn, half(kind)), BOX, label, noise)
    assert (mixed.labels == 1).any() and torch.equal(mixed.labels, plain.labels) and torch.equal(mixed.target_deltas, plain.target_deltas)
    anchors = asked(rpn).anchors
    index = Matcher(.7, .3, True)(torchvision.ops.box_iou(BOX[0], anchors))
    assert (index[mixed.labels[0] == 1] == 0).all()
    theirs = BoxCoder((1., 1., 1., 1.)).encode_single(BOX[0].expand(len(anchors), 4), anchors)
    torch.testing.assert_close(mixed.target_deltas[0], theirs, atol=1e-4, rtol=1e-4)


def test_in_halves_the_object_would_have_no_anchor(rpn):
    "What these tests guard against: the same in half precision, by torchvision's function, which computes in the type that it is given."
    a, b = BOX[0].half(), torch.tensor([[310., 110, 900, 690]]).half()
    area = (a[:, 2] - a[:, 0]) * (a[:, 3] - a[:, 1])
    assert area.isinf().all() and box_iou(a, b).isfinite().all() and box_iou(a, b) > .9


@kinds
def test_rpn_losses_and_proposals(rpn, kind):
    out = asked(rpn)
    with half(kind):
        p = rpn.propose(out, 500, 100)
        losses = rpn.losses(out, rpn.targets(out, BOX, torch.ones(1, 1).long(), torch.full((1, len(out.anchors)), .5)))
    plain = rpn.propose(out, 500, 100)
    assert all(torch.equal(x, y) for x, y in zip(p, plain)) and p.boxes.dtype == torch.float32
    assert all(v.isfinite() and v.dtype == torch.float32 for v in losses.values())


@kinds
def test_head_targets(kind):
    g = torch.Generator().manual_seed(0)
    proposals = BOX[0] + torch.randn(50, 4, generator=g) * 60
    masks = torch.zeros(1, *SIZE)
    masks[:, 100:700, 300:902] = 1
    def run():
        sampled = sample_rois(proposals, torch.ones(50).bool(), BOX[0], torch.ones(1).long(), torch.linspace(0, 1, 51), n_rois=32)
        return head_targets(sampled, BOX[0], masks, n_masks=8, aligned=True)
    with half(kind): mixed = run()
    plain = run()
    assert (mixed.labels > 0).any() and all(torch.equal(a, b) for a, b in zip(mixed, plain))


@kinds
@pytest.mark.parametrize('sampling', [2, 0])
def test_roi_align_of_half_maps(kind, sampling):
    features, rois = maps(kind)[2], torch.cat([torch.zeros(1, 1), BOX[0]], 1)
    for f in (roi_align, torchvision.ops.roi_align):
        with half(kind): got = f(features, rois, 7, 1 / 16, sampling)
        torch.testing.assert_close(got.float(), torchvision.ops.roi_align(features.float(), rois, 7, 1 / 16, sampling), atol=4e-3, rtol=1e-2)
    one = torch.zeros(1).long()
    with half(kind): plain = torch.ops.maskrcnn_edu.roi_align([features.float()], rois[:, 1:], one, one, [1 / 16], 7, 7, sampling, False)
    torch.testing.assert_close(plain, torchvision.ops.roi_align(features.float(), rois, 7, 1 / 16, sampling), atol=1e-5, rtol=1e-5)


@kinds
def test_the_pytorch_of_the_ops_ignores_autocast(kind):
    "The same numbers from the implementation that runs without a compiler."
    from maskrcnn_edu.cuda.rules import without_autocast
    feature, rois, zero = maps()[2], BOX[0] / 2, torch.zeros(1).long()
    args = [feature], rois, zero, zero, [1 / 16], 7, 7, 0, False
    with half(kind): got = without_autocast(roi_align_torch)(*args)
    torch.testing.assert_close(got, roi_align_torch(*args), atol=0, rtol=0)
    masks = torch.rand(3, 28, 28)
    boxes = torch.tensor([[3.2, 4.1, 90.3, 81.7], [10., 10, 700, 790], [-5., -5, 20, 30]])
    with half(kind): soft = paste_soft(masks, boxes, 100, 120, True)
    assert torch.equal(soft, paste_soft(masks, boxes, 100, 120, True)) and soft.dtype == torch.float32


@kinds
def test_crop_and_paste(kind):
    masks = torch.zeros(1, *SIZE)
    masks[:, 100:700, 300:902] = 1
    index = torch.zeros(1).long()
    with half(kind):
        small = crop_masks(masks, index, BOX[0] + 3.3)
        pasted = paste_masks(small, BOX[0], *SIZE)
    theirs = torchvision.ops.roi_align(masks[:, None], torch.cat([torch.zeros(1, 1), BOX[0] + 3.3], 1), 28)[:, 0]
    torch.testing.assert_close(small, theirs, atol=1e-5, rtol=1e-5)
    assert torch.equal(pasted, paste_masks_in_image(small[:, None], BOX[0], SIZE)[:, 0] >= .5)


@kinds
def test_detect(kind):
    torch.manual_seed(0)
    proposals = BOX[0] + torch.randn(30, 4) * 30
    logits, deltas, frame = torch.randn(30, 3) * 2, torch.randn(30, 3, 4), full_frame(SIZE, BOX)
    with half(kind): mixed = detect(proposals, torch.ones(30).bool(), logits, deltas, frame)
    assert all(torch.equal(a, b) for a, b in zip(mixed, detect(proposals, torch.ones(30).bool(), logits, deltas, frame)))
    low = detect(proposals, torch.ones(30).bool(), logits, deltas.to(kind), frame)       # what a head in halves answers
    assert low.boxes.dtype == torch.float32 and low.boxes.isfinite().all()


@kinds
def test_the_model(kind):
    torch.manual_seed(0)
    config = MaskRCNNConfig().change(
        n_classes=3, backbone=dict(layers=(1, 1, 1, 1), bottleneck=False, width=8, channels=16), head=dict(hidden=16, mask_channels=16, n_rois=32),
        rpn=dict(n_pre=100, n_post=50, n_pre_predict=100, n_post_predict=50), detection=dict(min_score=0., n_detections=10))
    model, images = MaskRCNN(config).eval(), torch.rand(1, 3, 832, 1344)
    masks = torch.zeros(1, 1, 832, 1344)
    masks[:, :, 100:700, 300:902] = 1
    with half(kind), torch.no_grad():
        found, losses = model.predict(images), model(images, BOX, torch.ones(1, 1).long(), masks)
    assert found.boxes.dtype == found.scores.dtype == torch.float32 and found.boxes.isfinite().all()
    assert all(v.isfinite() for v in losses.values())
    with half(kind), torch.no_grad():
        rpn = model.run_rpn(model.features(images), frame_of(images))
        targets = model.rpn.targets(rpn, BOX, torch.ones(1, 1).long(), torch.zeros(1, len(rpn.anchors)))
    assert (targets.labels == 1).any()


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(*[st.integers(0, 127)] * 4), min_size=1, max_size=6), st.sampled_from([torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64]))
def test_boxes_in_whole_numbers(rows, kind):
    boxes = torch.tensor([(min(a, c), min(b, d), max(a, c), max(b, d)) for a, b, c, d in rows], dtype=kind)
    exact = boxes.double()
    assert torch.equal(box_area(boxes).double(), (exact[:, 2:] - exact[:, :2]).prod(1))
    torch.testing.assert_close(box_iou(boxes, boxes), box_iou(exact, exact).float())
    sized = boxes[((boxes[:, 2:] - boxes[:, :2]) > 0).all(1)]
    if len(sized): torch.testing.assert_close(decode(encode(sized, sized), sized), sized.float())


def test_a_dialect_keeps_them_too():
    from maskrcnn_edu.dialects.base import build
    model = build(DETECTRON2, DETECTRON2.config.change(
        n_classes=3, backbone=dict(layers=(1, 1, 1, 1), width=8, channels=16), head=dict(hidden=16, mask_channels=16),
        rpn=dict(n_pre_predict=100, n_post_predict=50), detection=dict(min_score=0.))).eval()
    with half(torch.bfloat16): found = model.predict(torch.rand(1, 3, 64, 64))
    assert found.boxes.dtype == torch.float32

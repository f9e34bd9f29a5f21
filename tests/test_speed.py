"What is only for speed changes no answer: slots cut off, masks by the op, folded norms, replays; and the script for GPUs runs without one."
import os, subprocess, sys
from dataclasses import replace
from pathlib import Path
import pytest
import torch
import torchvision
from hypothesis import given, settings, strategies as st
from torch.nn import functional as F
from torchvision.ops import FrozenBatchNorm2d

from maskrcnn_edu.checkpoints import load_weights
from maskrcnn_edu.data import make_shapes
from maskrcnn_edu.head_targets import crop_masks
from maskrcnn_edu.learner import to_slots
from maskrcnn_edu.mask_rcnn import MaskRCNN, SHAPES, frame_of, used_slots
from maskrcnn_edu.resnet import ResNet
from maskrcnn_edu.roi_align import roi_align_torch
from maskrcnn_edu.speed import fold_norms, KINDS, Replay, alternate, kind_of, profile_step

root = Path(__file__).resolve().parent.parent
CONFIG = SHAPES.change(backbone=dict(width=16, channels=16), head=dict(hidden=32, mask_channels=16))     # 8 channels, channels last, two threads: PyTorch 2.15's convolution crashes on some processors


def batch_of(n=3, slots=6):
    samples = make_shapes(n, seed=3)
    images = torch.stack([torch.tensor(s.image) for s in samples]).permute(0, 3, 1, 2) / 255
    return images, *(torch.stack(t) for t in zip(*(to_slots(s.instances, slots) for s in samples)))


@pytest.mark.parametrize('labels, n', [([[0, 0, 0], [0, 0, 0]], 0), ([[1, 0, 0], [0, 0, 0]], 1), ([[0, 0, 2], [1, 0, 0]], 3), ([[0, -1, 0], [0, 0, 0]], 2), ([[], []], 0)])
def test_used_slots(labels, n):
    labels = torch.tensor(labels).long().reshape(2, -1)
    assert used_slots(labels) == n
    assert torch.vmap(lambda x: torch.tensor(used_slots(x[None])))(labels).tolist() == [labels.shape[1]] * 2      # shapes must stay fixed there


@pytest.mark.parametrize('more', [1, 50])
def test_empty_slots_change_nothing(more):
    torch.manual_seed(0)
    model, (images, boxes, labels, masks) = MaskRCNN(CONFIG).train(), batch_of()
    n_anchors = len(model.run_rpn(model.features(images), frame_of(images)).anchors)
    noise = model.draw_noise(3, n_anchors, CONFIG.rpn.n_post + 6, boxes)
    wide = [F.pad(t, (0, 0) * (t.ndim - 2) + (0, more)) for t in (boxes, labels, masks)]
    found = []
    for truth, dice in (((boxes, labels, masks), noise), (wide, noise._replace(head=F.pad(noise.head, (0, more))))):
        model.zero_grad()
        losses = model(images, *truth, dice)
        sum(losses.values()).backward()
        found.append((losses, [p.grad.clone() for p in model.parameters()]))
    (a, da), (b, db) = found
    assert all(torch.equal(a[k], b[k]) for k in a) and all(torch.equal(x, y) for x, y in zip(da, db))


def test_no_object_at_all():
    torch.manual_seed(0)
    model, (images, boxes, labels, masks) = MaskRCNN(CONFIG).train(), batch_of()
    losses = model(images, boxes, torch.zeros_like(labels), masks)
    sum(losses.values()).backward()
    assert all(v.isfinite() for v in losses.values()) and losses['loss_mask'] == 0


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.booleans(), st.integers(1, 30), st.sampled_from([7, 14, 28]))
def test_masks_by_the_op(seed, aligned, n, size):
    g = torch.Generator().manual_seed(seed)
    masks, index = torch.rand(4, 50, 70, generator=g) > .5, torch.randint(4, (n,), generator=g)
    corner = torch.rand(n, 2, generator=g) * 40
    rois = torch.cat([corner, corner + torch.rand(n, 2, generator=g) * 30], 1)
    ours = crop_masks(masks, index, rois, size, aligned)
    wide = torch.cat([rois[:, :2], torch.maximum(rois[:, 2:], rois[:, :2] + 1)], 1)
    theirs = torchvision.ops.roi_align(masks[:, None].float(), torch.cat([index[:, None], wide], 1), size, aligned=aligned)[:, 0]
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_masks_without_a_compiler():
    masks, rois = torch.rand(2, 30, 30) > .5, torch.tensor([[3., 4., 20., 21.], [5., 5., 6, 25.]])
    index = torch.tensor([0, 1])
    plain = roi_align_torch([masks[:, None].float()], rois, index, torch.zeros_like(index), [1.], 28, 28, 0, False)[:, 0]
    torch.testing.assert_close(crop_masks(masks, index, rois), plain, atol=1e-5, rtol=1e-4)
    assert crop_masks(masks, torch.zeros(0).long(), rois[:0]).shape == (0, 28, 28)


def test_folded_norms_answer_the_same():
    model, _ = load_weights('shapes')
    before = {k: v.clone() for k, v in model.state_dict().items()}
    images = batch_of(4)[0]
    folded = fold_norms(model)
    a, b = model.predict(images), folded.predict(images)
    assert torch.equal(a.labels, b.labels) and (a.labels > 0).any()
    for x, y in zip(a, b): torch.testing.assert_close(x, y, atol=2e-3, rtol=1e-3)
    assert not any(isinstance(m, (torch.nn.BatchNorm2d, FrozenBatchNorm2d)) for m in folded.modules())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()), 'the model itself must stay as it was'


@pytest.mark.parametrize('norm', [torch.nn.BatchNorm2d, FrozenBatchNorm2d, torch.nn.InstanceNorm2d])
@pytest.mark.parametrize('bottleneck', [False, True])
def test_folded_bodies(norm, bottleneck):
    torch.manual_seed(0)
    body = ResNet((1, 1, 1, 1), bottleneck, 4, norm).eval()
    for m in body.modules():
        if isinstance(m, (torch.nn.BatchNorm2d, FrozenBatchNorm2d)):
            for name in ('weight', 'bias', 'running_mean'): getattr(m, name).data.normal_()
            m.running_var.uniform_(.5, 2)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        for a, b in zip(body(x), fold_norms(body)(x)): torch.testing.assert_close(b, a, atol=1e-3, rtol=1e-3)
    left = sum(isinstance(m, norm) for m in fold_norms(body).modules())
    assert (left == 0) == (norm is not torch.nn.InstanceNorm2d), 'a norm that looks at the picture cannot be folded'


def test_replay():
    f = Replay(lambda a, b: (a + b, a * b), torch.zeros(3), torch.ones(3))
    assert [x.tolist() for x in f(torch.ones(3), torch.full((3,), 2.))] == [[3.] * 3, [2.] * 3]
    with pytest.raises(ValueError, match='input 1 is .2,. .* recorded is .3,.'): f(torch.ones(3), torch.ones(2))
    with pytest.raises(ValueError, match='float64'): f(torch.ones(3).double(), torch.ones(3))
    with pytest.raises(ValueError): f(torch.ones(3))


def test_time_by_kind():
    table = profile_step(lambda: torch.nn.functional.conv2d(torch.ones(1, 8, 64, 64), torch.ones(8, 8, 3, 3)), 2)
    assert table.index[0] == 'convolutions' and abs(table.share.sum() - 1) < 1e-6
    assert [kind_of(k) for k in ('aten::convolution_backward', 'maskrcnn_edu::nms_keep', 'torchvision::_roi_align_backward', 'aten::_fused_adamw_', 'aten::softmax')] == ['convolutions', 'NMS', 'ROIAlign', 'optimiser', 'the rest']
    assert set(table.index) <= {*KINDS, 'the rest'} and len(alternate([lambda: 1, lambda: 2], 2)) == 2


def test_the_script_for_gpus_runs_without_one(tmp_path):
    done = subprocess.run([sys.executable, str(root/'benchmarks/gpu_model.py'), '--out', str(tmp_path), '--runs', '1'], capture_output=True, text=True, env=os.environ | dict(CUDA_VISIBLE_DEVICES='', OMP_NUM_THREADS='1', MASKRCNN_EDU_CACHE=str(tmp_path/'cache')))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert done.stdout.count("'ratio'") == 5 and "'mask_ap'" in done.stdout and 'No GPU' in done.stdout and not list(tmp_path.glob('*.json'))

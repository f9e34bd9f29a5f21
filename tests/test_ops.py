"The native ops against torchvision on random and on awful inputs, on whatever backend runs here, and under every transform that PyTorch has."
import pytest, torch
from hypothesis import HealthCheck, given, settings, strategies as st
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision import ops as theirs
from torchvision.models.detection.roi_heads import paste_masks_in_image
from maskrcnn_edu import cuda
from maskrcnn_edu.boxes import full_frame
from maskrcnn_edu.checkpoints import load_weights
from maskrcnn_edu.data import make_shapes
from maskrcnn_edu.detections import paste_masks, paste_soft
from maskrcnn_edu.mask_rcnn import frame_of
from maskrcnn_edu.nms import nms_keep, nms_matrix
from maskrcnn_edu.roi_align import pyramid_roi_align, roi_align, roi_level

ops = torch.ops.maskrcnn_edu
many = settings(max_examples=1000 if cuda.backend() != 'torch' else 200, deadline=None, suppress_health_check=list(HealthCheck))
inf, nan = torch.inf, torch.nan


def random_boxes(g, n, side, degenerate=False):
    "Boxes of all sizes around a picture; some without extent, upside down or outside."
    rand = lambda *s: torch.rand(*s, generator=g)
    corner = rand(n, 2) * side * 1.4 - side * .2
    size = rand(n, 2) ** 3 * side * (rand(n, 2) * 1.2 - .2 if degenerate else 1)
    return torch.cat([corner, corner + size * (rand(n, 2) > .05 if degenerate else 1)], 1)


@st.composite
def nms_cases(draw):
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    n = draw(st.sampled_from([0, 1, 2, 15, 16, 17, 100, 127, 128, 129, 300, 700]))
    boxes = random_boxes(g, n, draw(st.sampled_from([10, 60, 400])), draw(st.booleans()))
    scores = torch.rand(n, generator=g)
    if draw(st.booleans()): scores = (scores * 8).round() / 8                 # ties
    if draw(st.booleans()): boxes = boxes.round()
    return boxes, scores, draw(st.sampled_from([0., .1, .3, .5, .7, .99, 1.])), draw(st.sampled_from([torch.float32, torch.float64]))

@many
@given(nms_cases())
def test_nms_keeps_what_torchvision_keeps(case):
    boxes, scores, iou, dtype = case
    boxes, scores = boxes.to(dtype), scores.to(dtype)
    if len(scores.unique()) < len(scores):   # torchvision's order among equals is that of a stable sort as well
        order = scores.argsort(descending=True, stable=True)
        boxes, scores = boxes[order], torch.linspace(1, 0, len(order), dtype=dtype)
        with_ties = scores.mul(4).ceil()     # equal scores, in the same order
    else: with_ties = scores
    expected = torch.zeros(len(boxes), dtype=torch.bool).index_fill(0, theirs.nms(boxes, scores, iou), True)
    assert torch.equal(nms_keep(boxes, with_ties, iou), expected)

@pytest.mark.parametrize('n', [3000, 9000])
def test_nms_of_thousands(n):
    g = torch.Generator().manual_seed(n)
    boxes, scores = random_boxes(g, n, 800), torch.rand(n, generator=g)
    expected = torch.zeros(n, dtype=torch.bool).index_fill(0, theirs.nms(boxes, scores, .6), True)
    assert torch.equal(nms_keep(boxes, scores, .6), expected)

def test_nms_of_awful_boxes():
    boxes = torch.tensor([[0, 0, 10, 10], [0, 0, 10, 10], [nan, 0, 10, 10], [0, 0, inf, 10], [-inf, -inf, inf, inf], [5, 5, 5, 5], [5, 5, 5, 5], [9, 9, 1, 1], [1, 1, 9, 9.]])
    scores = torch.tensor([.9, .8, .7, .6, .5, .4, .3, .2, -inf])
    keep = [True, False, True, True, True, True, True, True, False]   # only a true overlap strikes; an empty slot is never kept
    assert nms_keep(boxes, scores, .5).tolist() == keep and nms_matrix(boxes, scores, .5).tolist() == keep
    assert nms_keep(boxes[:2], torch.tensor([.9, nan]), .5).tolist() == [False, True]   # not-a-number ranks first, as torch.sort has it

@pytest.mark.parametrize('shape', [(1,), (3,), (2, 3), (0,), (2, 0)])
def test_nms_of_every_leading_index_on_its_own(shape):
    g = torch.Generator().manual_seed(0)
    boxes, scores = random_boxes(g, 200, 50).expand(*shape, 200, 4) + torch.rand(*shape, 200, 1, generator=g) * 20, torch.rand(*shape, 200, generator=g)
    scores = torch.where(scores < .2, -inf, scores)
    keep = nms_keep(boxes, scores, .4)
    assert keep.shape == scores.shape
    for b, s, k in zip(boxes.reshape(-1, 200, 4), scores.reshape(-1, 200), keep.reshape(-1, 200)): assert torch.equal(k, nms_matrix(b, s, .4))

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_nms_in_other_types(dtype):
    g = torch.Generator().manual_seed(0)
    boxes, scores = random_boxes(g, 300, 60).to(dtype), torch.rand(300, generator=g).to(dtype)
    whole = torch.promote_types(dtype, torch.float32)
    assert torch.equal(nms_keep(boxes, scores, .5), nms_keep(boxes.to(whole), scores.to(whole), .5))

def test_nms_of_wrong_shapes_says_so():
    with pytest.raises(RuntimeError, match='nms_keep: boxes'): nms_keep(torch.zeros(3, 4), torch.zeros(2), .5)


@st.composite
def roi_cases(draw):
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    h, w = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    b, c, n = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 3, 4, 5, 8, 33])), draw(st.sampled_from([0, 1, 2, 5, 30]))
    scale = draw(st.sampled_from([1., .5, .25, .3]))
    rois = torch.cat([torch.randint(0, b, (n, 1), generator=g).float(), random_boxes(g, n, max(h, w) / scale, draw(st.booleans()))], 1)
    size = draw(st.integers(1, 8)), draw(st.integers(1, 8))
    feature = torch.randn(b, c, h, w, generator=g)
    if draw(st.booleans()): feature = feature.contiguous(memory_format=torch.channels_last)
    return feature, rois, size, scale, draw(st.integers(-1, 4)), draw(st.booleans())

@many
@given(roi_cases())
def test_roi_align_and_its_gradient_are_those_of_torchvision(case):
    feature, rois, size, scale, sampling, aligned = case
    if aligned and sampling <= 0:    # a box that is upside down has no points: ours answers 0, theirs fails to make a list of negative length
        proper = (rois[:, 3:] >= rois[:, 1:3]).all(1)
        assert not roi_align(feature, rois[~proper], *case[2:]).any()
        case = feature, rois[proper], *case[2:]
    ours, expected = feature.clone().requires_grad_(), feature.clone().requires_grad_()
    a, b = f(ours, case, roi_align), f(expected, case, theirs.roi_align)
    assert a.shape == b.shape and a.is_contiguous()
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    g = torch.randn(a.shape, generator=torch.Generator().manual_seed(0))
    a, = torch.autograd.grad(a, ours, g)
    b, = torch.autograd.grad(b, expected, g)
    torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    assert a.stride() == torch.empty_like(feature).stride()

def f(feature, case, op):
    _, rois, size, scale, sampling, aligned = case
    return op(feature, rois, size, scale, sampling, aligned)

@pytest.mark.parametrize('format', [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize('sampling', [2, 0])
def test_roi_align_of_awful_boxes(format, sampling):
    feature = torch.randn(1, 8, 20, 24).contiguous(memory_format=format).requires_grad_()
    rois = torch.tensor([[0, nan, 0, 5, 5], [0, 0, 0, inf, 5], [0, -inf, 0, 5, 5], [0, 2, nan, 5, inf], [3, 0, 0, 5, 5], [-1, 0, 0, 5, 5], [0, 900, 900, 990, 990], [0, -1e9, -1e9, 1e9, 1e9], [0, 1e30, 0, -1e30, 5], [0, 2, 3, 7, 9.]])
    out = roi_align(feature, rois, 7, 1., sampling)
    assert out.isfinite().all() and not out[:7].any()      # not finite, of no image of the batch, or outside: 0
    torch.testing.assert_close(out[-1:], theirs.roi_align(feature, rois[-1:], 7, 1., sampling), atol=1e-5, rtol=1e-5)
    out.sum().backward()
    assert feature.grad.isfinite().all()

def test_roi_align_of_a_giant_box_is_the_share_of_it_that_is_inside():
    feature = torch.ones(1, 1, 10, 10, dtype=torch.float64)
    out = roi_align(feature, torch.tensor([[0, -5000., -5000., 5000, 5000]], dtype=torch.float64), 1, 1., -1)
    torch.testing.assert_close(out.item(), 11. ** 2 / 10_000 ** 2, rtol=.01, atol=0)   # cells count up to one cell outside

def test_roi_align_on_a_map_without_cells_or_boxes():
    assert roi_align(torch.zeros(2, 3, 0, 5), torch.tensor([[0, 0, 0, 5, 5.]]), 3).eq(0).all()
    assert roi_align(torch.zeros(2, 3, 6, 5), torch.zeros(0, 5), (3, 2)).shape == (0, 3, 3, 2)
    assert pyramid_roi_align([torch.zeros(2, 3, 8, 8)], torch.zeros(2, 0, 4), 7, full_frame((32, 32), torch.zeros(0), 2)).shape == (2, 0, 3, 7, 7)

def test_wrong_arguments_say_so():
    with pytest.raises(ValueError, match='rois must be'): roi_align(torch.zeros(1, 1, 4, 4), torch.zeros(3, 4), 2)
    if cuda.backend() == 'torch': return
    one, long = [torch.zeros(1, 1, 4, 4)], torch.zeros(1, dtype=torch.long)
    with pytest.raises(RuntimeError, match='scales for'): ops.roi_align(one, torch.zeros(1, 4), long, long, [1., 2.], 2, 2, 2, False)
    with pytest.raises(RuntimeError, match='int64'): ops.roi_align(one, torch.zeros(1, 4), long.float(), long, [1.], 2, 2, 2, False)

@st.composite
def pyramid_cases(draw):
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    b, r, c = draw(st.integers(1, 3)), draw(st.sampled_from([1, 6, 20])), draw(st.sampled_from([1, 4, 6]))
    features = [torch.randn(b, c, s, s, generator=g) for s in (32, 16, 8, 4)]
    if draw(st.booleans()): features = [x.contiguous(memory_format=torch.channels_last) for x in features]
    return features, torch.stack([random_boxes(g, r, 128) for _ in range(b)]), draw(st.sampled_from([3, 7, 14])), draw(st.integers(1, 3)), draw(st.sampled_from([40, 112, 224]))

@settings(many, max_examples=300)
@given(pyramid_cases())
def test_pyramid_roi_align_is_torchvisions_multiscale(case):
    features, boxes, size, sampling, canonical = case
    frame = full_frame((128, 128), boxes, len(boxes))
    pool = theirs.MultiScaleRoIAlign(['0', '1', '2', '3'], size, sampling, canonical_scale=canonical)
    expected = pool({str(i): x for i, x in enumerate(features)}, list(boxes), [(128, 128)] * len(boxes))
    filled = torch.rand(boxes.shape[:2]) > .3
    torch.testing.assert_close(pyramid_roi_align(features, boxes, size, frame, sampling=sampling, canonical_size=canonical).flatten(0, 1), expected, atol=1e-5, rtol=1e-5)
    some = pyramid_roi_align(features, boxes, size, frame, filled, sampling, canonical_size=canonical)
    torch.testing.assert_close(some[filled], expected[filled.flatten()], atol=1e-5, rtol=1e-5)
    assert not some[~filled].any()

@pytest.mark.parametrize('sampling', [2, 0])
@pytest.mark.parametrize('aligned', [False, True])
@pytest.mark.parametrize('format', [torch.contiguous_format, torch.channels_last])
def test_gradients_are_those_of_small_steps(sampling, aligned, format):
    torch.manual_seed(0)
    features = [torch.randn(2, 3, s, s, dtype=torch.float64).contiguous(memory_format=format).requires_grad_() for s in (8, 4)]
    boxes = random_boxes(torch.Generator().manual_seed(1), 6, 32).double()
    image, level, scales = torch.tensor([0, 1, 0, 1, 0, 1]), torch.tensor([0, 0, 1, 1, -1, 1]), [.25, .125]
    assert torch.autograd.gradcheck(lambda *x: ops.roi_align(list(x), boxes, image, level, scales, 3, 2, sampling, aligned), features)

def test_second_derivative_says_that_there_is_none():
    x = torch.randn(1, 2, 8, 8, requires_grad=True)
    g, = torch.autograd.grad(roi_align(x, torch.tensor([[0, 1, 1, 6, 6.]]), 3, sampling_ratio=2).square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match='no second derivative'): g.sum().backward()

@pytest.mark.parametrize('format', [torch.contiguous_format, torch.channels_last])
def test_the_gradient_has_the_same_bits_on_any_number_of_threads(format):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 40, 60, 60, generator=g).contiguous(memory_format=format).requires_grad_()
    rois = torch.cat([torch.randint(0, 2, (200, 1), generator=g).float(), random_boxes(g, 200, 240)], 1)
    grad, before, found = torch.randn(200, 40, 7, 7, generator=g), torch.get_num_threads(), []
    try:
        for n in (1, 2, 3, 7, 2):
            torch.set_num_threads(n)
            found.append(torch.autograd.grad(roi_align(x, rois, 7, .25, 2), x, grad)[0])
    finally: torch.set_num_threads(before)
    assert all(torch.equal(found[0], other) for other in found[1:])

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('format', [torch.contiguous_format, torch.channels_last])
def test_half_types_are_rounded_once(dtype, format):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, 16, 16, generator=g).to(dtype).contiguous(memory_format=format).requires_grad_()
    rois = torch.cat([torch.randint(0, 2, (9, 1), generator=g).float(), random_boxes(g, 9, 16)], 1)
    exact = x.detach().float().requires_grad_()
    out, expected = roi_align(x, rois, 5, sampling_ratio=2), roi_align(exact, rois, 5, sampling_ratio=2)
    assert out.dtype == dtype and torch.equal(out, expected.to(dtype))
    ours, wanted = torch.autograd.grad(out.sum(), x)[0], torch.autograd.grad(expected.sum(), exact)[0]
    assert ours.dtype == dtype and torch.equal(ours, wanted.to(dtype))

def test_under_autocast_maps_may_be_half_while_boxes_are_not():
    x, rois = torch.randn(1, 4, 16, 16), torch.tensor([[0, 1.3, 2.7, 11.1, 9.9]])
    with torch.autocast('cpu', torch.bfloat16):
        half = x.bfloat16()
        assert roi_align(half, rois, 3, sampling_ratio=2).dtype == torch.bfloat16
        assert torch.equal(roi_align(half, rois, 3, sampling_ratio=2), roi_align(half.float(), rois, 3, sampling_ratio=2).bfloat16())
        assert nms_keep(rois[:, 1:].bfloat16(), torch.ones(1).bfloat16(), .5).tolist() == [True]


@st.composite
def paste_cases(draw):
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    n, h, w = draw(st.sampled_from([0, 1, 3, 9])), draw(st.integers(1, 150)), draw(st.integers(1, 150))
    return torch.rand(n, *[draw(st.sampled_from([7, 14, 28]))] * 2, generator=g), random_boxes(g, n, max(h, w), draw(st.booleans())), h, w, draw(st.booleans())

@many
@given(paste_cases())
def test_pasted_masks_are_those_of_torchvision(case):
    masks, boxes, h, w, aligned = case
    pasted = paste_masks(masks, boxes, h, w, aligned=aligned)
    assert pasted.dtype == torch.bool and pasted.shape == (len(masks), h, w)
    if not len(masks): return
    soft = paste_soft(masks, boxes, h, w, aligned)
    assert (pasted == (soft >= .5))[(soft - .5).abs() > 1e-4].all()
    proper = (boxes[:, 2:] - boxes[:, :2] >= 0).all(1) & (boxes >= 0).all(1) & (boxes[:, 2] <= w) & (boxes[:, 3] <= h)   # as theirs come, after clipping
    if not proper.any() or aligned: return
    expected = paste_masks_in_image(masks[proper][:, None], boxes[proper], (h, w))[:, 0]
    assert (pasted[proper] == (expected >= .5))[(expected - .5).abs() > 1e-4].all()

def test_an_aligned_mask_comes_back_as_it_was():
    small = torch.rand(3, 28, 28) > .5
    boxes = torch.tensor([[2., 3, 30, 31], [10, 0, 38, 28], [5, 5, 33, 33]])      # a bin is a pixel
    pasted = paste_masks(small.float(), boxes, 40, 40, aligned=True)
    for mask, (x1, y1, x2, y2), whole in zip(small, boxes.long().tolist(), pasted): assert torch.equal(whole[y1:y2, x1:x2], mask) and whole.sum() == mask.sum()

def test_pasting_awful_boxes():
    boxes = torch.tensor([[nan, 0, 5, 5], [0, 0, inf, 5], [-1e30, -1e30, 1e30, 1e30], [500, 500, 600, 600], [9, 9, 3, 3], [2, 2, 8, 8.]])
    out = paste_masks(torch.ones(6, 28, 28), boxes, 10, 12)
    assert not out[[0, 1, 3]].any() and out[5, 3:7, 3:7].all()
    assert paste_masks(torch.ones(1, 28, 28).half(), boxes[5:], 10, 12).equal(out[5:])
    assert paste_masks(torch.ones(1, 28, 28), boxes[5:], 0, 12).shape == (1, 0, 12)


def samples():
    g = torch.Generator().manual_seed(0)
    boxes, scores = random_boxes(g, 20, 40), torch.rand(20, generator=g)
    features = [torch.randn(2, 3, s, s, generator=g) for s in (8, 4)]
    channels_last = [x.contiguous(memory_format=torch.channels_last).requires_grad_() for x in features]
    where = torch.randint(0, 2, (20,), generator=g), torch.randint(-1, 2, (20,), generator=g)
    args = (boxes, *where, [.25, .125], 3, 2, 2, False)
    yield ops.nms_keep.default, (boxes, scores, .5)
    yield ops.nms_keep.default, (boxes.view(4, 5, 4), scores.view(4, 5), .5)
    yield ops.roi_align.default, ([x.requires_grad_() for x in features], *args)
    yield ops.roi_align.default, (channels_last, *args)
    yield ops.roi_align.default, ([x.detach().half() for x in features], *args)
    yield ops.roi_align_backward.default, (torch.randn(20, 3, 3, 2, generator=g), [x.detach() for x in features], *args, True)
    yield ops.roi_align_backward.default, (torch.randn(20, 3, 3, 2, generator=g), [x.detach() for x in channels_last], *args, False)
    yield ops.paste_masks.default, (torch.rand(20, 28, 28, generator=g), boxes, 30, 40, .5, False)

@pytest.mark.parametrize('op, args', list(samples()), ids=lambda x: getattr(x, '__name__', ''))
def test_opcheck(op, args): assert set(torch.library.opcheck(op, args).values()) == {'SUCCESS'}

def test_vmap_is_a_loop():
    g = torch.Generator().manual_seed(0)
    boxes, scores = torch.stack([random_boxes(g, 30, 50) for _ in range(3)]), torch.rand(3, 30, generator=g)
    assert torch.equal(torch.vmap(lambda b, s: nms_keep(b, s, .4))(boxes, scores), torch.stack([nms_keep(b, s, .4) for b, s in zip(boxes, scores)]))
    assert torch.equal(torch.vmap(lambda s: nms_keep(boxes[0], s, .4))(scores), torch.stack([nms_keep(boxes[0], s, .4) for s in scores]))
    features = [torch.randn(3, 2, 4, s, s, generator=g) for s in (16, 8)]
    pair = boxes.view(3, 2, 15, 4)
    one = lambda *x: pyramid_roi_align(list(x[:2]), x[2], 7, full_frame((64, 64), x[2]), canonical_size=60)
    torch.testing.assert_close(torch.vmap(one)(*features, pair), torch.stack([one(*x) for x in zip(*features, pair)]), atol=0, rtol=0)
    fixed = lambda b: one(features[0][0], features[1][0], b)
    torch.testing.assert_close(torch.vmap(fixed)(pair), torch.stack([fixed(b) for b in pair]), atol=0, rtol=0)
    masks = torch.rand(3, 30, 28, 28, generator=g)
    assert torch.equal(torch.vmap(lambda m, b: paste_masks(m, b, 40, 50))(masks, boxes), torch.stack([paste_masks(m, b, 40, 50) for m, b in zip(masks, boxes)]))
    args = (boxes[0], torch.zeros(30).long(), torch.ones(30).long(), [.25, .125], 3, 2, 2, False, True)
    back = lambda grad, *x: ops.roi_align_backward(grad, list(x), *args)
    grads = torch.randn(3, 30, 4, 3, 2, generator=g)
    for a, b in zip(torch.vmap(back)(grads, *features), zip(*(back(*x) for x in zip(grads, *features)))): assert torch.equal(a, torch.stack(b))


@pytest.fixture(scope='module')
def model(): return load_weights('shapes')[0].eval()

@pytest.fixture(scope='module')
def images(): return torch.stack([torch.tensor(s.image).permute(2, 0, 1) / 255 for s in make_shapes(2, seed=5)])

def same(found, expected):
    assert (expected.labels > 0).any() and (expected.labels == 0).any(), 'the case must have filled and empty slots'
    assert torch.equal(found.labels, expected.labels)
    torch.testing.assert_close(found.boxes, expected.boxes, atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(found.scores, expected.scores, atol=1e-4, rtol=1e-4)
    filled = expected.labels > 0
    torch.testing.assert_close(found.masks[filled], expected.masks[filled], atol=1e-3, rtol=1e-3)

def test_predict_compiled_as_one_graph(model, images):
    same(torch.compile(model.predict, fullgraph=True, backend='aot_eager')(images), model.predict(images))

def test_predict_exported(model, images):
    class Predict(torch.nn.Module):
        def __init__(self): super().__init__(); self.model = model
        def forward(self, images): return self.model.detect(self.model.features(images), frame_of(images))
    with torch.no_grad(): program = torch.export.export(Predict().eval(), (images,))
    same(program.module()(images), model.predict(images))

def test_predict_under_vmap(model, images):
    found = torch.vmap(lambda image: model.predict(image[None]))(images)
    same(type(found)(*(t[:, 0] for t in found)), model.predict(images))


class Waits(TorchDispatchMode):
    "Notes whatever would make a GPU wait: numbers read back, numbers copied over, shapes that depend on numbers."
    asks = ('_local_scalar_dense', 'nonzero', 'lift_fresh', 'unique', 'masked_select', 'is_nonzero', 'aten.equal')
    def __init__(self): super().__init__(); self.found = []
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        by_mask = str(func) == 'aten.index.Tensor' and any(t is not None and t.dtype == torch.bool for t in args[1])
        if by_mask or any(a in str(func) for a in self.asks): self.found.append(str(func))
        return func(*args, **(kwargs or {}))

def test_predict_never_asks_for_a_number(model, images, monkeypatch):
    monkeypatch.setattr('maskrcnn_edu.mask_head.fixed_shapes', lambda t: True)   # as on a GPU
    with Waits() as waits: model.predict(images)
    assert waits.found == []

def test_the_watch_for_waits_sees_them():
    with Waits() as waits: torch.tensor([1., 2.]).max().item()
    assert len(waits.found) == 2

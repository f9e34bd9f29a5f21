"""The CUDA sources without a GPU: nvcc compiles them, and a C++ compiler makes of the same files ops for the CPU (cuda_on_cpu.h),
which are compared with torchvision. MASKRCNN_EDU_EMULATED names ops that are already built."""
import os, shutil, subprocess, sys
from pathlib import Path
import pytest, torch, torchvision
from torchvision.models.detection.roi_heads import paste_masks_in_image
from maskrcnn_edu.cuda.build import cuda_command
from maskrcnn_edu.detections import paste_soft

root = Path(__file__).resolve().parent.parent
sources = root/'maskrcnn_edu'/'cuda'/'csrc'
headers, libraries = (Path(torch.__file__).parent/d for d in ('include', 'lib'))
oldest_torch = '-DTORCH_TARGET_VERSION=0x020b000000000000ULL'   # 2.11: what a machine with a GPU may have
undefined = ['-fsanitize=undefined,float-cast-overflow', '-fno-sanitize=vptr', '-fno-sanitize-recover=all']
nvcc = shutil.which('nvcc') or shutil.which('/usr/local/cuda/bin/nvcc')
gxx = shutil.which('g++')
needs_gxx = pytest.mark.skipif(not gxx and 'MASKRCNN_EDU_EMULATED' not in os.environ, reason='no g++ on PATH: the kernels cannot be run without a GPU')


def run(*command, **env):
    "What a command prints; if it fails, the test fails with that."
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, cwd=root, env={**os.environ, **env})
    assert done.returncode == 0, f'{" ".join(map(str, command))}\n{done.stdout}\n{done.stderr}'
    return done.stdout + done.stderr

def build(folder, *flags):
    "The CUDA sources as ops for the CPU; undefined behaviour of C++ ends the process."
    run(gxx, '-x', 'c++', '-std=c++20', '-O0', '-fPIC', '-shared', '-DMASKRCNN_EDU_ON_CPU', oldest_torch, '-include', root/'tests'/'cuda_on_cpu.h',
        *undefined, *flags, f'-I{headers}', sources/'cuda.cu', '-o', folder/'emulated.so', f'-L{libraries}', '-ltorch_cpu', '-lc10')
    return folder/'emulated.so'

@pytest.fixture(scope='session')
def ops(tmp_path_factory):
    torch.ops.load_library(os.environ.get('MASKRCNN_EDU_EMULATED') or build(tmp_path_factory.mktemp('emulated')))
    return torch.ops.maskrcnn_edu_emulated

@pytest.fixture(params=['forwards', 'backwards'])
def threads(request, monkeypatch):
    "Which blocks and threads start first."
    monkeypatch.setenv('MASKRCNN_EDU_THREADS', request.param)


# ---- nvcc ----

@pytest.mark.skipif(not (nvcc and gxx), reason='no nvcc on PATH or in /usr/local/cuda, or no g++ for it')
def test_nvcc_compiles_for_sm_80_and_sm_90(tmp_path):
    command = cuda_command(('80', '90'))     # the one that a machine with a GPU runs
    said = run(*command, oldest_torch, '-Xcompiler', '-Wall,-Wno-unknown-pragmas', '-o', tmp_path/'cuda.so')
    assert not [line for line in said.splitlines() if 'csrc' in line], said


# ---- ROIAlign ----

def some_boxes(n, side, dtype=torch.float32):
    "Boxes of all sizes around a picture, and every odd kind."
    corner = torch.rand(n, 2) * side * 1.4 - side * .2
    odd = [[5, 5, 5, 5], [20, 30, 10, 12], [-90, -90, -70, -80], [side * 3, 5, side * 4, 9], [-1e6, -1e6, 1e6, 1e6], [-2, -2, 2, 2],
           [0, 0, side, side], [3, 4, 3.5, side], [side - 1, side - 1, side + 3, side + 3], [-4, 0, -4, side],
           [side - 1, side - 2, -2, -1]]
    return torch.cat([torch.cat([corner, corner + torch.rand(n, 2) ** 3 * side * 1.2 - 2], 1), torch.tensor(odd)]).to(dtype)

def torchvision_roi_align(features, boxes, image, level, scales, height, width, sampling, aligned):
    "The same from torchvision, a level at a time."
    out = features[0].new_zeros(len(boxes), features[0].shape[1], height, width)
    for l, (f, scale) in enumerate(zip(features, scales)):
        at = ((level == l) & (image >= 0) & (image < len(f)) & boxes.isfinite().all(1)).nonzero()[:, 0]
        rois = torch.cat([image[at, None].to(f), boxes[at].to(f)], 1)
        out = out.index_copy(0, at, torchvision.ops.roi_align(f, rois, (height, width), scale, sampling, aligned))
    return out

def maps_like(kind, *shape, dtype=torch.float32):
    if kind == 'strided': return torch.randn(*shape[:-1], 2 * shape[-1], dtype=dtype)[..., ::2]
    if kind == 'exchanged': return torch.randn(*shape[:2], shape[3], shape[2], dtype=dtype).transpose(2, 3)
    return torch.randn(*shape, dtype=dtype).contiguous(memory_format={'last': torch.channels_last, 'first': torch.contiguous_format}[kind])

def compare_roi_align(ops, features, *rest, atol=1e-5):
    "Forward and both ways backward against torchvision."
    features = [f.detach().requires_grad_() for f in features]
    want = torchvision_roi_align(features, *rest)
    grad = torch.randn_like(want)
    wants = torch.autograd.grad(want, features, grad)
    plain = [f.detach() for f in features]
    got = ops.roi_align(plain, *rest)
    torch.testing.assert_close(got, want.detach(), rtol=0, atol=atol)
    assert got.is_contiguous()
    for deterministic in (False, True):
        for f, g, w in zip(plain, ops.roi_align_backward(grad, plain, *rest, deterministic), wants):
            torch.testing.assert_close(g, w, rtol=0, atol=10 * atol)
            assert g.stride() == torch.empty_like(f).stride()

@needs_gxx
@pytest.mark.parametrize('aligned', [False, True])
@pytest.mark.parametrize('sampling', [-1, 1, 2, 3])
@pytest.mark.parametrize('kind', ['first', 'last', 'strided', 'exchanged'])
def test_roi_align_equals_torchvision(ops, threads, kind, sampling, aligned):
    torch.manual_seed(sampling)
    for dtype, atol in ((torch.float32, 1e-5), (torch.float64, 1e-11)):
        boxes = some_boxes(20, 64, dtype)
        if sampling < 1: boxes = boxes[boxes.abs().amax(1) < 1e5]   # torchvision would visit every point of the giant
        f, image, level = maps_like(kind, 2, 5, 13, 17, dtype=dtype), torch.randint(0, 2, (len(boxes),)), torch.zeros(len(boxes), dtype=torch.long)
        compare_roi_align(ops, [f], boxes, image, level, [.25], 4, 3, sampling, aligned, atol=atol)

@needs_gxx
@pytest.mark.parametrize('kind', ['first', 'last', 'strided', 'exchanged'])
@pytest.mark.parametrize('sampling', [0, 2])
def test_few_boxes_on_large_maps(ops, threads, kind, sampling):
    torch.manual_seed(0)
    f, boxes = maps_like(kind, 2, 11, 70, 90), torch.tensor([[30., 40, 210, 270], [100, 3, 104, 5]])
    compare_roi_align(ops, [f], boxes, torch.tensor([1, 0]), torch.zeros(2, dtype=torch.long), [.25], 3, 4, sampling, False)

@needs_gxx
@pytest.mark.parametrize('kind', ['first', 'last'])
def test_pyramid_with_empty_slots(ops, threads, kind):
    torch.manual_seed(0)
    features = [maps_like(kind, 2, 40, 48 >> k, 64 >> k) for k in range(4)]
    boxes = some_boxes(40, 192)
    image, level = torch.randint(-1, 3, (len(boxes),)), torch.randint(-1, 5, (len(boxes),))
    image[0], level[1], level[2], level[3] = 2**40, 2**40, 7, -2**40
    rest = boxes, image, level, [.25, .125, .0625, .03125], 2, 2, 2, True
    compare_roi_align(ops, features, *rest)
    empty = (image < 0) | (image > 1) | (level < 0) | (level > 3)
    assert empty.any() and not ops.roi_align(features, *rest)[empty].any()

@needs_gxx
@pytest.mark.parametrize('kind', ['first', 'last'])
def test_maps_of_one_row_column_or_channel(ops, threads, kind):
    torch.manual_seed(0)
    boxes = torch.cat([torch.tensor([[0., 10, 3, -1], [10, 0, -1, 3]]), some_boxes(10, 12)])   # first two that run backwards over a few cells
    image, level = torch.zeros(len(boxes), dtype=torch.long), torch.zeros(len(boxes), dtype=torch.long)
    for shape in ((1, 1, 6, 7), (1, 3, 1, 7), (1, 3, 6, 1), (1, 1, 1, 1), (1, 33, 2, 2)):
        for sampling, aligned in ((2, False), (3, True)): compare_roi_align(ops, [maps_like(kind, *shape)], boxes, image, level, [.5], 2, 3, sampling, aligned)

@needs_gxx
@pytest.mark.parametrize('sampling', [-1, 2])
@pytest.mark.parametrize('aligned', [False, True])
def test_boxes_that_are_no_numbers_give_zeros(ops, threads, sampling, aligned):
    nan, inf = torch.nan, torch.inf
    boxes = torch.tensor([[nan, 1, 9, 9], [1, nan, 9, 9], [1, 1, nan, 9], [1, 1, 9, nan], [inf, 1, 9, 9], [1, 1, inf, 9], [-inf, 1, 9, 9], [-inf, -inf, inf, inf]])
    image, level = torch.zeros(len(boxes), dtype=torch.long), torch.zeros(len(boxes), dtype=torch.long)
    rest = boxes, image, level, [1.], 3, 3, sampling, aligned
    f = torch.randn(1, 4, 10, 10)
    assert torch.equal(ops.roi_align([f], *rest), torch.zeros(len(boxes), 4, 3, 3))
    for deterministic in (False, True):
        assert not ops.roi_align_backward(torch.ones(len(boxes), 4, 3, 3), [f], *rest, deterministic)[0].any()

@needs_gxx
@pytest.mark.parametrize('size', [1e9, 1e20, 3e38])
@pytest.mark.parametrize('aligned', [False, True])
def test_giant_boxes_end(ops, size, aligned):
    f = torch.ones(1, 2, 10, 10)
    boxes = torch.tensor([[-size, -size, size, size], [0, 0, size, size], [-size, 0, 0, size], [size, size, -size, -size], [2, 2, size, 5]])
    zeros = torch.zeros(len(boxes), dtype=torch.long)
    for sampling in (-1, 2):
        out = ops.roi_align([f], boxes, zeros, zeros, [1.], 3, 3, sampling, aligned)
        assert out.isfinite().all() and out.min() >= 0 and out.max() <= 1 + 1e-5

@needs_gxx
def test_adaptive_box_larger_than_the_map(ops, threads):
    torch.manual_seed(0)
    boxes = torch.tensor([[-3000., -500, 2500, 700], [-40, -2000, 60, 900], [10, 10, 900, 11]])
    zeros = torch.zeros(3, dtype=torch.long)
    for aligned in (False, True): compare_roi_align(ops, [torch.randn(1, 2, 20, 30)], boxes, zeros, zeros, [1.], 3, 2, 0, aligned, atol=1e-4)

@needs_gxx
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('kind', ['first', 'last'])
def test_half_maps_are_summed_in_float(ops, kind, dtype):
    torch.manual_seed(0)
    f, boxes = maps_like(kind, 2, 6, 9, 11, dtype=dtype), some_boxes(200, 40)
    rest = boxes, torch.randint(0, 2, (len(boxes),)), torch.zeros(len(boxes), dtype=torch.long), [.25], 2, 2, 2, True
    out = ops.roi_align([f], *rest)
    assert out.dtype == dtype
    wide = torchvision_roi_align([f.float().requires_grad_()], *rest)
    torch.testing.assert_close(out, wide.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-5)   # rounded once
    g = torch.randn_like(out)
    leaf = f.float().requires_grad_()
    want, = torch.autograd.grad(torchvision_roi_align([leaf], *rest), leaf, g.float())
    for deterministic in (False, True):
        got, = ops.roi_align_backward(g, [f], *rest, deterministic)
        torch.testing.assert_close(got, want.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-4)

def crowded(dtype=torch.float32):
    "Many boxes on the same few cells, and the gradient of their bins."
    torch.manual_seed(0)
    f, boxes, n = torch.zeros(1, 3, 8, 8, dtype=dtype), torch.rand(300, 2, dtype=dtype) * 6, 300
    rest = torch.cat([boxes, boxes + 3], 1), torch.zeros(n, dtype=torch.long), torch.zeros(n, dtype=torch.long), [1.], 3, 3, 2, False
    return torch.randn(n, 3, 3, 3, dtype=dtype) * torch.logspace(-6, 3, n, dtype=dtype)[:, None, None, None], [f], *rest

@needs_gxx
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_deterministic_gradient_has_the_same_bits_in_any_order(ops, monkeypatch, dtype):
    args, results = crowded(dtype), {}
    for order in ('forwards', 'backwards'):
        monkeypatch.setenv('MASKRCNN_EDU_THREADS', order)
        for deterministic in (False, True): results[order, deterministic], = ops.roi_align_backward(*args, deterministic)
    assert torch.equal(results['forwards', True], results['backwards', True])
    assert not torch.equal(results['forwards', False], results['backwards', False]), 'the order of the threads did not change, so nothing was shown'
    largest = results['forwards', True].abs().max()
    torch.testing.assert_close(results['forwards', True] / largest, results['forwards', False] / largest, rtol=0, atol=1e-5 if dtype == torch.float32 else 1e-12)

@needs_gxx
@pytest.mark.parametrize('size', [1e-40, 1e-20, 1., 1e20, 3e38])
def test_deterministic_gradient_of_any_size(ops, size):
    f, box, zero = torch.zeros(1, 1, 4, 4), torch.tensor([[1., 1, 3, 3]]), torch.zeros(1, dtype=torch.long)
    grads = [ops.roi_align_backward(torch.full((1, 1, 2, 2), size), [f], box, zero, zero, [1.], 2, 2, 2, False, d)[0] for d in (False, True)]
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-5, atol=2e-45)
    assert grads[0].any()

@needs_gxx
@pytest.mark.parametrize('bad', [torch.nan, torch.inf])
def test_deterministic_gradient_is_nan_where_the_incoming_is_not_finite(ops, bad):
    grad, *rest = crowded()
    grad[7, 1, 1, 1] = bad
    assert ops.roi_align_backward(grad, *rest, True)[0].isnan().all()
    assert not ops.roi_align_backward(grad, *rest, False)[0].isfinite().all()

@needs_gxx
def test_nothing_unwritten_is_read(ops, threads):
    torch.manual_seed(0)
    f, boxes, zeros = torch.randn(1, 5, 30, 30), some_boxes(29, 30), torch.zeros(40, dtype=torch.long)
    b, s = boxes.reshape(2, 20, 4), torch.rand(2, 20)
    def everything():
        out = []
        for x in (f, f.contiguous(memory_format=torch.channels_last)):
            for sampling in (0, 2):
                for few in (slice(None), slice(1)):
                    rest = [x], boxes[few].clamp(-99, 99), zeros[few], zeros[few], [1.], 3, 3, sampling, False
                    out.append(ops.roi_align(*rest))
                    out += [*ops.roi_align_backward(out[-1], *rest, False), *ops.roi_align_backward(out[-1], *rest, True)]
        return out + [ops.nms_keep(b, s, .5), ops.paste_masks(torch.rand(40, 5, 5, generator=torch.Generator().manual_seed(0)), boxes, 31, 33, .5)]
    before = everything()
    torch.use_deterministic_algorithms(True)   # new memory is filled with not-a-number
    try:
        assert f.new_empty(3).isnan().all()
        after = everything()
    finally: torch.use_deterministic_algorithms(False)
    for x, y in zip(before, after): assert torch.equal(x, y)

@needs_gxx
def test_roi_align_of_nothing(ops):
    f, none = torch.randn(2, 3, 5, 5), torch.zeros(0, dtype=torch.long)
    assert ops.roi_align([f], torch.zeros(0, 4), none, none, [1.], 2, 2, 2, False).shape == (0, 3, 2, 2)
    grad, = ops.roi_align_backward(torch.zeros(0, 3, 2, 2), [f], torch.zeros(0, 4), none, none, [1.], 2, 2, 2, False, False)
    assert torch.equal(grad, torch.zeros_like(f))

@needs_gxx
def test_wrong_arguments_are_named(ops):
    f, boxes, zero = torch.randn(1, 3, 5, 5), torch.zeros(1, 4), torch.zeros(1, dtype=torch.long)
    for args in (([], boxes, zero, zero, []), ([f], boxes, zero, zero, []), ([f], boxes[:, :3], zero, zero, [1.]), ([f], boxes, zero.float(), zero, [1.]),
                 ([f, f.double()], boxes, zero, zero, [1., 1.]), ([f.long()], boxes, zero, zero, [1.])):
        with pytest.raises(RuntimeError, match='roi_align|numbers must be'): ops.roi_align(*args, 2, 2, 2, False)
    with pytest.raises(RuntimeError, match='nms_keep'): ops.nms_keep(torch.zeros(3, 4), torch.zeros(4), .5)
    with pytest.raises(RuntimeError, match='paste_masks'): ops.paste_masks(torch.zeros(3, 4, 5), torch.zeros(3, 4), 5, 5, .5)


# ---- NMS ----

def some_detections(*shape):
    "Overlapping boxes whose scores have ties, empty slots and a few that are not a number; some boxes too."
    corner = torch.rand(*shape, 2) * 60
    boxes, scores = torch.cat([corner, corner + torch.rand(*shape, 2) * 40 - 1], -1), torch.randint(0, 30, shape) / 30
    scores[torch.rand(shape) < .1], scores[torch.rand(shape) < .01] = -torch.inf, torch.nan
    boxes[torch.rand(shape) < .01] = torch.nan
    boxes[torch.rand(shape) < .01] = torch.inf
    return boxes, scores

def torchvision_nms(boxes, scores, iou):
    keep = torch.zeros(scores.shape, dtype=torch.bool)
    n = scores.shape[-1]
    for b, s, k in zip(boxes.reshape(-1, n, 4), scores.reshape(-1, n), keep.view(-1, n)):
        filled = (s != -torch.inf).nonzero()[:, 0]
        k[filled[torchvision.ops.nms(b[filled], s[filled], iou)]] = True
    return keep

@needs_gxx
@pytest.mark.parametrize('shape', [(1,), (2,), (63,), (64,), (65,), (128,), (129,), (700,), (5, 40), (2, 3, 150), (4, 1)])
def test_nms_equals_torchvision(ops, threads, shape):
    for seed in range(5):
        torch.manual_seed(seed)
        boxes, scores = some_detections(*shape)
        for iou in (.1, .5, .7):
            for b, s in ((boxes, scores), (boxes.double(), scores.double())): assert torch.equal(ops.nms_keep(b, s, iou), torchvision_nms(b, s, iou))

@needs_gxx
def test_nms_at_the_threshold(ops, threads):
    "Small whole numbers: many pairs overlap by exactly the threshold."
    for seed in range(20):
        torch.manual_seed(seed)
        corner = torch.randint(0, 6, (100, 2)).float()
        boxes, scores = torch.cat([corner, corner + torch.randint(1, 5, (100, 2))], 1), torch.rand(100)
        for iou in (.2, 1 / 3, .5, .6, .7): assert torch.equal(ops.nms_keep(boxes, scores, iou), torchvision_nms(boxes, scores, iou))

@needs_gxx
def test_nms_corner_cases(ops, threads):
    boxes, scores = some_detections(100)
    assert not ops.nms_keep(boxes, torch.full((100,), -torch.inf), .5).any()
    assert ops.nms_keep(torch.zeros(0, 4), torch.zeros(0), .5).shape == (0,)
    assert ops.nms_keep(torch.zeros(3, 0, 4), torch.zeros(3, 0), .5).shape == (3, 0)
    assert ops.nms_keep(torch.zeros(5, 4), torch.rand(5), .5).all(), 'boxes without area overlap nothing'
    same = torch.tensor([1., 1, 5, 5]).expand(200, 4)
    assert ops.nms_keep(same, torch.zeros(200), .5).nonzero().tolist() == [[0]], 'of equal scores the first stays'
    for dtype in (torch.float16, torch.bfloat16):
        half = boxes.to(dtype), scores.to(dtype)
        assert torch.equal(ops.nms_keep(*half, .5), torchvision_nms(*[x.float() for x in half], .5))


# ---- masks ----

def some_masks(n, size, height, width):
    "Masks, and boxes that touch the picture: torchvision has no answer for others."
    first = torch.rand(n, 2) * torch.tensor([width * 1.3, height * 1.3]) - torch.tensor([width, height]) * .3
    last = torch.maximum(first, torch.zeros(2)) + torch.rand(n, 2) ** 2 * torch.tensor([width, height]) + 2
    return torch.rand(n, size, size), torch.cat([first.minimum(torch.tensor([width - 2., height - 2.])), last], 1)

def check_paste(got, masks, boxes, height, width, threshold):
    want = paste_masks_in_image(masks[:, None], boxes, (height, width))[:, 0]
    assert got.dtype == torch.bool and got.shape == want.shape
    differ = got != (want >= threshold)
    assert not differ.any() or (want[differ] - threshold).abs().max() < 1e-5

@needs_gxx
@pytest.mark.parametrize('size', [1, 2, 14, 28])
@pytest.mark.parametrize('shape', [(40, 50), (33, 17), (7, 64), (5, 3)])
def test_paste_equals_torchvision(ops, threads, size, shape):
    torch.manual_seed(size)
    for threshold in (.5, .3):
        masks, boxes = some_masks(9, size, *shape)
        check_paste(ops.paste_masks(masks, boxes, *shape, threshold), masks, boxes, *shape, threshold)
        check_paste(ops.paste_masks(masks.double(), boxes.double(), *shape, threshold), masks.double(), boxes.double(), *shape, threshold)
        half = masks.bfloat16()
        check_paste(ops.paste_masks(half, boxes, *shape, threshold), half.float(), boxes, *shape, threshold)

@needs_gxx
def test_aligned_masks_come_back_as_they_were(ops, threads):
    small, boxes = random_masks_of_bits(), torch.tensor([[2., 3, 30, 31], [10, 0, 38, 28], [5.25, 5.5, 20.75, 33.]])
    pasted, soft = ops.paste_masks(small, boxes, 40, 41, .5, True), paste_soft(small, boxes, 40, 41, True)
    assert (pasted == (soft >= .5))[(soft - .5).abs() > 1e-5].all()
    for mask, (x1, y1, x2, y2), whole in zip(small[:2], boxes.long().tolist(), pasted): assert torch.equal(whole[y1:y2, x1:x2], mask > .5) and whole.sum() == mask.sum()

def random_masks_of_bits(): return (torch.rand(3, 28, 28, generator=torch.Generator().manual_seed(0)) > .5).float()

@needs_gxx
def test_paste_corner_cases(ops, threads):
    nan, inf = torch.nan, torch.inf
    boxes = torch.tensor([[nan, 1, 9, 9], [1, 1, inf, 9], [-inf, -inf, inf, inf], [90, 90, 95, 95], [-30, -30, -20, -20], [8, 8, 2, 2]])
    ones = torch.ones(len(boxes), 4, 4)
    pasted = ops.paste_masks(ones, boxes, 20, 21, .5)
    assert not pasted[:5].any() and pasted[5].sum() <= 1
    assert ops.paste_masks(ones, boxes, 20, 21, 0.).all(), 'nothing is below 0'
    assert ops.paste_masks(ones[:1], torch.tensor([[-1e9, -1e9, 1e9, 1e9]]), 20, 21, .5).all()
    for n, h, w in ((0, 5, 5), (2, 0, 5), (2, 5, 0)): assert ops.paste_masks(ones[:n], boxes[:n], h, w, .5).shape == (n, h, w)


# ---- memory ----

@needs_gxx
@pytest.mark.skipif('MASKRCNN_EDU_EMULATED' in os.environ, reason='this is the run under the address sanitizer')
def test_no_address_outside_is_touched(tmp_path):
    "Most of the above once more, with every read and write watched."
    preload = [run(gxx, f'-print-file-name={name}').strip() for name in ('libasan.so', 'libstdc++.so.6')]   # the second, so that it sees exceptions
    if not all(map(os.path.isabs, preload)): pytest.skip('g++ came without its address sanitizer')
    said = run(sys.executable, '-m', 'pytest', '-q', '-x', '-p', 'no:cacheprovider', '-k', 'not nvcc and not backwards and not at_the_threshold', __file__,
               MASKRCNN_EDU_EMULATED=str(build(tmp_path, '-fsanitize=address')), LD_PRELOAD=' '.join(preload), ASAN_OPTIONS='detect_leaks=0')
    assert ' passed' in said and 'failed' not in said, said

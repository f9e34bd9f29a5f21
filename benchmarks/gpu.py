"""Everything that must be shown on a GPU: the checks and the measurements of the native ops, written to benchmarks/results/<gpu>.json.

It needs torch, torchvision, nvcc and this repository:  python benchmarks/gpu.py [--out FOLDER]
Without a GPU it compiles the CUDA sources and runs their kernels on the CPU (tests/test_cuda_sources.py).
"""
import argparse, importlib.util, json, os, platform, re, shlex, shutil, subprocess, sys, tempfile, time, traceback
from functools import partial
from pathlib import Path
from statistics import median
from unittest.mock import MagicMock
import torch, torchvision
from maskrcnn_edu.boxes import full_frame

root = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(root))
GPU = torch.cuda.is_available()
os.environ['MASKRCNN_EDU_BACKEND'] = 'cuda' if GPU else 'cpp'
CHECKS, TIMES = [], {}


# ---- what a check is ----

class Skip(Exception): "Why a check cannot be made here."

def check(f):
    "A function that raises if something is wrong; it returns what is worth saying, or nothing."
    CHECKS.append(f)
    return f

def run_checks(only):
    results = []
    for f in CHECKS:
        if only and not re.search(only, f.__name__): continue
        start = time.perf_counter()
        try: status, said = 'pass', f()
        except Skip as e: status, said = 'skip', str(e)
        except Exception as e:
            status, said = 'FAIL', f'{type(e).__name__}: {str(e)[:800]}'
            traceback.print_exc()
        results.append(dict(check=f.__name__, what=f.__doc__, status=status, said=said, seconds=round(time.perf_counter() - start, 2)))
        print(f'{status}  {f.__name__}' + (f': {said}' if said else ''), flush=True)
    return results

def import_without_extras():
    "The model. What only its data and training need may be missing on a machine that is there for the GPU."
    for name in ('fastcore', 'fastcore.basics', 'fastai', 'pycocotools', 'pycocotools.mask', 'scipy', 'scipy.ndimage', 'PIL', 'matplotlib', 'safetensors'):
        try: found = importlib.util.find_spec(name)
        except (ImportError, ValueError): found = None
        if not found and name not in sys.modules: sys.modules[name] = MagicMock()
    from maskrcnn_edu import cuda, detections, mask_rcnn, nms, roi_align
    return cuda, detections, mask_rcnn, nms, roi_align

ops = torch.ops.maskrcnn_edu
close = partial(torch.testing.assert_close, check_device=False)
cpu = lambda x: x.cpu() if isinstance(x, torch.Tensor) else [cpu(i) for i in x] if isinstance(x, (list, tuple)) else x


# ---- inputs ----

def random_boxes(n, side, device='cuda', dtype=torch.float32, odd=True):
    "Boxes of all sizes around a picture; of every odd kind too."
    corner = torch.rand(n, 2) * side * 1.4 - side * .2
    boxes = torch.cat([corner, corner + torch.rand(n, 2) ** 3 * side * 1.2 - 2], 1)
    strange = [[5, 5, 5, 5], [20, 30, 10, 12], [-90, -90, -70, -80], [side * 3, 5, side * 4, 9], [-999, -999, 999, 999], [0, 0, side, side], [-4, 0, -4, side], [side - 1, side - 2, -2, -1]]
    return (torch.cat([boxes, torch.tensor(strange)]) if odd else boxes).to(device, dtype)

def random_map(*shape, kind='first', dtype=torch.float32):
    if kind == 'strided': return torch.randn(*shape[:-1], 2 * shape[-1], dtype=dtype, device='cuda')[..., ::2]
    return torch.randn(*shape, dtype=dtype, device='cuda').contiguous(memory_format=torch.channels_last if kind == 'last' else torch.contiguous_format)

def random_rois(n, images, side, **kw):
    boxes = random_boxes(n, side, **kw)
    return torch.cat([torch.randint(0, images, (len(boxes), 1)).to(boxes), boxes], 1)

def pyramid(channels=40, images=2, dtype=torch.float32, kind='last', n=60):
    "Arguments of ops.roi_align: four levels, empty slots, boxes that are not finite."
    features = [random_map(images, channels, 64 >> k, 96 >> k, kind=kind, dtype=dtype) for k in range(4)]
    boxes = random_boxes(n, 256, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    boxes[3, 0], boxes[4, 3] = torch.nan, torch.inf
    image, level = torch.randint(-1, images + 1, (len(boxes),), device='cuda'), torch.randint(-1, 5, (len(boxes),), device='cuda')
    return features, boxes, image, level, [.25, .125, .0625, .03125], 7, 7, 2, False

def random_detections(*shape, device='cuda'):
    corner = torch.rand(*shape, 2) * 200
    boxes, scores = torch.cat([corner, corner + torch.rand(*shape, 2) * 90], -1), torch.randint(0, 500, shape) / 500
    scores[torch.rand(shape) < .1] = -torch.inf
    return boxes.to(device), scores.to(device)

def random_masks(n, size, height, width, device='cuda', dtype=torch.float32):
    first = torch.rand(n, 2) * torch.tensor([width, height]) * .8
    boxes = torch.cat([first, first + 2 + torch.rand(n, 2) ** 2 * torch.tensor([width, height])], 1)
    return torch.rand(n, size, size).to(device, dtype), boxes.to(device)


# ---- checks ----

@check
def backend_is_cuda():
    "The CUDA sources are compiled at import, and run."
    assert cuda.backend() == 'cuda', cuda.backend()
    return f'imported in {IMPORT_SECONDS:.1f} s'

@check
def roi_align_equals_torchvision():
    "Forward within 1e-5, gradients within 1e-4, of torchvision's CUDA op; any layout, sampling, alignment; odd boxes."
    worst = [0., 0.]
    for seed in range(100):
        torch.manual_seed(seed)
        dtype, kind, sampling, aligned = (torch.float32, torch.float64)[seed % 2], ('first', 'last', 'strided')[seed % 3], seed % 4, seed % 5 > 2
        n, c = (60, 1, 0)[seed % 3] if seed % 7 else 500, (5, 64, 1, 300)[seed % 4]
        f = random_map(2, c, 37, 45, kind=kind, dtype=dtype).requires_grad_()
        rois = random_rois(n, 2, 160, dtype=dtype, odd=seed % 2 == 0)
        a = roi_align.roi_align(f, rois, (7, 5), .25, sampling, aligned)
        b = torchvision.ops.roi_align(f, rois, (7, 5), .25, sampling, aligned)
        g = torch.randn_like(a)
        (da,), (db,) = torch.autograd.grad(a, f, g), torch.autograd.grad(b, f, g)
        close(a, b, rtol=0, atol=1e-5)
        close(da, db, rtol=0, atol=1e-4)
        if len(rois): worst = [max(worst[0], (a - b).abs().max().item()), max(worst[1], (da - db).abs().max().item())]
    return f'100 cases, largest differences {worst[0]:.1e} and {worst[1]:.1e}'

@check
def roi_align_equals_cpu():
    "Pyramids with empty slots and boxes that are not finite: the same as the C++ backend, in four dtypes."
    for dtype, atol in ((torch.float32, 1e-5), (torch.float64, 1e-10), (torch.float16, 1e-2), (torch.bfloat16, 5e-2)):
        for kind in ('first', 'last'):
            for sampling in (2, 0):
                torch.manual_seed(0)
                args = *pyramid(dtype=dtype, kind=kind)[:7], sampling, True
                out = ops.roi_align(*args)
                close(out.cpu(), ops.roi_align(*cpu(args)), rtol=atol, atol=atol)
                assert out.isfinite().all() and not out[(args[3] < 0) | (args[3] > 3) | (args[2] < 0) | (args[2] > 1)].any()
                for deterministic in (False, True):
                    for a, b, f in zip(ops.roi_align_backward(out, *args, deterministic), ops.roi_align_backward(out.cpu(), *cpu(args), True), args[0]):
                        close(a.cpu(), b, rtol=10 * atol, atol=10 * atol)
                        assert a.stride() == torch.empty_like(f).stride()

@check
def giant_boxes_end():
    "Boxes up to the largest float, sampled adaptively: finite, and done."
    f, zeros = torch.ones(1, 2, 10, 10, device='cuda'), torch.zeros(3, dtype=torch.long, device='cuda')
    for size in (1e9, 1e20, 3e38):
        boxes = torch.tensor([[-size, -size, size, size], [0, 0, size, size], [size, size, -size, -size]], device='cuda')
        for sampling in (0, 2):
            out = ops.roi_align([f], boxes, zeros, zeros, [1.], 3, 3, sampling, True)
            assert out.isfinite().all() and out.min() >= 0 and out.max() <= 1 + 1e-5

@check
def nms_equals_torchvision():
    "The same boxes as torchvision keeps on the CPU, to the last one; batched, ties, empty slots; and as the C++ backend."
    for seed in range(60):
        torch.manual_seed(seed)
        shape = ((1,), (64,), (65,), (1000,), (5000,), (3, 4, 200), (80, 1000), (0,), (2, 0))[seed % 9]
        boxes, scores = random_detections(*shape)
        iou = (.3, .5, .7)[seed % 3]
        keep = nms.nms_keep(boxes, scores, iou).cpu()
        assert torch.equal(keep, nms.nms_keep(boxes.cpu(), scores.cpu(), iou)), f'CUDA and CPU differ at {shape}'
        n = shape[-1]
        if not n: continue
        for b, s, k in zip(boxes.cpu().reshape(-1, n, 4), scores.cpu().reshape(-1, n), keep.view(-1, n)):
            filled = (s > -torch.inf).nonzero()[:, 0]
            assert sorted(filled[torchvision.ops.nms(b[filled], s[filled], iou)].tolist()) == k.nonzero()[:, 0].tolist()

@check
def paste_equals_torchvision():
    "Pixels of pasted masks as torchvision's, but where its value is within 1e-5 of the threshold."
    from torchvision.models.detection.roi_heads import paste_masks_in_image
    for seed in range(30):
        torch.manual_seed(seed)
        height, width, size = ((50, 61), (200, 333), (7, 16))[seed % 3] + ((28, 14, 3)[seed % 2],)
        masks, boxes = random_masks(12, size, height, width)
        got, want = detections.paste_masks(masks, boxes, height, width), paste_masks_in_image(masks[:, None], boxes, (height, width))[:, 0]
        differ = got != (want >= .5)
        assert not differ.any() or (want[differ] - .5).abs().max() < 1e-5
        differ = got.cpu() != detections.paste_masks(masks.cpu(), boxes.cpu(), height, width)
        assert not differ.any() or (want.cpu()[differ] - .5).abs().max() < 1e-5

@check
def deterministic_gradient():
    "Under torch.use_deterministic_algorithms the gradient has the same bits every time, and is right."
    torch.manual_seed(0)
    f, rois = random_map(2, 64, 50, 50).requires_grad_(), random_rois(400, 2, 200)
    g = torch.randn(len(rois), 64, 7, 7, device='cuda')
    gradient = lambda x: torch.autograd.grad(roi_align.roi_align(x, rois.to(x), 7, .25, 2), x, g.to(x))[0]
    torch.use_deterministic_algorithms(True)
    try: runs = [gradient(f) for _ in range(10)]
    finally: torch.use_deterministic_algorithms(False)
    assert all(torch.equal(runs[0], r) for r in runs)
    plain = [gradient(f) for _ in range(10)]
    largest = plain[0].abs().max().item()
    close(runs[0], plain[0], rtol=0, atol=1e-5 * largest)
    close(runs[0], gradient(f.detach().double().requires_grad_()).float(), rtol=0, atol=1e-4 * largest)   # places of points are rounded too
    return f'10 runs alike; without it {sum(not torch.equal(plain[0], p) for p in plain)} of 10 differ in some bit from the first'

@check
def gradcheck():
    "The gradient against differences, in float64."
    torch.manual_seed(0)
    f, rois = random_map(2, 2, 7, 8, dtype=torch.float64).requires_grad_(), random_rois(4, 2, 24, dtype=torch.float64)
    for sampling in (2, 0):
        assert torch.autograd.gradcheck(lambda x: roi_align.roi_align(x, rois, 3, .25, sampling), f, nondet_tol=1e-9)

def cases():
    torch.manual_seed(0)
    args = pyramid(channels=3, n=5)
    args[1].nan_to_num_(1., 1., 1.)
    yield ops.nms_keep.default, (*random_detections(3, 50), .5)
    yield ops.roi_align.default, ([f.requires_grad_() for f in args[0]], *args[1:])
    yield ops.roi_align_backward.default, (torch.randn(len(args[1]), 3, 7, 7, device='cuda'), [f.detach() for f in args[0]], *args[1:], True)
    yield ops.paste_masks.default, (*random_masks(3, 14, 40, 50), 40, 50, .5)

@check
def opcheck():
    "torch.library.opcheck on all ops."
    for op, args in cases(): torch.library.opcheck(op, args)

def small_step(features, boxes, scores):
    "All four ops in a row, as the model uses them."
    keep = nms.nms_keep(boxes, scores, .5)
    pieces = roi_align.pyramid_roi_align(features, boxes, 7, full_frame((256, 384), boxes, len(boxes)), keep)
    return keep, pieces, detections.paste_masks(pieces[0, :, 0].sigmoid(), boxes[0], 256, 384)

def small_inputs():
    torch.manual_seed(0)
    features = [random_map(2, 16, 64 >> k, 96 >> k) for k in range(4)]
    return features, *random_detections(2, 80)

@check
def compile():
    "torch.compile(fullgraph=True) gives what eager gives."
    if not importlib.util.find_spec('triton'): raise Skip('no triton on this machine')
    inputs = small_inputs()
    with torch.no_grad():
        for a, b in zip(torch.compile(small_step, fullgraph=True)(*inputs), small_step(*inputs)): close(a, b)

@check
def vmap():
    "torch.vmap gives what a loop gives."
    torch.manual_seed(0)
    boxes, scores = random_detections(4, 100)
    assert torch.equal(torch.vmap(lambda b, s: nms.nms_keep(b, s, .5))(boxes, scores), nms.nms_keep(boxes, scores, .5))
    f, rois = torch.randn(3, 2, 5, 20, 20, device='cuda'), torch.stack([random_rois(9, 2, 80) for _ in range(3)])
    one = lambda x, r: roi_align.roi_align(x, r, 7, .25, 2)
    close(torch.vmap(one)(f, rois), torch.stack([one(x, r) for x, r in zip(f, rois)]))
    masks, boxes = random_masks(6, 14, 40, 50)
    paste = lambda m, b: detections.paste_masks(m, b, 40, 50)
    assert torch.equal(torch.vmap(paste)(masks.view(2, 3, 14, 14), boxes.view(2, 3, 4)).flatten(0, 1), paste(masks, boxes))

def captured(f):
    "f recorded as a CUDA graph: a function that replays it, and its results."
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3): f()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph): out = f()
    return graph.replay, out

@check
def cuda_graph():
    "All ops, backward too, are recorded in a CUDA graph and replayed on new numbers."
    features, boxes, scores = small_inputs()
    def step():
        keep, pieces, pasted = small_step(features, boxes, scores)
        flat = boxes.flatten(0, 1)
        image, level = torch.arange(2, device='cuda').repeat_interleave(80), torch.zeros(160, dtype=torch.long, device='cuda')
        rest = features, flat, image, level, [.25, .125, .0625, .03125], 7, 7, 2, False
        return keep, pieces, pasted, ops.roi_align_backward(pieces.flatten(0, 1), *rest, True)[0], ops.roi_align_backward(pieces.flatten(0, 1), *rest, False)[0]
    with torch.no_grad():
        replay, out = captured(step)
        for f in features: f.normal_()
        boxes.add_(7), scores.copy_(scores.flip(-1))
        replay()
        for a, b in zip(out, step()): close(a, b)

@check
def other_stream():
    "On a stream of its own, behind work that is not done yet."
    features, boxes, scores = small_inputs()
    with torch.no_grad():
        want = small_step(features, boxes, scores)
        stream = torch.cuda.Stream()
        late = [torch.zeros_like(f) for f in features]
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(50_000_000)
            for l, f in zip(late, features): l.copy_(f)
            got = small_step(late, boxes, scores)
        stream.synchronize()
    for a, b in zip(got, want): close(a, b)

def model(config=None):
    torch.manual_seed(0)
    return mask_rcnn.MaskRCNN(config or mask_rcnn.MaskRCNNConfig(frozen_norm=True)).cuda().eval()

@check
def predict_never_waits():
    "The whole predict, a ResNet-50 with a pyramid, under torch.cuda.set_sync_debug_mode('error')."
    m, images = model(), torch.rand(2, 3, 512, 640, device='cuda')
    m.predict(images)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode('error')
    try: m.predict(images)
    finally: torch.cuda.set_sync_debug_mode('default')

@check
def predict_equals_cpu():
    "predict on the GPU finds what it finds on the CPU (small model, random weights)."
    m, images = model(mask_rcnn.SHAPES), torch.rand(2, 3, 128, 128, device='cuda')
    matmul, conv = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try: a, b = m.predict(images), m.cpu().predict(images.cpu())
    finally: torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = matmul, conv
    close(a.scores.sort().values, b.scores.sort().values, rtol=1e-2, atol=1e-3)
    return f'{int((b.labels > 0).sum())} objects'

@check
def predict_in_a_cuda_graph():
    "The whole predict recorded once and replayed on other images."
    m, images = model(mask_rcnn.SHAPES), torch.rand(2, 3, 128, 128, device='cuda')
    with torch.no_grad():
        replay, out = captured(lambda: m.predict(images))
        images.uniform_()
        replay()
        for a, b in zip(out, m.predict(images)): close(a, b, rtol=1e-3, atol=1e-4)

def all_kernels():
    "A small run of every kernel, for compute-sanitizer."
    for kind in ('first', 'last', 'strided'):
        for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
            for sampling, n in ((2, 30), (0, 30), (2, 0)):
                args = *pyramid(channels=35, dtype=dtype, kind=kind, n=n + 5)[:7], sampling, False
                if n == 0: args = args[0], *(x[:1] for x in args[1:4]), *args[4:]
                out = ops.roi_align(*args)
                for deterministic in (False, True): ops.roi_align_backward(out, *args, deterministic)
    for shape in ((1,), (65,), (700,), (3, 130)): ops.nms_keep(*random_detections(*shape), .5)
    for shape in ((33, 17), (64, 64)): ops.paste_masks(*random_masks(5, 28, *shape), *shape, .5)
    torch.cuda.synchronize()

def sanitizer(tool):
    if not (path := shutil.which('compute-sanitizer') or shutil.which('/usr/local/cuda/bin/compute-sanitizer')): raise Skip('compute-sanitizer is not on PATH')
    command = [path, '--tool', tool, sys.executable, __file__, '--kernels']
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, env={**os.environ, 'PYTORCH_NO_CUDA_MEMORY_CACHING': '1'})
    said = done.stdout + done.stderr
    if 'Device not supported' in said: raise Skip('compute-sanitizer does not support this device')
    assert 'all kernels ran' in said and 'SUMMARY' in said, said[-3000:]
    assert not re.search(r'maskrcnn_edu::\w+<', said), said[:3000]   # where a fault is reported its kernel is named; those of PyTorch are not ours
    return next(line.strip('= ') for line in said.splitlines() if 'SUMMARY' in line)

@check
def sanitizer_memcheck():
    "compute-sanitizer finds no access outside of memory in any kernel."
    return sanitizer('memcheck')

@check
def sanitizer_racecheck():
    "compute-sanitizer finds no race in shared memory in any kernel."
    return sanitizer('racecheck')

@check
def sanitizer_synccheck():
    "compute-sanitizer finds no barrier that some threads miss."
    return sanitizer('synccheck')


# ---- measurements ----

def timed(f, calls=10, runs=21):
    "Milliseconds a call: the median of several runs of some calls, timed by the GPU."
    for _ in range(3): f()
    times = []
    for _ in range(runs):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(calls): f()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / calls)
    return median(times)

def note(name, goal=None, **ms):
    "Keep a measurement; `ours` and `torchvision` in milliseconds."
    row = {k: round(v, 4) for k, v in ms.items()}
    if 'torchvision' in ms: row['speedup'] = round(ms['torchvision'] / ms['ours'], 2)
    if goal: row['goal'] = goal
    TIMES[name] = row
    print('     ', name, row, flush=True)
    return row.get('speedup')

def copy_bandwidth():
    "GB/s of a large copy, read and write."
    a = torch.empty(1 << 30, dtype=torch.uint8, device='cuda')
    b = torch.empty_like(a)
    return 2 * a.numel() / timed(lambda: b.copy_(a)) / 1e6

def level_boxes(n=512, images=2, picture=800):
    "Boxes of objects from 16 to 512 pixels, wherever they fit."
    torch.manual_seed(0)
    side = 16 * 32 ** torch.rand(n, 1) * 2 ** (torch.rand(n, 2) - .5)
    side = side.clamp(max=picture - 1)
    corner = torch.rand(n, 2) * (picture - side)
    return torch.cat([torch.randint(0, images, (n, 1)).float(), corner, corner + side], 1).cuda()

@check
def speed_of_roi_align():
    "ROIAlign on (2, 256, 200, 200), 512 boxes, 7 x 7 bins, 2 x 2 points: forward and backward each 1.5 times torchvision's speed."
    bandwidth, rois, slow = copy_bandwidth(), level_boxes(), []
    note('copy of 1 GiB', GBps=bandwidth)
    cells = sum(int((g != 0).sum()) for g in ops.roi_align_backward(torch.ones(512, 1, 7, 7, device='cuda'), [torch.zeros(2, 1, 200, 200, device='cuda')], rois[:, 1:].contiguous(),
                                                                      rois[:, 0].long(), torch.zeros(512, dtype=torch.long, device='cuda'), [.25], 7, 7, 2, False, False))
    for dtype in (torch.float32, torch.bfloat16):
        for kind in ('first', 'last'):
            f = random_map(2, 256, 200, 200, kind=kind, dtype=dtype).requires_grad_()
            def theirs(x):   # torchvision has no bfloat16: what it does under autocast
                return torchvision.ops.roi_align(x.float(), rois, 7, .25, 2).to(dtype)
            ours = lambda x: roi_align.roi_align(x, rois, 7, .25, 2)
            g = torch.randn(512, 256, 7, 7, device='cuda', dtype=dtype)
            size = torch.finfo(dtype).bits // 8
            must = dict(forward=(cells + 512 * 49) * 256 * size, backward=(2 * 200 * 200 + 512 * 49) * 256 * size)   # bytes
            with torch.no_grad(): times = dict(forward=(timed(lambda: ours(f)), timed(lambda: theirs(f))))
            a, b = ours(f), theirs(f)
            times['backward'] = tuple(timed(lambda: torch.autograd.grad(x, f, g, retain_graph=True)) for x in (a, b))
            torch.use_deterministic_algorithms(True)
            try: fixed = timed(lambda: torch.autograd.grad(a, f, g, retain_graph=True))
            finally: torch.use_deterministic_algorithms(False)
            for way, (our, their) in times.items():
                name = f'roi_align {way} {str(dtype)[6:]} channels {kind}'
                extra = dict(deterministic=fixed) if way == 'backward' else {}
                speedup = note(name, goal=1.5, ours=our, torchvision=their, share_of_bandwidth=must[way] / our / 1e6 / bandwidth, **extra)
                if speedup < 1.5: slow.append(f'{name} {speedup}')
    assert not slow, slow

@check
def speed_of_pyramid():
    "The model's own call: 2 x 1000 boxes from P2 to P5 of 800 x 1344 pixels, against torchvision's MultiScaleRoIAlign (no goal)."
    torch.manual_seed(0)
    features = [random_map(2, 256, 200 >> k, 336 >> k) for k in range(4)]
    rois = level_boxes(2000)
    boxes = rois[:, 1:].reshape(2, 1000, 4).contiguous()
    pool = torchvision.ops.MultiScaleRoIAlign(list('0123'), 7, 2)
    named = dict(zip('0123', features))
    with torch.no_grad():
        note('pyramid forward', ours=timed(lambda: roi_align.pyramid_roi_align(features, boxes, 7, full_frame((800, 1344), boxes, len(boxes)))),
             torchvision=timed(lambda: pool(named, list(boxes), [(800, 1344)] * 2)))

def crowd(*shape, side=1000):
    "Boxes around a number of objects, as a detector proposes them."
    torch.manual_seed(0)
    objects = torch.rand(*shape[:-1], 50, 2) * side
    centre = objects.gather(-2, torch.randint(0, 50, (*shape, 1)).expand(*shape, 2)) + torch.randn(*shape, 2) * 20
    half = 10 + torch.rand(*shape, 2) * 60
    return torch.cat([centre - half, centre + half], -1).cuda(), torch.rand(shape).cuda()

@check
def speed_of_nms():
    "Batched NMS of 8 x 2,000 boxes: 5 times torchvision's batched_nms; one group of 12,000 (no goal)."
    boxes, scores = crowd(12000)
    note('nms 12000', ours=timed(lambda: nms.nms_keep(boxes, scores, .7)), torchvision=timed(lambda: torchvision.ops.nms(boxes, scores, .7)))
    boxes, scores = crowd(8, 2000)
    group = torch.arange(8, device='cuda').repeat_interleave(2000)
    speedup = note('nms 8 x 2000', goal=5, ours=timed(lambda: nms.nms_keep(boxes, scores, .7)),
                   torchvision=timed(lambda: torchvision.ops.batched_nms(boxes.flatten(0, 1), scores.flatten(), group, .7)))
    assert speedup >= 5, speedup

@check
def speed_of_paste():
    "100 masks of 28 x 28 into 800 x 1333 (no goal on a GPU)."
    from torchvision.models.detection.roi_heads import paste_masks_in_image
    torch.manual_seed(0)
    masks, boxes = random_masks(100, 28, 800, 1333)
    note('paste 100', ours=timed(lambda: detections.paste_masks(masks, boxes, 800, 1333)),
         torchvision=timed(lambda: paste_masks_in_image(masks[:, None], boxes, (800, 1333)) >= .5, calls=2, runs=7))

@check
def speed_of_predict():
    "predict of a ResNet-50 with a pyramid, 2 images of 800 x 1344, random weights, eager and as a CUDA graph (no goal)."
    m, images = model(), torch.rand(2, 3, 800, 1344, device='cuda')
    with torch.no_grad():
        eager = timed(lambda: m.predict(images), calls=2, runs=7)
        note('predict', ours=eager, graph=timed(captured(lambda: m.predict(images))[0], calls=2, runs=7))


# ---- the script ----

def machine():
    said = lambda *c: subprocess.run(c, capture_output=True, text=True, cwd=root).stdout.strip() if shutil.which(c[0]) else ''
    p = torch.cuda.get_device_properties(0)
    return dict(gpu=p.name, memory_GiB=round(p.total_memory / 2**30), multiprocessors=p.multi_processor_count, capability=f'{p.major}.{p.minor}', torch=torch.__version__,
                torchvision=torchvision.__version__, cuda=torch.version.cuda, driver=said('nvidia-smi', '--query-gpu=driver_version', '--format=csv,noheader'),
                python=platform.python_version(), commit=said('git', 'rev-parse', 'HEAD'), command=shlex.join(['python', *sys.argv]))

def without_gpu():
    "What goes: compile for GPUs that are not here, and run the kernels on the CPU."
    print('No GPU here: the CUDA sources are compiled, and their kernels run on the CPU; nothing is timed.')
    if importlib.util.find_spec('pytest'):
        return subprocess.run([sys.executable, '-m', 'pytest', '-q', '-rs', str(root/'tests'/'test_cuda_sources.py')], cwd=root).returncode
    from maskrcnn_edu.cuda import build
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run([*build.cuda_command(['80', '90']), '-o', f'{folder}/cuda.so'])
    print(f'nvcc for sm_80 and sm_90: {"failed" if done.returncode else "compiled"}; without pytest the kernels were not run.')
    return done.returncode

def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--out', type=Path, default=root/'benchmarks'/'results', help='folder of the result')
    parser.add_argument('--only', help='checks whose name matches this pattern; writes nothing')
    parser.add_argument('--kernels', action='store_true', help='run every kernel once and end (for compute-sanitizer)')
    args = parser.parse_args()
    if not GPU: return without_gpu()
    global cuda, detections, mask_rcnn, nms, roi_align, IMPORT_SECONDS
    start = time.perf_counter()
    cuda, detections, mask_rcnn, nms, roi_align = import_without_extras()
    IMPORT_SECONDS = time.perf_counter() - start
    if args.kernels:
        all_kernels()
        print('all kernels ran')
        return 0
    about = machine()
    print(', '.join(f'{k} {v}' for k, v in about.items()), flush=True)
    results = run_checks(args.only)
    failed = [r['check'] for r in results if r['status'] == 'FAIL']
    print(f'{len(results) - len(failed)} of {len(results)} checks without a fault' + (f'; failed: {", ".join(failed)}' if failed else ''))
    if not args.only:
        args.out.mkdir(parents=True, exist_ok=True)
        file = args.out/f'{re.sub("[^a-z0-9]+", "-", about["gpu"].lower()).strip("-")}.json'
        file.write_text(json.dumps(dict(machine=about, checks=results, measurements=TIMES), indent=1) + '\n')
        print(f'written to {file}')
    return 1 if failed else 0

if __name__ == '__main__': sys.exit(main())

"""Our ops beside torchvision's on this machine's CPU: alternating in one run, medians, written to benchmarks/results/ops.json

    make bench            (or: python benchmarks/ops.py --threads 2 --runs 15)
"""
import argparse, json, platform, statistics, subprocess, sys, tempfile, time, os
from pathlib import Path
import torch, torchvision
from torchvision import ops as theirs
from torchvision.models.detection.roi_heads import paste_masks_in_image
from maskrcnn_edu import cuda
from maskrcnn_edu.detections import paste_masks
from maskrcnn_edu.nms import nms_keep
from maskrcnn_edu.roi_align import roi_align

here = Path(__file__).parent


def random_boxes(n, width, height, least, most):
    "Boxes inside a picture, sides spread evenly over the octaves."
    sides = (torch.rand(n, 2) * torch.tensor(most / least).log()).exp() * least
    corner = torch.rand(n, 2) * (torch.tensor([width, height]) - sides)
    return torch.cat([corner, corner + sides], 1)


def roi_align_pair(memory_format, backward):
    feature = torch.randn(2, 256, 200, 200).contiguous(memory_format=memory_format)
    rois = torch.cat([torch.randint(0, 2, (512, 1)).float(), random_boxes(512, 800, 800, 16, 400)], 1)
    grad = torch.randn(512, 256, 7, 7)
    if not backward: return lambda: theirs.roi_align(feature, rois, 7, .25, 2), lambda: roi_align(feature, rois, 7, .25, 2)
    plain = feature.contiguous()     # torchvision has no other
    args = rois, .25, 7, 7, 2, 256, 200, 200, 2, False
    where = rois[:, 0].long()
    return (lambda: torch.ops.torchvision._roi_align_backward(grad, *args),
            lambda: torch.ops.maskrcnn_edu.roi_align_backward(grad, [feature], rois[:, 1:], where, torch.zeros_like(where), [.25], 7, 7, 2, False, True)[0])


def nms_pair(n):
    boxes, scores = random_boxes(n, 800, 800, 16, 400), torch.rand(n)
    return lambda: theirs.nms(boxes, scores, .7), lambda: nms_keep(boxes, scores, .7).nonzero()[:, 0]


def batched_nms_pair(groups, n):
    boxes, scores, group = random_boxes(groups * n, 800, 800, 16, 400), torch.rand(groups * n), torch.arange(groups).repeat_interleave(n)
    return lambda: theirs.batched_nms(boxes, scores, group, .7), lambda: nms_keep(boxes.view(groups, n, 4), scores.view(groups, n), .7).flatten().nonzero()[:, 0]


def paste_pair():
    masks, boxes = torch.rand(100, 28, 28), random_boxes(100, 1333, 800, 30, 600)
    return lambda: paste_masks_in_image(masks[:, None], boxes, (800, 1333))[:, 0] >= .5, lambda: paste_masks(masks, boxes, 800, 1333)


CASES = {
    'ROIAlign forward': lambda: roi_align_pair(torch.contiguous_format, False),
    'ROIAlign forward, channels_last': lambda: roi_align_pair(torch.channels_last, False),
    'ROIAlign backward': lambda: roi_align_pair(torch.contiguous_format, True),
    'ROIAlign backward, channels_last': lambda: roi_align_pair(torch.channels_last, True),
    'NMS, 12,000 boxes': lambda: nms_pair(12_000),
    'NMS, 8 x 2,000 boxes': lambda: batched_nms_pair(8, 2000),
    'paste 100 masks into 800 x 1333': paste_pair}
GOALS = dict(zip(CASES, (8, 8, 20, 20, 10, 10, 5)))


def agree(a, b):
    "The largest difference; for index lists and masks, the share that differs."
    if a.dtype == torch.int64: return float(len(set(a.tolist()) ^ set(b.tolist())))
    return ((a != b).float().mean() if a.dtype == torch.bool else (a - b).abs().max()).item()


def measure(make, runs):
    torch.manual_seed(0)
    pair = make()
    difference = agree(*(f() for f in pair))
    times = [[], []]
    for _ in range(runs):
        for f, seconds in zip(pair, times):
            start = time.perf_counter()
            f()
            seconds.append(time.perf_counter() - start)
    torchvision_ms, ours_ms = (statistics.median(t) * 1e3 for t in times)
    return dict(torchvision_ms=round(torchvision_ms, 2), ours_ms=round(ours_ms, 2), ratio=round(torchvision_ms / ours_ms, 2), difference=difference)


def import_times(runs=7):
    "Seconds of the first import with a cold cache, and what a warm one adds to importing torch."
    code = 'import torch, time; start = time.perf_counter(); import maskrcnn_edu.cuda; print(time.perf_counter() - start)'
    with tempfile.TemporaryDirectory() as cache:
        run = lambda: float(subprocess.run([sys.executable, '-c', code], env=os.environ | dict(MASKRCNN_EDU_CACHE=cache), capture_output=True, text=True, check=True).stdout)
        return dict(cold_s=round(run(), 2), warm_ms=round(statistics.median(run() for _ in range(runs)) * 1e3, 1))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--threads', type=int, default=2)
    parser.add_argument('--runs', type=int, default=15)
    parser.add_argument('--out', type=Path, default=here / 'results' / 'ops.json')
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    results = {}
    for name, make in CASES.items():
        results[name] = measure(make, args.runs) | dict(goal=GOALS[name])
        r = results[name]
        print(f"{name:34s} torchvision {r['torchvision_ms']:8.1f} ms   ours {r['ours_ms']:7.1f} ms   {r['ratio']:5.1f} x  (goal {r['goal']})   difference {r['difference']:.1e}", flush=True)
    imports = import_times()
    print(f"first import {imports['cold_s']} s, warm import {imports['warm_ms']} ms")
    about = dict(processor=next((l.split(':')[1].strip() for l in open('/proc/cpuinfo') if l.startswith('model name')), platform.processor()) if sys.platform == 'linux' else platform.processor(),
                 threads=args.threads, backend=cuda.backend(), torch=torch.__version__, torchvision=torchvision.__version__, runs=args.runs, command='python ' + ' '.join(sys.argv))
    args.out.parent.mkdir(exist_ok=True)
    args.out.write_text(json.dumps(dict(about=about, results=results, imports=imports), indent=1) + '\n')


if __name__ == '__main__': main()

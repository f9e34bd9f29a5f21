"""The whole model beside torchvision's: the same weights, widths, anchors, counts, data and optimiser; alternating in one run, medians, written to benchmarks/results/model.json

    make bench-train      (or: python benchmarks/model.py --threads 2 --runs 9 --settings shapes nuclei r50)
"""
import argparse, ctypes, gc, json, platform, statistics, subprocess, sys, time
from dataclasses import replace
from pathlib import Path
import torch, torchvision
from torch import nn
from torchvision.models import resnet
from torchvision.models.detection import MaskRCNN as TheirMaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import FrozenBatchNorm2d
from maskrcnn_edu import cuda
from maskrcnn_edu.data import open_dataset, make_shapes, shapes_folder
from maskrcnn_edu.detections import paste_masks
from maskrcnn_edu.evaluate import CocoEval
from maskrcnn_edu.instances import to_instances
from maskrcnn_edu.learner import to_slots
from maskrcnn_edu.mask_rcnn import MaskRCNN, MaskRCNNConfig, SHAPES
from maskrcnn_edu.resnet import RESNET18, RESNET50
from maskrcnn_edu.speed import alternate, fold_norms, profile_step

here = Path(__file__).parent
COMMON = SHAPES.change(backbone=dict(**RESNET18, width=64), detection=dict(box_passes=1), head=dict(aligned=False, beta=1 / 9))   # as torchvision has it
SETTINGS = {   # config, side of the images, batch, level of the drawings, slots
    'shapes': (COMMON.change(head=dict(n_masks=16)), (128, 128), 8, 'classic', 8),
    'nuclei': (COMMON.change(n_classes=2, head=dict(n_rois=96, positive_fraction=.25, n_masks=24), detection=dict(n_detections=100),
                             rpn=dict(sizes=((14,), (28,), (56,), (112,), (180,)), n_pre=500, n_post=400, n_pre_predict=500, n_post_predict=400, n_sample=256)),
               (256, 256), 4, 'crowded', 64),
    'r50': (MaskRCNNConfig().change(backbone=dict(**RESNET50, width=64, norm='frozen')), (800, 1088), 1, 'crowded', 32)}
ORIGINAL = set(SETTINGS)
GOALS = dict(shapes=.67, nuclei=.67, r50=.9)


def their_model(c: MaskRCNNConfig, size) -> TheirMaskRCNN:
    "torchvision's model with the numbers of our configuration."
    b, r, h = c.backbone, c.rpn, c.head
    norm = dict(batch=nn.BatchNorm2d, frozen=FrozenBatchNorm2d)[b.norm]
    body = resnet.ResNet(resnet.Bottleneck if b.bottleneck else resnet.BasicBlock, list(b.layers), norm_layer=norm)
    channels = [64 * 2**i * (4 if b.bottleneck else 1) for i in range(4)]
    backbone = BackboneWithFPN(body, {f'layer{i + 1}': str(i) for i in range(4)}, channels, b.channels)
    return TheirMaskRCNN(
        backbone, None, min_size=min(size), max_size=max(size), image_mean=list(b.mean), image_std=list(b.std), size_divisible=32,
        rpn_anchor_generator=AnchorGenerator(r.sizes, (r.ratios,) * 5), rpn_pre_nms_top_n_train=r.n_pre, rpn_post_nms_top_n_train=r.n_post,
        rpn_pre_nms_top_n_test=r.n_pre_predict, rpn_post_nms_top_n_test=r.n_post_predict, rpn_batch_size_per_image=r.n_sample,
        box_batch_size_per_image=h.n_rois, box_positive_fraction=h.positive_fraction, box_detections_per_img=c.detection.n_detections,
        box_head=TwoMLPHead(b.channels * h.box_bins**2, h.hidden), box_predictor=FastRCNNPredictor(h.hidden, c.n_classes),
        mask_head=MaskRCNNHeads(b.channels, (h.mask_channels,) * 4, 1), mask_predictor=MaskRCNNPredictor(h.mask_channels, h.mask_channels, c.n_classes))


def pair(name, seed=0):
    "Both models with the same weights, and a batch of drawings for each."
    config, size, bs, level, slots = SETTINGS[name]
    torch.manual_seed(seed)
    theirs = their_model(config, size)
    nn.init.normal_(theirs.roi_heads.box_predictor.cls_score.weight, std=.05)    # undecided enough that all slots are filled
    ours = MaskRCNN(config)
    ours.load_state_dict({k.replace('roi_heads.', ''): v for k, v in theirs.state_dict().items()})
    return theirs, ours.to(memory_format=torch.channels_last)


def batches(name, device, seed=0):
    "The same images and objects, in the form that each wants."
    config, size, bs, level, slots = SETTINGS[name]
    samples = make_shapes(bs, seed=seed, size=max(size), level=level)
    pieces = [(s.image[:size[0]], s.instances.window(0, 0, *size)) for s in samples]
    images = torch.stack([torch.tensor(im).permute(2, 0, 1) / 255 for im, _ in pieces]).to(device)
    boxes, labels, masks = (torch.stack(t).to(device) for t in zip(*(to_slots(o, slots) for _, o in pieces)))
    labels = labels.clamp(max=config.n_classes - 1)
    targets = [dict(boxes=b[l > 0], labels=l[l > 0], masks=m[l > 0]) for b, l, m in zip(boxes, labels, masks)]
    return (list(images), targets), (images.contiguous(memory_format=torch.channels_last), boxes, labels, masks)


def train_step(model, batch, fused):
    "One step of training, as a function."
    opt = torch.optim.AdamW(model.parameters(), 1e-4, fused=fused)
    def step():
        opt.zero_grad()
        sum(model(*batch).values()).backward()
        opt.step()
    return step


def their_predict(model, batch):
    @torch.no_grad()
    def predict(): return [r['masks'] > .5 for r in model(batch[0])]
    return predict


def our_predict(model, batch):
    def predict():
        d, (h, w) = model.predict(batch[0]), batch[0].shape[-2:]
        return [paste_masks(m[l > 0], b[l > 0], h, w) for b, l, m in zip(d.boxes, d.labels, d.masks)]
    return predict


def apart(call, n=1):
    "Start `model.<call>` in n processes of their own at once; the last word that each prints, as a number."
    code = f'import sys; sys.path.insert(0, {str(here)!r}); import model; model.SETTINGS.update({ {k: v for k, v in SETTINGS.items() if k not in ORIGINAL} !r}); model.{call}'
    code = 'from maskrcnn_edu.mask_rcnn import *; ' + code
    runs = [subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(n)]
    said = [r.communicate() for r in runs]
    for r, (_, errors) in zip(runs, said):
        if r.returncode: raise RuntimeError(errors[-2000:])
    return [float(out.split()[-1]) for out, _ in said]


def peak_memory(name, which, what, times=5):
    "Megabytes that three steps take beyond what the imports took, in a process of its own; the median of some, since the allocator has moods."
    return statistics.median(apart(f'print_peak({name!r}, {which}, {what!r})')[0] for _ in range(times))


def print_peak(name, which, what):
    model, batch = pair(name)[which], batches(name, 'cpu')[which]
    step = steps(what, model, batch, which)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)                               # what building both models left unused goes back first
    Path('/proc/self/clear_refs').write_text('5')                  # the peak begins anew here (Linux)
    kilobytes = lambda key: int(next(l.split()[1] for l in open('/proc/self/status') if l.startswith(key)))
    before = kilobytes('VmRSS')
    for _ in range(3): step()
    print((kilobytes('VmHWM') - before) / 1024)


def steps(what, model, batch, which):
    "A step of torchvision's (0) or ours (1)."
    if what == 'train': return train_step(model.train(), batch, fused=bool(which))
    return their_predict(model.eval(), batch) if which == 0 else our_predict(fold_norms(model), batch)


def measure(name, runs, device):
    "Training step and prediction, with memory, of one setting."
    out = {}
    for what in ('train', 'predict'):
        models, data = [m.to(device) for m in pair(name)], batches(name, device)
        t, o = alternate([steps(what, m, b, i) for i, (m, b) in enumerate(zip(models, data))], runs)
        out[what] = dict(torchvision_s=round(t, 4), ours_s=round(o, 4), ratio=round(o / t, 3), goal=GOALS[name])
        if device == 'cpu': out[what] |= dict(zip(('torchvision_mb', 'ours_mb'), (round(peak_memory(name, i, what, 1 if name == 'r50' else 5)) for i in (0, 1))))
        print(f'{name:8s}{what:8s} torchvision {t:7.3f} s   ours {o:7.3f} s   ratio {o / t:.2f} (goal {GOALS[name]})', *([f"  memory {out[what]['torchvision_mb']} and {out[what]['ours_mb']} MB"] if device == 'cpu' else []), flush=True)
    return out


def vary(name, side=None, bs=None, level=None, slots=None, **numbers):
    "A setting with some of its numbers changed, under a name of its own."
    config, size, b, l, g = SETTINGS[name]
    key = f'{name} {side} {bs} {level} {slots} {numbers}'
    SETTINGS[key] = config.change(**numbers), size if side is None else (side, side), bs or b, level or l, slots or g
    return key


def scaling(runs, device):
    "Seconds of both against one number at a time, the others as in shapes."
    cases = dict(side=[(n, dict(side=n, bs=1)) for n in (128, 256, 512, 1024)],
                 batch=[(n, dict(bs=n)) for n in (1, 2, 4, 8, 16)],
                 proposals=[(n, dict(side=256, bs=1, rpn=dict(n_pre=2 * n, n_pre_predict=2 * n, n_post=n, n_post_predict=n))) for n in (50, 200, 800, 2000)],
                 slots=[(n, dict(side=256, bs=2, level='crowded', slots=n)) for n in (8, 32, 128)])
    out = {}
    for what, values in cases.items():
        out[what] = []
        for n, changes in values:
            name, row = vary('shapes', **changes), dict(n=n)
            for step in ('train', 'predict'):
                models, data = [m.to(device) for m in pair(name)], batches(name, device)
                row[step] = dict(zip(('torchvision_s', 'ours_s'), (round(t, 4) for t in alternate([steps(step, m, b, i) for i, (m, b) in enumerate(zip(models, data))], runs))))
            if what == 'side' and device == 'cpu': row['train'] |= dict(zip(('torchvision_mb', 'ours_mb'), (round(peak_memory(name, i, 'train', 1)) for i in (0, 1))))
            out[what].append(row)
            print(what, row, flush=True)
    if device == 'cpu': out['processes'] = {n: dict(zip(('torchvision_s', 'ours_s'), (round(statistics.mean(apart(f'print_seconds({i})', n)), 3) for i in (0, 1)))) for n in (1, 2, 4)}
    return out


def print_seconds(which, threads=1, runs=7):
    "A training step at shapes on one thread, for several of these at once."
    torch.set_num_threads(threads)
    print(alternate([steps('train', pair('shapes')[which], batches('shapes', 'cpu')[which], which)], runs)[0])


def profiles(name='nuclei'):
    "Milliseconds of a training step by kind of operation, of both."
    return {who: {k: round(v, 2) for k, v in profile_step(steps('train', m, b, i), 5).ms.items()} for i, (who, m, b) in enumerate(zip(('torchvision', 'ours'), pair(name), batches(name, 'cpu')))}


def in_bf16(f):
    def g():
        with torch.autocast('cpu', torch.bfloat16): return f()
    return g


def options(runs):
    "What bf16 and torch.compile bring to ours: seconds with and without, and of the first call."
    out = {}
    for name in ('shapes', 'nuclei'):
        fresh, batch = lambda: pair(name)[1], batches(name, 'cpu')[1]
        def compiled_backbone():
            m = fresh()
            m.backbone.compile()
            return train_step(m.train(), batch, True)
        def compiled_predict():
            m = fold_norms(fresh())
            m.predict = torch.compile(m.predict)
            return our_predict(m, batch)
        for title, make, plain in (('bf16, training', lambda: in_bf16(steps('train', fresh(), batch, 1)), 'train'), ('bf16, prediction', lambda: in_bf16(steps('predict', fresh(), batch, 1)), 'predict'),
                                   ('compiled backbone, training', compiled_backbone, 'train'), ('compiled, prediction', compiled_predict, 'predict')):
            f = make()
            start = time.perf_counter()
            f()
            first = time.perf_counter() - start
            without, with_it = alternate([steps(plain, fresh(), batch, 1), f], runs)
            out[f'{title}, {name}'] = dict(without_s=round(without, 4), with_s=round(with_it, 4), ratio=round(with_it / without, 3), warm_up_s=round(first, 1))
            print(title, name, out[f'{title}, {name}'], flush=True)
    return out


OWN = dict(head=dict(aligned=True, beta=0., n_masks=4), detection=dict(box_passes=2))      # what the recipe of the shapes has otherwise than torchvision: ROIAlign and masks at pixel centres, a straight box loss, a second look, masks of 4 rois a picture


def time_to_ap(which, goal=.8, every=21, most=3000, seed=0):
    "Seconds of training steps until mask AP on the valid shapes reaches the goal; all see the same batches. 0 torchvision, 1 ours by the same rules, 2 ours by its own."
    SETTINGS['own'] = SETTINGS['shapes'][0].change(**OWN), *SETTINGS['shapes'][1:]
    config, size, bs, _, slots = SETTINGS['shapes']
    train, valid = open_dataset(shapes_folder())
    samples = [train[i] for i in range(len(train))]
    model = pair('own' if which == 2 else 'shapes', seed)[min(which, 1)].train()
    opt = torch.optim.AdamW(model.parameters(), 1e-3, fused=bool(which))
    rng, seconds, history = torch.Generator().manual_seed(seed), 0., []
    for step in range(1, most + 1):
        drawn = [samples[int(i)] for i in torch.randint(len(samples), (bs,), generator=rng)]
        start = time.perf_counter()
        images = torch.stack([torch.tensor(s.image).permute(2, 0, 1) / 255 for s in drawn])
        slotted = [to_slots(s.instances, slots) for s in drawn]
        if which: batch = images.contiguous(memory_format=torch.channels_last), *(torch.stack(t) for t in zip(*slotted))
        else: batch = list(images), [dict(boxes=b[l > 0], labels=l[l > 0], masks=m[l > 0]) for b, l, m in slotted]
        loss = sum(model(*batch).values())
        opt.zero_grad()
        loss.backward()
        opt.step()
        seconds += time.perf_counter() - start
        if step % every == 0:
            ap = mask_ap(model, valid, which)
            history.append(dict(step=step, seconds=round(seconds, 1), mask_ap=round(ap, 4)))
            print(('torchvision', 'ours', 'ours, own rules')[which], history[-1], flush=True)
            if ap >= goal: break
    return history


@torch.no_grad()
def mask_ap(model, valid, which):
    "Mask AP, by our evaluation, which equals pycocotools."
    coco = CocoEval(valid.classes, 20)
    model.eval()
    for s in valid:
        image = torch.tensor(s.image).permute(2, 0, 1)[None] / 255
        if which: found = [t[0] for t in model.predict(image)]
        else:
            r, = model(list(image))
            coco.add(s.instances, theirs_as_instances(r, s.image.shape[:2]))
            continue
        coco.add(s.instances, to_instances(*found, s.image.shape[:2], aligned=model.config.head.aligned))
    model.train()
    return coco.compute()['mask_ap']


def theirs_as_instances(r, size):
    from maskrcnn_edu.data import Instances
    keep = (r['masks'][:, 0] > .5).flatten(1).any(1)
    masks = (r['masks'][keep, 0] > .5).numpy() if len(r['masks']) else torch.zeros(0, *size).numpy()
    return Instances.from_masks(masks.reshape(-1, *size), r['labels'][keep].numpy(), r['scores'][keep].numpy(), boxes=r['boxes'][keep].numpy())


def about(args):
    cpu = next((l.split(':')[1].strip() for l in open('/proc/cpuinfo') if l.startswith('model name')), platform.processor()) if sys.platform == 'linux' else platform.processor()
    return dict(processor=cpu, device=torch.cuda.get_device_name() if args.device != 'cpu' else 'cpu', threads=args.threads, backend=cuda.backend(), torch=torch.__version__, torchvision=torchvision.__version__, runs=args.runs,
                command='python ' + ' '.join(sys.argv))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--settings', nargs='*', default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument('--threads', type=int, default=2)
    parser.add_argument('--runs', type=int, default=9)
    parser.add_argument('--device', default='cpu')
    parser.add_argument('--ap', action='store_true', help='also the time to mask AP 0.80 on the shapes')
    parser.add_argument('--scaling', action='store_true', help='also against side, batch, proposals and slots')
    parser.add_argument('--options', action='store_true', help='also bf16 and torch.compile')
    parser.add_argument('--out', type=Path, default=here / 'results' / 'model.json')
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    results = {name: measure(name, max(3, args.runs // 3) if name == 'r50' and args.device == 'cpu' else args.runs, args.device) for name in args.settings}
    if args.scaling: results['scaling'] = scaling(max(3, args.runs // 3), args.device)
    if args.ap: results['time to mask AP 0.80'] = dict(zip(('torchvision', 'ours', 'ours, own rules'), map(time_to_ap, (0, 1, 2))))
    found = dict(about=about(args), results=results)
    if args.device == 'cpu': found['profile'] = profiles()
    if args.options: found['options'] = options(args.runs)
    args.out.parent.mkdir(exist_ok=True)
    args.out.write_text(json.dumps(found, indent=1) + '\n')


if __name__ == '__main__': main()

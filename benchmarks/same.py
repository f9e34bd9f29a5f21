"""Does this tree compute what another one computes? `python benchmarks/same.py OTHER_CHECKOUT [--time]`

Both trees run in processes of their own on this machine: detections of the models that ship, and
losses and weights after 20 training steps of five seeds, compared bit for bit. `--time` also runs
a training step, a prediction and the peak of memory of both, in turns.
Needs an environment with the package's requirements; other revisions come from `git worktree add`.
"""
import argparse, hashlib, json, os, resource, statistics, subprocess, sys, time
from pathlib import Path

here = Path(__file__).resolve().parent.parent


def digest(tensors) -> str:
    "The bits of tensors or arrays, as a short name."
    import numpy as np
    sha = hashlib.sha256()
    for t in tensors: sha.update(np.ascontiguousarray(t.detach().numpy() if hasattr(t, 'detach') else t).tobytes())
    return sha.hexdigest()[:16]


def nuclei_images(count=3):
    "Real nuclei where they are, else none: whole pictures by the names of the split."
    folder = here.parent/'shared/data'
    if not (folder/'dsb2018_stage1_train.zip').is_file(): return []
    import io, zipfile
    from PIL import Image
    import numpy as np
    with zipfile.ZipFile(folder/'dsb2018_stage1_train.zip') as z:
        names = sorted(n for n in z.namelist() if '/images/' in n and n.endswith('.png'))[::150][:count]
        return [np.asarray(Image.open(io.BytesIO(z.read(n))).convert('RGB')) for n in names]


def batch(seed, n=4, slots=8):
    "Images and truth of a few drawn shapes, as the model takes them."
    import torch
    from maskrcnn_edu.data import make_shapes
    samples = make_shapes(n, seed=seed)
    images = torch.stack([torch.tensor(s.image) for s in samples]).permute(0, 3, 1, 2) / 255
    boxes, labels = torch.zeros(n, slots, 4), torch.zeros(n, slots, dtype=torch.long)
    masks = torch.zeros(n, slots, *images.shape[-2:], dtype=torch.uint8)
    for i, s in enumerate(samples):
        k = len(s.instances)
        boxes[i, :k], labels[i, :k] = torch.tensor(s.instances.boxes), torch.tensor(s.instances.labels)
        masks[i, :k] = torch.tensor(s.instances.masks())
    return images, boxes, labels, masks


def trained(config, seed, steps=20):
    "Losses of every step, as exact numbers, and the weights at the end."
    import torch
    from maskrcnn_edu.mask_rcnn import MaskRCNN
    torch.manual_seed(seed)
    model = MaskRCNN(config)
    optimizer, losses = torch.optim.AdamW(model.parameters(), 1e-3), []
    for step in range(steps):
        images, boxes, labels, masks = batch(100 * seed + step)
        parts = model(images, boxes, labels.clamp(max=config.n_classes - 1), masks)
        optimizer.zero_grad()
        sum(parts.values()).backward()
        optimizer.step()
        losses.append({k: v.item().hex() for k, v in parts.items()})
    return dict(losses=losses, weights=digest(model.state_dict().values()))


def record() -> dict:
    "All that is compared."
    import torch
    from maskrcnn_edu.checkpoints import load_weights
    from maskrcnn_edu.data import make_shapes
    from maskrcnn_edu.learner import predict_instances
    from maskrcnn_edu.mask_rcnn import SHAPES
    from maskrcnn_edu.train import NUCLEI
    torch.set_num_threads(1)
    out = {}
    for name, pictures in (('shapes', [s.image for s in make_shapes(20, seed=3)]), ('nuclei', [s.image for s in make_shapes(2, seed=3)] + nuclei_images())):
        model, _ = load_weights(name)
        for i, picture in enumerate(pictures):
            f = predict_instances(model, picture)
            out[f'{name} picture {i}'] = dict(found=len(f), bits=digest([f.boxes, f.labels, f.scores, f.masks()]))
    for seed in range(5): out[f'shapes seed {seed}'] = trained(SHAPES, seed)
    out['nuclei seed 0'] = trained(NUCLEI, 0, 3)
    return out


def timed() -> dict:
    "Seconds of a training step and of a prediction, the best of several, and the process's peak of memory in MB."
    import torch
    from maskrcnn_edu.mask_rcnn import MaskRCNN, SHAPES
    torch.manual_seed(0)
    model, truth = MaskRCNN(SHAPES), batch(0, 8)
    def step():
        losses = model(*truth)
        sum(losses.values()).backward()
        model.zero_grad()
    def best(f, n):
        f()
        seconds = []
        for _ in range(n):
            start = time.perf_counter()
            f()
            seconds.append(time.perf_counter() - start)
        return statistics.median(seconds)
    step_s = best(step, 9)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    model.eval()
    return dict(step=step_s, predict=best(lambda: model.predict(truth[0]), 15), peak=peak)


def run(tree: Path, what: str) -> dict:
    "The same script with the package of another tree."
    environment = dict(os.environ, PYTHONPATH=str(tree), PYTHONHASHSEED='0')
    done = subprocess.run([sys.executable, __file__, '--run', what], cwd=tree, env=environment, capture_output=True, text=True)
    if done.returncode: raise SystemExit(f'{tree}: {done.stderr}')
    return json.loads(done.stdout.splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('other', nargs='?', type=Path, help='checkout to compare with')
    parser.add_argument('--time', action='store_true', help='time and memory too, in turns')
    parser.add_argument('--turns', type=int, default=5)
    parser.add_argument('--run', choices=('record', 'timed'), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        import maskrcnn_edu
        assert Path(maskrcnn_edu.__file__).resolve().parent.parent == Path.cwd(), f'{maskrcnn_edu.__file__} is not the package of {Path.cwd()}'
        return print(json.dumps(dict(record=record, timed=timed)[args.run]()))
    if not args.other: parser.error('name the other checkout')
    mine, other = run(here, 'record'), run(args.other.resolve(), 'record')
    wrong = [k for k in mine | other if mine.get(k) != other.get(k)]
    for k in mine: print(f'{k:20}', 'DIFFERS' if k in wrong else 'same bits', mine[k].get('found', ''))
    if args.time:
        turns = [(run(here, 'timed'), run(args.other.resolve(), 'timed')) for _ in range(args.turns)]
        for k in turns[0][0]:
            a, b = ([t[i][k] for t in turns] for i in (0, 1))
            ratios = sorted(x / y for x, y in zip(a, b))
            print(f'{k:8} here {statistics.median(a):.3f} other {statistics.median(b):.3f}, ratio {statistics.median(ratios):.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f})')
    if wrong: raise SystemExit(f'{len(wrong)} of {len(mine)} differ')


if __name__ == '__main__': main()

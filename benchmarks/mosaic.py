"""A mosaic of the 80 validation images, predicted in tiles, beside the images alone: peak memory, counts, finds made twice, finds cut; into benchmarks/results/mosaic.json

    make mosaic           (or: python benchmarks/mosaic.py --weights nuclei --side 2048)

The images are stretched to one brightness and laid in shelves of one height, again and again until the mosaic is full; where a picture does not fit it is cut. Each picture, as it was cut, is also predicted alone,
with the same levels of brightness, and its finds count as often as it was laid. Half a nucleus at the border of a picture is another object in the mosaic: two halves that meet are one, and a half beside something else may not be found at all.
The tiles are not to blame for that, so it is kept out of the comparison: between pictures lie `--gap` pixels of the network's neutral colour, and a picture alone is predicted in a frame of as many, so that the network sees the same
around it. No pixel belongs to two finds, as in the command line. Counted are all finds, and those whose centre lies at least `--rim` pixels inside their picture; and, for completeness, what is found on the images without a frame.
"""
import argparse, json, os, platform, subprocess, sys, tempfile, time
from pathlib import Path
import numpy as np
import torch, torchvision
from maskrcnn_edu import cuda
from maskrcnn_edu.checkpoints import load_weights
from maskrcnn_edu.data import DataError, Instances, write_atomic
from maskrcnn_edu.learner import predict_instances, stretch
from maskrcnn_edu.nuclei import find_nuclei, load_nuclei, remove_overlaps
from maskrcnn_edu.tiles import extents, near_pairs, open_picture, picture_levels, predict_tiled, shared, tile_grid

here = Path(__file__).parent


def lay(sizes, side, gap):
    "Where pictures go: (y, x, number, height, width) of each, in shelves, all pictures in turn and again."
    order, k, y, places = np.argsort([s[0] for s in sizes], kind='stable').tolist(), 0, 0, []
    while y < side:
        shelf, x = [], 0
        while x < side:
            i = order[k % len(order)]
            shelf.append((x, i, min(sizes[i][1], side - x)))
            x, k = x + sizes[i][1] + gap, k + 1
        height = min(min(sizes[i][0] for _, i, _ in shelf), side - y)
        places += [(y, x, i, height, w) for x, i, w in shelf]
        y += height + gap
    return places


def framed(image, gap, colour):
    "A picture with a margin as it has it in the mosaic."
    out = np.empty((image.shape[0] + 2 * gap, image.shape[1] + 2 * gap, 3), np.uint8)
    out[:] = colour
    out[gap:gap + image.shape[0], gap:gap + image.shape[1]] = image
    return out


def build(file, images, places, side, colour):
    "The mosaic as a .npy file."
    mosaic = np.lib.format.open_memmap(file, 'w+', np.uint8, (side, side, 3))
    mosaic[:] = colour
    for y, x, i, h, w in places: mosaic[y:y + h, x:x + w] = images[i][:h, :w]
    mosaic.flush()


def peak_mb():
    "Most memory that this process held, in MiB."
    if sys.platform == 'linux': return int(next(l.split()[1] for l in open('/proc/self/status') if l.startswith('VmHWM'))) / 1024
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def predict(args):
    "In a process of its own: the finds of the mosaic into a file, time and memory printed."
    model, _ = load_weights(args.weights, args.device)
    before, start = peak_mb(), time.time()
    def progress(tiles):
        for i, t in enumerate(tiles):
            if i % 50 == 0: print(f'tile {i} of {len(tiles)}, {time.time() - start:.0f} s, {peak_mb():.0f} MB', file=sys.stderr, flush=True)
            yield t
    found = predict_tiled(model, open_picture(args.predict), args.tile, args.overlap, args.min_score, progress=progress)
    print(json.dumps(dict(seconds=round(time.time() - start, 1), peak_mb=round(peak_mb()), peak_before_mb=round(before))))
    np.savez(args.predict.with_suffix('.npz'), boxes=found.boxes, labels=found.labels, scores=found.scores, origins=found.origins,
             shapes=np.array([c.shape for c in found.crops]).reshape(-1, 2), bits=np.packbits(np.concatenate([c.ravel() for c in found.crops] or [np.zeros(0, bool)])))


def load(file, side):
    "The finds that `predict` wrote."
    f = np.load(file)
    ends = np.cumsum(f['shapes'].prod(1)).astype(int)
    bits = np.unpackbits(f['bits'], count=ends[-1] if len(ends) else 0).astype(bool)
    crops = [c.reshape(s) for c, s in zip(np.split(bits, ends[:-1]), f['shapes'])] if len(ends) else []
    return Instances((side, side), f['boxes'], f['labels'], crops, f['origins'], f['scores'])


def twice(found):
    "Pairs of finds with a mask IoU above 0.5."
    pairs, area = near_pairs(extents(found), np.arange(len(found))), np.array([c.sum() for c in found.crops])
    common = shared(found, pairs)
    return int((common / np.maximum(area[pairs].sum(1) - common, 1) > .5).sum())


def straight(found, rows, columns, least=8):
    "Finds whose border runs along one of these lines for at least so many pixels."
    lines, n = (set(rows), set(columns)), 0
    for crop, (y1, x1, y2, x2) in zip(found.crops, extents(found).tolist()):
        edges = ((0, y1, crop[:1]), (0, y2, crop[-1:]), (1, x1, crop[:, :1]), (1, x2, crop[:, -1:]))
        n += any(at in lines[axis] and edge.sum() >= least for axis, at, edge in edges)
    return n


def seams(found, side, tile, overlap):
    "Finds that end straight at a tile's border, and how many end so at lines that are none, on average."
    grid = tile_grid((side, side), tile, overlap)
    lines = {v for t in grid for v in t.box} - {0, side}
    control = [straight(found, moved, moved) for d in range(1, 24) if not (moved := {v + d for v in lines}) & lines]
    return dict(at_seams=straight(found, lines, lines), elsewhere=round(float(np.mean(control)), 1))


def inside(where, y, x, h, w, rim):
    "Finds whose centre lies in the picture, `rim` pixels from its border."
    centre = (where[:, :2] + where[:, 2:]) / 2
    return ((centre >= (y + rim, x + rim)) & (centre < (y + h - rim, x + w - rim))).all(1)


def away_from_joints(found, places, least=2):
    "The finds that lie in one picture and do not come near its border."
    where, keep = extents(found), np.zeros(len(found), bool)
    for y, x, i, h, w in places: keep |= ((where[:, :2] >= (y + least, x + least)) & (where[:, 2:] <= (y + h - least, x + w - least))).all(1)
    return found[keep]


def compare(found, alone, places, rim):
    "Counts of the mosaic and of the images alone: all, and away from the joints."
    where, counts, gap = extents(found), np.zeros((len(places), 2), int), (next(iter(alone.values())).size[0] - places[0][3]) // 2
    for k, (y, x, i, h, w) in enumerate(places):
        counts[k] = inside(where, y, x, h, w, rim).sum(), inside(extents(alone[i, h, w]), gap, gap, h, w, rim).sum()
    total = len(found), sum(len(alone[p[2:]]) for p in places)
    row = lambda a, b: dict(mosaic=int(a), alone=int(b), difference_percent=round(100 * (a - b) / max(b, 1), 2))
    return dict(all=row(*total), away_from_joints=row(*counts.sum(0)) | dict(rim=rim)), counts


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--weights', default='nuclei')
    parser.add_argument('--side', type=int, default=8192)
    parser.add_argument('--tile', type=int, default=512)
    parser.add_argument('--overlap', type=int, default=128)
    parser.add_argument('--min-score', type=float, help='what the model says if not given')
    parser.add_argument('--gap', type=int, default=32)
    parser.add_argument('--rim', type=int, default=16)
    parser.add_argument('--device', default='cpu')
    parser.add_argument('--data', type=Path, default=find_nuclei())
    parser.add_argument('--out', type=Path, default=here / 'results' / 'mosaic.json')
    parser.add_argument('--predict', type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.predict: return predict(args)
    if args.data is None: sys.exit('no nuclei found: give --data, a folder or zip in the layout of stage1_train.')
    _, valid, kinds = load_nuclei(args.data)
    images = [stretch(s.image) for s in valid]
    model, _ = load_weights(args.weights, args.device)
    if args.min_score is None: args.min_score = model.config.detection.sure
    colour = np.round(255 * np.array(model.config.backbone.mean)).astype(np.uint8)
    places = lay([im.shape[:2] for im in images], args.side, args.gap)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / 'mosaic.npy'
        build(file, images, places, args.side, colour)
        levels = picture_levels(np.load(file, mmap_mode='r'))
        child = [sys.executable, __file__, '--predict', str(file), *(f'--{k}={getattr(args, k.replace("-", "_"))}' for k in ('weights', 'tile', 'overlap', 'min-score', 'device'))]
        run = json.loads(subprocess.run(child, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])
        found = remove_overlaps(load(file.with_suffix('.npz'), args.side), min_area=1)
    single = lambda i, h, w, gap: remove_overlaps(predict_instances(model, framed(images[i][:h, :w], gap, colour), args.min_score, levels=levels), min_area=1)
    alone, bare = ({p: single(*p, gap) for p in dict.fromkeys(p[2:] for p in places)} for gap in (args.gap, 0))
    counts, each = compare(found, alone, places, args.rim)
    by_kind = {k: each[[kinds[valid.names[p[2]]] == k for p in places]].sum(0).tolist() for k in sorted({kinds[valid.names[p[2]]] for p in places})}
    results = run | dict(levels=levels, tiles=len(tile_grid((args.side, args.side), args.tile, args.overlap)), pictures=len(places), different=len({p[2] for p in places}), counts=counts | dict(without_frame=sum(len(bare[p[2:]]) for p in places)),
        by_kind_away_from_joints={k: dict(mosaic=a, alone=b) for k, (a, b) in by_kind.items()},
        twice=dict(mosaic=twice(found), alone=sum(twice(alone[p[2:]]) for p in places)), seams=seams(away_from_joints(found, places), args.side, args.tile, args.overlap))
    processor = next((l.split(':')[1].strip() for l in open('/proc/cpuinfo') if l.startswith('model name')), platform.processor()) if sys.platform == 'linux' else platform.processor()
    about = dict(processor=processor, threads=torch.get_num_threads(), backend=cuda.backend(), python=platform.python_version(), torch=torch.__version__, torchvision=torchvision.__version__, numpy=np.__version__,
                 command='python ' + ' '.join(sys.argv), side=args.side, tile=args.tile, overlap=args.overlap, gap=args.gap, min_score=args.min_score, weights=args.weights)
    print(json.dumps(results, indent=1))
    write_atomic(args.out, (json.dumps(dict(about=about, results=results), indent=1) + '\n').encode())


if __name__ == '__main__':
    try: main()
    except DataError as e: sys.exit(str(e))

"""Does it help to look several times? The nuclei score with one, two, four and eight looks, into benchmarks/results/flips.json

    python benchmarks/flips.py --weights nuclei --images 20
"""
import argparse, json, platform, sys, time
from pathlib import Path
import numpy as np
import torch
from maskrcnn_edu.checkpoints import load_weights
from maskrcnn_edu.data import write_atomic
from maskrcnn_edu.evaluate import dsb_score, mean_dsb
from maskrcnn_edu.learner import predict_instances, turn
from maskrcnn_edu.nuclei import find_nuclei, load_nuclei, remove_overlaps
from maskrcnn_edu.tiles import TURNS, VIEWS, gather, turn_back, vote

here = Path(__file__).parent
LOOKS = {'1': VIEWS[:1], '2': VIEWS[:2], '4': TURNS, '8': VIEWS}   # as it is; and its mirror image; four quarter turns; all
LEAST = (.2, .3, .4, .5, .6)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--weights', default='nuclei')
    parser.add_argument('--images', type=int, default=20)
    parser.add_argument('--side', type=int, default=360, help='no image with a longer side')
    parser.add_argument('--out', type=Path, default=here / 'results' / 'flips.json')
    args = parser.parse_args()
    model, _ = load_weights(args.weights)
    _, valid, kinds = load_nuclei(find_nuclei())
    small = [s for s in valid if max(s.image.shape) <= args.side]
    some = small[::max(1, len(small) // args.images)][:args.images]
    scores, start = {(k, t): [] for k in LOOKS for t in LEAST}, time.time()
    for s in some:
        looks = {v: turn_back(predict_instances(model, turn(s.image, s.instances, *v)[0]), *v) for v in VIEWS}
        for k, views in LOOKS.items():
            found = vote(*gather([looks[v] for v in views]), len(views))
            for t in LEAST: scores[k, t].append(dsb_score(s.instances, remove_overlaps(found[found.scores >= t])))
    mean = lambda rows, kind: round(mean_dsb([r for r, s in zip(rows, some) if kind in (None, kinds[s.name])])['dsb'], 4)
    present = sorted({kinds[s.name] for s in some})
    results = {k: {str(t): dict(all=mean(scores[k, t], None)) | {kind: mean(scores[k, t], kind) for kind in present} for t in LEAST} for k in LOOKS}
    for k in LOOKS: print(k, 'looks:', '  '.join(f'from {t} {results[k][str(t)]["all"]:.3f}' for t in LEAST))
    about = dict(torch=torch.__version__, python=platform.python_version(), weights=args.weights, images=len(some), kinds={kind: sum(kinds[s.name] == kind for s in some) for kind in present},
                 seconds=round(time.time() - start, 1), command='python ' + ' '.join(sys.argv))
    write_atomic(args.out, (json.dumps(dict(about=about, results=results), indent=1) + '\n').encode())


if __name__ == '__main__': main()

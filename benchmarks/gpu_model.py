"""The whole model on a GPU, beside torchvision's: written to benchmarks/results/<gpu>_model.json. It needs torch, torchvision and this repository:

    python benchmarks/gpu_model.py [--out FOLDER] [--runs 15] [--minutes 2]

Goals: a training step at most half of torchvision's time (R50, bf16, batch 8) and a third (shapes, batch 16); prediction as one CUDA graph, without asking the GPU for a number, a third;
shapes to mask AP 0.93 in under two minutes. Without a GPU the same code runs on the CPU with small numbers, to show that it runs; what only a GPU can do is then skipped and said.
"""
import argparse, json, sys, time, traceback
from dataclasses import replace
from functools import partial
from pathlib import Path
import torch

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]
import model as bench
from maskrcnn_edu.detections import paste_masks
from maskrcnn_edu.speed import Replay, alternate, fold_norms, profile_step

GPU = torch.cuda.is_available()
DEVICE = 'cuda' if GPU else 'cpu'


def setting(name, **changes): return bench.vary(name, **(changes if GPU else dict(side=128, bs=2)))


def autocast(f, on):
    def g(*args):
        with torch.autocast(DEVICE, torch.bfloat16, enabled=on): return f(*args)
    return g


def our_step(model, batch, bf16, graph):
    "A training step of ours; as one graph where it is asked for."
    opt = torch.optim.AdamW(model.train().parameters(), 1e-4, fused=True, capturable=GPU)
    def step(*batch):
        opt.zero_grad(set_to_none=True)
        loss = sum(autocast(model, bf16)(*batch).values())
        loss.backward()
        opt.step()
        return loss
    replay = Replay(step, *batch) if graph else step
    return lambda: replay(*batch)


def their_step(model, batch, bf16):
    opt = torch.optim.AdamW(model.train().parameters(), 1e-4, fused=GPU)
    def step():
        opt.zero_grad(set_to_none=True)
        sum(autocast(model, bf16)(*batch).values()).backward()
        opt.step()
    return step


def data_of(name):
    theirs, ours = (m.to(DEVICE) for m in bench.pair(name))
    return theirs, ours, *bench.batches(name, DEVICE)


def training(name, bf16, goal, runs):
    "Eager and as one graph, beside torchvision."
    theirs, ours, their_batch, batch = data_of(name)
    functions = dict(torchvision=their_step(theirs, their_batch, bf16), eager=our_step(ours, batch, bf16, False))
    if GPU: functions['graph'] = our_step(bench.pair(name)[1].to(DEVICE), batch, bf16, True)
    seconds = dict(zip(functions, alternate(list(functions.values()), runs)))
    best = min(v for k, v in seconds.items() if k != 'torchvision')
    table = profile_step(functions['eager'])
    return dict(seconds={k: round(v, 5) for k, v in seconds.items()}, ratio=round(best / seconds['torchvision'], 3), goal=goal, convolutions=round(float(table.share.get('convolutions', 0)), 3))


def prediction(name, goal, runs):
    "As one graph, beside torchvision; first that it asks the GPU for nothing."
    theirs, ours, their_batch, batch = data_of(name)
    ours, theirs = fold_norms(ours), theirs.eval()
    if GPU:
        ours.predict(batch[0])
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode('error')
        try: ours.predict(batch[0])
        finally: torch.cuda.set_sync_debug_mode('default')
    def whole(images):
        "Detections and their masks at the size of the picture, as torchvision gives them."
        d, (h, w) = ours.predict(images), images.shape[-2:]
        return *d, torch.vmap(lambda m, b: paste_masks(m, b, h, w))(d.masks, d.boxes)
    replay = Replay(whole, batch[0])
    for a, b in zip(replay(batch[0])[:4], ours.predict(batch[0])): torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)
    t, eager, graph = alternate([torch.no_grad()(lambda: theirs(their_batch[0])), lambda: whole(batch[0]), lambda: replay(batch[0])], runs)
    return dict(seconds=dict(torchvision=round(t, 5), eager=round(eager, 5), graph=round(graph, 5)), ratio=round(graph / t, 3), goal=goal)


def shapes_to_ap(minutes, goal=.93):
    "The recipe of the shapes on the GPU, and how long it took to the goal; AP is measured after every epoch, its time included."
    from maskrcnn_edu.data import open_dataset, shapes_folder
    from maskrcnn_edu.train import SHAPES_RECIPE, fit
    import tempfile
    train, valid = open_dataset(shapes_folder())
    recipe = replace(SHAPES_RECIPE, ap_every=2) if GPU else replace(SHAPES_RECIPE, epochs=1, repeat=1)
    if not GPU: train, valid = train.subset(range(16)), valid.subset(range(8))
    start = time.perf_counter()
    learn = fit(recipe, train, valid, Path(tempfile.mkdtemp()) / 'run', device=DEVICE)
    seconds = time.perf_counter() - start
    aps = [float(row[learn.recorder.metric_names.index('mask_ap') - 1]) for row in learn.recorder.values]
    best = max((a for a in aps if a == a), default=float('nan'))
    return dict(seconds=round(seconds, 1), mask_ap=round(best, 4), goal=f'{goal} in {60 * minutes:.0f} s', reached=bool(best >= goal and seconds <= 60 * minutes))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--out', type=Path, default=Path(__file__).parent / 'results')
    parser.add_argument('--runs', type=int, default=15 if GPU else 1)
    parser.add_argument('--minutes', type=float, default=2)
    args = parser.parse_args()
    name = torch.cuda.get_device_name().replace(' ', '_') if GPU else 'cpu'
    work = {'training, R50, bf16, batch 8': partial(training, setting('r50', bs=8), True, .5, args.runs),
            'training, shapes, batch 16': partial(training, setting('shapes', bs=16), False, .33, args.runs),
            'training, shapes, bf16, batch 16': partial(training, setting('shapes', bs=16), True, .33, args.runs),
            'prediction, R50, batch 8': partial(prediction, setting('r50', bs=8), .33, args.runs),
            'prediction, shapes, batch 16': partial(prediction, setting('shapes', bs=16), .33, args.runs),
            'shapes to mask AP 0.93': partial(shapes_to_ap, args.minutes)}
    found, failed = {}, False
    for title, f in work.items():
        start = time.perf_counter()
        try: found[title] = f()
        except Exception as e:
            traceback.print_exc()
            found[title], failed = dict(error=f'{type(e).__name__}: {str(e)[:500]}'), True
        print(f'{title}: {found[title]} ({time.perf_counter() - start:.0f} s)', flush=True)
        if GPU:                                            # after each, so that a time limit loses only the last
            args.out.mkdir(exist_ok=True, parents=True)
            (args.out / f'{name}_model.json').write_text(json.dumps(dict(device=name, torch=torch.__version__, runs=args.runs, results=found), indent=1) + '\n')
    if not GPU: print('No GPU: graphs, the check that nothing is asked of the GPU, and the numbers were left out; nothing was written.')
    raise SystemExit(failed)


if __name__ == '__main__': main()

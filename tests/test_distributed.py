"Two processes on the CPU, started by accelerate, are one process that looks at two batches a step."
import json, os, socket, subprocess, sys
from pathlib import Path
import pytest

root = Path(__file__).resolve().parent.parent
SCRIPT = '''
import json, sys, warnings
warnings.simplefilter('ignore')
from dataclasses import replace
import torch
from fastai.callback.training import GradientAccumulation
from fastai.distributed import *
from fastai.torch_core import num_distrib, rank_distrib
from maskrcnn_edu.data import CLASSES, open_dataset, shapes_folder
from maskrcnn_edu.evaluate import CocoMetrics
from maskrcnn_edu.checkpoints import load_weights
from maskrcnn_edu.learner import EMA, FrozenNorm, SaveState, colour, instance_dls, losses_of, mask_rcnn_learner, SHAPES
folder = sys.argv[1]
train, valid = open_dataset(shapes_folder())

def fit(config, n_valid, epochs, lr, cbs, start=None):
    dls = instance_dls(train.subset(range(16)), valid.subset(range(n_valid)), batch_tfms=colour(), bs=4, device='cpu')
    coco = CocoMetrics(CLASSES)
    learn = mask_rcnn_learner(dls, config, cbs=[coco, *cbs], metrics=coco.metrics())
    if start: learn.model.load_state_dict(start)
    with learn.no_bar(), learn.no_logging():
        if num_distrib() > 1:
            with learn.distrib_ctx(sync_bn=False, cpu=True): learn.fit(epochs, lr)
        else: learn.fit(epochs, lr, cbs=GradientAccumulation(8))
    return learn, coco.scores

learn, scores = fit(SHAPES.change(backbone=dict(norm='group', width=16, channels=32), head=dict(hidden=64, mask_channels=32), detection=dict(min_score=0.)), 8, 2, 1e-3, [EMA(.5), SaveState(folder)])
weights = torch.cat([p.detach().flatten() for p in learn.model.parameters()])
shipped, names = load_weights('shapes')
_, uneven = fit(shipped.config, 6, 1, 0., [FrozenNorm()], shipped.state_dict())
out = dict(columns=losses_of(learn), scores=scores, uneven=uneven, weights=weights[::97].tolist(), rank=rank_distrib(), world=num_distrib())
json.dump(out, open(f'{folder}/{rank_distrib()}.json', 'w'))
'''

def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]

def run(folder, processes):
    "The results of every process."
    (folder/'script.py').write_text(SCRIPT)
    launch = ['-m', 'accelerate.commands.launch', '--multi_gpu', '--num_processes', '2', '--num_machines', '1', '--mixed_precision', 'no',
              '--dynamo_backend', 'no', '--main_process_port', str(free_port())]   # "gpu" means: through torchrun; without a GPU it is gloo
    env = os.environ | dict(OMP_NUM_THREADS='1', PYTHONPATH=str(root), ACCELERATE_USE_CPU='true')
    done = subprocess.run([sys.executable, *(launch if processes > 1 else []), str(folder/'script.py'), str(folder)], capture_output=True, text=True, env=env, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder/f'{i}.json').read_text()) for i in range(processes)]

@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    pytest.importorskip('accelerate')
    return run(tmp_path_factory.mktemp('one'), 1), run(tmp_path_factory.mktemp('two'), 2)

def test_two_processes_give_the_losses_of_one(runs):
    (one,), two = runs
    assert [(r['rank'], r['world']) for r in two] == [(0, 2), (1, 2)]
    for column, values in one['columns'].items():
        if column == 'train_loss': continue   # a running mean over steps, of which there are half as many
        for process in two: assert process['columns'][column] == pytest.approx(values, abs=1e-4, nan_ok=True), column
    assert one['columns']['t_mask'][0] != one['columns']['t_mask'][1] and one['columns']['valid_loss'][0] > 0

def test_both_processes_hold_the_weights_of_one(runs):
    (one,), two = runs
    assert two[0]['weights'] == two[1]['weights'] and two[0]['weights'] == pytest.approx(one['weights'], abs=1e-4)

def test_average_precision_is_of_all_images_in_every_process(runs):
    (one,), two = runs
    for process in two: assert process['scores'] and process['scores']['mask_ap'] == pytest.approx(one['scores']['mask_ap'], abs=1e-4)

def test_six_images_in_batches_of_four_are_counted_once_each(runs):
    (one,), two = runs
    assert one['uneven']['mask_ap'] > .5, 'a trained model'
    for process in two: assert process['uneven']['mask_ap'] == pytest.approx(one['uneven']['mask_ap'], abs=1e-4)

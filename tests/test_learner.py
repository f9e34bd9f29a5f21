"The Learner: what fastai offers works, nothing of it is bent, and a run can be stopped anywhere."
import ast, json, math, os, re, signal, subprocess, sys, time, warnings
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path
import matplotlib
matplotlib.use('Agg')
warnings.filterwarnings('ignore', category=FutureWarning)
import fastai.vision.all as everything
import numpy as np
import pandas as pd
import pytest
import torch
from fastai.vision.all import Callback, CSVLogger, EarlyStoppingCallback, GradientAccumulation, GradientClip, SaveModelCallback
from matplotlib import pyplot as plt
from PIL import Image
from torch import nn
from maskrcnn_edu.boxes import box_iou
from maskrcnn_edu.data import CLASSES, DataError, InstanceDataset, open_dataset, make_shapes, shapes_folder
from maskrcnn_edu.evaluate import CocoMetrics
from maskrcnn_edu.instances import Instances
from maskrcnn_edu.learner import (EMA, LOSSES, FlipTurn, FrozenNorm, LossInterpretation, PredictionPicture, SaveState, ScaleCrop, Shown, Slots, ZoomWhole, batch_names, colour, diagram_boxes,
                                  heads_first, instance_dls, load_state, mask_rcnn_learner, predict_instances, raw_model, split_model, to_slots)
from maskrcnn_edu.loss_doctor import NaNDoctor, expected_losses, first_losses, overfit_batch, read_curve, read_total
from maskrcnn_edu.mask_rcnn import SHAPES
from maskrcnn_edu.record import listening

root = Path(__file__).resolve().parent.parent
TINY = SHAPES.change(backbone=dict(width=16, channels=32), head=dict(hidden=64, mask_channels=32))

@contextmanager
def quiet(learn):
    with learn.no_bar(), learn.no_logging(), redirect_stdout(StringIO()): yield

def small(path='.', n=16, config=TINY, bs=8, cbs=(), loaders={}, **kwargs):
    train, valid = open_dataset(shapes_folder())
    dls = instance_dls(train.subset(range(n)), valid.subset(range(8)), batch_tfms=colour(), bs=bs, device='cpu', **loaders)
    return mask_rcnn_learner(dls, config, path=path, cbs=cbs, **kwargs)

def weights(model): return torch.cat([p.detach().float().flatten() for p in model.state_dict().values()])


# ---- what fastai offers

def test_batches_and_results_show_themselves(tmp_path):
    learn = small(tmp_path)
    learn.dls.show_batch(max_n=4)
    assert len(plt.gcf().axes) == 4 and all(ax.images for ax in plt.gcf().axes)
    with quiet(learn):
        learn.show_results(max_n=2)
        assert len(plt.gcf().axes) == 4
        interp = LossInterpretation.from_learner(learn)
        interp.plot_top_losses(3)
        assert len(plt.gcf().axes) == 6
        batch = learn.validate()[0]
        one_by_one = [learn.validate(dl=learn.dls.test_dl([item], with_labels=True))[0] for item in learn.dls.valid_ds.items[:2]]
    assert len(interp.losses) == 8 and abs(interp.losses.mean() - batch) < .3 * batch
    assert interp.losses[0].item() == pytest.approx(one_by_one[0], rel=1e-4), 'the loss of the first image, alone in a batch with the same dice'
    assert interp.top_losses(1)[0] == interp.losses.max()
    plt.close('all')

def test_results_are_shown_after_a_run_that_measured_ap(tmp_path):
    coco = CocoMetrics(CLASSES)
    learn = small(tmp_path, cbs=coco, metrics=coco.metrics())
    with quiet(learn):
        learn.fit(1)
        learn.show_results(max_n=2)
    assert len(plt.gcf().axes) == 4
    plt.close('all')

def test_best_model_and_early_stop_by_mask_ap(tmp_path):
    coco = CocoMetrics(CLASSES)
    learn = small(tmp_path, cbs=coco, metrics=coco.metrics())
    class Scores(Callback):
        "Stands in for what training would bring: better, then worse."
        order = 46   # after CocoMetrics, before the Recorder
        def after_validate(self): coco.scores['mask_ap'] = [.1, .3, .2, .2, .2, .2][self.epoch]
    with quiet(learn):
        learn.fit(6, 1e-3, cbs=[Scores(), SaveModelCallback('mask_ap', fname='best', with_opt=True), EarlyStoppingCallback('mask_ap', patience=2), CSVLogger('log.csv'), GradientClip(1.)])
    table = pd.read_csv(tmp_path/'log.csv')
    assert table.mask_ap.tolist() == [.1, .3, .2, .2], 'stopped two epochs after the best'
    assert {'t_mask', 'v_mask', 'box_ap', 'mask_ap50'} <= set(table)
    best = torch.load(tmp_path/'models/best.pth', weights_only=False)['model']
    assert all(torch.equal(v, best[k]) for k, v in learn.model.state_dict().items()), 'the best model is what remains'

def test_lr_find_fine_tune_and_mixed_precision_leave_a_model_that_learns(tmp_path):
    learn = small(tmp_path, cbs=SaveState(tmp_path)).to_bf16()
    with quiet(learn), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        learn.lr_find(num_it=4, stop_div=False, show_plot=False, suggest_funcs=())
        learn.validate(), learn.get_preds()
        assert not (tmp_path/'state.pth').exists(), 'only training is worth saving'
        learn.fine_tune(1, 1e-3)
    assert learn.recorder.epoch == 0 and math.isfinite(learn.recorder.values[-1][0])
    assert torch.load(tmp_path/'state.pth')['epochs'] == 1
    plt.close('all')

def test_freeze_keeps_the_backbone_still_and_stages_free_it(tmp_path):
    learn = small(tmp_path, config=TINY.change(backbone=dict(norm='frozen')))
    groups, moved = split_model(learn.model), []
    assert sum(p.numel() for g in groups for p in g) == sum(p.numel() for p in learn.model.parameters())
    copy = lambda: [torch.cat([p.detach().flatten().clone() for p in g]) for g in groups]
    class Watch(Callback):
        def before_train(self): self.start = copy()
        def after_train(self): moved.append([not torch.equal(a, b) for a, b in zip(self.start, copy())])
    with quiet(learn): learn.fit(4, cbs=[heads_first(4), Watch()])
    assert moved == [[False, False, True], [False, True, True], [False, True, True], [True, True, True]]
    assert learn.opt.hypers[-1]['lr'] == pytest.approx(1e-4)

def test_gradients_of_two_small_batches_are_those_of_their_mean(tmp_path):
    learn = small(tmp_path, config=TINY.change(backbone=dict(norm='group')), bs=4, n=8)
    model, batches = learn.model, list(learn.dls.train)
    def pull(xb, yb):
        torch.manual_seed(0)
        return sum(model(*(t.as_subclass(torch.Tensor) for t in (xb, *yb))).values())
    model.train(), (sum(pull(*b) for b in batches) / 2).backward()
    want = torch.cat([p.grad.flatten() for p in model.parameters()])
    model.zero_grad()
    got = []
    class SameBatches(Callback):
        order = -20
        def before_batch(self):
            if self.training: self.learn.xb, self.learn.yb = batches[self.iter][:1], batches[self.iter][1:]
    class SameDice(Callback):
        order = 8   # just before the model
        def before_batch(self): torch.manual_seed(0)
    class Look(Callback):
        order = 30   # what the optimiser is given after the last batch
        def before_step(self): got.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    with quiet(learn): learn.fit(1, 1e-4, cbs=[SameBatches(), SameDice(), GradientAccumulation(8), Look()])
    assert len(got) == 1, 'one step for two batches'
    torch.testing.assert_close(got[0], want, atol=1e-5, rtol=1e-3)

def test_an_exported_learner_predicts_the_same_in_another_process(tmp_path):
    learn = small(tmp_path)
    with quiet(learn): learn.fit(1, 1e-3)
    picture = open_dataset(shapes_folder())[1][0].image
    Image.fromarray(picture).save(tmp_path/'a.png')
    learn.export('e.pkl')
    code = ('import sys, json, warnings; warnings.simplefilter("ignore")\n'
            'from fastai.learner import load_learner\n'
            'import numpy as np; from PIL import Image\n'
            'learn = load_learner(sys.argv[1])\n'
            'kinds = sys.argv[2], np.array(Image.open(sys.argv[2])), Image.open(sys.argv[2])\n'
            'with learn.no_bar(): found = [learn.predict(k)[0] for k in kinds]\n'
            'many = learn.dls.test_dl([sys.argv[2]] * 3, bs=2)\n'
            'with learn.no_bar(): preds = learn.get_preds(dl=many)[0]\n'
            'print(json.dumps([[f.boxes.tolist(), f.scores.tolist(), f.masks().sum().item(), f.names] for f in found] + [list(preds[0].shape)]))')
    out = subprocess.run([sys.executable, '-c', code, tmp_path/'e.pkl', tmp_path/'a.png'], capture_output=True, text=True)
    assert out.returncode == 0, out.stderr[-2000:]
    *found, shape = json.loads(out.stdout)
    here = predict_instances(learn.model, picture)
    assert len(here) > 0 and shape == [3, TINY.detection.n_detections, 4]
    for boxes, scores, area, names in found:
        np.testing.assert_allclose(boxes, here.boxes, atol=1e-3)
        np.testing.assert_allclose(scores, here.scores, atol=1e-5)
        assert area == here.masks().sum() and names == CLASSES

def test_pictures_of_any_size_are_predicted(tmp_path):
    learn = small(tmp_path)
    with quiet(learn): found, slots, _ = learn.predict(np.random.default_rng(0).integers(0, 255, (70, 100, 3)).astype(np.uint8))
    assert found.size == (128, 128) and isinstance(slots, Slots)


# ---- callbacks of ours

def test_ema_is_what_is_validated_saved_and_kept(tmp_path):
    raws, means, validated = [], [], []
    class Watch(Callback):
        order = 1
        def after_batch(self):
            if self.training: raws.append(weights(self.model))
        def before_validate(self): validated.append(weights(self.model))
    learn = small(tmp_path, config=TINY.change(backbone=dict(norm='group')), cbs=[EMA(.5), Watch()])
    with quiet(learn): learn.fit(2, 1e-3, cbs=SaveModelCallback(every_epoch=True))
    mean = raws[0]
    for n, raw in enumerate(raws[1:], 1): mean = torch.lerp(raw, mean, min(.5, (1 + n) / (10 + n)))
    torch.testing.assert_close(validated[-1], mean)
    torch.testing.assert_close(weights(learn.model), mean)
    assert not torch.allclose(mean, raws[-1])
    saved = small(tmp_path, config=TINY.change(backbone=dict(norm='group'))).load('model_1', weights_only=False)
    torch.testing.assert_close(weights(saved.model), mean)
    assert torch.equal(weights(raw_model(learn)), weights(learn.model)) and learn.opt.param_lists[0][0] is next(learn.model.parameters())

def test_frozen_norm_keeps_its_means(tmp_path):
    learn = small(tmp_path)
    means = lambda: {k: v.clone() for k, v in learn.model.state_dict().items() if 'running' in k}
    before = means()
    with quiet(learn): learn.fit(1, 1e-3, cbs=FrozenNorm())
    assert all(torch.equal(v, before[k]) for k, v in means().items())

@pytest.mark.parametrize('norm, layer', [('batch', nn.BatchNorm2d), ('group', nn.GroupNorm)])
def test_norm_is_a_choice(norm, layer):
    model = small(config=TINY.change(backbone=dict(norm=norm))).model
    assert any(isinstance(m, layer) for m in model.modules())
    assert not [m for m in small(config=TINY.change(backbone=dict(norm='frozen'))).model.backbone.body.bn1.parameters()]

def test_prediction_pictures_are_written_and_the_model_is_left_in_its_mode(tmp_path):
    learn = small(tmp_path, cbs=PredictionPicture(tmp_path/'seen', 2, every=2))
    with quiet(learn): learn.fit(3, 1e-3)
    assert [p.name for p in (tmp_path/'seen').iterdir()] == ['epoch_001.png']


# ---- stop and go on

def test_dice_belong_to_the_images(tmp_path):
    learn = small(tmp_path)
    a = learn.dls.train
    a.before_iter()   # from here on it turns and mirrors, as in training
    a.seed = 5
    x = a.do_item(3)[0]
    for i in (7, 1): a.do_item(i)
    assert torch.equal(a.do_item(3)[0], x), 'in any order'
    a.seed = 6
    assert any(not torch.equal(a.do_item(3)[0], x) for a.seed in range(6, 12)), 'another epoch, other dice'
    names = []
    class Names(Callback):
        def before_batch(self):
            if self.training: names.append((batch_names(self.dl, self.iter), self.xb[0].mean((1, 2, 3)).tolist()))
    runs = []
    for workers in (0, 2):
        names.clear()
        plain = small(tmp_path, loaders=dict(num_workers=workers))
        with quiet(plain): plain.fit(1, 0., cbs=Names())
        runs.append(list(names))
    assert [n for n, _ in runs[0]] == [n for n, _ in runs[1]], 'the same images in the same order, read here or by two workers'

def run_to_the_end(folder, epochs=3, stop=None, resume=False, ema=True, seed=0):
    "A run with everything that has a memory, stopped in (epoch, step) if asked."
    class Stop(Callback):
        def before_batch(self):
            if self.training and stop == (self.epoch, self.iter): raise KeyboardInterrupt
    learn = small(folder, cbs=[EMA(.9)] if ema else [], seed=seed)
    state = load_state(learn, folder) if resume else dict(epochs=0, rows=[], smooth=None)
    learn.add_cb(SaveState(folder, state['rows'], state['smooth']))
    try:
        with quiet(learn): learn.fit_one_cycle(epochs, 2e-3, start_epoch=state['epochs'], cbs=[Stop(), GradientClip(5.)])
    except KeyboardInterrupt: pass
    return learn, (Path(folder)/'history.csv').read_text() if (Path(folder)/'history.csv').exists() else ''

@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    return {ema: run_to_the_end(tmp_path_factory.mktemp('whole'), ema=ema) for ema in (True, False)}

@pytest.mark.parametrize('stop, ema', [((1, 0), True), ((1, 1), True), ((2, 1), True), ((1, 1), False)])
def test_resumed_is_as_if_never_stopped(tmp_path, whole, stop, ema):
    learn, history = run_to_the_end(tmp_path, stop=stop, ema=ema)
    assert len(history.splitlines()) == 1 + stop[0], 'only finished epochs count'
    learn, history = run_to_the_end(tmp_path, resume=True, ema=ema)
    assert history == whole[ema][1]
    assert torch.equal(weights(learn.model), weights(whole[ema][0].model))

def test_a_process_that_was_killed_is_resumed(tmp_path, whole):
    code = (f'import sys, os, signal; sys.path.insert(0, {str(root/"tests")!r})\n'
            'import test_learner as t\n'
            'class Kill(t.Callback):\n'
            '    def before_batch(self):\n'
            '        if self.training and (self.epoch, self.iter) == (2, 1): os.kill(os.getpid(), signal.SIGKILL)\n'
            'learn = t.small(sys.argv[1], cbs=[t.EMA(.9), t.SaveState(sys.argv[1])])\n'
            'with t.quiet(learn): learn.fit_one_cycle(3, 2e-3, cbs=[Kill(), t.GradientClip(5.)])\n')
    assert subprocess.run([sys.executable, '-c', code, tmp_path], capture_output=True).returncode == -signal.SIGKILL
    learn, history = run_to_the_end(tmp_path, resume=True)
    assert history == whole[True][1] and torch.equal(weights(learn.model), weights(whole[True][0].model))

def test_same_seed_same_run_other_seed_other_run(tmp_path, whole):
    (tmp_path/'a').mkdir(), (tmp_path/'b').mkdir()
    assert run_to_the_end(tmp_path/'a')[1] == whole[True][1]
    assert run_to_the_end(tmp_path/'b', seed=1)[1] != whole[True][1]

def test_a_run_with_ema_is_not_resumed_without(tmp_path):
    run_to_the_end(tmp_path, epochs=1)
    with pytest.raises(DataError, match='with EMA'): load_state(small(tmp_path), tmp_path)

def test_sigkill_while_saving_leaves_a_whole_checkpoint(tmp_path):
    code = ('import sys, torch\nfrom maskrcnn_edu.learner import save_atomic\n'
            'for i in range(10**9): save_atomic(dict(i=i, x=torch.full((1_000_000,), float(i))), sys.argv[1])')
    file, halves = tmp_path/'state.pth', 0
    process = subprocess.Popen([sys.executable, '-W', 'ignore', '-c', code, file])
    while not file.exists(): time.sleep(.05)
    for i in range(12):
        time.sleep(.004 * i + .02)
        os.kill(process.pid, signal.SIGSTOP)    # stands still as it would if it were killed now
        state = torch.load(file)
        assert (state['x'] == state['i']).all()
        part = file.with_suffix('.part')
        halves += part.exists() and part.stat().st_size < file.stat().st_size
        os.kill(process.pid, signal.SIGCONT)
    process.kill(), process.wait()
    state = torch.load(file)
    assert (state['x'] == state['i']).all() and state['i'] > 0
    assert halves, 'at least once it was caught in the middle of writing'


# ---- crowds: objects with a negative label

def squares(*sides, labels):
    "Squares on a diagonal, in an image of 128 pixels"
    masks = np.zeros((len(sides), 128, 128), np.uint8)
    for i, (mask, side) in enumerate(zip(masks, sides)): mask[12 * i:12 * i + side, 12 * i:12 * i + side] = 1
    return Instances.from_masks(masks, labels)

def test_objects_take_slots_before_crowds():
    many = squares(40, 6, 50, 9, 7, labels=[-1, 2, -3, 1, 3])
    kept = {g: to_slots(many, g)[1].tolist() for g in (1, 2, 3, 4, 5, 6)}
    assert kept == {1: [1], 2: [1, 3], 3: [2, 1, 3], 4: [2, -3, 1, 3], 5: [-1, 2, -3, 1, 3], 6: [-1, 2, -3, 1, 3, 0]}
    back = to_slots(many, 8).instances()
    assert back.labels.tolist() == many.labels.tolist() and (back.boxes == many.boxes).all() and (back.masks() == many.masks()).all()

class Record(str):
    "The name of a sample in memory"
    name = property(str)

def in_memory(samples, crowd):
    "A data set in which `crowd` says of each sample which objects are crowds"
    labels = lambda o: np.where(crowd(o), -1, 1) * o.labels
    known = {s.name: replace(s, instances=replace(s.instances, labels=labels(s.instances))) for s in samples}
    return InstanceDataset(list(map(Record, known)), CLASSES, lambda r: (known[r], []))

def crowded_batch(crowd, n=4, side=128):
    "Loader and model of a batch in which `crowd` says of each sample which objects are crowds; eval mode, so that the noise is always the same"
    data = in_memory(make_shapes(n, seed=21, level='hard', size=side), crowd)
    learn = mask_rcnn_learner(instance_dls(data.subset(range(n)), data, item_tfms=(), slots=16, bs=n, device='cpu', shuffle=False), TINY)
    images, targets = learn.dls.valid.one_batch()
    return learn.model.eval(), images.as_subclass(torch.Tensor), [t.as_subclass(torch.Tensor) for t in targets]

def told(model, images, targets):
    "The losses, and what the heads should have said"
    with listening(model) as notes: losses = model(images, *targets)
    return losses, notes

def in_a_crowd(boxes, targets, i):
    "Which boxes touch a crowd of image i"
    return (box_iou(boxes, targets[0][i][targets[1][i] < 0]) >= .001).any(1)

def test_a_crowd_reaches_the_targets_and_asks_nothing_there():
    "From data set through loader and slots to the labels of anchors and rois: -1 in a crowd, unless an object is there too"
    model, images, targets = crowded_batch(lambda o: np.arange(len(o)) % 2 == 0)
    assert (targets[1] < 0).sum() > 6 and (targets[1] > 0).sum() > 6
    losses, notes = told(model, images, targets)
    dropped = [targets[0], targets[1].clamp(min=0), targets[2]]
    _, without = told(model, images, dropped)
    wrong = dict(anchors=0, rois=0)
    for i in range(len(images)):
        near = in_a_crowd(notes['anchors'], targets, i)
        labels, before = notes['rpn_targets'].labels[i], without['rpn_targets'].labels[i]
        assert not (labels[near] == 0).any() and (labels[~near] == 0).any()
        wrong['anchors'] += (before[near] == 0).sum()
        rois, labels = notes['head_targets'].rois[i], notes['head_targets'].labels[i]
        assert not (labels[in_a_crowd(rois, targets, i)] == 0).any() and not (labels < -1).any() and (labels > 0).any()
        real = targets[1][i] > 0
        assert set(labels[labels > 0].tolist()) <= set(targets[1][i][real].tolist())
        wrong['rois'] += (without['head_targets'].labels[i][in_a_crowd(without['head_targets'].rois[i], targets, i)] == 0).sum()
    assert wrong['anchors'] > 20 and wrong['rois'] > 20, 'with the crowds dropped, their places would be taught as background'
    assert all(v.isfinite() for v in losses.values())

def test_a_batch_of_crowds_only_teaches_the_background_around_them():
    model, images, targets = crowded_batch(lambda o: np.ones(len(o), bool))
    assert (targets[1] <= 0).all() and (targets[1] < 0).any()
    losses, notes = told(model, images, targets)
    for i in range(len(images)):
        assert (notes['rpn_targets'].labels[i] <= 0).all() and (notes['head_targets'].labels[i] <= 0).all()
        assert not (notes['rpn_targets'].labels[i][in_a_crowd(notes['anchors'], targets, i)] == 0).any()
    zero = {k for k, v in losses.items() if v == 0}
    assert zero == {'loss_rpn_box_reg', 'loss_box_reg', 'loss_mask'} and all(v.isfinite() for v in losses.values())
    sum(losses.values()).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())

def test_one_crowd_over_the_whole_picture_teaches_nothing():
    model, images, _ = crowded_batch(lambda o: np.ones(len(o), bool))
    boxes, labels, masks = torch.tensor([[[0., 0, 128, 128]]] * 4), torch.full((4, 1), -2), torch.ones(4, 1, 128, 128, dtype=torch.uint8)
    losses, notes = told(model, images, (boxes, labels, masks))
    assert (notes['rpn_targets'].labels == -1).all() and (notes['head_targets'].labels == -1).all()
    assert set(losses) == set(LOSSES) and all(v == 0 for v in losses.values())
    sum(losses.values()).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())

def test_a_run_with_crowds_trains_and_is_measured(tmp_path):
    train, valid = (in_memory(make_shapes(n, seed=seed), lambda o: np.arange(len(o)) == 0) for n, seed in ((8, 1), (4, 2)))
    coco, crops = CocoMetrics(CLASSES), [FlipTurn(), ScaleCrop(128, aim=.9)]
    learn = mask_rcnn_learner(instance_dls(train, valid, item_tfms=crops, batch_tfms=colour(), bs=4, device='cpu'), TINY, path=tmp_path, cbs=coco, metrics=coco.metrics())
    with quiet(learn): learn.fit(1, 1e-3)
    assert all(map(math.isfinite, learn.recorder.values[-1][:2])) and sum((t.labels < 0).sum() for t, _ in coco.pairs) == 4
    learn.dls.show_batch(max_n=2), learn.show_results(max_n=2)
    plt.close('all')

def test_augmentation_keeps_crowds_and_aims_at_objects():
    s = make_shapes(1, seed=3, level='crowded', size=256)[0]
    crowds = replace(s, instances=replace(s.instances, labels=-s.instances.labels))
    for tfm in (FlipTurn(), ZoomWhole(), ScaleCrop(256)): assert (tfm((s.image, crowds.instances), split_idx=0)[1].labels < 0).all()
    masks = np.zeros((2, 512, 512), np.uint8)
    masks[0, 440:470, 440:470], masks[1, :200, :200] = 1, 1
    one = Instances.from_masks(masks, [1, -1])   # a small object far from a large crowd
    for _ in range(30): assert 1 in ScaleCrop(64, aim=1.).encodes((np.zeros((512, 512, 3), np.uint8), one))[1].labels
    ScaleCrop(64, aim=1.).encodes((np.zeros((512, 512, 3), np.uint8), one[[1]]))   # nothing to aim at

def test_a_crowd_in_a_batch_is_shown_as_one():
    shown = Shown(**vars(squares(40, 30, labels=[1, -2])), names=CLASSES)
    ax = shown.show()
    assert [x.get_text() for x in ax.texts] == ['crowd of circle', 'square'] and len(ax.collections) == 2
    plt.close('all')


# ---- loss doctor

def test_first_losses_are_those_of_guessing(tmp_path):
    first = first_losses(small(tmp_path, config=SHAPES))
    for name, value in expected_losses(SHAPES.n_classes).items(): assert abs(first[name] - value) < .35 * value, name
    assert expected_losses(91)['loss_classifier'] == pytest.approx(4.5109, abs=1e-4)

def test_one_batch_is_learned_by_heart(tmp_path):
    losses = [sum(l.values()) for l in overfit_batch(small(tmp_path), 30)]
    assert len(losses) == 30 and np.mean(losses[-5:]) < .8 * np.mean(losses[:3])

@pytest.mark.parametrize('box', ['resnet', 'fpn', 'rpn_head', 'box_head', 'mask_head'])
def test_the_doctor_names_the_box(tmp_path, box):
    class Poison(Callback):
        def before_batch(self):
            if self.train_iter == 1: next(diagram_boxes(self.model)[box][-1].parameters()).data[:] = math.nan
    doctor, learn = NaNDoctor(), small(tmp_path)
    with quiet(learn): learn.fit(2, 1e-3, cbs=[doctor, Poison()])
    assert doctor.box == box and 'a weight' in doctor.finding

def test_the_doctor_names_the_image_and_the_gradient(tmp_path):
    class Pixel(Callback):
        def before_batch(self):
            if self.train_iter == 1: self.xb[0][2] = math.inf; names.append(batch_names(self.dl, self.iter)[2])
    names, doctor, learn = [], NaNDoctor(), small(tmp_path)
    with quiet(learn): learn.fit(2, 1e-3, cbs=[doctor, Pixel()])
    assert (doctor.box, doctor.image) == ('data', names[0])
    doctor, learn = NaNDoctor(), small(tmp_path)
    learn.model.mask_head.register_full_backward_hook(lambda m, i, o: tuple(x * math.nan for x in i))
    with quiet(learn): learn.fit(1, 1e-3, cbs=doctor)
    assert 'the gradient' in doctor.finding and doctor.box == 'fpn', 'the first box that the sick gradient reaches'

@pytest.mark.parametrize('train, valid, guess, word', [
    ([1, .8, .6, .5], [1, .9, .7, .6], None, 'Still falling'),
    ([1, .5, .3, .2], [1, .6, .9, 1.2], None, 'by heart'),
    ([1, .5, .5, .5], [1, .5, .5, .5], None, 'Flat'),
    ([1, .4, .8, 1.5], [1, .5, .9, 1.5], None, 'too high'),
    ([.70, .69, .69, .70], [.7, .69, .7, .69], math.log(2), 'guessing'),
    ([1, .9, .9, .8], [80, 2, 1, .9], math.log(2), 'Far larger'),
    ([1, math.nan, 1, 1], [1, 1, 1, 1], None, 'NaNDoctor')])
def test_curves_are_read(train, valid, guess, word): assert word in read_curve(train, valid, guess)

def test_total_and_ap_are_read_together():
    assert 'believe AP' in read_total([.9, .6, .7], [.3, .6, .8])
    assert 'stop earlier' in read_total([.9, .6, .7], [.3, .8, .6])
    assert 'agree' in read_total([.9, .7, .6], [.3, math.nan, .8])


# ---- fastai as it is

def fastai_classes(code):
    "Names in the code that are classes or modules of fastai."
    names = {}
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and (node.module or '').split('.')[0] == 'fastai':
            for a in node.names:
                space = vars(everything) if a.name == '*' else {a.asname or a.name: getattr(__import__(node.module, fromlist=[a.name]), a.name, None)}
                names |= {k: v for k, v in space.items() if isinstance(v, type) and v.__module__.startswith('fastai')}
        if isinstance(node, ast.Import): names |= {(a.asname or a.name).split('.')[0]: None for a in node.names if a.name.split('.')[0] == 'fastai'}
    return set(names)

def bent(code, ours=('Diagram',)):
    "What the code does to fastai that it should not: private attributes and names, patches, assignments to its classes."
    classes, found = fastai_classes(code), []
    leftmost = lambda n: leftmost(n.value) if isinstance(n, ast.Attribute) else getattr(n, 'id', None)
    private = lambda name: name.startswith('_') and not (name.startswith('__') and name.endswith('__'))
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Attribute) and private(node.attr): found.append(f'private attribute {node.attr}')
        if isinstance(node, ast.ImportFrom) and (node.module or '').startswith('fastai'): found += [f'private name {a.name}' for a in node.names if private(a.name)]
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and any(re.search(r'\bpatch', ast.unparse(d)) for d in node.decorator_list): found.append(f'patch {node.name}')
        targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, (ast.AugAssign, ast.AnnAssign)) else []
        found += [f'assignment to {ast.unparse(t)}' for t in targets if isinstance(t, ast.Attribute) and leftmost(t) in classes]
        if isinstance(node, ast.Call) and getattr(node.func, 'id', getattr(node.func, 'attr', '')) in ('setattr', 'delattr', 'patch_to', 'patch_property', 'patch'): found.append(ast.unparse(node)[:60])
    return found

def test_a_bent_fastai_is_seen():
    head = 'from fastai.vision.all import *\nfrom fastai.learner import Learner as Lrn\n'
    for code in ('learn._split(b)', 'self._valid_mets', 'self.dl._types', 'Learner.fit = f', 'Lrn.fit = f', 'setattr(Learner, "fit", f)',
                 '@patch\ndef fit(self: Learner): pass', '@patch_to(Learner)\ndef fit(self): pass', 'from fastai.learner import _loop', 'Recorder.order += 1',
                 'import fastai.learner\nfastai.learner.Learner.fit = f'):
        assert bent(head + code), code
    assert not bent(head + 'learn.fit(1)\nself.learn.pred = 1\nself.__class__\nclass A(Callback): order = 3')

def code_of(path):
    cells = [''.join(c['source']) for c in json.loads(path.read_text(encoding='utf-8'))['cells'] if c['cell_type'] == 'code']
    return '\n'.join(re.sub(r'^(\s*)[%!].*', r'\1pass', c, flags=re.M) for c in cells if not c.startswith('%%'))

@pytest.mark.parametrize('path', sorted((root/'nbs').glob('2[0-4]*.ipynb')), ids=lambda p: p.name)
def test_no_private_attributes(path):
    assert not bent(code_of(path)), f'{path.name} bends fastai: {bent(code_of(path))}'

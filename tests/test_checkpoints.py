"Checkpoints of other programs: what is read, what is refused and how it is said, and values by hand. Small networks of the same names."
import argparse, collections, pathlib, pickle, time, zipfile
import json
import h5py
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torchvision.models.detection import maskrcnn_resnet50_fpn, maskrcnn_resnet50_fpn_v2

from fuzz import mutations, one_sentence, within
from maskrcnn_edu.checkpoints import (DIALECTS, Placeholder, convert, find_weights, SYSTEMS, WeightsError, as_frozen, folded, layers_of, load_weights, make_model, our_order, read_file,
                                      recognise, save_weights, shipped, translate)
from maskrcnn_edu.dialects.base import Names
from maskrcnn_edu.learner import predict_instances
from maskrcnn_edu.mask_rcnn import MaskRCNN

TINY = dict(n_classes=5, backbone=dict(layers=(1, 1, 1, 1), width=4, channels=8), head=dict(hidden=16, mask_channels=8))
systems = pytest.mark.parametrize('name', SYSTEMS)
small = dict(short_side=64, long_side=128, rpn=dict(n_pre_predict=50, n_post_predict=20), detection=dict(n_detections=5))


def checkpoint(name, blocks=(1, 1, 1, 1)):
    "A small network in a system's names, as PyTorch lays tensors out."
    system, g = SYSTEMS[name].names, torch.Generator().manual_seed(0)
    config = SYSTEMS[name].config.change(**TINY).change(backbone=dict(layers=blocks))
    narrow = {'rpn.head.conv.0.0.weight': torch.zeros(8, 1)}         # the RPN head has 8 channels too
    model = make_model(config, narrow, dict(name=SYSTEMS[name].name))
    shapes, out = {k: v.shape for k, v in model.state_dict().items()}, {}
    for layer, _, key, numbers in layers_of(blocks, system.layers):
        n_out, *rest = shapes[layer + '.weight']
        if system.pairs and key == 'rpn.head.cls_logits': n_out *= 2
        if system.background_last: n_out -= dict([('box_predictor.bbox_pred', 4), ('mask_predictor.mask_fcn_logits', 1)]).get(key, 0)
        if system.pairs and key == 'box_head.fc6': rest = [8, 7, 7]
        if system.pairs and key == 'box_head.fc7': rest = [16, 1, 1]
        theirs = system.layers[key].format(**numbers)
        out[theirs + system.conv[0]] = torch.randn(n_out, *rest, generator=g) * .1
        norm = system.layers.get(key + '_norm')
        if system.biased or not norm: out[theirs + system.conv[1]] = torch.randn(n_out, generator=g) * .1
        for i, end in enumerate(system.norm if norm else ()): out[norm.format(**numbers) + end] = torch.rand(n_out, generator=g) + (.5 if i in (0, 3) else 0)
    return out


def written(name, state, folder):
    "The same in the system's own container."
    arrays = {k: v.numpy() for k, v in state.items()}
    if name == 'matterport':
        with h5py.File(folder/'w.h5', 'w') as f:
            for k, v in arrays.items(): f[k] = v.transpose({4: (2, 3, 1, 0), 2: (1, 0), 1: (0,)}[v.ndim])
        return folder/'w.h5'
    if name in ('detectron', 'detectron2'):
        (folder/'w.pkl').write_bytes(pickle.dumps({'blobs' if name == 'detectron' else 'model': arrays, 'cfg': 'text'}, 2))
        return folder/'w.pkl'
    torch.save({'model': state, 'step': 1} if name == 'detectron_pytorch' else state, folder/'w.pth')
    return folder/'w.pth'


@systems
def test_every_system_is_recognised_and_predicts(name, tmp_path):
    state = checkpoint(name)
    file = written(name, state, tmp_path)
    assert recognise(read_file(file)) is SYSTEMS[name]
    model = MaskRCNN.from_checkpoint(file, **small)
    found = predict_instances(model, np.random.default_rng(0).integers(0, 255, (50, 70, 3)).astype(np.uint8))
    assert found.size == (50, 70) and np.isfinite(found.boxes).all()
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in translate(state, SYSTEMS[name]).items())


@systems
def test_each_missing_name_and_an_extra_one(name):
    state = checkpoint(name)
    for key in state:
        rest = {k: v for k, v in state.items() if k != key}
        with pytest.raises(WeightsError, match='is missing|is no tensor'): translate(rest, SYSTEMS[name], 'f')
    with pytest.raises(WeightsError, match='^f: one.more is no tensor'): translate(state | {'one.more': torch.zeros(1)}, SYSTEMS[name], 'f')


def test_deeper_networks_are_counted(tmp_path):
    for name in ('detectron', 'matterport'):
        model = MaskRCNN.from_checkpoint(written(name, checkpoint(name, (1, 2, 3, 2)), tmp_path))
        assert model.config.backbone.layers == (1, 2, 3, 2)


@systems
def test_what_real_files_hold_besides(name, tmp_path):
    more = {'detectron': {'lr': np.float32(.1), 'conv1_w_momentum': np.zeros(3), 'fc1000_w': np.zeros(2), 'res2_0_branch2a_b': np.zeros(4), 'conv1_b': np.zeros(4)},
            'detectron2': {'pixel_mean': np.zeros(3), 'proposal_generator.anchor_generator.cell_anchors.0': np.zeros((3, 4))}}.get(name, {})
    state = checkpoint(name) | {k: torch.tensor(v) for k, v in more.items()} | ({} if name in ('matterport', 'detectron') else {'x.num_batches_tracked': torch.tensor(3)})
    wrapped = {'module.' + k: v for k, v in state.items()} if name == 'detectron_pytorch' else state
    MaskRCNN.from_checkpoint(written(name, wrapped, tmp_path))


def test_pickles_of_both_numpys(tmp_path):
    state = {k: v.numpy() for k, v in checkpoint('detectron').items()}
    raw = pickle.dumps({'blobs': state}, 2)
    old = raw.replace(b'cnumpy._core.multiarray\n', b'cnumpy.core.multiarray\n')
    assert old != raw
    for i, data in enumerate((raw, old, pickle.dumps({'blobs': state}, 5))):
        (tmp_path/f'{i}.pkl').write_bytes(data)
        assert read_file(tmp_path/f'{i}.pkl').keys() == state.keys()


class Code:
    def __init__(self, path): self.path = path
    def __reduce__(self): return open, (str(self.path), 'w')


@pytest.mark.parametrize('write', [lambda x, f: f.write_bytes(pickle.dumps(x)), torch.save], ids=['pickle', 'torch'])
def test_a_pickle_that_runs_code_is_refused(write, tmp_path):
    write({'model': Code(tmp_path/'ran')}, tmp_path/'evil.pkl')
    with pytest.raises(WeightsError, match=r'evil\.pkl: .*(nothing of it was run|was not done)'): MaskRCNN.from_checkpoint(tmp_path/'evil.pkl')
    assert not (tmp_path/'ran').exists()


@systems
def test_a_file_that_was_cut(name, tmp_path):
    file = written(name, checkpoint(name), tmp_path)
    whole = file.read_bytes()
    for part in (len(whole) // 2, len(whole) - 100):
        file.write_bytes(whole[:part])
        with pytest.raises(WeightsError, match='cannot be read: it is cut off or damaged') as e: MaskRCNN.from_checkpoint(file)
        assert str(file) in str(e.value) and '\n' not in str(e.value)


def test_files_of_other_kinds(tmp_path):
    (tmp_path/'list.pkl').write_bytes(pickle.dumps([1, 2]))
    torch.save({'layer.weight': torch.zeros(2)}, tmp_path/'other.pth')
    torch.save({'epoch': 3}, tmp_path/'none.pth')
    torch.save(torch.zeros(3), tmp_path/'one.pth')
    (tmp_path/'folder').mkdir()
    with zipfile.ZipFile(tmp_path/'packed.zip', 'w') as z: z.writestr('model.pth', 'x')
    for name, text in dict(text='hello', html='  <!DOCTYPE html><html>', xml='<?xml version="1.0"?>', lfs='version https://git-lfs.github.com/spec/v1\noid', zero='', blank='\n\n', gz='\x1f').items():
        for end in ('.pth', '.h5', '.pkl', ''): (tmp_path/f'{name}{end}').write_text(text)
    (tmp_path/'gz').write_bytes(b'\x1f\x8b\x08\0')
    for name, message in [('text.pth', 'neither HDF5 nor a pickle'), ('list.pkl', 'no dictionary of tensors but a list'), ('other.pth', 'not a Mask R-CNN of a known system'), ('none.pth', 'a dictionary without any'),
            ('one.pth', 'no dictionary of tensors but a Tensor'), ('folder', 'this is a folder'), ('packed.zip', 'a zip with model.pth in it'), ('gz', 'packed with gzip'), ('xml.h5', 'web page'),
            *[(f'{n}{e}', m) for n, m in dict(html='web page', lfs='git lfs pull', zero='empty', blank='empty').items() for e in ('.pth', '.h5', '.pkl', '')]]:
        with pytest.raises(WeightsError, match=message) as e: MaskRCNN.from_checkpoint(tmp_path/name)
        one_sentence(e.value, name)
    with pytest.raises(FileNotFoundError, match='no such checkpoint'): MaskRCNN.from_checkpoint(tmp_path/'absent.pth')


# ---- as people save them ----

class Trainer:
    "Whatever a training program keeps beside its weights."
    def __init__(self): self.inside = dict(a=[1], path=pathlib.Path('x'))

def prefixed(state, word): return {word + k: v for k, v in state.items()}

HABITS = {
    'plain': lambda s: s,
    'reference': lambda s: {'model': s, 'optimizer': {'state': {0: {'exp_avg': torch.ones(3)}}, 'param_groups': []}, 'epoch': 3},
    'tutorial': lambda s: {'model_state_dict': s, 'epoch': 3, 'loss': .3},
    'net': lambda s: {'net': s}, 'weights, deeper': lambda s: {'a': {'b': {'weights': s}}},
    'lightning': lambda s: {'state_dict': prefixed(s, 'model.') | {'loss.weight': torch.ones(2)}, 'pytorch-lightning_version': '2.0'},
    'parallel': lambda s: {'model': prefixed(s, 'module.')}, 'compiled': lambda s: prefixed(s, '_orig_mod.'),
    'compiled in parallel in lightning': lambda s: {'state_dict': prefixed(s, 'net.module._orig_mod.')},
    'backbone in parallel': lambda s: {k.replace('backbone.', 'backbone.module.', 1): v for k, v in s.items()},
    'average besides': lambda s: {'ema': {k: v + 1 for k, v in s.items()}, 'model': s},
    'average alone': lambda s: {'model_ema': prefixed(s, 'module.') | {'n_averaged': torch.tensor(3)}},
    'arguments': lambda s: {'model': s, 'args': argparse.Namespace(lr=1, out=pathlib.Path('x'))},
    'numpy scalar': lambda s: {'model': s, 'best': np.float64(.3), 'n': np.int64(2), 'ap': np.float32(.1)},
    'numpy arrays': lambda s: {'model': {k: v.numpy() for k, v in s.items()}},
    'strange things': lambda s: {'trainer': Trainer(), 'kind': Trainer, 'path': pathlib.PurePosixPath('x'), 'model': s, 'n': collections.Counter('aab')},
    'parameters': lambda s: collections.OrderedDict((k, nn.Parameter(v) if v.is_floating_point() else v) for k, v in s.items()),
}

@pytest.fixture(scope='module')
def plain(): return checkpoint('torchvision')

@pytest.mark.parametrize('old', [False, True], ids=['zip', 'before 1.6'])
@pytest.mark.parametrize('habit', HABITS)
def test_habits(plain, habit, old, tmp_path):
    for name in ('w.pth', 'w.ckpt', 'w.bin', 'w'):
        torch.save(HABITS[habit](plain), tmp_path/name, _use_new_zipfile_serialization=not old)
        found = read_file(tmp_path/name)
        assert found.keys() == plain.keys() and all(torch.equal(v, plain[k]) for k, v in found.items())

@systems
def test_every_system_inside_of_something(name, tmp_path):
    state = checkpoint(name)
    torch.save({'epoch': 1, 'state_dict': prefixed(state, 'model.module.')}, tmp_path/'w.pth')
    found = read_file(tmp_path/'w.pth')
    assert found.keys() == state.keys() and recognise(found) is SYSTEMS[name]

def test_any_ending_and_kind_of_number(plain, tmp_path):
    want = MaskRCNN.from_checkpoint(written('torchvision', plain, tmp_path)).state_dict()
    for kind, tolerance in ((torch.float16, 2e-3), (torch.bfloat16, 1e-2), (torch.float64, 0)):
        cast = {k: v.to(kind) for k, v in plain.items()}
        torch.save(cast, tmp_path/'x.bin'), save_file(cast, tmp_path/'x.safetensors'), save_file(cast, tmp_path/'x')
        for name in ('x.bin', 'x.safetensors', 'x'):
            model = MaskRCNN.from_checkpoint(tmp_path/name)
            assert model.dialect == 'torchvision' and all(v.dtype == want[k].dtype and torch.allclose(v, want[k], rtol=tolerance, atol=tolerance) for k, v in model.state_dict().items())
    convert(tmp_path/'x', tmp_path/'ours.safetensors')
    with pytest.raises(WeightsError, match='maskrcnn-edu convert'): load_weights(tmp_path/'x.safetensors')
    with pytest.raises(WeightsError, match='maskrcnn-edu convert'): load_weights(tmp_path/'w.pth')
    (tmp_path/'ours.safetensors').rename(tmp_path/'ours')       # ours by its content, not by its name
    assert MaskRCNN.from_checkpoint(tmp_path/'ours').dialect == 'torchvision'

def test_whole_models_and_programs(tmp_path):
    model = nn.Sequential(nn.Linear(2, 2), nn.Conv2d(1, 1, 3))
    torch.save(model, tmp_path/'whole.pth'), torch.save({'model': model, 'epoch': 1}, tmp_path/'inside.pth')
    torch.save(model, tmp_path/'old.pth', _use_new_zipfile_serialization=False)
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), tmp_path/'script.pt')
    (tmp_path/'tensors.pkl').write_bytes(pickle.dumps({'a.weight': torch.zeros(2)}))
    for name, words in (('whole.pth', 'Sequential'), ('inside.pth', 'Sequential'), ('old.pth', 'asks for something'), ('script.pt', 'TorchScript'), ('tensors.pkl', 'torch')):
        with pytest.raises(WeightsError, match=f'{name}: .*{words}.*model.state_dict') as e: MaskRCNN.from_checkpoint(tmp_path/name)
        one_sentence(e.value, name)

def test_relatives(plain, tmp_path):
    faster = {k: v for k, v in plain.items() if 'mask' not in k}
    basic = {k: v for k, v in plain.items() if 'conv3' not in k and 'bn3' not in k}
    for state, words in ((faster, 'no layers for masks'), (basic, 'basic blocks')):
        with pytest.raises(WeightsError, match=words) as e: MaskRCNN.from_checkpoint(written('torchvision', state, tmp_path))
        one_sentence(e.value, 'w.pth')

def test_nothing_of_a_file_is_run(plain, tmp_path):
    "Sound tensors beside something that wants to be run: the tensors are read, and it is not run; modules of the system are refused"
    torch.save({'model': plain, 'more': Code(tmp_path/'ran')}, tmp_path/'w.pth')
    assert read_file(tmp_path/'w.pth').keys() == plain.keys() and not (tmp_path/'ran').exists()
    x = Placeholder(1, two=3)
    x.__setstate__(dict(a=1))
    assert not vars(x)
    raw = pickle.dumps({'model': {'a.weight': np.zeros(2, np.float32)}}, 2)
    (tmp_path/'os.pkl').write_bytes(raw.replace(b'cnumpy._core.multiarray\n_reconstruct', b'cposix\nsystem'))
    with pytest.raises(WeightsError, match='posix.system; nothing of it was run'): read_file(tmp_path/'os.pkl')

def test_a_pickle_that_wants_all_memory(tmp_path):
    "A mutated number of the memo: Python's reader in C makes room for 16 GB and takes a minute"
    (tmp_path/'memo.pkl').write_bytes(b'\x80\x02}r\xff\xff\xff\x3f.')
    start = time.time()
    with pytest.raises(WeightsError, match='memo.pkl'): read_file(tmp_path/'memo.pkl')
    assert time.time() - start < 2

def test_convert_keeps_the_checkpoint_and_the_names(plain, tmp_path):
    file = written('torchvision', plain, tmp_path)
    before = file.read_bytes()
    with pytest.raises(WeightsError, match='is the checkpoint itself'): convert(file, tmp_path/'.'/file.name)
    assert file.read_bytes() == before
    convert(shipped('shapes'), tmp_path/'half.safetensors', half=True)
    assert load_weights(tmp_path/'half.safetensors')[1] == load_weights('shapes')[1]

def test_the_folder_of_a_run(tmp_path):
    (tmp_path/'weights.safetensors').write_bytes(shipped('shapes').read_bytes())
    assert find_weights(tmp_path) == tmp_path/'weights.safetensors'
    (tmp_path/'empty').mkdir()
    with pytest.raises(FileNotFoundError, match='no such weight file'): find_weights(tmp_path/'empty')

def test_headers_that_contradict_themselves(tmp_path):
    for change in (dict(classes=json.dumps(['background', 'a'])), dict(classes='7'), dict(classes='{'), dict(config='[]'), dict(config='7'), dict(dialect='7')):
        header = dict(format='maskrcnn_edu', config=json.dumps(dict(n_classes=3, backbone={})), classes=json.dumps(['background', 'a', 'b'])) | change
        save_file({'x': torch.zeros(1)}, tmp_path/'w.safetensors', header)
        with pytest.raises(WeightsError) as e: load_weights(tmp_path/'w.safetensors')
        one_sentence(e.value, 'w.safetensors')


# ---- bytes at random ----

CONTAINERS = {'zip': 'torchvision', 'legacy': 'torchvision', 'safetensors': 'torchvision', 'ours': 'torchvision', 'pickle': 'detectron', 'zoo': 'detectron2', 'keras': 'matterport'}

@pytest.mark.parametrize('container', CONTAINERS)
def test_bytes_at_random(container, tmp_path):
    name = CONTAINERS[container]
    state, file = checkpoint(name), tmp_path/'x.safetensors'
    if container == 'legacy': torch.save(state, file, _use_new_zipfile_serialization=False)
    elif container == 'safetensors': save_file(state, file)
    elif container == 'ours': convert(written(name, state, tmp_path), file)
    else: file = written(name, state, tmp_path)
    said = 0
    for data in mutations(file.read_bytes(), 100):
        file.write_bytes(data)
        try:
            with within(10): MaskRCNN.from_checkpoint(file)
        except (WeightsError, FileNotFoundError) as e: one_sentence(e, file.name); said += 1
    assert said > 30


def test_a_tensor_of_another_shape(tmp_path):
    state = checkpoint('torchvision')
    state['roi_heads.box_head.fc7.weight'] = torch.zeros(3, 3)
    with pytest.raises(WeightsError, match='another shape.*fc7'): MaskRCNN.from_checkpoint(written('torchvision', state, tmp_path))


@systems
def test_other_classes(name, tmp_path, capsys):
    file = written(name, checkpoint(name), tmp_path)
    whole, swapped = MaskRCNN.from_checkpoint(file), MaskRCNN.from_checkpoint(file, n_classes=3)
    said = capsys.readouterr().out
    left_out = {k for k, v in swapped.state_dict().items() if v.shape != whole.state_dict()[k].shape}
    assert left_out and all(k in said for k in left_out) and said.count('\n') == 1
    assert all(torch.equal(v, whole.state_dict()[k]) for k, v in swapped.state_dict().items() if k not in left_out)


@systems
def test_ours_keeps_the_rules(name, tmp_path):
    model = MaskRCNN.from_checkpoint(written(name, checkpoint(name), tmp_path), **small)
    names = ['background', 'a', 'b', 'c', 'd']
    again, classes = load_weights(save_weights(model, tmp_path/'ours.safetensors', names))
    assert again.config == model.config and classes == names
    picture = np.random.default_rng(1).integers(0, 255, (60, 50, 3)).astype(np.uint8)
    a, b = predict_instances(model, picture), predict_instances(again, picture)
    assert np.array_equal(a.boxes, b.boxes) and np.array_equal(a.scores, b.scores)
    assert MaskRCNN.from_checkpoint(tmp_path/'ours.safetensors').config == model.config


def test_the_command_converts(tmp_path):
    from typer.testing import CliRunner
    from maskrcnn_edu.train import app
    file, ours = written('detectron2', checkpoint('detectron2'), tmp_path), tmp_path/'ours.safetensors'
    done = CliRunner().invoke(app, ['convert', str(file), '--out', str(ours)])
    assert done.exit_code == 0 and '5 classes' in done.output, done.output
    theirs = MaskRCNN.from_checkpoint(file)
    assert all(torch.equal(v, theirs.state_dict()[k]) for k, v in load_weights(ours)[0].state_dict().items())
    (tmp_path/'cut.pkl').write_bytes(file.read_bytes()[:500])
    refused = CliRunner().invoke(app, ['convert', str(tmp_path/'cut.pkl'), '--out', str(tmp_path/'none.safetensors')])
    assert refused.exit_code == 1 and 'cut.pkl' in refused.output and not (tmp_path/'none.safetensors').exists()


# ---- by hand ----

def bare(**kwargs): return Names('sign', {}, **kwargs)

def layers(**rows):
    "Weights whose rows are numbered, so that an order can be read off."
    names = dict(conv1='backbone.body.conv1', logits='rpn.head.cls_logits', deltas='rpn.head.bbox_pred', score='box_predictor.cls_score',
                 box='box_predictor.bbox_pred', mask='mask_predictor.mask_fcn_logits')
    return {f'{names[k]}.{kind}': torch.arange(n, dtype=torch.float32) if kind == 'bias' else torch.arange(n, dtype=torch.float32)[:, None] for k, n in rows.items() for kind in ('weight', 'bias')}


def test_two_logits_become_one():
    out = our_order({'rpn.head.cls_logits.weight': torch.tensor([[1.], [5.], [2.], [9.]]), 'rpn.head.cls_logits.bias': torch.tensor([0., 1., 5., 3.])}, bare(pairs=True))
    assert out['rpn.head.cls_logits.weight'].tolist() == [[4], [7]] and out['rpn.head.cls_logits.bias'].tolist() == [1, -2]


def test_y_before_x_is_turned():
    out = our_order(layers(deltas=8, box=8), bare(yx=True))
    for key in ('rpn.head.bbox_pred', 'box_predictor.bbox_pred'): assert out[key + '.bias'].tolist() == [1, 0, 3, 2, 5, 4, 7, 6]


def test_background_comes_first():
    out = our_order(layers(score=4, box=12, mask=3), bare(background_last=True))
    assert out['box_predictor.cls_score.bias'].tolist() == [3, 0, 1, 2]
    assert out['box_predictor.bbox_pred.bias'].tolist() == [0] * 4 + list(range(12)) and out['mask_predictor.mask_fcn_logits.weight'][:, 0].tolist() == [0, 0, 1, 2]


def test_blue_first_is_turned():
    weight = torch.arange(3.).view(1, 3, 1, 1)
    assert our_order({'backbone.body.conv1.weight': weight}, bare(bgr=True))['backbone.body.conv1.weight'].flatten().tolist() == [2, 1, 0]


def test_norms_are_taken_in():
    torch.manual_seed(0)
    conv, norm, x = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, eps=1e-3).eval(), torch.randn(2, 3, 8, 8)
    for p in (norm.weight, norm.bias, norm.running_mean, norm.running_var): nn.init.uniform_(p, .5, 1.5)
    numbers = norm.weight, norm.bias, norm.running_mean, norm.running_var
    weight, bias = folded(conv.weight, conv.bias, numbers, 1e-3)
    torch.testing.assert_close(nn.functional.conv2d(x, weight, bias), norm(conv(x)))
    ours = as_frozen(conv.bias, numbers, 1e-3)
    y = nn.functional.conv2d(x, conv.weight)
    scale = (ours['weight'] * (ours['running_var'] + 1e-5).rsqrt()).view(-1, 1, 1)
    torch.testing.assert_close((y - ours['running_mean'].view(-1, 1, 1)) * scale + ours['bias'].view(-1, 1, 1), norm(conv(x)))


def test_keras_axes(tmp_path):
    "Two of (h, w, in, out), told apart by their lengths."
    with h5py.File(tmp_path/'w.h5', 'w') as f:
        f['conv/conv/kernel:0'], f['dense/dense/kernel:0'], f['deconv/deconv/kernel:0'] = np.zeros((3, 5, 7, 11)), np.arange(6.).reshape(2, 3), np.zeros((2, 2, 4, 6))
    found = read_file(tmp_path/'w.h5')
    assert found['conv/conv/kernel:0'].shape == (11, 7, 3, 5) and found['dense/dense/kernel:0'].tolist() == [[0, 3], [1, 4], [2, 5]]
    assert found['deconv/deconv/kernel:0'].shape == (6, 4, 2, 2)      # stored (h, w, out, in): PyTorch wants (in, out, h, w)


# ---- torchvision itself ----

def random_torchvision(build, seed):
    "A network of random weights that are sure of something."
    torch.manual_seed(seed)
    model = build(weights=None, weights_backbone=None, min_size=160, max_size=224, box_score_thresh=.2, box_detections_per_img=20, rpn_pre_nms_top_n_test=300, rpn_post_nms_top_n_test=100).eval()
    with torch.no_grad():
        for m in model.modules():
            if hasattr(m, 'running_var'):
                for t, (low, high) in ((m.weight, (.8, 1.2)), (m.bias, (-.1, .1)), (m.running_mean, (-.1, .1)), (m.running_var, (.8, 1.2))): nn.init.uniform_(t, low, high)
        model.roi_heads.box_predictor.cls_score.weight *= 20
        model.roi_heads.box_predictor.bbox_pred.weight *= 3
    return model


@pytest.mark.parametrize('build', [maskrcnn_resnet50_fpn, maskrcnn_resnet50_fpn_v2], ids=['v1', 'v2'])
def test_torchvision_finds_the_same(build, tmp_path):
    theirs = random_torchvision(build, 3)
    torch.save(theirs.state_dict(), tmp_path/'w.pth')
    ours = MaskRCNN.from_checkpoint(tmp_path/'w.pth', short_side=160, long_side=224, detection=dict(min_score=.2, n_detections=20), rpn=dict(n_pre_predict=300, n_post_predict=100))
    (tmp_path/'w.pth').unlink()
    total = 0
    for i, (h, w) in enumerate([(120, 150), (200, 90), (161, 333)]):
        picture = np.random.default_rng(i).integers(0, 255, (h, w, 3)).astype(np.uint8)
        with torch.no_grad(): want = theirs([torch.tensor(picture).permute(2, 0, 1) / 255])[0]
        got = predict_instances(ours, picture)
        total += len(got)
        order = lambda labels, boxes: np.lexsort((*np.asarray(boxes).round(1).T, np.asarray(labels)))     # scores may be nearly equal
        a, b = order(got.labels, got.boxes), order(want['labels'], want['boxes'])
        assert got.labels[a].tolist() == want['labels'][b].tolist()
        np.testing.assert_allclose(got.boxes[a], want['boxes'][b].numpy(), atol=1e-2)
        np.testing.assert_allclose(got.scores[a], want['scores'][b].numpy(), atol=1e-4)
        differ = (got.masks()[a].astype(bool) != (want['masks'][b, 0] > .5).numpy()).sum()
        assert differ <= 1e-4 * want['masks'].numel()
    print(total, 'detections')
    assert total > 5


# ---- learning on from other weights ----

def test_the_command_starts_from_a_checkpoint(tmp_path, capsys):
    "The network and its rules are the file's, the numbers of boxes are the recipe's, and the last layers begin anew."
    from typer.testing import CliRunner
    from maskrcnn_edu.data import CLASSES, make_shapes, write_coco
    from maskrcnn_edu.train import app
    write_coco(make_shapes(5, seed=1), tmp_path/'set', 'x', CLASSES)
    (tmp_path/'set/annotations/x.json').rename(tmp_path/'set/annotations.json')
    file = written('detectron2', checkpoint('detectron2'), tmp_path)
    args = ['train', 'coco', '--data', str(tmp_path/'set'), '--epochs', '1', '--device', 'cpu', '--out', str(tmp_path/'run')]
    done = CliRunner().invoke(app, [*args, '--start', str(file)])
    assert done.exit_code == 0 and '4 classes in place of 5, so these are reinitialised: box_predictor.cls_score.weight' in done.output, (done.output, done.exception)
    model, names = load_weights(tmp_path/'run/weights.safetensors')
    assert names == CLASSES and model.dialect == 'detectron2' and not hasattr(model, 'door')      # pictures go in as they are
    assert model.config.backbone.layers == (1, 1, 1, 1) and model.config.head.hidden == 16 and model.config.head.n_rois == 32
    both = CliRunner().invoke(app, [*args, '--start', str(file), '--pretrained'])
    assert both.exit_code == 1 and 'give one' in both.output
    nowhere = CliRunner().invoke(app, [*args, '--start', str(tmp_path/'none.pth')])
    assert nowhere.exit_code == 1 and 'none.pth: no such checkpoint' in nowhere.output
    assert MaskRCNN.from_checkpoint('shapes', classes=CLASSES).config == load_weights('shapes')[0].config


def test_as_many_classes_with_other_names(tmp_path, capsys):
    names = ['background', 'cat', 'dog', 'horse']
    kept, anew = MaskRCNN.from_checkpoint('shapes'), MaskRCNN.from_checkpoint('shapes', classes=names)
    assert 'reinitialised' in capsys.readouterr().out
    same = {k for k, v in kept.state_dict().items() if torch.equal(v, anew.state_dict()[k])}
    assert {k.rsplit('.', 1)[0] for k in kept.state_dict().keys() - same} == {'box_predictor.cls_score', 'box_predictor.bbox_pred', 'mask_predictor.mask_fcn_logits'}


@systems
def test_without_a_place(name, tmp_path):
    "In fine-tuning pictures go in as they are: finite losses and gradients, and boxes inside the picture."
    torch.manual_seed(0)
    model = MaskRCNN.from_checkpoint(written(name, checkpoint(name), tmp_path), short_side=0, detection=dict(n_detections=5, min_score=0.),
                                     rpn=dict(n_pre_predict=50, n_post_predict=20, n_pre=50, n_post=20), head=dict(n_rois=8, n_masks=4))
    images, boxes, masks = torch.rand(2, 3, 64, 64), torch.tensor([[[4., 4., 40., 50.]]] * 2), torch.zeros(2, 1, 64, 64)
    masks[:, :, 4:50, 4:40] = 1
    losses = model.train()(images, boxes, torch.ones(2, 1).long(), masks)
    sum(losses.values()).backward()
    assert all(v.isfinite() for v in losses.values()) and all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    found = model.eval().predict(images)
    assert (found.labels > 0).any() and found.boxes.min() >= 0 and found.boxes.max() <= 64 + 1e-3

"Other programs' checkpoints in our model: at every stage the numbers that those programs recorded. `pytest tests/test_oracles.py --oracles DIR`."
import importlib.util, json
from dataclasses import replace
from functools import cached_property, lru_cache
from pathlib import Path
import numpy as np
import pytest
import torch
from torch import nn

from maskrcnn_edu.boxes import box_iou, denormalise, normalise
from maskrcnn_edu.box_loss import box_loss
from maskrcnn_edu.checkpoints import SYSTEMS, WeightsError, read_file, translate
from maskrcnn_edu.learner import placed, predict_instances
from maskrcnn_edu.mask_loss import mask_loss
from maskrcnn_edu.mask_rcnn import MaskRCNN, Place
from maskrcnn_edu.nms import suppress
from maskrcnn_edu.roi_align import roi_level
from maskrcnn_edu.rpn import RPNOutput

STAGES = 1e-4       # of an array's largest magnitude
GRADIENTS = 1e-3


def recipe(folder):
    spec = importlib.util.spec_from_file_location('make_weights', folder/'make_weights.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def numbers(system, c):
    "What the recording's configuration has otherwise than its makers published."
    if system == 'detectron2':
        heads, size = c['ROI_HEADS'], c['INPUT']
        return dict(short_side=size['MIN_SIZE_TEST'], long_side=size['MAX_SIZE_TEST'], min_score=heads['SCORE_THRESH_TEST'], nms_iou=heads['NMS_THRESH_TEST'],
                    rpn_nms_iou=c['RPN']['NMS_THRESH'], n_pre_predict=c['RPN']['PRE_NMS_TOPK_TEST'], n_post_predict=c['RPN']['POST_NMS_TOPK_TEST'],
                    n_detections=c['TEST']['DETECTIONS_PER_IMAGE'])
    if system.startswith('detectron'):
        t = c['TEST']
        return dict(short_side=t['SCALE'], long_side=t['MAX_SIZE'], min_score=t['SCORE_THRESH'], nms_iou=t['NMS'], rpn_nms_iou=t['RPN_NMS_THRESH'],
                    n_pre_predict=t['RPN_PRE_NMS_TOP_N'], n_post_predict=t['RPN_POST_NMS_TOP_N'], n_detections=t['DETECTIONS_PER_IM'])
    return dict(short_side=c['IMAGE_MIN_DIM'], long_side=c['IMAGE_MAX_DIM'], min_score=c['DETECTION_MIN_CONFIDENCE'], nms_iou=c['DETECTION_NMS_THRESHOLD'],
                rpn_nms_iou=c['RPN_NMS_THRESHOLD'], n_post_predict=c['POST_NMS_ROIS_INFERENCE'], n_detections=c['DETECTION_MAX_INSTANCES'])


class Case:
    "A system's checkpoint in our model, and its recording."
    def __init__(self, folder, system, scratch):
        self.name, self.system = system, SYSTEMS[system]
        self.inventory, self.golden = json.loads((folder/f'{system}.json').read_text()), np.load(folder/f'{system}.npz')
        self.info = json.loads(str(self.golden['info']))
        make, kind = recipe(folder), self.inventory['container']['kind']
        file = scratch/self.inventory['container']['file'].replace('*', '')
        weights = make.make(self.inventory, self.info['seed'])
        assert make.digest(weights) == self.info['weights_sha256'], 'the recipe for the weights was not followed'
        make.WRITERS[kind](self.inventory, weights, file)
        try:
            self.model = MaskRCNN.from_checkpoint(file, **numbers(system, self.info['config']))
            self.state = read_file(file)
        finally: file.unlink()
        self.v = self.model.config.conventions
        self.xyxy = [1, 0, 3, 2] if self.system.yx else [0, 1, 2, 3]
        self.errors = {}

    def __getitem__(self, name): return torch.tensor(self.golden[name])
    def __contains__(self, name): return name in self.golden.files
    def boxes(self, name): return self[name].float()[..., self.xyxy]

    def part(self, name, ours):
        "Of our array, what was recorded."
        strides = self.info.get('subsets', {}).get(name, {}).get('strides')
        return ours[tuple(slice(None, None, s) for s in strides)] if strides else ours

    def close(self, name, ours, tolerance=STAGES, theirs=None):
        theirs = self[name] if theirs is None else theirs
        ours = self.part(name, ours)
        assert ours.shape == theirs.shape, f'{name}: {tuple(ours.shape)}, recorded {tuple(theirs.shape)}'
        size = np.abs(self.golden[name + '__stat'][2:]).max() if name + '__stat' in self else theirs.abs().max().item()
        error = (ours.double() - theirs.double()).abs().max().item() / max(size, 1e-12)
        self.errors[name] = max(error, self.errors.get(name, 0))
        print(f'{self.name} {name} {error:.1e}')
        assert error <= tolerance, f'{name}: off by {error:.1e} of its largest magnitude'

    @cached_property
    def input(self): return placed(self.golden['image'], self.model)

    @cached_property
    def maps(self):
        "C1 to C5, P2 to P6."
        body, c1 = self.model.backbone.body, []
        hooks = [body.maxpool.register_forward_hook(lambda m, args, out: c1.append(out)), body.register_forward_hook(lambda m, args, out: c1.extend(out))]
        with torch.no_grad(): pyramid = self.model.features(self.input[0])
        for h in hooks: h.remove()
        return c1, pyramid

    @property
    def size(self): return tuple(self.input[0].shape[-2:])

    @cached_property
    def rpn(self):
        with torch.no_grad(): return self.model.rpn(self.maps[1], self.size)

    def second_stage(self, boxes):
        "Recorded rois (N, 4) as our second stage reads them: (1, N, 4)."
        if self.name == 'multimodal': boxes = boxes * torch.tensor([self.size[1], self.size[0]] * 2)
        if self.v.last_pixel: boxes = boxes + torch.tensor([0., 0., 1., 1.]) * self.input[1].pixel
        return boxes[None]

    def last_first(self, classes): return (classes + 1) % self.model.config.n_classes if self.system.background_last else classes
    def logits(self, x): return x.roll(-1, -1) if self.system.background_last else x
    def per_class(self, x): return x[:, 1:] if self.system.background_last else x
    def heads(self, name):
        rois = self.second_stage(self.boxes(name))
        with torch.no_grad():
            logits, deltas = self.model.box_branch(self.maps[1], rois, torch.ones(rois.shape[:2], dtype=torch.bool), self.size, self.input[1])
        return self.logits(logits[0]), self.per_class(deltas[0])[..., self.xyxy]


def pytest_generate_tests(metafunc):
    if 'case' not in metafunc.fixturenames: return
    folder = Path(metafunc.config.getoption('oracles'))
    found = [s for s in SYSTEMS if (folder/f'{s}.npz').is_file() and (folder/f'{s}.json').is_file()]
    absent = pytest.param(None, marks=pytest.mark.skip(reason=f'no recordings in {folder}; give their folder with --oracles'))
    metafunc.parametrize('case', [pytest.param(s, marks=pytest.mark.xdist_group(s)) for s in found] or [absent], indirect=True, scope='session')


@pytest.fixture(scope='session')
def case(request, tmp_path_factory):
    torch.manual_seed(0)
    return Case(Path(request.config.getoption('oracles')), request.param, tmp_path_factory.mktemp(request.param))


def test_every_entry_of_the_inventory_is_used_once(case):
    assert sorted(case.state) == sorted(e['key'] for e in case.inventory['entries'])
    ours = translate(case.state, case.system)
    assert ours.keys() == case.model.state_dict().keys()
    assert all(ours[k].shape == v.shape for k, v in case.model.state_dict().items())


def test_a_missing_and_an_extra_entry_are_named(case):
    some = sorted(k for k in case.state if k != case.system.sign)[::40]
    for key in some:
        with pytest.raises(WeightsError, match='is missing'): translate({k: v for k, v in case.state.items() if k != key}, case.system)
    with pytest.raises(WeightsError, match='^f: extra.weight is no tensor'): translate(case.state | {'extra.weight': torch.zeros(1)}, case.system, 'f')


def test_input(case):
    c = case.model.config
    images, place = case.input
    x = ((images - case.model.mean) / case.model.std)[0]
    if 'pre_molded' in case:
        case.close('pre_molded', x.permute(1, 2, 0))
        assert place.window[0][case.xyxy].tolist() == case['pre_window'].tolist()
        images, place = placed(case.golden['pre2_image'], case.model)
        case.close('pre2_molded', ((images - case.model.mean) / case.model.std)[0].permute(1, 2, 0))
        assert place.window[0][case.xyxy].tolist() == case['pre2_window'].tolist() and abs(place.pixel.item() - float(case['pre2_scale'])) < 1e-6
    else:
        case.close('pre_input', x.flip(0))
        if 'pre_resized_shape' in case: assert place.window[0, [3, 2]].tolist() == case['pre_resized_shape'].tolist()
        if 'pre_im_info' in case: assert np.allclose([*case.size, place.pixel.item()], case.golden['pre_im_info'][0])


def test_features(case):
    for i, x in enumerate(case.maps[0]): case.close(f'feat_C{i + 1}', x[0])
    for i, x in enumerate(case.maps[1]): case.close(f'feat_P{i + 2}', x[0])


def test_anchors(case):
    anchors = case.rpn.anchors
    recorded = case.boxes('anchors') + torch.tensor([0, 0, 1, 1]) * case.v.last_pixel
    assert (anchors - recorded).abs().max() <= 1e-4 and list(case.rpn.level_sizes) == case['rpn_level_counts'].tolist()
    if 'anchors_norm' in case: assert (normalise(anchors, *case.size) - case.boxes('anchors_norm')).abs().max() <= 1e-6


def test_rpn(case):
    logits = case['rpn_logits']
    case.close('rpn_logits', case.rpn.objectness[0], theirs=logits if logits.ndim == 1 else logits[:, 1] - logits[:, 0])
    if 'rpn_probs' in case: case.close('rpn_probs', torch.stack([1 - case.rpn.objectness[0].sigmoid(), case.rpn.objectness[0].sigmoid()], 1))
    case.close('rpn_deltas', case.rpn.deltas[0][:, case.xyxy])


def test_proposals(case):
    logits = case['rpn_logits']
    fed = case.rpn._replace(objectness=(logits if logits.ndim == 1 else logits[:, 1] - logits[:, 0])[None], deltas=case['rpn_deltas'][None][..., case.xyxy])
    c = case.model.config
    p = case.model.propose(fed, c.n_pre_predict, c.n_post_predict, case.input[1])
    recorded, unit = case.second_stage(case.boxes('proposals'))[0], 1 / case.size[0] if case.v.normalised else 1
    found = (torch.cdist(recorded, p.boxes[0][p.valid[0]], p=torch.inf).amin(1) <= 1e-2 * unit).float().mean().item()
    print(f'{case.name} proposals {found:.1%}, in place {((recorded - p.boxes[0][:len(recorded)]).abs().amax(1) <= 1e-2 * unit).float().mean():.1%}')
    assert found >= .99 and p.valid.sum() == len(recorded)


def test_roi_align_alone(case):
    maps, c = [case[f'roialign_map_P{i}'][None] for i in range(2, 6)], case.model.config
    size, boxes = tuple(4 * n for n in maps[0].shape[-2:]), case.boxes('roialign_boxes')[None]
    if case.name == 'multimodal': boxes = boxes * torch.tensor([size[1], size[0]] * 2)
    for bins in (7, 14): case.close(f'roialign_out{bins}', case.model.pool(maps, boxes, bins, size, c.sampling, c.aligned, c.canonical_size, None)[0], 1e-5)
    if 'roialign_level' in case:
        rule = {k: x for k, x in case.model.pool.keywords.items() if k != 'normalised'}
        assert torch.equal(roi_level(boxes[0], **rule) + 2, case['roialign_level'].long())


def test_nms_alone(case):
    boxes = case.boxes('nms_boxes') + torch.tensor([0, 0, 1, 1]) * case.v.last_pixel
    for name in [k for k in case.golden.files if k.startswith('nms_keep_')]:
        keep = suppress(boxes, case['nms_scores'], int(name[-2:]) / 10, case.v.nms_plus, case.v.nms_equal).nonzero()[:, 0]
        recorded = case[name].long()
        assert torch.equal(keep, recorded.sort().values), name
        if not case.v.last_pixel: assert torch.equal(keep[case['nms_scores'][keep].argsort(descending=True)], recorded), name


def test_heads(case):
    logits, deltas = case.heads('head_rois')
    case.close('head_logits', logits)
    case.close('head_probs', logits.softmax(-1))
    case.close('head_deltas', deltas)


def test_heads_on_all_proposals(case):
    logits, deltas = case.heads('proposals')
    case.close('headall_logits', logits)
    case.close('headall_deltas', deltas)
    score, best = logits.softmax(-1).max(1)
    case.close('headall_score', score)
    assert (best == case['headall_class']).float().mean() >= .999


def test_masks(case):
    rois = case.second_stage(case.boxes('mask_rois'))
    with torch.no_grad(): logits = case.model.mask_branch(case.maps[1], rois, torch.ones(rois.shape[:2], dtype=torch.bool), case.size, case.input[1])[0]
    name = 'mask_logits' if 'mask_logits' in case else 'mask_probs'
    case.close(name, case.per_class(logits if name == 'mask_logits' else logits.sigmoid()))


def pair_up(case, name, boxes, labels, scores, recorded, classes, their_scores, unit=.5):
    "Index of our detection for each recorded one: the same class, nearly the same score and box; one to one."
    apart = torch.cdist(recorded.double(), boxes.double(), p=torch.inf)
    fits = (classes[:, None] == labels) & ((their_scores[:, None] - scores).abs() <= 1e-3) & (apart <= unit)
    pairs = []
    for i in range(len(recorded)):
        free = [j for j in fits[i].nonzero()[:, 0].tolist() if j not in pairs]
        assert free, f'{name}: recorded detection {i} was not found again'
        pairs.append(min(free, key=lambda j: apart[i, j]))
    assert len(pairs) == len(labels), f'{name}: {len(labels)} found, {len(pairs)} recorded'
    index = torch.tensor(pairs, dtype=torch.int64)
    print(f'{case.name} {name}: {len(pairs)}, boxes {apart[torch.arange(len(pairs)), index].max():.1e} pixels, scores {(scores[index] - their_scores).abs().max():.1e}')
    return index


def test_detections(case):
    with torch.no_grad(): found = case.model.predict(*case.input)
    filled = found.labels[0] > 0
    boxes, labels, scores, masks = (t[0][filled] for t in found)
    if 'det_raw' in case:
        raw = case['det_raw']
        recorded, classes, their_scores = raw[:, case.xyxy], raw[:, 4].long(), raw[:, 5]
        if case.v.normalised: recorded = denormalise(recorded, *case.size)
    elif 'det_raw_boxes' in case: recorded, classes, their_scores = case['det_raw_boxes'], case.last_first(case['det_raw_classes']), case['det_raw_scores']
    else:
        recorded, classes, their_scores = (case['det_boxes'] + torch.tensor([0, 0, 1, 1])) * case.input[1].pixel, case['det_class_ids'], case['det_scores']
    index = pair_up(case, 'det_raw', boxes, labels, scores, recorded, classes, their_scores)
    case.close('det_mask28', masks[index], 1e-3)


def test_objects_in_the_picture(case):
    found = predict_instances(case.model, case.golden['image'])
    recorded = case.boxes('det_boxes') + torch.tensor([0, 0, 1, 1]) * case.v.last_pixel
    index = pair_up(case, 'det', torch.tensor(found.boxes), torch.tensor(found.labels), torch.tensor(found.scores), recorded,
                    case.last_first(case['det_class_ids'].long()), case['det_scores'])
    shape = case.golden['det_masks_shape']
    theirs = np.unpackbits(case.golden['det_masks_packed'], axis=-1)[..., :shape[-1]].astype(bool)
    if tuple(theirs.shape) != tuple(shape): theirs = theirs.reshape(shape)
    ours = found.masks()[index.numpy()].astype(bool)
    union = (ours | theirs).sum((1, 2))
    iou = np.where(union, (ours & theirs).sum((1, 2)) / np.maximum(union, 1), 1)
    print(f'{case.name} masks: least IoU {iou.min():.4f}, pixels {(ours != theirs).sum()}')
    assert iou.min() >= .98

"Other programs' checkpoints in our model: at every stage the numbers that those programs recorded. `pytest tests/test_oracles.py --oracles DIR`."
import importlib.util, json
from contextlib import contextmanager
from copy import deepcopy
from functools import cached_property, partial
from pathlib import Path
import numpy as np
import pytest
import torch
from torch import nn

from pycocotools import mask as coco_mask

from maskrcnn_edu.boxes import full_frame
from maskrcnn_edu.checkpoints import SYSTEMS, WeightsError, read_file, translate
from maskrcnn_edu.dialects import detectron, detectron2, matterport
from maskrcnn_edu.dialects.base import shift_far_corner
from maskrcnn_edu.head_targets import HeadTargets
from maskrcnn_edu.learner import predict_instances
from maskrcnn_edu.mask_rcnn import MaskRCNN
from maskrcnn_edu.nms import nms_keep
from maskrcnn_edu.rpn_targets import RPNTargets

STAGES = 1e-4       # of an array's largest magnitude
GRADIENTS = 1e-3


shared = Path(__file__).resolve().parent.parent.parent/'shared/oracles'


def beside(recording, name):
    "A file that belongs to a recording: in its folder, or where ours are."
    return recording.parent/name if (recording.parent/name).is_file() else shared/name


def recipe(file):
    spec = importlib.util.spec_from_file_location('make_weights', file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def numbers(system, c):
    "What the recording's configuration has otherwise than its makers published."
    if system == 'detectron2':
        heads, rpn, size = c['ROI_HEADS'], c['RPN'], c['INPUT']
        return dict(short_side=size['MIN_SIZE_TEST'], long_side=size['MAX_SIZE_TEST'],
                    rpn=dict(nms_iou=rpn['NMS_THRESH'], n_pre_predict=rpn['PRE_NMS_TOPK_TEST'], n_post_predict=rpn['POST_NMS_TOPK_TEST']),
                    detection=dict(min_score=heads['SCORE_THRESH_TEST'], nms_iou=heads['NMS_THRESH_TEST'], n_detections=c['TEST']['DETECTIONS_PER_IMAGE']))
    if system.startswith('detectron'):
        t = c['TEST']
        return dict(short_side=t['SCALE'], long_side=t['MAX_SIZE'],
                    rpn=dict(nms_iou=t['RPN_NMS_THRESH'], n_pre_predict=t['RPN_PRE_NMS_TOP_N'], n_post_predict=t['RPN_POST_NMS_TOP_N']),
                    detection=dict(min_score=t['SCORE_THRESH'], nms_iou=t['NMS'], n_detections=t['DETECTIONS_PER_IM']))
    return dict(short_side=c['IMAGE_MIN_DIM'], long_side=c['IMAGE_MAX_DIM'],
                rpn=dict(sizes=tuple((s,) for s in c['RPN_ANCHOR_SCALES']), nms_iou=c['RPN_NMS_THRESHOLD'], n_post_predict=c['POST_NMS_ROIS_INFERENCE']),
                detection=dict(min_score=c['DETECTION_MIN_CONFIDENCE'], nms_iou=c['DETECTION_NMS_THRESHOLD'], n_detections=c['DETECTION_MAX_INSTANCES']))


def within(rois, boxes):
    "Rois (M, 4) as parts of boxes (M, 4): for masks that are kept as small pictures of their box alone."
    return (rois - boxes[:, :2].repeat(1, 2)) / (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)


def polygon_masks(polygons, rois, size=28):
    "Polygons, arrays of x and y, drawn in the rois' own small frames: (M, S, S) 0 or 1."
    out = []
    for polygon, (x1, y1, x2, y2) in zip(polygons, rois.double().tolist()):
        xy = (np.asarray(polygon, np.float64).reshape(-1, 2) - [x1, y1]) * size / [max(x2 - x1, 1), max(y2 - y1, 1)]
        out.append(coco_mask.decode(coco_mask.frPyObjects([xy.reshape(-1).tolist()], size, size))[..., 0])
    return torch.tensor(np.array(out, np.float32).reshape(-1, size, size))


class Case:
    "A system's checkpoint in our model, and its recording."
    def __init__(self, recording, scratch):
        self.golden = np.load(recording)
        self.info = json.loads(str(self.golden['info']))
        self.name, self.system = self.info['system'], SYSTEMS[self.info['system']]
        self.inventory = json.loads(beside(recording, f'{self.name}.json').read_text())
        make, kind = recipe(beside(recording, 'make_weights.py')), self.inventory['container']['kind']
        file = scratch/self.inventory['container']['file'].replace('*', '')
        weights = make.make(self.inventory, self.info['seed'])
        assert make.digest(weights) == self.info['weights_sha256'], 'the recipe for the weights was not followed'
        make.WRITERS[kind](self.inventory, weights, file)
        try:
            self.model = MaskRCNN.from_checkpoint(file, **numbers(self.name, self.info['config']))
            self.state = read_file(file)
        finally: file.unlink()
        self.yx, self.background_last = self.system.names.yx, self.system.names.background_last
        self.last_pixel = self.name in ('detectron', 'detectron_pytorch')
        self.xyxy = [1, 0, 3, 2] if self.yx else [0, 1, 2, 3]
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
    def input(self): return self.prepare('image')

    def prepare(self, name): return self.model.door.prepare(self.golden[name], self.model)

    @property
    def frame(self): return self.input[1]

    @cached_property
    def maps(self):
        "C1 to C5, P2 to P6."
        body, c1 = self.model.backbone.body, []
        hooks = [body.maxpool.register_forward_hook(lambda m, args, out: c1.append(out.relu())), body.register_forward_hook(lambda m, args, out: c1.extend(out))]
        with torch.no_grad(): pyramid = self.model.features(self.input[0])
        for h in hooks: h.remove()
        return c1, pyramid

    @property
    def size(self): return tuple(self.input[0].shape[-2:])

    @cached_property
    def rpn(self):
        with torch.no_grad(): return self.model.rpn(self.maps[1], self.frame)

    def second_stage(self, boxes):
        "Recorded rois (N, 4) as our second stage reads them: (1, N, 4)."
        if self.last_pixel: boxes = shift_far_corner(boxes, self.frame.scale[0])
        return self.to_pixels(boxes, self.size)[None]

    def to_pixels(self, boxes, size):
        "Recorded boxes in parts of an input of this size, in pixels; others as they are."
        if self.name == 'multimodal': return boxes * torch.tensor([size[1], size[0]] * 2)
        return matterport.to_pixels(boxes, size) if self.name == 'matterport' else boxes

    def truth_frame(self, size): return full_frame(size, torch.zeros(0), 1)

    def level_rule(self, boxes):
        "Number of the map, from 2, of recorded boxes in pixels."
        rules = dict(detectron2=detectron2.choose_level, multimodal=matterport.nearest_level, matterport=matterport.nearest_level)
        return rules.get(self.name, detectron.choose_level)(boxes) + 2

    def last_first(self, classes): return (classes + 1) % self.model.config.n_classes if self.background_last else classes
    def logits(self, x): return x.roll(-1, -1) if self.background_last else x
    def per_class(self, x): return x[:, 1:] if self.background_last else x
    def heads(self, name):
        rois = self.second_stage(self.boxes(name))
        with torch.no_grad():
            logits, deltas = self.model.box_branch(self.maps[1], rois, torch.ones(rois.shape[:2], dtype=torch.bool), self.frame)
        return self.logits(logits[0]), self.per_class(deltas[0])[..., self.xyxy]


def pytest_generate_tests(metafunc):
    if 'case' not in metafunc.fixturenames: return
    folder = Path(metafunc.config.getoption('oracles'))
    found = [p for p in sorted(folder.glob('*.npz')) if beside(p, 'make_weights.py').is_file() and p.stem.startswith(tuple(SYSTEMS))]
    absent = pytest.param(None, marks=pytest.mark.skip(reason=f'no recordings in {folder}; give their folder with --oracles'))
    metafunc.parametrize('case', [pytest.param(p, marks=pytest.mark.xdist_group(p.stem), id=p.stem) for p in found] or [absent], indirect=True, scope='session')


@pytest.fixture(scope='session')
def case(request, tmp_path_factory):
    torch.manual_seed(0)
    return Case(request.param, tmp_path_factory.mktemp(request.param.stem))


def test_every_entry_of_the_inventory_is_used_once(case):
    assert sorted(case.state) == sorted(e['key'] for e in case.inventory['entries'])
    ours = translate(case.state, case.system)
    assert ours.keys() == case.model.state_dict().keys()
    assert all(ours[k].shape == v.shape for k, v in case.model.state_dict().items())


def test_a_missing_and_an_extra_entry_are_named(case):
    some = sorted(k for k in case.state if k != case.system.names.sign)[::40]
    for key in some:
        with pytest.raises(WeightsError, match='is missing'): translate({k: v for k, v in case.state.items() if k != key}, case.system)
    with pytest.raises(WeightsError, match='^f: extra.weight is no tensor'): translate(case.state | {'extra.weight': torch.zeros(1)}, case.system, 'f')


def test_input(case):
    images, frame = case.input
    x = ((images - case.model.mean) / case.model.std)[0]
    if 'pre_molded' in case:
        case.close('pre_molded', x.permute(1, 2, 0))
        assert frame.window[0][case.xyxy].tolist() == case['pre_window'].tolist()
        images, frame = case.prepare('pre2_image')
        case.close('pre2_molded', ((images - case.model.mean) / case.model.std)[0].permute(1, 2, 0))
        assert frame.window[0][case.xyxy].tolist() == case['pre2_window'].tolist() and abs(frame.scale.item() - float(case['pre2_scale'])) < 1e-6
    else:
        case.close('pre_input', x.flip(0))
        if 'pre_resized_shape' in case: assert frame.window[0, [3, 2]].tolist() == case['pre_resized_shape'].tolist()
        if 'pre_im_info' in case: assert np.allclose([*case.size, frame.scale.item()], case.golden['pre_im_info'][0])


def test_features(case):
    for i, x in enumerate(case.maps[0]): case.close(f'feat_C{i + 1}', x[0])
    for i, x in enumerate(case.maps[1]): case.close(f'feat_P{i + 2}', x[0])


def test_anchors(case):
    anchors = case.rpn.anchors
    recorded = case.boxes('anchors') + torch.tensor([0, 0, 1, 1]) * case.last_pixel
    assert (anchors - recorded).abs().max() <= 1e-4 and list(case.rpn.level_sizes) == case['rpn_level_counts'].tolist()
    if 'anchors_norm' in case: assert (matterport.to_units(anchors, case.size) - case.boxes('anchors_norm')).abs().max() <= 1e-6


def test_rpn(case):
    logits = case['rpn_logits']
    case.close('rpn_logits', case.rpn.objectness[0], theirs=logits if logits.ndim == 1 else logits[:, 1] - logits[:, 0])
    if 'rpn_probs' in case: case.close('rpn_probs', torch.stack([1 - case.rpn.objectness[0].sigmoid(), case.rpn.objectness[0].sigmoid()], 1))
    case.close('rpn_deltas', case.rpn.deltas[0][:, case.xyxy])


def test_proposals(case):
    logits = case['rpn_logits']
    fed = case.rpn._replace(objectness=(logits if logits.ndim == 1 else logits[:, 1] - logits[:, 0])[None], deltas=case['rpn_deltas'][None][..., case.xyxy])
    p = case.model.rpn.propose(fed, *case.model.n_predict)
    recorded = case.second_stage(case.boxes('proposals'))[0]
    found = (torch.cdist(recorded, p.boxes[0][p.valid[0]], p=torch.inf).amin(1) <= 1e-2).float().mean().item()
    print(f'{case.name} proposals {found:.1%}, in place {((recorded - p.boxes[0][:len(recorded)]).abs().amax(1) <= 1e-2).float().mean():.1%}')
    assert found >= .99 and abs(p.valid.sum() - len(recorded)) <= .01 * len(recorded)


def test_proposals_level_by_level(case):
    if 'rpn_rois_P2' not in case: pytest.skip(f'{case.name} records no levels')
    cells = torch.stack([detectron.window_anchors([32 * 2**i], (.5, 1., 2.), 4 * 2**i) for i in range(5)])
    assert torch.equal(cells - torch.tensor([0., 0., 1., 1.]), case['anchor_cells'].float())
    n_pre, start = case.model.n_predict[0], 0
    for i, n in enumerate(case['rpn_level_counts'].tolist()):
        here = slice(start, start + n)
        fed = case.rpn._replace(anchors=case.rpn.anchors[here], objectness=case['rpn_logits'][None, here], deltas=case['rpn_deltas'][None, here],
                                level_sizes=(n,), frame=case.truth_frame(case.size))
        p = case.model.rpn.propose(fed, n_pre, n_pre)
        recorded, count, start = case[f'rpn_rois_P{i + 2}'] + torch.tensor([0, 0, 1, 1]), int(case[f'rpn_roi_count_P{i + 2}']), start + n
        found = torch.cdist(recorded, p.boxes[0][p.valid[0]], p=torch.inf).amin(1) <= 1e-2
        assert abs(p.valid.sum() - count) <= max(1, .01 * count) and found.float().mean() >= .99
    assert (case.level_rule(case.boxes('proposals')) == case['proposal_levels']).float().mean() >= .999


def test_roi_align_alone(case):
    maps = [case[f'roialign_map_P{i}'][None] for i in range(2, 6)]
    size = tuple(4 * n for n in maps[0].shape[-2:])
    boxes = case.to_pixels(case.boxes('roialign_boxes'), size)
    given = shift_far_corner(boxes, torch.tensor(1.)) if case.last_pixel else boxes
    for bins in (7, 14): case.close(f'roialign_out{bins}', case.model.parts.roi_align(maps, given[None], bins, case.truth_frame(size), None)[0], 1e-5)
    if 'roialign_level' in case: assert torch.equal(case.level_rule(boxes), case['roialign_level'].long())


def test_nms_alone(case):
    boxes = case.boxes('nms_boxes') + torch.tensor([0, 0, 1, 1]) * case.last_pixel
    for name in [k for k in case.golden.files if k.startswith('nms_keep_')]:
        measured, limit = matterport.longer(boxes) if case.name == 'multimodal' else boxes, int(name[-2:]) / 10
        at_threshold = case.last_pixel or case.name == 'multimodal'
        keep = nms_keep(measured, case['nms_scores'], detectron.just_below(limit) if at_threshold else limit).nonzero()[:, 0]
        recorded = case[name].long()
        assert torch.equal(keep, recorded.sort().values), name
        if not case.last_pixel: assert torch.equal(keep[case['nms_scores'][keep].argsort(descending=True)], recorded), name


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
    assert (best == case['headall_class']).float().mean() >= .995


def test_masks(case):
    rois = case.second_stage(case.boxes('mask_rois'))
    with torch.no_grad(): logits = case.model.mask_branch(case.maps[1], rois, torch.ones(rois.shape[:2], dtype=torch.bool), case.frame)[0]
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
        if case.name == 'matterport': recorded = matterport.to_pixels(recorded, case.size)
    elif 'det_raw_boxes' in case: recorded, classes, their_scores = case['det_raw_boxes'], case.last_first(case['det_raw_classes']), case['det_raw_scores']
    else:
        recorded, classes, their_scores = (case['det_boxes'] + torch.tensor([0, 0, 1, 1])) * case.frame.scale, case['det_class_ids'], case['det_scores']
    index = pair_up(case, 'det_raw', boxes, labels, scores, recorded, classes, their_scores)
    case.close('det_mask28', masks[index], 1e-3)


def test_objects_in_the_picture(case):
    found = predict_instances(case.model, case.golden['image'])
    recorded = case.boxes('det_boxes') + torch.tensor([0, 0, 1, 1]) * case.last_pixel
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


# ---- training ----

def unpacked(case, name, width):
    "Masks as 0 or 1, float."
    return torch.tensor(np.unpackbits(case.golden[name], axis=-1)[..., :width]).float()


def ternary(case, labels):
    "Recorded labels of anchors as ours: 1, 0 negative, -1 not asked."
    return torch.where(labels == 1, 1, torch.where(labels == 0, -1, 0)) if case.yx else labels.long()


def truth(case, crowd=False):
    "Boxes and labels of the recorded truth, in the network's input."
    boxes, labels = case.boxes('train_gt_boxes'), case.last_first(case['matchcrowd_class_ids' if crowd else 'train_gt_class_ids'].long())
    return (boxes + torch.tensor([0, 0, 1, 1])) * case.frame.scale if case.last_pixel else boxes, labels


def all_anchors(case, crowd=False):
    "What every anchor should say, none left out."
    boxes, labels = truth(case, crowd)
    n, rpn = len(case.rpn.anchors), case.model.rpn
    sampled, rpn.assign_anchors = rpn.assign_anchors, partial(rpn.assign_anchors, n_sample=2 * n)
    targets = rpn.targets(case.rpn, boxes[None], labels[None], torch.zeros(1, n))
    rpn.assign_anchors = sampled
    return RPNTargets(*(t[0] for t in targets))


def test_anchors_are_labelled(case):
    targets = all_anchors(case)
    if 'match_labels' in case:
        recorded = ternary(case, case['match_labels'])
        assert torch.equal(targets.labels, recorded)
        case.close('match_deltas', targets.target_deltas[recorded == 1][:, case.xyxy])
    sampled = ternary(case, case['train_rpn_match'])
    assert (targets.labels[sampled == 1] == 1).all() and (targets.labels[sampled == 0] == 0).all()
    if 'train_rpn_deltas' in case: case.close('train_rpn_deltas', targets.target_deltas[sampled == 1])
    assert (sampled == 1).sum() == min((targets.labels == 1).sum(), 128)


def test_anchors_near_a_crowd(case):
    if 'matchcrowd_labels' not in case: pytest.skip(f'{case.name} records no crowd')
    targets, recorded = all_anchors(case, crowd=True), ternary(case, case['matchcrowd_labels'])
    assert torch.equal(targets.labels, recorded)
    case.close('matchcrowd_deltas', targets.target_deltas[recorded == 1][:, case.xyxy])


def setups(case): return ('mini', 'full', 'padded') if 'train_padded_rois' in case else ('mini', 'full') if 'train_mini_rois' in case else ('',)


def drawn(case, setup):
    "Recorded rois, labels, deltas and masks of the target stage, positives first."
    name = lambda x: f'train_{setup}_{x}' if setup else f'train_{x}'
    rois, labels = case.second_stage(case.boxes(name('rois')))[0], case.last_first(case[name('class_ids')].long())
    deltas, masks = case.boxes(name('deltas')), unpacked(case, name('masks_packed'), 28)
    order, positive = (labels <= 0).long().argsort(stable=True), labels > 0
    full = torch.zeros(len(labels), 4)
    full[positive] = deltas[positive] if len(deltas) == len(labels) else deltas
    masks = masks[positive] if len(masks) == len(labels) else masks
    return rois[order], labels[order], full[order], masks


def target_stage(case, setup):
    "What our target stage makes of the recorded proposals and truth."
    parts, (boxes, labels), n = case.model.parts, truth(case), {}
    if 'train_config' in case.info:
        other = case.info['train_config'][setup]
        n = dict(n_rois=other['TRAIN_ROIS_PER_IMAGE'], positive_fraction=other['ROI_POSITIVE_RATIO'])
    proposals = case.second_stage(case.boxes('train_proposals'))[0] if 'train_proposals' in case else case.boxes('train_proposals_px')
    sampled = parts.sample_rois(proposals, torch.ones(len(proposals), dtype=torch.bool), boxes, labels, torch.zeros(len(proposals) + len(boxes)), **n)
    describe = partial(parts.head_targets, n_masks=int((sampled.labels > 0).sum()))
    if 'train_gt_polygons' in case:
        targets, pixel, polygons = describe(sampled, boxes, torch.zeros(len(boxes), 1, 1)), case.frame.scale, case.golden['train_gt_polygons']
        rois = shift_far_corner(sampled.rois, -pixel[0]) / pixel
        n = len(targets.target_masks)
        return targets._replace(target_masks=polygon_masks([polygons[i] for i in sampled.matched[:n]], rois[:n]))
    if setup in ('mini', 'padded'):
        mini, units = unpacked(case, 'train_gt_mini_packed', 56), matterport.to_units if case.name == 'matterport' else matterport.to_shares
        crop = lambda masks, index, rois, size: matterport.corner_masks(mini, index, within(rois, units(boxes, case.size)[index]), size)
        return describe(sampled, boxes, torch.zeros(len(boxes), *case.size), crop=crop)
    width = case.golden['train_gt_masks_shape'][-1] if 'train_gt_masks_shape' in case else case.size[1]
    return describe(sampled, boxes, unpacked(case, 'train_gt_masks_packed', width))


def test_rois_and_their_targets(case):
    for setup in setups(case):
        rois, labels, deltas, masks = drawn(case, setup)
        ours = target_stage(case, setup)
        filled = (ours.labels >= 0).nonzero()[:, 0]
        nothing = 1 if case.name == 'matterport' else 0           # its zeros, which fill up, are a pixel in pixels
        real = (rois[:, 2:] - rois[:, :2] > nothing + 1e-3).all(1)
        assert real.sum() == len(filled), setup
        apart = torch.cdist(rois[real], ours.rois[filled], p=torch.inf)
        index = filled[apart.argmin(1)]
        assert apart.amin(1).max() <= 1e-2 and len(index.unique()) == len(filled), setup
        assert torch.equal(ours.labels[index], labels[real]), setup
        positive = labels[real] > 0
        case.close(f'train_{setup}_deltas', ours.target_deltas[index][positive], theirs=deltas[real][positive])
        wrong = (ours.target_masks[index[positive]] != masks).float().mean((1, 2))
        print(f'{case.name} {setup} masks: {(wrong > 0).sum()} of {len(wrong)} differ, at most in {wrong.max():.2%} of their bins')
        assert wrong.max() <= .01, setup


class Step(nn.Module):
    "The five losses on recorded samples, as a function of the weights."
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images, frame, labels, deltas, *samples):
        features = self.model.features(images)
        targets = RPNTargets(labels[None], deltas[None]), HeadTargets(*(s[None] for s in samples))
        return self.model.compute_losses(features, self.model.rpn(features, frame), *targets)


@contextmanager
def only(model, active):
    "The class loss counts these classes (K,) alone; None: all."
    parts = model.parts
    if active is not None: model.parts = parts._replace(box_loss=partial(parts.box_loss, active=active))
    try: yield
    finally: model.parts = parts


def samples(case, setup):
    "What the losses were computed on."
    labels = ternary(case, case['train_rpn_match'])
    deltas = all_anchors(case).target_deltas.clone()
    if 'train_rpn_bbox' in case: deltas[labels == 1] = case.boxes('train_rpn_bbox')[:(labels == 1).sum()]
    active = case['train_active_class_ids'].bool() if 'train_active_class_ids' in case else None
    return (*case.input, labels, deltas, *drawn(case, setup)), active


def compare(case, name, losses):
    for loss, ours, theirs in zip(case.info['losses_order'], losses.values(), case[name]):
        error = abs(ours.item() - theirs.item()) / max(abs(theirs.item()), 1e-12)
        print(f'{case.name} {name} {loss} {error:.1e}')
        assert error <= STAGES, f'{name} {loss}: {ours.item()}, recorded {theirs.item()}'


def test_losses(case):
    step = Step(case.model)
    for setup in setups(case)[1:]:
        args, active = samples(case, setup)
        with torch.no_grad(), only(case.model, active): compare(case, f'train_{setup}_losses', step(*args))
    if 'train_inactive_losses' in case:
        with torch.no_grad(), only(case.model, case['train_inactive_class_flags'].bool()):
            compare(case, 'train_inactive_losses', step(*samples(case, 'mini')[0]))


def test_rpn_losses_level_by_level(case):
    if 'train_losses_rpn_levels' not in case: pytest.skip(f'{case.name} records no losses of levels')
    _, _, labels, deltas, *_ = samples(case, '')[0]
    start = 0
    for n, recorded in zip(case['rpn_level_counts'].tolist(), case['train_losses_rpn_levels'].T):
        here = (torch.arange(len(labels)) >= start) & (torch.arange(len(labels)) < start + n)
        ours = case.model.rpn.rpn_loss(case.rpn.objectness, case.rpn.deltas, torch.where(here, labels, -1)[None], deltas[None])
        share = (here & (labels >= 0)).sum() / (labels >= 0).sum()      # recorded: divided by the anchors of all levels
        ours = ours['loss_objectness'].item(), (ours['loss_rpn_box_reg'] * share).item()
        assert np.allclose(ours, recorded, rtol=STAGES, atol=1e-7)
        start += n


def test_classes_that_the_head_takes_the_rois_for(case):
    if 'train_mini_pred_classes' not in case: pytest.skip(f'{case.name} records no such classes')
    for setup in setups(case): assert torch.equal(case.heads(f'train_{setup}_rois')[0].argmax(1), case[f'train_{setup}_pred_classes'].long()), setup


def in_64_bits(x):
    "So that no sum in a processor's own order tips a ReLU over that is nearly 0."
    if isinstance(x, (tuple, list)): return type(x)(*map(in_64_bits, x)) if hasattr(x, '_asdict') else tuple(map(in_64_bits, x))
    return x.double() if isinstance(x, nn.Module) or isinstance(x, torch.Tensor) and x.is_floating_point() else x


def test_gradients(case):
    setup = setups(case)[0]
    exact = (lambda x: x) if case.name == 'matterport' else in_64_bits       # its mask loss is made of what 32 bits leave of a sigmoid
    args, active = exact(samples(case, setup))
    state = {k: exact(v.clone()).requires_grad_() if v.is_floating_point() else v for k, v in case.state.items()}
    ours = {f'model.{k}': v for k, v in translate(state, case.system).items()}      # gradients go through the translation
    step = exact(Step(deepcopy(case.model)))
    with only(step.model, active): losses = torch.func.functional_call(step, ours, args)
    compare(case, f'train_{setup}_losses' if setup else 'train_losses', losses)
    sum(losses.values()).backward()
    for name in [k for k in case.golden.files if k.startswith('grad|')]:
        g = state[name.removeprefix('grad|')].grad
        if case.inventory['container']['kind'] == 'keras_h5': g = g.permute({4: (2, 3, 1, 0), 2: (1, 0), 1: (0,)}[g.ndim])
        flat = g.flatten()
        case.close(name, flat[::max(1, len(flat) // 64)][:64], GRADIENTS)
        norm = float(case.golden[name.replace('grad|', 'gradnorm|')])
        assert abs(flat.norm().item() - norm) <= GRADIENTS * norm, name

"What the trace shows is what the model did, for any image, in prediction and training."
import re
from dataclasses import replace
from html.parser import HTMLParser
import numpy as np
import pytest, torch
from matplotlib.figure import Figure
from maskrcnn_edu.boxes import box_iou
from maskrcnn_edu.checkpoints import load_weights
from maskrcnn_edu.data import make_shapes
from maskrcnn_edu.detections import detect
from maskrcnn_edu.head_targets import head_targets
from maskrcnn_edu.mask_rcnn import MaskRCNN, MaskRCNNConfig, Parts, SHAPES, frame_of
from maskrcnn_edu.record import Noting
from maskrcnn_edu.roi_align import pyramid_roi_align, roi_level
from maskrcnn_edu.dialects import DIALECTS
from maskrcnn_edu.dialects.base import build
from maskrcnn_edu.learner import door_of, predict_instances
from maskrcnn_edu.trace import BOXES, grad_cam, png_text, trace_model, trace_page

def render(fig):
    "Draw it all, coarsely."
    fig.set_layout_engine('none')
    assert png_text(fig, dpi=20)


@pytest.fixture(scope='module')
def shipped(): return load_weights('shapes')

@pytest.fixture(scope='module')
def model(shipped): return shipped[0].eval()

@pytest.fixture(scope='module')
def names(shipped): return shipped[1]

def batch_of(samples, slots=8):
    images = torch.stack([torch.tensor(s.image) for s in samples]).permute(0, 3, 1, 2) / 255
    pad = lambda t: torch.nn.functional.pad(t, (0, 0) * (t.ndim - 1) + (0, slots - len(t)))
    return images, *(torch.stack([pad(torch.tensor(x)) for x in column]) for column in zip(*[(s.instances.boxes, s.instances.labels, s.instances.masks()) for s in samples]))

@pytest.fixture(scope='module')
def batch(): return batch_of(make_shapes(2, seed=5))

@pytest.fixture(scope='module')
def prediction(model, batch, names): return trace_model(model, batch[0], names=names)

@pytest.fixture(scope='module')
def training(model, batch, names): return trace_model(model, *batch, names=names)


def test_prediction_is_that_of_predict(model, batch, prediction):
    plain = model.predict(batch[0])
    assert (plain.labels > 0).any() and all(torch.equal(a, b) for a, b in zip(prediction['detections'], plain))
    assert all(torch.equal(a, b) for a, b in zip(prediction['features'], model.features(batch[0])))
    frame = frame_of(batch[0])
    rpn = model.rpn(prediction['features'], frame)
    for name in ('anchors', 'objectness', 'deltas'): assert torch.equal(prediction[name], getattr(rpn, name))
    p = model.rpn.propose(rpn, model.config.rpn.n_pre_predict, model.config.rpn.n_post_predict)
    assert all(torch.equal(a, b) for a, b in zip(prediction['proposals'], p))
    with torch.no_grad(): logits, deltas = model.box_branch(prediction['features'], p.boxes, p.valid, frame)
    assert torch.equal(prediction['class_logits'], logits) and torch.equal(prediction['box_deltas'], deltas)   # of the first look
    assert torch.equal(prediction['mask_rois'], plain.boxes)

def test_losses_are_those_of_forward(model, batch, training):
    with torch.no_grad(): plain = model(*batch)
    assert set(training['losses']) == set(plain) and all(torch.equal(training['losses'][k], v) for k, v in plain.items())
    for name, t in zip(('boxes', 'labels', 'masks'), batch[1:]): assert torch.equal(training['gt'][name], t)

def test_shapes_are_those_of_the_design(model, prediction, training):
    c, B = model.config, 2
    A, m = len(prediction['anchors']), c.head.n_masks
    R, P, D, K, C = c.head.n_rois, c.rpn.n_post_predict, c.detection.n_detections, c.n_classes, c.backbone.channels
    shapes = lambda t: {k: tuple(x.shape) for k, x in t.tensors().items()}
    expected = {'images': (B, 3, 128, 128), 'anchors': (A, 4), 'objectness': (B, A), 'deltas': (B, A, 4), 'P2': (B, C, 32, 32), 'P6': (B, C, 2, 2)}
    assert expected.items() <= shapes(prediction).items() and expected.items() <= shapes(training).items()
    assert {'C2', 'C3', 'C4', 'C5'} <= set(shapes(prediction))
    assert {'proposals.boxes': (B, P, 4), 'proposals.scores': (B, P), 'proposals.valid': (B, P), 'rois': (B, P, 4), 'roi_features': (B, P, C, 7, 7), 'class_logits': (B, P, K),
            'box_deltas': (B, P, K, 4), 'mask_features': (B, D, C, 14, 14), 'mask_logits': (B, D, K, 28, 28), 'detections.boxes': (B, D, 4), 'detections.labels': (B, D),
            'detections.scores': (B, D), 'detections.masks': (B, D, 28, 28)}.items() <= shapes(prediction).items()
    assert {'rpn_targets.labels': (B, A), 'rpn_targets.target_deltas': (B, A, 4), 'head_targets.rois': (B, R, 4), 'head_targets.labels': (B, R), 'head_targets.target_deltas': (B, R, 4),
            'head_targets.target_masks': (B, m, 28, 28), 'mask_logits': (B, m, K, 28, 28), 'losses.loss_mask': ()}.items() <= shapes(training).items()

def test_the_model_is_left_as_it_was(batch):
    model = MaskRCNN(SHAPES).train()
    model.backbone.body.bn1.eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    trace_model(model, batch[0]), trace_model(model, *batch)
    assert model.training and not model.backbone.body.bn1.training and model.notes is None
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()) and all(p.grad is None for p in model.parameters())
    assert not model.backbone.body._forward_hooks
    with pytest.raises(ValueError, match="4 channels"): trace_model(model, torch.rand(1, 4, 64, 64))
    assert model.notes is None and model.training and not model.backbone.body._forward_hooks

def test_nothing_is_kept_while_nobody_listens(model, batch):
    model.predict(batch[0])
    assert model.notes is None and Noting.notes is None

def test_a_part_of_the_truth_is_too_little(model, batch):
    with pytest.raises(ValueError, match='all three'): trace_model(model, batch[0], batch[1])


def test_every_box_shows_for_every_image(prediction, training):
    assert set(prediction.boxes()) | set(training.boxes()) == set(BOXES)
    for t in (prediction, training):
        for box in t.boxes():
            assert isinstance(t.show(box), Figure) and t.table(box)
            render(t.show(box, image=1))

def test_names_of_data_lead_to_their_box(prediction):
    for name in ('proposals', 'rois', 'roi_features', 'features', 'images', 'instances', 'objectness'): assert isinstance(prediction.show(name), Figure)

def test_wrong_names_say_which_are_right(prediction):
    with pytest.raises(ValueError, match="no box 'propsals'.*proposals"): prediction.show('propsals')
    with pytest.raises(ValueError, match='only|labels and masks'): prediction.show('mask_loss')
    with pytest.raises(ValueError, match='images 0 to 1'): prediction.show('nms', image=2)
    with pytest.raises(KeyError, match='there are images'): prediction['nonsense']

def test_the_table_counts(prediction):
    rows = {r.name: r for r in prediction.table()}
    assert set(rows) == set(prediction.tensors()) and all(r.nans == 0 for r in rows.values())
    valid = prediction['proposals'].valid
    assert rows['proposals.valid'].zeros == pytest.approx(1 - valid.float().mean().item()) and '<th>' in prediction.table()._repr_html_()

@pytest.mark.parametrize('config', [SHAPES, MaskRCNNConfig().change(n_classes=2, backbone=dict(channels=32, layers=(1, 1, 1, 1)), head=dict(hidden=32, mask_channels=16, n_rois=16), rpn=dict(n_pre=50, n_post=40, n_pre_predict=50, n_post_predict=30))],
                         ids=['shapes', 'two classes'])
def test_untrained_models_and_images_without_objects(config):
    torch.manual_seed(0)
    model, image = MaskRCNN(config), torch.full((1, 3, 64, 128), .5)
    nothing = torch.zeros(1, 0, 4), torch.zeros(1, 0).long(), torch.zeros(1, 0, 64, 128)
    empty = torch.zeros(1, 3, 4), torch.zeros(1, 3).long(), torch.zeros(1, 3, 64, 128)
    for t in (trace_model(model, image), trace_model(model, image, *nothing), trace_model(model, image, *empty)):
        for box in t.boxes(): render(t.show(box))

def test_nan_in_the_weights_is_seen(batch):
    model = MaskRCNN(SHAPES)
    with torch.no_grad(): model.rpn.head.bbox_pred.weight.fill_(torch.nan)
    t = trace_model(model, batch[0])
    sick = [r.name for r in t.table() if r.nans]
    assert sick[0] == 'deltas'
    for box in t.boxes(): render(t.show(box))


class Page(HTMLParser):
    def __init__(self): super().__init__(); self.ids, self.asks, self.links, self.alts, self.dialogs = [], [], [], [], []
    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if 'id' in attrs: self.ids.append(attrs['id'])
        if tag == 'dialog': self.dialogs.append(attrs['id'])
        if tag == 'img': self.alts.append(attrs.get('alt', ''))
        self.asks += [v for k, v in attrs.items() if k == 'src' or (k == 'href' and tag == 'link')]
        if tag == 'a': self.links.append(attrs['href'])

def test_page_holds_all_it_needs(model, batch, prediction, training, names, tmp_path):
    for t, image in ((prediction, 0), (training, 1)):
        text = t.to_html(tmp_path/'page.html', image=image, lessons='https://example.org/{}.html').read_text(encoding='utf-8')
        page = Page()
        page.feed(text)
        assert all(a.startswith('data:') for a in page.asks) and '@import' not in text and not re.search(r'url\((?!data:)', text)
        assert len(page.ids) == len(set(page.ids)) and {f'panel-{b}' for b in BOXES} <= set(page.dialogs)
        assert len(page.alts) == len(t.boxes()) and all(len(a) > 20 for a in page.alts)
        assert {a for a in page.links if not a.startswith('#')} == {f'https://example.org/{b.lesson}.html' for b in BOXES.values()} | {a for a in page.links if re.search(r'org/(00|01|2\d|55)_', a)}
        assert all(a[1:] in page.ids for a in page.links if a.startswith('#')) and 'prefers-color-scheme: dark' in text and 'width=device-width' in text
    path = trace_page(model, batch[0], tmp_path/'other.html', names, image=1)
    hrefs = [a for a in re.findall(r'<a href="([^"#]+)">Lesson', path.read_text(encoding='utf-8'))]
    assert len(hrefs) >= 18 and all((tmp_path/h).resolve().is_file() for h in hrefs)

def test_names_are_escaped(model, batch, tmp_path):
    text = trace_model(model, batch[0], names=['background', '<b>', '&', '"']).to_html(tmp_path/'x.html', title='<script>').read_text(encoding='utf-8')
    assert '<title>&lt;script&gt;' in text and '<b>' not in text


def test_grad_cam_goes_back_to_the_level_and_the_pixels(model, batch):
    plain = model.predict(batch[0])
    cam = grad_cam(model, batch[0][0], 0)
    assert cam.level == 2 + int(roi_level(cam.roi, canonical_size=model.config.head.canonical_size))
    assert [bool(m.any()) for m in cam.maps] == [level == cam.level for level in (2, 3, 4, 5)] and cam.pixels.shape == (128, 128)
    assert float(box_iou(cam.roi[None], plain.boxes[:1, 0])) > .4          # the roi is that of the detection
    x1, y1, x2, y2 = cam.roi.round().int().tolist()
    inside = cam.pixels[max(y1, 0):y2, max(x1, 0):x2]
    assert inside.mean() > cam.pixels.mean() and all(p.grad is None for p in model.parameters()) and model.notes is None
    coarse = MaskRCNN(model.config.change(head=dict(canonical_size=20), detection=dict(min_score=0.))).eval()
    coarse.load_state_dict(model.state_dict())
    assert grad_cam(coarse, batch[0][0], 0).level > 2

def test_grad_cam_of_an_empty_slot_says_so(model, batch):
    with pytest.raises(ValueError, match='is empty; there are'): grad_cam(model, batch[0][0], model.config.detection.n_detections - 1)

def test_parts_given_to_the_constructor_are_used(batch):
    calls = []
    def of(function, name):
        def call(*args, **kwargs): calls.append(name); return function(*args, **kwargs)
        return call
    parts = Parts(roi_align=of(pyramid_roi_align, 'pool'), head_targets=of(head_targets, 'targets'), detect=of(detect, 'filter'))
    model = MaskRCNN(SHAPES, parts).eval()
    expected = MaskRCNN(SHAPES).eval()
    expected.load_state_dict(model.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(model.predict(batch[0]), expected.predict(batch[0])))
    model(*batch)
    assert {'pool', 'targets', 'filter'} == set(calls)

@pytest.mark.parametrize('name', DIALECTS)
def test_models_of_other_programs_are_traced_as_they_predict(name, tmp_path):
    "The page shows the pass that predict_instances makes: the same input, the same frame."
    torch.manual_seed(0)
    small = dict(n_classes=4, backbone=dict(layers=(1, 1, 1, 1), width=4, channels=8),
                 head=dict(hidden=16, mask_channels=8), detection=dict(min_score=.01))
    model = build(DIALECTS[name], DIALECTS[name].config.change(**small), short_side=128, long_side=192).eval()
    picture = make_shapes(1, seed=3, size=120)[0].image[:90]
    images, frame = door_of(model).prepare(picture, model)
    trace = trace_model(model, images, frame=frame)
    found = predict_instances(model, picture)
    assert len(found) and int((trace['detections.labels'] > 0).sum()) >= len(found)
    back = door_of(model).restore(*(t[0] for t in trace['detections']), frame, picture.shape[:2], model.config)
    assert np.array_equal(back.boxes, found.boxes) and np.array_equal(back.masks(), found.masks())
    page = trace_page(model, images, tmp_path/'trace.html', frame=frame)
    assert page.read_text(encoding='utf-8').count('<img') == len(trace.boxes())

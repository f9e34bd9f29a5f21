"The page that a run leaves: whole for any run and any names, true to the numbers, and the same in a browser."
import base64, html.parser, io, json, re, shlex, sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, strategies as st
from PIL import Image
from typer.testing import CliRunner
from maskrcnn_edu.checkpoints import load_weights
from maskrcnn_edu.data import DataError, Fault, InstanceDataset, Sample, open_dataset, make_shapes, shapes_folder, write_coco, CLASSES
from maskrcnn_edu.evaluate import CocoEval, CocoMetrics, IOUS, match
from maskrcnn_edu.instances import Instances
from maskrcnn_edu.learner import SaveState, instance_dls, mask_rcnn_learner, predict_instances
from maskrcnn_edu.mask_rcnn import MaskRCNN, SHAPES
from maskrcnn_edu.report import (CROWDS, Html, RunLog, collect, command_line, count, count_labels, data_warnings, escape, facts, git_commit, of_100, page, read_log, sure_errors, table, tag,
                                 training_warnings, worst_pictures, write_report)
from test_site import brightness, chromium, look, needs_browser, open_page   # of this folder

HOSTILE = '</td><script>alert(1)</script> & "a" \'b\' <img src=x onerror=alert(2)> $x^$'

class Page(html.parser.HTMLParser):
    "What a page holds, and what is wrong with it."
    EMPTY = {'img', 'meta', 'link'}
    INSIDE = dict(tr=('thead', 'tbody'), td=('tr',), th=('tr',), li=('ul',), thead=('table',), tbody=('table',), caption=('table',), figcaption=('figure',), section=('main',), h1=('main',))

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.refs, self.wrong, self.names, self.texts, self.alts, self.loads, self.cells = [], [], [], [], Counter(), [], [], [], []
        if not text.startswith('<!DOCTYPE html>'): self.wrong.append('no doctype')
        self.feed(text), self.close()
        self.wrong += [f'not closed: {self.open}'] * bool(self.open) + [f'id twice: {i}' for i, n in Counter(self.ids).items() if n > 1] + [f'leads nowhere: {r}' for r in self.refs if r not in self.ids]

    def handle_starttag(self, name, attrs):
        if len(dict(attrs)) < len(attrs): self.wrong.append(f'attribute twice in {name}')
        attrs, parent = dict(attrs), self.open[-1] if self.open else None
        self.names[name] += 1
        if name in self.INSIDE and parent not in self.INSIDE[name]: self.wrong.append(f'{name} in {parent}')
        if parent == 'p' and name not in ('b', 'code', 'a'): self.wrong.append(f'{name} in a p')
        if name not in self.EMPTY: self.open.append(name)
        if 'id' in attrs: self.ids.append(attrs['id'])
        if name == 'img': self.alts.append(attrs.get('alt'))
        if 'aria-labelledby' in attrs: self.refs.append(attrs['aria-labelledby'])
        for k in ('href', 'src', 'srcset', 'action', 'data'):
            if k in attrs: self.refs.append(attrs[k][1:]) if attrs[k].startswith('#') else self.loads.append(attrs[k])
        self.wrong += [f'{name} obeys {k}' for k in attrs if k.startswith('on')]

    def handle_endtag(self, name):
        if not self.open or self.open.pop() != name: self.wrong.append(f'closes {name} out of turn')

    def handle_data(self, data): self.texts.append(data) if not self.open or self.open[-1] != 'style' else None

def whole(file):
    "The page, read: nothing wrong, nothing loaded, no scripts, words for every picture, less than 3 MB."
    text = Path(file).read_text(encoding='utf-8')
    p = Page(text)
    assert not p.wrong, p.wrong[:5]
    assert all(x.startswith('data:') for x in p.loads) and not p.names['script'] and not p.names['iframe'] and '@import' not in text and not re.search(r'url\(', text.split('</style>')[0])
    assert all(a and len(a) > 20 for a in p.alts) and len(text.encode()) < 3e6
    for kind, letters in re.findall('src="data:image/(.*?);base64,(.*?)"', text):
        raw = base64.b64decode(letters)
        if kind == 'webp': assert Image.open(io.BytesIO(raw)).width > 200
        else: assert b'<svg' in raw[:2000]
    p.said = ' '.join(p.texts)
    return p


class Memory:
    "Reads samples that are there already."
    def __init__(self, samples): self.samples = {s.name: s for s in samples}
    def __call__(self, record): return self.samples[record.name], []

class Record(str):
    @property
    def name(self): return str(self)

def dataset(samples, classes=CLASSES): return InstanceDataset([Record(s.name) for s in samples], classes, Memory(samples))

def scored(data, found):
    ev = CocoEval(data.classes)
    for s, f in zip(data, found): ev.add(s.instances, f)
    return ev.compute()

def guessed(data, seed=0, keep=.8):
    "Finds that are mostly the truth, moved a little, some of another class, some not there."
    rng, out = np.random.default_rng(seed), []
    for s in data:
        t = s.instances[rng.random(len(s.instances)) < keep]
        labels = np.where(rng.random(len(t)) < .8, t.labels, rng.integers(1, len(data.classes), len(t)))
        out.append(replace(t, labels=labels, scores=rng.random(len(t)).astype(np.float32)))
    return out

@pytest.fixture(scope='module')
def shapes(): return open_dataset(shapes_folder())

@pytest.fixture(scope='module')
def model(): return load_weights('shapes')[0]

@pytest.fixture(scope='module')
def shipped(shapes, model, tmp_path_factory):
    "The report of the shipped model, with a history and everything else."
    out, valid = tmp_path_factory.mktemp('report'), shapes[1].subset(range(12))
    history = json.loads((Path(__file__).parent.parent/'benchmarks/results/shapes_runs.json').read_text())['runs'][0]['history']
    pd.DataFrame(history).to_csv(out/'history.csv', index=False, na_rep='nan')
    found = [predict_instances(model, s.image) for s in valid]
    kinds = {n: ('fluorescence', 'histology')[i % 2] for i, n in enumerate(valid.names)}
    return write_report(out, model, valid, scored(valid, found) | dict(dsb=.5, ap_by_iou={str(t): .5 for t in IOUS}, by_kind={'histology': dict(images=6, dsb=.4, ap_by_iou={str(t): .4 for t in IOUS})}),
                        found, shapes[0].subset(range(20)), 'maskrcnn-edu train coco', [Fault('a.png', 'empty mask', 'object dropped')], ['anchors from 16 pixels'], kinds, n_pictures=4)

@pytest.fixture
def learner(shapes, tmp_path):
    tiny = SHAPES.change(backbone=dict(width=16, channels=32), head=dict(hidden=64, mask_channels=32), detection=dict(min_score=0.))
    def make(cbs=(), n=8):
        dls = instance_dls(shapes[0].subset(range(n)), shapes[1].subset(range(2)), bs=4, device='cpu')
        return mask_rcnn_learner(dls, tiny, path=tmp_path, cbs=cbs, seed=3)
    return make

def quiet(learn, *args, **kwargs):
    with learn.no_bar(), learn.no_logging(): learn.fit(*args, **kwargs)
    return learn


@given(st.text('<>&"\'/!-=;#abc1 \n\x00\x7f\ud800', max_size=30) | st.text())
def test_any_text_comes_back(text):
    p = Page('<!DOCTYPE html>' + tag('p', text, title=text))
    assert not p.wrong and ''.join(p.texts) == re.sub('[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]', '\ufffd', text) and p.names == {'p': 1}
    assert escape(text).encode() is not None

def test_html_is_not_escaped_twice():
    assert tag('p', tag('b', 'a & b'), ['<', None, Html('<i></i>')]) == '<p><b>a &amp; b</b>&lt;<i></i></p>'
    assert 'class="x"' in tag('p', class_='x') and 'aria-label="y"' in tag('p', aria_label='y') and 'title' not in tag('p', title=None)
    assert not Page(page('<t>', tag('p', 'x')).decode()).wrong

def test_the_reader_of_pages_can_find_fault():
    for bad in ('<p><b>x</p>', '<p id="a"></p><p id="a"></p>', '<a href="#no">x</a>', '<img onerror="x">', '<p><div></div></p>', '<td>x</td>'): assert Page('<!DOCTYPE html>' + bad).wrong, bad


def test_the_whole_report(shipped):
    p = whole(shipped)
    for words in ('12 validation images', 'maskrcnn-edu train coco', 'empty mask', 'anchors from 16 pixels', 'torch ' + torch.__version__.split('+')[0], 'histology', '0.400', 'Precision and recall', 'learned', 'n_detections'):
        assert words.lower() in p.said.lower() or words == 'learned', words
    assert p.names['img'] == 2 + 3 + 4 + 4 and p.names['h1'] == 1 and p.names['section'] == 7

def test_counts_are_those_of_match(shapes):
    "Right, wrong and missed are counted in two ways."
    data = dataset(make_shapes(30, seed=9))
    for seed in range(3):
        found = guessed(data, seed)
        r = collect(Path('nowhere'), MaskRCNN(SHAPES), data, {}, found)
        ms = [match(s.instances, f[f.scores >= .5]) for s, f in zip(data, found)]
        assert tuple(count(r.split)) == tuple(sum(len(m[k]) for m in ms) for k in range(3))
        errors = sure_errors(r.ev.compared['mask'])
        assert count(r.split).wrong == sum(errors.values()) - errors['missed'] and errors['missed'] <= count(r.split).missed and count(r.split).objects == sum(len(s.instances) for s in data)
        by_image = [count(r.split, images=[i]) for i in range(30)]
        assert [tuple(c) for c in by_image] == [(len(m.pairs), len(m.wrong), len(m.missed)) for m in ms]

@given(st.integers(0, 3000), st.integers(0, 3000), st.booleans())
def test_a_share_is_not_rounded_to_all_or_none(k, n, most):
    k = max(n - k % 7, 0) if most else k % (n + 1)
    text = of_100(k, n)
    if n: assert (text == '100 of 100') == (k == n) and (text == '0 of 100') == (k == 0) and abs(int(text.split()[0]) - 100 * k / n) < 1
    else: assert text == '–'

def test_summary_says_the_counts(shapes, tmp_path):
    data = dataset(make_shapes(40, seed=2))
    found = [replace(s.instances, scores=np.full(len(s.instances), .9, np.float32)) for s in data]
    n, lost = sum(map(len, found)), 0
    for i in range(10): lost, found[i] = lost + len(found[i]), found[i][[]]
    p = whole(write_report(tmp_path, MaskRCNN(SHAPES), data, scored(data, found), found))
    assert f'The 40 validation images hold {n} objects. The model finds {n - lost} of them ({of_100(n - lost, n)}). Of its {n - lost} finds 0 are wrong (0 of 100).' in p.said
    assert f'“missed”: {lost} of {lost}' in p.said and f'0 right, 0 wrong, {len(data[0].instances)} missed' in p.said


def test_hostile_names_are_shown_and_not_obeyed(tmp_path):
    samples = [replace(s, name=f'{i} {HOSTILE}') for i, s in enumerate(make_shapes(3, seed=1))]
    data = dataset(samples, ['background', HOSTILE, '<b>bold', '&amp;'])
    found = guessed(data, keep=1)
    p = whole(write_report(tmp_path, MaskRCNN(SHAPES), data, scored(data, found), found, dataset(samples, data.classes), f'maskrcnn-edu {HOSTILE}', [Fault(HOSTILE, HOSTILE, HOSTILE), HOSTILE], [HOSTILE],
                           {s.name: HOSTILE for s in samples}, HOSTILE, 5, HOSTILE))
    assert p.said.count(HOSTILE) > 12 and '<b>bold' in p.said and '&amp;' in p.said and any(HOSTILE in a for a in p.alts)
    assert p.texts.count(HOSTILE) >= 6

def test_names_that_no_font_and_no_codec_has(tmp_path):
    name = 'bad\udce9\x00\n$\\frac{'
    samples = [replace(s, name=name + str(i)) for i, s in enumerate(make_shapes(2, seed=1))]
    data = dataset(samples, ['background', name, '$', '$$'])
    found = guessed(data, keep=1)
    whole(write_report(tmp_path, MaskRCNN(SHAPES), data, scored(data, found), found, faults=[name], title=name))

@pytest.mark.parametrize('n_classes', [1, 80])
def test_one_class_and_eighty(n_classes, tmp_path):
    rng = np.random.default_rng(0)
    samples = [replace(s, instances=replace(s.instances, labels=rng.integers(1, n_classes + 1, len(s.instances)))) for s in make_shapes(24, seed=4)]
    data = dataset(samples, ['background', *(f'class {i}' for i in range(n_classes))])
    found = guessed(data)
    p = whole(write_report(tmp_path, MaskRCNN(SHAPES.change(n_classes=n_classes + 1)), data, scored(data, found), found, n_pictures=2))
    assert f'class {n_classes - 1}' in p.said and ('and 75 more' in p.said or n_classes == 1 or 'more in the validation images' in p.said) and p.names['tr'] > n_classes
    assert ('No object of' in p.said) == (n_classes == 80)

def crowded(sample, n=1):
    "The first n objects are crowds now"
    return replace(sample, instances=replace(sample.instances, labels=sample.instances.labels * np.where(np.arange(len(sample.instances)) < n, -1, 1)))

def test_a_crowd_is_counted_apart_and_never_missed(tmp_path):
    plain = make_shapes(24, seed=12, level='crowded')
    data, n = dataset([crowded(s) for s in plain]), sum(len(s.instances) for s in plain) - 24
    assert sum(count_labels(data).values()) == n == facts(data)['objects'] and min(count_labels(data)) == 1
    assert facts(data)[CROWDS] == 24 and facts(data)['most objects in an image'] == max(len(s.instances) for s in plain) - 1
    assert facts(data)['of them without an object'] == sum(len(s.instances) == 1 for s in plain)
    found = [replace(s.instances, scores=np.full(len(s.instances), .9, np.float32)) for s in plain]   # every object, those of the crowds too
    p = whole(write_report(tmp_path, MaskRCNN(SHAPES), data, scored(data, found), found))
    assert f'hold {n} objects. The model finds {n} of them (100 of 100). Of its {n} finds 0 are wrong' in p.said and 'Nothing is wrong in any image.' in p.said
    assert f'{CROWDS} 24' in ' '.join(p.said.split()) and 'Hatched in grey is a crowd' in p.said and all('and 1 crowd)' in a for a in p.alts if 'twice: left the truth' in a)
    nothing = [f[[]] for f in found]
    p = whole(write_report(tmp_path, MaskRCNN(SHAPES), data, scored(data, nothing), nothing))
    assert f'“missed”: {n} of {n}' in p.said
    spoilt = [replace(f, labels=np.where(np.arange(len(f)) == 1, f.labels % 3 + 1, f.labels)) for f in found]
    p = whole(write_report(tmp_path, MaskRCNN(SHAPES), data, scored(data, spoilt), spoilt))
    assert '1 wrong, 1 missed, 1 in a crowd' in p.said

def test_a_report_without_crowds_does_not_speak_of_them(shipped):
    assert 'crowd' not in whole(shipped).said.lower()

def test_validation_of_crowds_only(tmp_path):
    data = dataset([crowded(s, 99) for s in make_shapes(3, seed=1)])
    found = [replace(s.instances, labels=abs(s.instances.labels), scores=np.full(len(s.instances), .9, np.float32)) for s in data]
    p = whole(write_report(tmp_path, MaskRCNN(SHAPES), data, scored(data, found), found, data))
    assert 'hold no object to find; the model made 0 finds' in p.said and 'Only 0 objects' in p.said and 'No object of square, circle, triangle in the training' in p.said

def test_valid_without_objects(tmp_path, model):
    samples = [replace(s, instances=s.instances[[]]) for s in make_shapes(2, seed=1)]
    data = dataset(samples)
    found = [replace(s.instances, scores=np.zeros(0, np.float32)) for s in samples]
    p = whole(write_report(tmp_path, model, data, scored(data, found), found, dataset(make_shapes(3, seed=2))))
    assert 'no object to find' in p.said and 'Only 0 objects' in p.said and 'No object of square, circle, triangle' in p.said and 'nan' not in p.said.lower().replace('nanopore', '')
    wrong = [replace(s.instances, scores=np.full(len(s.instances), .9, np.float32)) for s in make_shapes(2, seed=1)]
    p = whole(write_report(tmp_path, model, data, scored(data, wrong), wrong))
    assert f'made {sum(map(len, wrong))} finds' in p.said

def test_no_images_at_all(tmp_path, model):
    p = whole(write_report(tmp_path, model, dataset([]), {}))
    assert 'There are no validation images.' in p.said

def test_nothing_found_and_nothing_wrong(tmp_path, model, shapes):
    data = dataset(make_shapes(3, seed=3))
    nothing = [replace(s.instances[[]], scores=np.zeros(0, np.float32)) for s in data]
    assert 'finds 0 of them (0 of 100)' in whole(write_report(tmp_path, model, data, scored(data, nothing), nothing)).said
    perfect = [replace(s.instances, scores=np.ones(len(s.instances), np.float32)) for s in data]
    p = whole(write_report(tmp_path, model, data, scored(data, perfect), perfect))
    assert 'Nothing is wrong in any image.' in p.said and 'Nothing was taken for anything else.' in p.said

def test_finds_that_do_not_fit_the_images(tmp_path, model, shapes):
    with pytest.raises(DataError, match='2 lists of finds for 3 images'): write_report(tmp_path, model, shapes[1].subset(range(3)), {}, guessed(shapes[1].subset(range(2))))
    assert not (tmp_path/'report.html').exists()

def test_large_noisy_images_stay_small(tmp_path, model):
    rng, samples = np.random.default_rng(0), []
    for i in range(6):
        labels = np.kron(np.arange(1, 301).reshape(15, 20) * (rng.random((15, 20)) < .9), np.pad(np.ones((30, 30), int), ((0, 10), (0, 10))))
        instances = Instances.from_label_map(labels)
        samples.append(Sample(rng.integers(0, 256, (*labels.shape, 3), dtype=np.uint8), instances, f'noise {i}'))
    data = dataset(samples, ['background', 'nucleus'])
    found = guessed(data)
    assert whole(write_report(tmp_path, MaskRCNN(SHAPES.change(n_classes=2, stretch=True)), data, scored(data, found), found)).names['img'] == 14


def test_a_run_that_was_resumed(learner, shapes, tmp_path):
    quiet(learner([RunLog(tmp_path, 'first command')]), 1, 1e-3)
    assert [e['first'] for e in read_log(tmp_path)] == [1]
    saved = SaveState(tmp_path, rows=[[0, *[.5] * 12]])
    learn = quiet(learner([RunLog(tmp_path, 'second command'), saved]), 3, 1e-3, start_epoch=1)
    log = read_log(tmp_path)
    assert [(e['first'], e['last'], e['command']) for e in log] == [(1, 1, 'first command'), (2, 3, 'second command')] and all(e['seconds'] > 0 for e in log)
    valid = shapes[1].subset(range(2))
    p = whole(write_report(tmp_path, learn, valid, {}))
    for words in ('Sessions', 'first command', 'second command', '2 to 3', '(h:mm:ss)', 'FlipTurn', 'seed'): assert words in p.said, words
    assert p.names['tr'] > 20 and len(pd.read_csv(tmp_path/'history.csv')) == 3

def test_a_new_run_starts_a_new_log(learner, tmp_path):
    for command in ('old', 'new'): quiet(learner([RunLog(tmp_path, command)]), 1, 1e-3)
    assert [e['command'] for e in read_log(tmp_path)] == ['new']

def test_one_epoch_through_the_command_line(tmp_path, monkeypatch):
    from maskrcnn_edu.train import app
    folder = tmp_path/'my "data" & more'
    write_coco(make_shapes(6, seed=5), folder, 'train', CLASSES), write_coco(make_shapes(3, seed=6), folder, 'valid', CLASSES)
    words = ['train', 'coco', '--data', str(folder), '--out', str(tmp_path/'run'), '--epochs', '1']
    monkeypatch.setattr(sys, 'argv', ['/usr/bin/maskrcnn-edu', *words])
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    p = whole(tmp_path/'run/report.html')
    assert shlex.join(['maskrcnn-edu', *words]) in p.said and '1 epoch only' in p.said and str(folder) in p.said and 'ScaleCrop(size=128' in p.said

def test_command_only_where_it_was_typed(monkeypatch):
    for argv, command in ((['-c'], None), ([''], None), (['/x/pytest', 'a'], None), (['/x/maskrcnn-edu', 'train', 'a b'], "maskrcnn-edu train 'a b'"), (['C:/maskrcnn-edu.exe', 'x'], 'maskrcnn-edu x')):
        monkeypatch.setattr(sys, 'argv', argv)
        assert command_line() == command

def test_commit_of_a_clone_only(tmp_path):
    import subprocess
    assert git_commit(tmp_path) is None
    git = lambda *words: subprocess.run(['git', '-C', tmp_path, '-c', 'user.name=t', '-c', 'user.email=t@t', *words], check=True, capture_output=True, text=True).stdout.strip()
    git('init', '--quiet')
    assert git_commit(tmp_path) is None   # nothing committed yet
    (tmp_path/'a').write_text('1')
    git('add', 'a'), git('commit', '--quiet', '-m', 'one')
    assert git_commit(tmp_path) == git('rev-parse', '--short=12', 'HEAD')
    (tmp_path/'a').write_text('2')
    assert git_commit(tmp_path).endswith(', with changes')

def test_warnings_come_when_they_should():
    full = Counter({1: 50, 2: 50, 3: 50})
    assert not data_warnings(CLASSES, full, full, 5, 20)
    said = lambda *args: ' '.join(data_warnings(CLASSES, *args))
    assert 'Only 19 objects' in said(Counter({1: 7, 2: 6, 3: 6})) and 'No object of circle in the validation' in said(Counter({1: 50, 3: 50})) and 'No object of square in the training' in said(full, Counter({2: 1, 3: 1}))
    assert 'holds 21 objects, but the model finds 20' in said(full, full, 21, 20)
    frame = lambda t, v: pd.DataFrame(dict(epoch=range(len(t)), train_loss=t, valid_loss=v))
    assert not training_warnings(frame([3., 1, 1, 1, 1, 1, 1, 1], [3., 1, 1, 1, 1, 1, 1, 1]), 4) and 'still falling' in training_warnings(frame([4., 3, 2, 1], [4., 3, 2, 1]), 4)[0]
    assert 'by heart' in training_warnings(frame([4., 3, 2, 1, .5, .3, .2, .1], [4., 3, 2, 2.5, 3, 3.5, 4, 4]), 4)[0] and training_warnings(pd.DataFrame({'epoch': []}), 4) == []
    assert 'not a number' in training_warnings(frame([1., 1, np.nan], [1., 1, 1]), 4)[0]

def test_a_model_that_knows_its_training_images_by_heart(tmp_path, model, shapes):
    data = dataset(make_shapes(20, seed=8))
    nothing = [replace(s.instances[[]], scores=np.zeros(0, np.float32)) for s in data]
    p = whole(write_report(tmp_path, model, data, scored(data, nothing), nothing, shapes[0].subset(range(3))))
    assert 'on 3 training images and 0.000 in validation: the training images are known by heart' in p.said


CONTRAST = '''() => {
  const light = c => { const [r, g, b] = c.match(/[0-9.]+/g).map(v => v / 255).map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4); return .2126 * r + .7152 * g + .0722 * b }
  const out = []
  for (const e of document.body.querySelectorAll('*')) {
    if (![...e.childNodes].some(n => n.nodeType == 3 && n.data.trim())) continue
    let g = e
    while (g && getComputedStyle(g).backgroundColor == 'rgba(0, 0, 0, 0)') g = g.parentElement
    const [a, b] = [light(getComputedStyle(e).color), light(g ? getComputedStyle(g).backgroundColor : 'rgb(255, 255, 255)')].sort((x, y) => y - x)
    if ((a + .05) / (b + .05) < 4.5) out.push(e.tagName + ' ' + e.textContent.slice(0, 30))
  }
  return out }'''

@needs_browser
@pytest.mark.parametrize('width,scheme', [(1280, 'light'), (390, 'dark')])
def test_in_a_browser(shipped, open_page, width, scheme):
    page = open_page(shipped, width, scheme)
    assert not look(page)
    assert page.evaluate(CONTRAST) == [] and (brightness(page) > 230) == (scheme == 'light')
    page.add_style_tag(content='p {color: #999 !important; background: #aaa}')
    assert page.evaluate(CONTRAST), 'the check of the contrast can fail'

@needs_browser
def test_hostile_names_in_a_browser(open_page, tmp_path):
    samples = [replace(s, name=HOSTILE + str(i)) for i, s in enumerate(make_shapes(2, seed=1))]
    data = dataset(samples, ['background', HOSTILE, 'b', 'c'])
    found = guessed(data, keep=1)
    page = open_page(write_report(tmp_path, MaskRCNN(SHAPES), data, scored(data, found), found, faults=[HOSTILE], title=HOSTILE), 390)
    assert not look(page) and page.title() == HOSTILE and page.locator('h1').inner_text() == HOSTILE and page.locator('script').count() == 0

@needs_browser
def test_contents_lead_to_their_sections_and_paper_has_no_need_of_them(shipped, open_page):
    page = open_page(shipped)
    links = page.locator('nav a')
    for i in range(links.count()):
        links.nth(i).click()
        assert page.locator(page.evaluate('location.hash')).bounding_box()['y'] < 900
    page.emulate_media(media='print')
    assert not page.locator('nav').is_visible() and page.locator('table').first.is_visible()
    assert len(page.pdf(prefer_css_page_size=True)) > 50_000

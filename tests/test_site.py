"The site as a reader has it: built from the notebooks, opened from the disk in Chromium; and a page of a trace."
import ast, fcntl, html.parser, json, re, shutil, subprocess, sys
from pathlib import Path
import pytest

root = Path(__file__).resolve().parent.parent
browser_file = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
needs_browser = pytest.mark.skipif(not browser_file, reason='no Chromium here: `apt-get install chromium` has one')
quiet = ['--no-sandbox', '--disable-gpu', '--disable-dev-shm-usage', '--disable-background-networking', '--disable-component-update', '--disable-sync', '--no-first-run']
sys.path.insert(0, str(root/'site'))
import api, convert   # of the folder site


@pytest.fixture(scope='module')
def site(tmp_path_factory):
    "The pages, built once for all workers."
    shared = tmp_path_factory.getbasetemp()
    if shared.name.startswith('popen-'): shared = shared.parent
    with open(shared/'site.lock', 'w') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (shared/'site/index.html').exists():
            done = subprocess.run([sys.executable, root/'site/build.py', shared/'site'], cwd=root, capture_output=True, text=True)
            assert done.returncode == 0, f'the site has warnings or cannot be built:\n{done.stderr[-3000:]}'
    return shared/'site'

@pytest.fixture(scope='module')
def chromium():
    from playwright.sync_api import sync_playwright
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=browser_file, args=quiet)
        yield browser
        browser.close()

@pytest.fixture
def open_page(chromium, tmp_path):
    "Open a file at a width; what the browser complains about, and what it asks of the net, gathers in `complaints`."
    contexts = []
    def start(file, width=1280, scheme='light'):
        context = chromium.new_context(viewport=dict(width=width, height=900), color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        page.complaints = []
        page.on('console', lambda m: page.complaints.append(f'{m.type}: {m.text}') if m.type in ('error', 'warning') else None)
        page.on('pageerror', lambda e: page.complaints.append(f'error: {e}'))
        page.on('request', lambda r: page.complaints.append(f'asks for {r.url}') if not r.url.startswith(('file:', 'data:', 'blob:')) else None)
        page.on('requestfailed', lambda r: page.complaints.append(f'{r.url}: {r.failure}'))
        page.goto(file if '://' in str(file) else Path(file).as_uri())
        return page
    yield start
    for c in contexts: c.close()


LOOK = '''() => ({
  wide: document.documentElement.scrollWidth - document.documentElement.clientWidth,
  broken: [...document.images].filter(i => !i.complete || i.naturalWidth == 0).map(i => i.src),
  nameless: [...document.images].filter(i => !i.alt || /[.]png$/.test(i.alt)).map(i => i.src)})'''

def look(page):
    "What is wrong on a page that is open."
    page.wait_for_load_state('load')
    seen = page.evaluate(LOOK)
    wrong = [f'{kind}: {seen[kind]}' for kind in ('broken', 'nameless') if seen[kind]]
    if seen['wide'] > 0: wrong.append(f'wider than the window by {seen["wide"]} pixels')
    wrong += page.complaints
    page.complaints = []
    return wrong


class Links(html.parser.HTMLParser):
    "The places that a page can be entered at, and where it leads."
    def __init__(self, text):
        super().__init__()
        self.ids, self.targets = set(), []
        self.feed(text)
    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if attrs.get('id'): self.ids.add(attrs['id'])
        for name in ('href', 'src'):
            if attrs.get(name): self.targets.append((tag, attrs[name]))

def test_every_link_leads_to_a_page_and_a_place_on_it(site):
    pages = {p: Links(p.read_text(encoding='utf-8')) for p in site.rglob('*.html')}
    assert len(pages) > len(convert.lessons) * 2
    for page, links in pages.items():
        for tag, target in links.targets:
            if re.match(r'(https?|mailto|data|javascript):', target):
                assert tag == 'a' or target.startswith('data:'), f'{page.name} loads {target} from the net'
                continue
            file, _, place = target.partition('#')
            there = (page.parent/file.split('?')[0]).resolve() if file else page
            assert there.exists(), f'{page.relative_to(site)} leads to {target}, which is missing'
            assert not there.name.endswith('.ipynb'), f'{page.relative_to(site)} leads to a notebook, not to its page: {target}'
            if place and there in pages: assert place in pages[there].ids, f'{page.relative_to(site)}: {target} leads to no place on its page'

def test_every_lesson_answer_module_and_test_has_its_page(site):
    for p in convert.lessons: assert (site/f'{p.stem}.html').exists()
    for p in convert.answers: assert (site/f'solutions/{p.stem}.html').exists()
    for m in map(convert.module, convert.lessons):
        text = (site/f'api/{m}.html').read_text(encoding='utf-8')
        assert re.search(r'href="\.\./\d\d\w*\.html"', text), f'the page of {m} does not lead to its lesson'
    home = Links((site/'index.html').read_text(encoding='utf-8')).targets
    order = [t for tag, t in home if tag == 'a' and re.fullmatch(r'\d\d\w*\.html', t)]
    tree = [f'{p.stem}.html' for p in convert.lessons]
    assert any(order[i:i + len(tree)] == tree for i in range(len(order))), 'the lessons do not stand in the order of reading'

def test_directives_are_obeyed():
    code = lambda source, **k: dict(cell_type='code', source=source, outputs=k.get('outputs', []), id='x', metadata={})
    shown = lambda *args, **k: [c for c in convert.code_cell(code(*args, **k), '', 'Heading') if c['cell_type'] == 'code']
    assert not shown('#| hide\nassert secret') and not shown('#| default_exp nms') and not shown('#| include: false\nx')
    one, = shown('#| eval: false\n#| fig-alt: Two boxes\nplot()')
    assert one['source'] == 'plot()' and one['metadata']['mystnb']['image']['alt'] == 'Two boxes'
    one, = shown('plot()')
    assert one['metadata']['mystnb']['image']['alt'] == 'Figure: Heading'
    one, = shown('#| hide\nimport torch')
    assert 'hide-input' in one['metadata']['tags']
    stream = dict(output_type='stream', name='stdout', text='out')
    one, = shown('#| echo: false\nplot()', outputs=[stream, dict(stream, name='stderr')])
    assert one['metadata']['tags'] == ['remove-input'] and one['outputs'] == [stream]
    anchor, one = convert.code_cell(code('#| export\ndef f(): pass'), '', 'Heading')
    assert 'id="def-f"' in anchor['source'] and 'exported' in one['metadata']['tags']

def test_tables_of_arguments_are_those_of_docments():
    "Our reader needs no import; on every function that fastcore can read, the two agree."
    from fastcore.docments import docments
    import maskrcnn_edu.boxes, maskrcnn_edu.core, maskrcnn_edu.data, maskrcnn_edu.nms, maskrcnn_edu.roi_align, maskrcnn_edu.rpn_targets
    compared = 0
    for module in (maskrcnn_edu.boxes, maskrcnn_edu.core, maskrcnn_edu.data, maskrcnn_edu.nms, maskrcnn_edu.roi_align, maskrcnn_edu.rpn_targets):
        source = Path(module.__file__).read_text(encoding='utf-8')
        tree, said = ast.parse(source), api.comments(source)
        for node in tree.body:
            if not isinstance(node, ast.FunctionDef) or node.name == '_' or node.decorator_list: continue
            theirs = {k: ' '.join((v or '').split()) for k, v in docments(getattr(module, node.name), args_kwargs=True).items()}   # a comment of two lines is one sentence
            ours = {a.name.lstrip('*').replace('returns', 'return'): a.comment for a in api.arguments(node, said)}
            assert {k: v for k, v in theirs.items() if v} == {k: v for k, v in ours.items() if v}, f'{module.__name__}.{node.name}'
            compared += any(ours.values())
    assert compared > 40


@needs_browser
def test_home_shows_the_diagram_and_every_box_leads_to_its_lesson(site, open_page):
    page = open_page(site/'index.html')
    boxes = page.locator('.diagram svg a')
    targets = [boxes.nth(i).get_attribute('href') for i in range(boxes.count())]
    main = {p.stem for p in convert.lessons if re.match(r'[012]\d_', p.name)}
    assert page.locator('.diagram svg').first.bounding_box()['width'] > 600
    assert main <= {Path(t).stem for t in targets}, f'no box leads to {main - {Path(t).stem for t in targets}}'
    for i, target in enumerate(targets):
        box = page.locator('.diagram svg a').nth(i)
        box.scroll_into_view_if_needed()
        if i % 2: box.focus(), page.keyboard.press('Enter')
        else: box.locator('text').first.click()
        page.wait_for_url(f'**/{target}')
        path = root/'nbs'/f'{Path(target).stem}.ipynb'
        assert page.locator('h1').first.inner_text().strip().startswith(re.sub(r'[`*]', '', convert.title(path))), target
        assert not look(page), target
        page.goto((site/'index.html').as_uri())

@needs_browser
def test_every_page_loads_and_fits(site, open_page):
    page = open_page(site/'index.html', width=390)
    wrong = {}
    for file in sorted(site.rglob('*.html')):
        page.goto(file.as_uri())
        for width in (390, 1280) if file.parent == site else (390,):
            page.set_viewport_size(dict(width=width, height=900))
            if found := look(page): wrong[f'{file.relative_to(site)} at {width}'] = found
    assert not wrong, json.dumps(wrong, indent=1)[:4000]

@needs_browser
def test_the_check_of_a_page_can_fail(open_page, tmp_path):
    (tmp_path/'bad.html').write_text('<html><body><img src="none.png"><div style="width:2000px">x</div><script>console.error("oh")</script></body></html>')
    found = ' '.join(look(open_page(tmp_path/'bad.html')))
    assert all(word in found for word in ('broken', 'nameless', 'wider', 'oh'))

@needs_browser
def test_search_finds_the_anchors(site, open_page):
    page = open_page(site/'index.html')
    page.fill('input[name=q]', 'anchors')
    page.press('input[name=q]', 'Enter')
    page.wait_for_selector('#search-results ul.search li a')
    # results come one after the other, and the summary when all are there
    page.wait_for_function("(document.querySelector('#search-results p.search-summary')?.textContent || '').includes('found')")
    found = page.locator('#search-results ul.search li a').evaluate_all('all => all.map(a => a.getAttribute("href"))')
    assert any('03_anchors.html' in f for f in found) and any('api/anchors.html' in f for f in found)
    assert not look(page)

def brightness(page, what='body'):
    "How light the ground of an element is, 0..255."
    return page.evaluate(f'''() => {{ let e = document.querySelector({what!r}), c = ''
      for (; e; e = e.parentElement) {{ c = getComputedStyle(e).backgroundColor; if (c && c != 'rgba(0, 0, 0, 0)') break }}
      return c.match(/[0-9.]+/g).slice(0, 3).reduce((a, b) => a + Number(b), 0) / 3 }}''')

@needs_browser
def test_dark_and_light(site, open_page):
    fill = lambda page: page.evaluate("getComputedStyle(document.querySelector('.diagram svg > rect')).fill")
    assert brightness(light := open_page(site/'index.html')) > 230 and fill(light) == 'rgb(255, 255, 255)'
    assert brightness(dark := open_page(site/'index.html', scheme='dark')) < 50 and fill(dark) != 'rgb(255, 255, 255)'
    light.locator('.theme-toggle-header, .content-icon-container .theme-toggle').last.click()                 # auto, then the other one
    for _ in range(2):
        if brightness(light) < 50: break
        light.locator('.content-icon-container .theme-toggle').last.click()
    assert brightness(light) < 50 and fill(light) == fill(dark)

@needs_browser
@pytest.mark.parametrize('width', [1280, 390])
def test_screenshots(site, open_page, tmp_path, width):
    "Pictures for whoever wants to look; and none of them is empty."
    for name, scheme in (('index', 'light'), ('index', 'dark'), ('03_anchors', 'light'), ('api/nms', 'dark')):
        file = tmp_path/f'{name.replace("/", "_")}_{width}_{scheme}.png'
        open_page(site/f'{name}.html', width, scheme).screenshot(path=file)
        assert file.stat().st_size > 15_000


@pytest.fixture(scope='module')
def traces(tmp_path_factory):
    "Pages of a trace in prediction and in training, of the shipped model."
    pytest.importorskip('maskrcnn_edu.trace', reason='maskrcnn_edu.trace is not there yet')
    import torch
    from maskrcnn_edu.checkpoints import load_weights
    from maskrcnn_edu.data import make_shapes
    from maskrcnn_edu.trace import trace_model
    model, names = load_weights('shapes')
    s = make_shapes(1, seed=5)[0]
    images = torch.tensor(s.image).permute(2, 0, 1)[None] / 255
    truth = [torch.tensor(x)[None] for x in (s.instances.boxes, s.instances.labels, s.instances.masks())]
    folder = tmp_path_factory.mktemp('traces')
    return trace_model(model, images, names=names).to_html(folder/'prediction.html'), trace_model(model, images, *truth, names=names).to_html(folder/'training.html')

@needs_browser
@pytest.mark.parametrize('way,width', [(0, 1280), (1, 390)], ids=['prediction, wide', 'training, narrow'])
def test_a_trace_opens_every_box_by_click_and_by_keyboard(traces, open_page, tmp_path, way, width):
    page = open_page(traces[way], width)
    assert not look(page)
    boxes = page.locator('svg a[data-box]')
    names = [boxes.nth(i).get_attribute('data-box') for i in range(boxes.count())]
    assert len(set(names)) > 15 and page.locator('dialog[open]').count() == 0
    for i, name in enumerate(names):
        panel = page.locator(f'#panel-{name}')
        boxes.nth(i).scroll_into_view_if_needed()
        boxes.nth(i).locator('text').first.click()
        assert panel.is_visible(), f'a click does not open {name}'
        assert not look(page), name
        page.keyboard.press('Escape')
        assert not panel.is_visible(), f'Escape does not close {name}'
        page.wait_for_timeout(20)                # the page is told that the panel has closed after it has
        boxes.nth(i).focus()
        page.keyboard.press('Enter')
        assert panel.is_visible(), f'Enter does not open {name}'
        if i in (0, 9): page.screenshot(path=tmp_path/f'{name}.png')
        page.keyboard.press('Escape')
        assert page.locator('dialog[open]').count() == 0
    assert not look(page)

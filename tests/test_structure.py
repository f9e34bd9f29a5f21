"What holds the project together: one direction of imports, notebooks and modules in step, one place for metadata."
import ast, configparser, importlib.util, json, re, shutil, subprocess, sys, tomllib
import xml.etree.ElementTree as ET
from pathlib import Path
import pytest

root = Path(__file__).resolve().parent.parent
package = 'maskrcnn_edu'
numbered = sorted((root/'nbs').glob('[0-9][0-9]*.ipynb'))
every_notebook = sorted(p for p in (root/'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts)
name = lambda path: str(path.relative_to(root))


def cells(path, kind):
    "Sources of a notebook's cells of one kind."
    return [''.join(c['source']) for c in json.loads(path.read_text(encoding='utf-8'))['cells'] if c['cell_type'] == kind]

def default_exp(path):
    "The module that a notebook exports to."
    found = re.findall(r'^#\|\s*default_exp\s+(\S+)', '\n'.join(cells(path, 'code')), re.M)
    assert len(found) == 1, f'{name(path)} has {len(found)} default_exp lines, one is needed'
    return found[0]

def order():
    "Module -> place in the order of reading."
    modules = [default_exp(p) for p in numbered]
    assert len(set(modules)) == len(modules), 'two notebooks export to the same module'
    return {m: i for i, m in enumerate(modules)}

def our_imports(code, module=''):
    "Names of our modules that `code`, which stands in `module`, imports."
    parts = f'{package}.{module}'.split('.')
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import): names = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = '.'.join(parts[:len(parts) - node.level]) if node.level else ''
            base = '.'.join(filter(None, [base, node.module]))
            names = [f'{base}.{a.name}' for a in node.names] if base == package else [base]
        else: continue
        yield from (n[len(package) + 1:] for n in names if n.startswith(package + '.'))

def plain(code):
    "Cell without the lines that only IPython understands."
    return '\n'.join('pass' if re.match(r'\s*[%!]', line) else line for line in code.splitlines()) if not code.startswith('%%') else ''

def known(module, places):
    "The module that a name belongs to; None for the package's own names."
    while module and module not in places: module = module.rpartition('.')[0]
    return module or None

# the rooms of the house, from the bottom; in a room lower numbers come first
CORE = ('boxes anchors resnet fpn rpn_head rpn_targets rpn_loss nms proposals rpn roi_align head_targets box_head box_loss '
        'mask_head mask_loss detections record mask_rcnn').split()
DATA = [f'data.{m}' for m in ('shapes files names tiff images masks label_maps records coco writing via folders programs truth doctor sources '
                              'opening recommend').split()]
ROOMS = dict(core=CORE, drawing=['core'], objects=['instances', 'anchor_sizes'], data=DATA,
             train=['learner', 'loss_doctor', 'evaluate'],
             dialects=['dialects.base', 'dialects.torchvision', 'dialects.detectron2', 'dialects.detectron', 'dialects.matterport', 'checkpoints'],
             looking=['trace'], own=['nuclei'], use=['tiles', 'results', 'report', 'speed'], cli=['train'])
BELOW = dict(core=[], drawing=[], objects=['core'], data=['core', 'drawing', 'objects'], train=['core', 'drawing', 'objects', 'data'],
             dialects=['core', 'objects', 'data'], looking=['core', 'drawing', 'objects', 'data'], own=['core', 'drawing', 'objects', 'data', 'train'],
             use=['core', 'drawing', 'objects', 'data', 'train', 'dialects', 'looking', 'own'], cli=list(ROOMS)[:-1])
room_of = {m: room for room, modules in ROOMS.items() for m in modules}


def test_the_import_finder_sees_every_way_to_import():
    code = ('import maskrcnn_edu.boxes as b\nfrom maskrcnn_edu import nms\nfrom maskrcnn_edu.cuda.nms import x\n'
            'from .fpn import FPN\nfrom . import rpn\nimport torch\ndef f():\n  from maskrcnn_edu.data import y')
    assert sorted(our_imports(code, 'core')) == ['boxes', 'cuda.nms', 'data', 'fpn', 'nms', 'rpn']
    assert list(our_imports('from ..core import x', 'cuda.nms')) == ['core']


def test_every_module_has_a_room():
    assert sorted(order()) == sorted(room_of), 'ROOMS in this file must name every module'

def may_import(module, other, places):
    "Whether the rooms and the order of reading allow it."
    if room_of[module] == room_of[other]: return places[other] < places[module]
    return room_of[other] in BELOW[room_of[module]]

@pytest.mark.parametrize('path', numbered, ids=name)
def test_a_module_imports_from_the_rooms_below_and_what_comes_before_it(path):
    places, module = order(), default_exp(path)
    code = (root/package/(module.replace('.', '/') + '.py')).read_text(encoding='utf-8')
    used = {known(m, places) for m in our_imports(code, module)} - {None}
    wrong = sorted(m for m in used if not may_import(module, m, places))
    assert not wrong, f'{module}, of the room {room_of[module]}, imports {wrong}'

@pytest.mark.parametrize('path', numbered, ids=name)
def test_a_lesson_shows_nothing_that_comes_later_in_its_room(path):
    "Its demonstrations may draw, and use data and objects; of the core only what was taught."
    places, module = order(), default_exp(path)
    used = {known(m, places) for c in cells(path, 'code') for m in our_imports(plain(c), module)} - {None, module}
    helpers = ('drawing', 'objects', 'data', 'train') if room_of[module] in ('core', 'objects') else tuple(ROOMS)
    wrong = sorted(m for m in used if not may_import(module, m, places) and not (room_of[m] in helpers and places[m] < 100))
    later = sorted(m for m in used if room_of[m] == 'core' == room_of[module] and places[m] > places[module])
    assert not wrong and not later, f'{name(path)} imports {wrong + later}'


@pytest.mark.parametrize('path', every_notebook, ids=name)
def test_no_star_import_between_our_modules(path):
    stars = [n.module for c in cells(path, 'code') for n in ast.walk(ast.parse(plain(c)))
             if isinstance(n, ast.ImportFrom) and n.names[0].name == '*' and (n.module or '').startswith(package)]
    assert not stars, f'{name(path)} imports * from {stars}; name what it uses'


@pytest.mark.parametrize('path', every_notebook, ids=name)
def test_notebook_has_title_subtitle_and_no_stored_error(path):
    first = cells(path, 'markdown')[0].splitlines()
    assert first[0].startswith('# ') and any(line.startswith('> ') for line in first[1:]), \
        f'{name(path)} must open with "# Title" and "> subtitle"'
    outputs = [o for c in json.loads(path.read_text(encoding='utf-8'))['cells'] for o in c.get('outputs', [])]
    assert not any(o['output_type'] == 'error' for o in outputs), f'{name(path)} has an error in its stored outputs'


def test_every_module_comes_from_a_notebook():
    exported = {'__init__.py', '_modidx.py'} | {m.replace('.', '/') + '.py' for m in order()}
    files = {p.relative_to(root/package).as_posix() for p in (root/package).rglob('*.py')}
    native = {'cuda/build.py', 'cuda/rules.py'}      # what compiles the kernels and makes them known is no lesson
    written = {f for f in files - exported - native if not f.endswith('/__init__.py')}
    assert not written, f'{sorted(written)} come from no notebook'
    for m in order():
        text = (root/package/(m.replace('.', '/') + '.py')).read_text(encoding='utf-8')
        assert '# AUTOGENERATED! DO NOT EDIT!' in text, f'{m} was written by hand'


HEAVY = ['matplotlib', 'pandas', 'scipy', 'skimage', 'pycocotools', 'tifffile', 'fastai', 'h5py', 'IPython', 'safetensors', 'imageio']

def test_the_network_loads_no_more_than_torch_and_its_ops():
    "In a fresh process; what torch and torchvision.ops load themselves does not count."
    code = ('import sys, torch, torchvision.ops\nbefore = set(sys.modules)\nimport maskrcnn_edu.mask_rcnn\n'
            'print(*sorted({m.partition(".")[0] for m in set(sys.modules) - before}))')
    loaded = subprocess.run([sys.executable, '-c', code], cwd=root, check=True, capture_output=True, text=True).stdout.split()
    assert not set(loaded) & set(HEAVY), f'importing the network loads {sorted(set(loaded) & set(HEAVY))}'
    from importlib.metadata import packages_distributions
    others = set(loaded) & set(packages_distributions()) - {package, 'fastcore', 'torch', 'torchvision'}
    assert not others, f'importing the network loads {sorted(others)}'

def lines_of_code(text): return sum(1 for line in text.splitlines() if line.strip() and not line.strip().startswith('#'))

def test_the_core_is_the_paper_and_nothing_else():
    "No other program, few lines, few parameters: a direction that the design gives."
    total = 0
    for module in set(CORE) - {'record'}:
        text = (root/package/f'{module}.py').read_text(encoding='utf-8')
        total += lines_of_code(text)
        for f in ast.walk(ast.parse(text)):
            if isinstance(f, ast.FunctionDef):
                names = [a.arg for a in f.args.args + f.args.kwonlyargs if a.arg != 'self']
                assert len(names) <= 10, f'{module}.{f.name} has {len(names)} parameters'
    assert total <= 1500, f'the core has {total} lines'

@pytest.mark.parametrize('path', [p for p in numbered if room_of[default_exp(p)] in ('core', 'objects')], ids=name)
def test_exported_cells_of_the_core_are_short(path):
    for code in cells(path, 'code'):
        exported = re.match(r'#\|\s*export', code) is not None
        rows = [line for line in code.splitlines() if line.strip()]
        if exported and not all(isinstance(n, (ast.Import, ast.ImportFrom)) for n in ast.parse(code).body):
            assert len(rows) <= 26, f'{name(path)}: {rows[1]} has {len(rows) - 1} lines'

@pytest.mark.parametrize('path', numbered, ids=name)
def test_lines_of_lessons_fit_a_page_of_the_site(path):
    long = [line for code in cells(path, 'code') for line in code.splitlines() if len(line) > 100]
    assert not long, f'{name(path)}: {long[0]}'

def test_other_programs_stay_in_their_room():
    "Everything outside dialects/ knows that there are dialects, not which."
    others = re.compile('matterport|detectron|multimodal|conventions', re.I)
    for file in [*(root/package).glob('*.py'), *(root/package/'cuda').rglob('*')]:
        if file.name == '_modidx.py' or file.suffix not in ('.py', '.h', '.cpp', '.cu', '.cuh'): continue
        assert not others.search(file.read_text(encoding='utf-8')), file


@pytest.fixture
def copy(tmp_path):
    "The tracked files as they are now, in a repository of their own."
    run = lambda *c: subprocess.run(c, cwd=tmp_path, check=True, capture_output=True, text=True).stdout
    listed = subprocess.run(['git', 'ls-files', '-z'], cwd=root, check=True, capture_output=True, text=True).stdout
    for file in filter(None, listed.split('\0')):
        if (root/file).is_file():
            (tmp_path/file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(root/file, tmp_path/file)
    run('git', 'init', '--quiet')
    run('git', 'add', '--all')
    run('git', '-c', 'user.name=test', '-c', 'user.email=test@localhost', 'commit', '--quiet', '--message', 'copy')
    return tmp_path, run

@pytest.mark.parametrize('command', ['nbdev-export', 'nbdev-clean'])
def test_nbdev_changes_nothing(copy, command):
    folder, run = copy
    run(str(Path(sys.executable).parent/command))
    assert run('git', 'status', '--porcelain') == '', f'{command} changes files: run it and commit\n{run("git", "diff", "--stat")}'


def test_metadata_stands_in_one_place(monkeypatch):
    config = configparser.ConfigParser(delimiters=['='])
    config.read(root/'settings.ini', encoding='utf-8')
    meta = config['DEFAULT']
    project = tomllib.loads((root/'pyproject.toml').read_text(encoding='utf-8'))
    assert set(project) == {'build-system', 'tool'} and set(project['tool']) == {'nbdev'}
    nbdev = project['tool']['nbdev']
    assert (nbdev['lib_path'], nbdev['nbs_path']) == (meta['lib_path'], meta['nbs_path'])
    assert set(nbdev) & {'version', 'description', 'author', 'license', 'min_python', 'requirements'} == set()
    assert project['build-system']['requires'][0] in meta['dev_requirements'].split('\n')
    assert not (root/'setup.cfg').exists() and not list(root.glob('requirements*.txt'))

    given = {}
    monkeypatch.setattr('setuptools.setup', lambda **kw: given.update(kw))
    monkeypatch.chdir(root)
    spec = importlib.util.spec_from_file_location('our_setup', root/'setup.py')
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    assert (given['name'], given['version'], given['license']) == (meta['lib_name'], meta['version'], meta['license'])
    assert given['python_requires'] == '>=' + meta['min_python'] and given['description'] == meta['description']
    assert given['install_requires'] == meta['requirements'].split() and given['extras_require']['dev'] == meta['dev_requirements'].split()
    assert any(r.startswith('torch>=') for r in given['install_requires'])
    assert package in given['packages'] and not any(p.startswith('tests') for p in given['packages'])
    assert meta['version'] not in (root/'setup.py').read_text() + (root/'pyproject.toml').read_text()
    version = re.search(r'^__version__ = "(.*)"$', (root/package/'__init__.py').read_text(), re.M)[1]
    assert version == meta['version']


svg = lambda: ET.fromstring((root/'nbs/images/overview.svg').read_text(encoding='utf-8'))
space = '{http://www.w3.org/2000/svg}'

def test_every_box_of_the_diagram_links_to_the_notebook_of_its_module():
    groups = [g for g in svg().iter(space + 'g') if g.get('id')]
    for group in groups:
        target = group.find(space + 'a').get('href')
        path = (root/'nbs/images'/target).resolve()
        assert path.is_file(), f'the box {group.get("id")} links to {target}, which is missing'
        assert default_exp(path).partition('.')[0] == group.get('id'), f'the box {group.get("id")} links to {target}'
    drawn = [g.get('id') for g in groups]
    assert len(drawn) == len(set(drawn)), 'an id stands twice in the diagram'
    main = {default_exp(p).partition('.')[0] for p in numbered if re.match(r'[012]\d_', p.name)}        # the rooms from 30 on stand beside the diagram
    assert main <= set(drawn), f'not in the diagram: {sorted(main - set(drawn))}'
    plain_boxes = [g for g in svg().iter(space + 'g') if 'box' in (g.get('class') or '').split() and not g.get('id')]
    assert len(plain_boxes) == 4, 'only the four boxes of the legend may stand without a link'

def test_the_diagram_is_the_one_that_its_script_draws():
    spec = importlib.util.spec_from_file_location('overview', root/'tools/overview.py')
    overview = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(overview)
    for path in overview.targets:
        assert path.read_text(encoding='utf-8') == overview.draw(), f'{name(path)}: run `python tools/overview.py`'


@pytest.fixture
def readme():
    spec = importlib.util.spec_from_file_location('readme', root/'tools/readme.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

def test_readme_is_in_step_with_the_index(readme):
    text, pictures = readme.convert()
    assert (root/'README.md').read_text(encoding='utf-8') == text, 'run `make readme`'
    for file, content in pictures.items(): assert (root/file).read_bytes() == content, f'{file}: run `make readme`'

def test_results_in_the_readme_are_those_of_the_json(monkeypatch):
    code, = (c for c in cells(root/'nbs/index.ipynb', 'code') if 'def results_table' in c)
    monkeypatch.chdir(root/'nbs')
    space = {}
    exec(code, space)
    assert space['results_table']().data in (root/'README.md').read_text(encoding='utf-8'), 'run `make readme`'

def test_links_of_the_readme_lead_somewhere():
    targets = re.findall(r'\]\(([^)#]+)', (root/'README.md').read_text(encoding='utf-8'))
    here = [t for t in targets if not t.startswith('http')]
    assert not [t for t in here if not (root/t).exists()]
    assert {name(p) for p in numbered if re.match(r'\d\d_', p.name)} <= set(here), 'a notebook is not in the table'

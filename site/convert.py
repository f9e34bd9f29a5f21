"Notebooks as stored -> notebooks as Sphinx shows them: directives obeyed, links between pages, the diagram inline and clickable."
import ast, json, re
from pathlib import Path

root = Path(__file__).resolve().parent.parent
nbs = root/'nbs'
lessons = sorted(nbs.glob('[0-9][0-9]*.ipynb'))
answers = sorted((nbs/'solutions').glob('*.ipynb'))


def joined(text): return text if isinstance(text, str) else ''.join(text)

def read(path): return json.loads(path.read_text(encoding='utf-8'))

def directives(code):
    "`#| name: value` lines -> {name: value}, and the code without them."
    joined_up = re.sub(r'\n#\|[ \t]{3,}', ' ', code)     # a value may go on in indented lines
    found = dict((m[1], m[2].strip()) for m in re.finditer(r'^#\|\s*([\w-]+):?[ \t]*(.*)$', joined_up, re.M))
    return found, re.sub(r'^#\|.*\n?', '', code, flags=re.M).strip('\n')

def title(path):
    "The text of the first heading."
    return re.search(r'^# (.+)$', joined(read(path)['cells'][0]['source']), re.M)[1].strip()

def module(path):
    "What a lesson exports to; None for other notebooks."
    code = '\n'.join(joined(c['source']) for c in read(path)['cells'] if c['cell_type'] == 'code')
    found = re.search(r'^#\|\s*default_exp\s+(\S+)', code, re.M)
    return found[1] if found else None

def parsed(code):
    "Statements of a cell; none where only IPython understands it."
    try: return ast.parse(re.sub(r'^\s*[%!].*$', 'pass', code, flags=re.M)).body
    except SyntaxError: return []

def only_imports(code):
    "Whether a cell is there to import: nothing but a setting may stand beside."
    body = parsed(code)
    return bool(body) and isinstance(body[0], (ast.Import, ast.ImportFrom)) and all(isinstance(n, (ast.Import, ast.ImportFrom, ast.Assign, ast.Expr)) for n in body)

def defines(code): return [n.name for n in parsed(code) if isinstance(n, (ast.FunctionDef, ast.ClassDef))] + [
    t.id for n in parsed(code) if isinstance(n, ast.Assign) for t in n.targets if isinstance(t, ast.Name)]


def diagram(svg, up=''):
    "The diagram as HTML: boxes lead to pages, and ids do not collide with those of headings."
    svg = re.sub(r'href="(?:\.\./)*(\d\d\w*)\.ipynb"', rf'href="{up}\1.html"', svg)
    svg = re.sub(r'<title>(\d\d)_(\w+)\.ipynb</title>', r'<title>\1 \2</title>', svg).replace(' id="', ' data-box="')
    return f'<div class="diagram">\n{re.sub(chr(10) + "+", chr(10), svg).strip()}\n</div>'

SQUARES = dict(zip('🟨🟦🟪🟩', ('datagen', 'model', 'filter', 'loss')))         # not every machine has a font with them

def links(text, up=''):
    "Links of a text that lead out of the pages' folder, and the colours of the diagram."
    for square, role in SQUARES.items(): text = text.replace(square, f'<span class="key {role}"></span>')
    picture = diagram((nbs/'images/overview.svg').read_text(encoding='utf-8'), up)
    text = re.sub(r'\[!\[[^\]]*\]\((?:\.\./)*images/overview\.svg\)\]\([^)]*\)', lambda m: picture, text)
    text = re.sub(r'!\[[^\]]*\]\((?:\.\./)*images/overview\.svg\)', lambda m: picture, text)
    text = re.sub(r'\[([^\]]*)\]\((?:\.\./)*images/overview\.svg\)', rf'<a href="{up}overview.svg">\1</a>', text)
    text = re.sub(r'\]\((?:\.\./)+(?:maskrcnn_edu)/([\w/]+)\.py\)', lambda m: f']({up}api/{m[1].replace("/", ".")}.md)', text)
    return re.sub(r'\]\((?:\.\./)+tests/(test_\w+)\.py\)', rf']({up}tests/\1.md)', text)

def output(out, up):
    "One stored output, or None if a page has no use for it."
    if out['output_type'] == 'error' or out.get('name') == 'stderr': return None
    data = out.get('data')
    if data is None: return out
    data = {k: v for k, v in data.items() if not k.startswith('application/')}
    if 'image/svg+xml' in data and 'mrcnn-overview' in joined(data['image/svg+xml']):
        data = {'text/html': diagram(joined(data['image/svg+xml']), up)}
    for kind in ('text/html', 'text/markdown'):
        if kind in data: data[kind] = re.sub(r'(href="(?:\.\./)*[\w/]+)\.ipynb', r'\1.html', links(joined(data[kind]), up))
    if len(data) == 1 and re.match(r'<(function|matplotlib|Axes|Figure)', joined(data.get('text/plain', ''))): return None   # of use in a live notebook only
    return dict(out, data=data) if data else None

KINDS = {'exercise': 'Exercise {}: write your own', 'check': 'Check of exercise {}', 'solution': 'Answer {}'}

def code_cell(cell, up, heading):
    "A code cell as the page shows it, and the anchors of what it exports; nothing if it is hidden."
    found, code = directives(joined(cell['source']))
    imports, exported = only_imports(code), 'export' in found or 'exporti' in found
    if 'hide' in found and not imports or 'default_exp' in found or found.get('include') == 'false' or not code: return
    outputs = [o for o in (output(dict(o), up) for o in cell.get('outputs', [])) if o and found.get('output') != 'false']
    tags, shown = [], dict(image=dict(alt=found.get('fig-alt') or found.get('alt') or f'Figure: {heading}'))
    if found.get('echo') == 'false':
        if not outputs: return
        tags.append('remove-input')
    elif imports: tags.append('hide-input'), shown.update(code_prompt_show='Imports', code_prompt_hide='Imports')
    elif 'check' in found:
        tags.append('hide-input')
        shown.update(code_prompt_show=KINDS['check'].format(found['check']), code_prompt_hide=KINDS['check'].format(found['check']))
    tags += [f'{kind}-{found[kind]}' for kind in ('exercise', 'solution') if kind in found] + [kind for kind in ('exercise', 'solution') if kind in found]
    if exported and not imports: tags.append('exported')
    if exported and defines(code):
        yield dict(cell_type='markdown', metadata={}, source=''.join(f'<span id="def-{n}" class="anchor"></span>' for n in defines(code)))
    yield dict(cell_type='code', metadata=dict(tags=tags, mystnb=shown), source=code, outputs=outputs, execution_count=None)

def cells(path, up=''):
    "All cells of a notebook as its page shows them."
    heading = title(path)
    for cell in read(path)['cells']:
        text = joined(cell['source'])
        if cell['cell_type'] == 'code': yield from code_cell(cell, up, heading)
        elif cell['cell_type'] == 'markdown':
            heading = (re.findall(r'^#+ (.+)$', text, re.M) or [heading])[-1].strip()
            yield dict(cell_type='markdown', metadata={}, source=links(text, up))

def notebook(cells):
    "A notebook for myst-nb, which wants an id for every cell."
    language = dict(kernelspec=dict(name='python3', display_name='Python 3', language='python'), language_info=dict(name='python', pygments_lexer='ipython3'))
    return json.dumps(dict(nbformat=4, nbformat_minor=5, metadata=language, cells=[dict(c, id=f'cell{i}') for i, c in enumerate(cells)]), ensure_ascii=False)

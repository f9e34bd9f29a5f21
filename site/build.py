"Static pages from the notebooks as stored, offline: `python site/build.py [OUT]`, by default build/site."
import os, re, shutil, sys
from pathlib import Path
from sphinx.cmd.build import main as sphinx
import api, convert
from convert import answers, lessons, nbs, root, title

here = Path(__file__).resolve().parent
tests = sorted((root/'tests').glob('test_*.py'))
ROOMS = {'Boxes and data': ('00', '03'), 'Backbone': ('04', '05'), 'RPN': ('06', '11'), 'Head': ('12', '18'), 'The model': ('19', '19'),
         'Training': ('20', '22'), 'Using': ('23', '24'), 'Data': ('30', '39'), 'Looking': ('40', '49'), 'Other programs': ('50', '59')}   # first and last number


def toctree(caption, entries): return f'```{{toctree}}\n:hidden:\n:caption: {caption}\n\n' + '\n'.join(entries) + '\n```'

def number(path): return path.stem.split('_')[0]

def about(module):
    "The tests that mention a module."
    return [t.stem for t in tests if re.search(rf'maskrcnn_edu\.{re.escape(module)}\b|from maskrcnn_edu import [^\n]*\b{re.escape(module)}\b', t.read_text(encoding='utf-8'))]

def see_also(path):
    "Where a lesson's code and checks live."
    module, solution = convert.module(path), nbs/'solutions'/path.name
    parts = [f'module [`maskrcnn_edu.{module}`](api/{module}.md)'] if module else []
    parts += [f'[answers](solutions/{path.name})'] if solution.exists() else []
    parts += [f'tests {", ".join(f"[{t}](tests/{t}.md)" for t in about(module))}'] if module and about(module) else []
    return dict(cell_type='markdown', metadata={}, source=':::{container} seealso-line\n' + ' · '.join(parts) + '\n:::')

def index(modules):
    "The home page: the index with the diagram, and the tree of all pages."
    cells = list(convert.cells(nbs/'index.ipynb'))
    if not any('class="diagram"' in str(c) for c in cells):
        cells.insert(1, dict(cell_type='markdown', metadata={}, source=convert.diagram((nbs/'images/overview.svg').read_text(encoding='utf-8'))))
    rooms = {room: [p for p in lessons if first <= number(p)[:2] <= last] for room, (first, last) in ROOMS.items()}
    trees = [*(toctree(room, [f'{number(p)} {title(p)} <{p.stem}>' for p in ps]) for room, ps in rooms.items() if ps),
             toctree('Answers', [f'{number(p)} {title(p).removeprefix("Answers: ")} <solutions/{p.stem}>' for p in answers]),
             toctree('Reference', ['Modules <api/index>', 'Tests <tests/index>'])]
    return convert.notebook(cells + [dict(cell_type='markdown', metadata={}, source='\n\n'.join(trees))])

def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding='utf-8')

def sources(folder):
    "All pages as Sphinx reads them."
    by_module = {convert.module(p): p for p in lessons}
    modules = [*by_module, 'cuda', 'cuda.build', 'cuda.rules']
    write(folder/'index.ipynb', index(modules))
    for p in lessons:
        first, *rest = convert.cells(p)
        write(folder/p.name, convert.notebook([first, see_also(p), *rest]))
    for p in answers: write(folder/'solutions'/p.name, convert.notebook(convert.cells(p, up='../')))
    rows = []
    for m in modules:
        p = by_module.get(m)
        write(folder/f'api/{m}.md', api.page(m, p.stem if p else None, f'{number(p)} {title(p)}' if p else '', about(m)))
        rows.append(f'| [`{m}`]({m}.md) | {f"[{number(p)} {title(p)}](../{p.name})" if p else ""} | {", ".join(f"[{t}](../tests/{t}.md)" for t in about(m))} |')
    write(folder/'api/index.md', '# Modules\n\nEvery lesson writes one module of the package `maskrcnn_edu`.\n\n| module | lesson | tests |\n|---|---|---|\n' + '\n'.join(rows)
          + '\n\n' + toctree('', [f'{m} <{m}>' for m in modules]).replace(':caption: \n', ''))
    for t in tests:
        code = t.read_text(encoding='utf-8')
        write(folder/f'tests/{t.stem}.md', f'# {t.stem}\n\n````python\n{code}\n````\n')
    write(folder/'tests/index.md', '# Tests\n\nWhat cannot live in a notebook. The notebooks are tests themselves: every one runs in the suite.\n\n'
          + toctree('', [t.stem for t in tests]).replace(':caption: \n', '').replace(':hidden:\n', ':maxdepth: 1\n'))

def build(out):
    "0 if all pages could be written without a warning."
    work = out.parent/f'{out.name}.work'
    shutil.rmtree(work, ignore_errors=True)
    shutil.rmtree(out, ignore_errors=True)                # what stood there is older than the notebooks
    sources(work/'source')
    write(work/'extra/overview.svg', re.sub(r'href="\.\./(\w+)\.ipynb"', r'href="\1.html"', (nbs/'images/overview.svg').read_text(encoding='utf-8')))
    os.environ['SITE_EXTRA'] = str(work/'extra')
    failed = sphinx(['-q', '-W', '--keep-going', '-j', str(os.cpu_count() or 1), '-c', str(here), '-d', str(work/'doctrees'), '-b', 'html', str(work/'source'), str(work/'html')])
    if not failed: shutil.move(work/'html', out)
    shutil.rmtree(work, ignore_errors=True)
    return failed


if __name__ == '__main__':
    out = Path(sys.argv[1] if len(sys.argv) > 1 else root/'build/site').resolve()
    if failed := build(out): sys.exit(failed)
    print(f'open {out}/index.html')

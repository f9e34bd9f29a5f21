"What each lesson has and lacks: `python tools/lessons.py [NOTEBOOK …]`; tests/test_lessons.py asks the same."
import ast, json, re, sys
from pathlib import Path

root = Path(__file__).resolve().parent.parent
lessons = sorted((root/'nbs').glob('[0-9][0-9]*.ipynb'))

# name of the section: what must stand in a heading or in bold, in markdown
SECTIONS = {
    'where we are': None,                                # a call of show_diagram near the top
    'in and out': r'^## In and out',
    'picture first': None,                               # a figure among the first cells
    'by hand': r'(?i)\bby hand\b',
    'independent reference': r'^##+ .*Against ',         # code that we did not write, or numbers by hand where there is none
    'what goes wrong': r'^## What goes wrong if…',
    'summary': r'^## Summary',
    'exercises': r'^## Exercises',
    'next': r'(?i)\bnext: \[',
}
PAPER = r'(?i)\bsections? \d|arxiv|\bpaper\b'


def read(path):
    "The cells of a notebook, their sources joined."
    cells = json.loads(Path(path).read_text(encoding='utf-8'))['cells']
    return [dict(c, source=''.join(c['source'])) for c in cells]

def directives(source):
    "Lines like `#| name value` at the top of a code cell; one that is indented goes on with the last."
    source = re.sub(r'\n#\|[ \t]{3,}', ' ', source)
    return dict((m[1], m[2].strip()) for m in re.finditer(r'^#\|\s*([\w-]+):?[ \t]*(.*)$', source, re.M))

def plain(code):
    "A cell without the lines that only IPython understands."
    return '' if code.startswith('%%') else '\n'.join('pass' if re.match(r'\s*[%!]', line) else line for line in code.splitlines())

def pictures(cell): return sum('image/png' in o.get('data', {}) or 'image/svg+xml' in o.get('data', {}) for o in cell.get('outputs', []))

def figures(cells):
    "Code cells that leave a picture, without the diagram."
    return [c for c in cells if c['cell_type'] == 'code' and pictures(c) and 'show_diagram(' not in c['source']]

def sections(cells):
    "Name of the section -> whether it is there."
    text = '\n\n'.join(c['source'] for c in cells if c['cell_type'] == 'markdown')
    found = {name: bool(re.search(pattern, text, re.M)) for name, pattern in SECTIONS.items() if pattern}
    found['where we are'] = any('show_diagram(' in c['source'] for c in cells[:8] if c['cell_type'] == 'code')
    found['picture first'] = any(pictures(c) for c in cells[:10] if 'show_diagram(' not in c['source'])
    return {name: found[name] for name in SECTIONS}

def damage_shown(cells):
    "Whether code follows the heading `What goes wrong if…`, with a picture."
    start = next((i for i, c in enumerate(cells) if '## What goes wrong if…' in c['source']), len(cells))
    end = next((i for i, c in enumerate(cells) if i > start and re.search(r'^## ', c['source'], re.M)), len(cells))
    return any(pictures(c) for c in cells[start:end] if c['cell_type'] == 'code')

def defined(code):
    "Public names that a cell defines, and for each the names that it uses."
    out = {}
    for node in ast.parse(plain(code)).body:
        uses = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)} | {n.attr for n in ast.walk(node) if isinstance(n, ast.Attribute)}
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)): out[patched(node) or node.name] = uses
        if isinstance(node, ast.Assign): out |= {t.id: uses for t in node.targets if isinstance(t, ast.Name)}
    return {k: v for k, v in out.items() if not k.startswith('_')}

def patched(node):
    "The class of a `forward` that `@patch` adds to it: whoever calls an instance uses it."
    is_patch = any('patch' in ast.dump(d) for d in node.decorator_list)
    return node.args.args[0].annotation.id if is_patch and node.name == 'forward' else None

def without_evidence(cells, within=3):
    "Exported names that none of the next code cells that are not exported use, directly or through another name that one uses."
    code, missing = [c['source'] for c in cells if c['cell_type'] == 'code'], []
    exported = [bool(re.match(r'#\|\s*export', s)) for s in code]
    everywhere = {}
    for s, e in zip(code, exported):
        if e: everywhere |= defined(s)
    for i, (s, e) in enumerate(zip(code, exported)):
        if not e: continue
        near = [t for t, f in zip(code[i + 1:], exported[i + 1:]) if not f][:within]
        shown, names = set(re.findall(r'\w+', '\n'.join(near))), defined(s)
        reached, todo = set(), [n for n in everywhere if n in shown]
        while todo:
            n = todo.pop()
            if n in reached: continue
            reached.add(n)
            todo += [u for u in everywhere[n] if u in everywhere]
        missing += [n for n in names if n not in reached]
    return missing

def exercises(cells):
    "Number -> (unsolved code, check), from cells that begin with `#| exercise N` and `#| check N`."
    found = {}
    for c in cells:
        if c['cell_type'] != 'code': continue
        for kind in ('exercise', 'check'):
            if kind in (d := directives(c['source'])): found.setdefault(int(d[kind]), {})[kind] = c['source']
    return {n: (f.get('exercise'), f.get('check')) for n, f in sorted(found.items())}

def solutions(path):
    "Number -> code, from cells that begin with `#| solution N`; 0 is what they share."
    found = {0: ''}
    if not Path(path).exists(): return found
    for c in read(path):
        if c['cell_type'] != 'code': continue
        d = directives(c['source'])
        if 'solution' in d: found[int(d['solution'])] = found.get(int(d['solution']), '') + c['source'] + '\n'
        elif len(found) == 1 and re.match(r'(#\|.*\n)*(import|from) ', c['source']): found[0] += c['source'] + '\n'
    return found

def broken_links(path, cells):
    "Relative links of the text that lead nowhere."
    targets = [t for c in cells if c['cell_type'] == 'markdown' for t in re.findall(r'\]\(([^)#\s]+)', c['source'])]
    return [t for t in targets if '://' not in t and not t.startswith('mailto:') and not (Path(path).parent/t).exists()]

def without_alt(cells):
    "First lines of the cells whose picture has no `#| fig-alt:`."
    return [next(l for l in c['source'].splitlines() if l and not l.startswith('#|'))[:60] for c in figures(cells) if not directives(c['source']).get('fig-alt')]

def report(path):
    "All that can be counted in a lesson."
    cells = read(path)
    markdown = [c['source'] for c in cells if c['cell_type'] == 'markdown']
    have = sections(cells)
    summary = '\n'.join(markdown).partition('## Summary')[2]
    return dict(
        name=Path(path).name, cells=len(cells), code=len(cells) - len(markdown), words=sum(len(m.split()) for m in markdown),
        figures=len(figures(cells)), kb=Path(path).stat().st_size // 1024, exercises=len(exercises(cells)),
        lacks=[n for n, there in have.items() if not there] + ([] if damage_shown(cells) else ['picture of the damage']) + ([] if re.search(PAPER, summary) else ['paper in the summary']),
        no_evidence=without_evidence(cells), no_alt=without_alt(cells), broken=broken_links(path, cells))

def main(paths):
    for r in map(report, paths or lessons):
        print(f"{r['name']:24} {r['cells']:3} cells {r['code']:3} code {r['words']:5} words {r['figures']:2} figures {r['exercises']} exercises {r['kb']:4} KB")
        for key in ('lacks', 'no_evidence', 'no_alt', 'broken'):
            if r[key]: print(f"{'':8}{key}: {', '.join(map(str, r[key]))}")

if __name__ == '__main__': main([Path(p) for p in sys.argv[1:]])

"A page for each module from its source: signatures with types, the comments beside the arguments as a table, links to lesson and tests."
import ast, io, re, tokenize
from dataclasses import dataclass
from convert import root

package = root/'maskrcnn_edu'


@dataclass
class Argument:
    name: str
    kind: str         # its type, as it is written; '' if it is not
    default: str      # as it is written; '' if there is none
    comment: str      # what stands beside it


def comments(code):
    "Line -> the comment on it."
    return {t.start[0]: t.string.lstrip('#').strip() for t in tokenize.generate_tokens(io.StringIO(code).readline) if t.type == tokenize.COMMENT and not t.string.startswith('# %%')}

def written(node): return ast.unparse(node) if node is not None else ''

def beside(line, said, taken):
    "The comment on a line, or those on the lines directly above."
    if line in said: return said[line]
    above = []
    while (line := line - 1) in said and line not in taken: above.insert(0, said[line])
    return ' '.join(above)

def arguments(function, said):
    "The arguments of a function, then what it returns."
    a = function.args
    ordered = [*a.posonlyargs, *a.args]
    defaults = dict(zip([x.arg for x in ordered[len(ordered) - len(a.defaults):]], a.defaults)) | {x.arg: d for x, d in zip(a.kwonlyargs, a.kw_defaults) if d is not None}
    every = ordered + ([a.vararg] if a.vararg else []) + a.kwonlyargs + ([a.kwarg] if a.kwarg else [])
    last = {x.lineno: x.arg for x in every}                                     # of several on a line the last one has the comment
    if function.returns: last[function.returns.end_lineno] = 'returns'
    star = {getattr(a.vararg, 'arg', None): '*', getattr(a.kwarg, 'arg', None): '**'}
    found = [Argument(star.get(x.arg, '') + x.arg, written(x.annotation), written(defaults.get(x.arg)), beside(x.lineno, said, last) if last[x.lineno] == x.arg else '') for x in every]
    if ordered and found[0].name in ('self', 'cls'): found = found[1:]
    if function.returns: found.append(Argument('returns', written(function.returns), '', beside(function.returns.end_lineno, said, last)))
    return found

def fields(cls, said):
    "The fields of a dataclass or a named tuple."
    inside = [n for n in cls.body if isinstance(n, ast.AnnAssign)]
    return [Argument(n.target.id, written(n.annotation), written(n.value), beside(n.lineno, said, [x.lineno for x in inside])) for n in inside]

def short(text, limit=60): return text if len(text) <= limit else text[:limit - 3] + '...'

def cell(text, code=False):
    "A text in a cell of a table."
    text = text.replace('\n', ' ').replace('|', '\\|')
    return f'`{text}`' if code and text else re.sub(r'([*_<>])', r'\\\1', text)

def table(args):
    "Arguments with types, defaults and comments."
    if not args: return ''
    columns = {'': ['**returns**' if a.name == 'returns' else cell(a.name, True) for a in args], 'type': [cell(short(a.kind), True) for a in args],
               'default': [cell(short(a.default), True) for a in args], 'meaning': [cell(a.comment) for a in args]}
    shown = {k: v for k, v in columns.items() if not k or any(v)}
    return '\n'.join(f'| {" | ".join(row)} |' for row in [shown, ['---'] * len(shown), *zip(*shown.values())]) + '\n'

def signature(name, args, before=''):
    "A call with types, one line if it fits."
    given = [a.name + (f': {a.kind}' if a.kind else '') + ((' = ' if a.kind else '=') + short(a.default, 40) if a.default else '') for a in args if a.name != 'returns']
    end = next((f' -> {a.kind}' for a in args if a.name == 'returns'), '')
    line = f'{before}{name}({", ".join(given)}){end}'
    if len(line) > 88: line = f'{before}{name}(\n' + ''.join(f'    {g},\n' for g in given) + f'){end}'
    return f'```python\n{line}\n```\n'

def own(node): return not node.name.startswith('_')

def patched(body):
    "Class -> functions that `@patch` gives it."
    out = {}
    for n in body:
        if isinstance(n, ast.FunctionDef) and any('patch' == written(d).split('(')[0] for d in n.decorator_list) and n.args.args and n.args.args[0].annotation:
            out.setdefault(written(n.args.args[0].annotation), []).append(n)
    return out

def describe(node, said, more, lesson):
    "A function or class in markdown."
    doc = (ast.get_docstring(node) or '').removesuffix('.')
    doc += '.' if doc else ''
    where = f' <a class="source" href="../{lesson}.html#def-{node.name}">see it in the lesson</a>' if lesson else ''
    if isinstance(node, ast.FunctionDef):
        args = arguments(node, said)
        return f'## {node.name}\n\n{signature(node.name, args)}\n{doc}{where}\n\n{table(args)}'
    methods = {n.name: n for n in [*node.body, *more] if isinstance(n, ast.FunctionDef)}
    bases = [written(b) for b in node.bases]
    args = arguments(methods['__init__'], said) if '__init__' in methods else fields(node, said)
    text = f'## {node.name}\n\n{signature(node.name, args, "class ")}\n{doc}' + (f' (A kind of `{", ".join(bases)}`.)' if bases else '') + f'{where}\n\n{table(args)}'
    for name, m in methods.items():
        if not own(m) or not (ast.get_docstring(m) or m.returns or name in ('forward', 'predict')): continue
        inside = arguments(m, said)
        if any(written(d) == 'property' for d in m.decorator_list): text += f'\n### {node.name}.{name}\n\n{ast.get_docstring(m) or ""} (A property.)\n'
        else: text += f'\n### {node.name}.{name}\n\n{signature(name, inside)}\n{ast.get_docstring(m) or ""}\n\n{table(inside)}'
    return text

def public(tree):
    "The names that the module exports, or those that it defines."
    for n in tree.body:
        if isinstance(n, ast.Assign) and written(n.targets[0]) == '__all__': return ast.literal_eval(n.value)
    return [n.name for n in tree.body if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and own(n)]

def page(module, lesson, lesson_title, tests):
    "The page of a module in markdown; lesson: its file without ending, or None."
    file = package/(module.replace('.', '/') + '.py')
    if not file.exists(): file = package/module.replace('.', '/')/'__init__.py'
    code = file.read_text(encoding='utf-8')
    tree, said = ast.parse(code), comments(code)
    names, more = public(tree), patched(tree.body)
    found = {n.name: n for n in tree.body if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and n.name in names and own(n)}
    values = {t.id: n.value for n in tree.body if isinstance(n, ast.Assign) for t in n.targets if isinstance(t, ast.Name) and t.id in names and t.id != '__all__'}
    links = ([f'Lesson: [{lesson_title}](../{lesson}.ipynb)'] if lesson else []) + ([f'Tests: {", ".join(f"[{t}](../tests/{t}.md)" for t in tests)}'] if tests else [])
    text = f'# maskrcnn_edu.{module}\n\n{(ast.get_docstring(tree) or "").strip()}.\n\n{" · ".join(links)}\n\n'
    text += '\n\n'.join(describe(n, said, more.get(n.name, []), lesson) for n in found.values())
    if values: text += '\n\n## Values\n\n| | |\n|---|---|\n' + '\n'.join(f'| `{k}` | {cell(short(written(v), 90), True)} |' for k, v in values.items()) + '\n'
    return text

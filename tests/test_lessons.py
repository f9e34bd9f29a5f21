"Every lesson is whole: its sections, pictures, links and exercises; `python tools/lessons.py` prints the table."
import ast, importlib.util, re, sys, warnings
from pathlib import Path
import pytest

root = Path(__file__).resolve().parent.parent
spec = importlib.util.spec_from_file_location('lessons', root/'tools/lessons.py')
lessons = importlib.util.module_from_spec(spec)
spec.loader.exec_module(lessons)

def solution_of(path): return root/'nbs/solutions'/path.name
each = pytest.mark.parametrize('path', lessons.lessons, ids=lambda p: p.stem)


@each
def test_lesson_is_whole(path):
    r = lessons.report(path)
    print(r)
    assert not r['lacks'], f'{path.name} lacks {r["lacks"]}'
    assert r['figures'] >= 4 and r['cells'] >= 25 and r['words'] >= 300, f'{path.name}: {r}'
    assert not r['no_alt'], f'{path.name}: pictures without `#| fig-alt:`, in the cells that begin {r["no_alt"]}'
    assert not r['broken'], f'{path.name}: links that lead nowhere: {r["broken"]}'
    assert not r['no_evidence'], f'{path.name}: exported, but neither shown nor tested within three cells: {r["no_evidence"]}'


@pytest.mark.parametrize('path', [root/'nbs/index.ipynb', root/'README.md', *sorted((root/'nbs/solutions').glob('*.ipynb'))], ids=lambda p: p.stem)
def test_links_resolve(path):
    cells = lessons.read(path) if path.suffix == '.ipynb' else [dict(cell_type='markdown', source=path.read_text(encoding='utf-8'))]
    assert not lessons.broken_links(path, cells)


def run(code, space):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        exec(lessons.plain(code), space)

def start(path):
    "What a reader has defined when the exercises come: imports and exported code of the lesson."
    import matplotlib
    matplotlib.use('Agg')
    space = {}
    for c in lessons.read(path):
        d = lessons.directives(c['source']) if c['cell_type'] == 'code' else {}
        if 'default_exp' in d or not d.keys() & {'export', 'exporti'} and not only_imports(c): continue
        run(c['source'], space)
    return space

def only_imports(cell):
    "Whether a cell is there to import: it begins so and has no more than a setting beside."
    if cell['cell_type'] != 'code': return False
    body = ast.parse(lessons.plain(cell['source'])).body
    return bool(body) and isinstance(body[0], (ast.Import, ast.ImportFrom)) and all(isinstance(n, (ast.Import, ast.ImportFrom, ast.Assign, ast.Expr)) for n in body)

@each
def test_exercises_fail_unsolved_and_pass_solved(path):
    found, answers = lessons.exercises(lessons.read(path)), lessons.solutions(solution_of(path))
    assert sorted(found) == [1, 2, 3], f'{path.name} has the exercises {sorted(found)}'
    assert sorted(answers) == [0, 1, 2, 3], f'{solution_of(path).name} has the solutions {sorted(answers)}'
    before = start(path)
    for n, (stub, check) in found.items():
        assert stub and check, f'{path.name}: exercise {n} lacks its stub or its check'
        for source in (stub, check): assert lessons.directives(source).get('eval') == 'false', f'{path.name}: exercise {n} would run with the lesson'
        space = dict(before)
        with pytest.raises((AssertionError, NotImplementedError)):
            run(stub, space)
            run(check, space)
        space = dict(before)
        run(answers[0], space)
        run(answers[n], space)
        run(check, space)


def test_the_checks_of_this_file_can_fail(tmp_path):
    "A lesson with nothing in it is told so."
    code = lambda s, **k: dict(cell_type='code', source=s, outputs=[], **k)
    cells = [dict(cell_type='markdown', source='# T\n> s\n[x](nowhere.ipynb)'), code('#| export\ndef f(): return g()\ndef g(): pass\ndef h(): pass'), code('assert f() is None'),
             dict(cell_type='code', source='plot()', outputs=[dict(output_type='display_data', data={'image/png': ''})])]
    assert not any(v for k, v in lessons.sections(cells[:3]).items())
    assert lessons.without_evidence(cells) == ['h'] and lessons.without_alt(cells) == ['plot()'] and lessons.broken_links(tmp_path/'x.ipynb', cells) == ['nowhere.ipynb']
    assert not lessons.damage_shown(cells)

"Colours that carry meaning, as red-green blind readers see them: what looks alike must differ by line style too."
import ast, functools, itertools, json, re
from pathlib import Path
import numpy as np
import pytest
from matplotlib.colors import to_rgb
from skimage.color import deltaE_ciede2000, rgb2lab
from maskrcnn_edu.core import COLOURS, ROLE_COLOURS

root = Path(__file__).resolve().parent.parent
# Machado, Oliveira, Fernandes: A Physiologically-based Model for Simulation of Color Vision Deficiency,
# IEEE Transactions on Visualization and Computer Graphics 15(6), 2009, table 1, severity 1.0; for linear RGB
BLIND = {'protanopia':   [[.152286, 1.052583, -.204868], [.114503, .786281, .099216], [-.003882, -.048116, 1.051998]],
         'deuteranopia': [[.367322, .860646, -.227968], [.280085, .672501, .047413], [-.011820, .042940, .968881]]}
ENOUGH = 11   # CIEDE2000; about 2 can just be told apart side by side, thin lines on a picture need far more


def simulate(colour, matrix):
    "The sRGB colour that a colour looks like."
    c = np.array(to_rgb(colour))
    linear = np.where(c <= .04045, c / 12.92, ((c + .055) / 1.055) ** 2.4)
    seen = (np.array(matrix) @ linear).clip(0, 1)
    return np.where(seen <= .0031308, seen * 12.92, 1.055 * seen ** (1 / 2.4) - .055)

@functools.cache
def apart(a, b):
    "How far apart two colours look, to the reader who sees the least difference."
    lab = lambda c, m: rgb2lab(simulate(c, m)[None, None])[0, 0]
    return min(float(deltaE_ciede2000(lab(a, m), lab(b, m))) for m in BLIND.values())

alike = {frozenset(pair) for pair in itertools.combinations(ROLE_COLOURS, 2) if apart(*map(ROLE_COLOURS.get, pair)) < ENOUGH}


def test_simulation():
    "Greys stay, red and green of one lightness meet, blue and yellow do not."
    for m in BLIND.values():
        for grey in (0., .5, 1.): assert np.allclose(simulate((grey,) * 3, m), grey, atol=1e-3)
    assert apart('#00a000', '#d04000') < apart('#00a000', '#0040d0') / 3 and apart('#ffff00', '#0000ff') > 50

def test_truth_can_be_told_from_everything():
    "White is drawn together with all roles, and as a full line as they are."
    for role, colour in ROLE_COLOURS.items():
        if role != 'gt': assert apart(ROLE_COLOURS['gt'], colour) > 20, role

def test_the_pairs_that_look_alike_are_known():
    "If a colour changes and another pair becomes alike, look again at every figure that draws both."
    known = [('positive', 'negative'), ('positive', 'proposal'), ('positive', 'prediction'), ('proposal', 'prediction')]
    assert alike <= set(map(frozenset, known)), sorted(map(sorted, alike))

def test_neighbours_in_the_list_of_colours():
    "Objects are coloured in turn: each colour and the next can be told apart."
    for a, b in zip(COLOURS, COLOURS[1:]): assert apart(a, b) > ENOUGH, (a, b)


def drawn(code):
    "Axes -> (colour, line style) of what a cell draws on them with `show_boxes` and `plot`, as far as both are written there."
    on = {}
    for node in ast.walk(ast.parse(code)):
        if not isinstance(node, ast.Call): continue
        words = {k.arg: k.value for k in node.keywords}
        said = lambda names, default: next((v.value if isinstance(v := words[n], ast.Constant) else None for n in names if n in words), default)
        if isinstance(node.func, ast.Name) and node.func.id == 'show_boxes' and len(node.args) > 1:
            axes, colour, style = node.args[1], said(['role'], 'gt'), said(['style'], '-')
        elif isinstance(node.func, ast.Attribute) and node.func.attr == 'plot':
            axes, colour, style = node.func.value, said(['color', 'c'], None), said(['ls', 'linestyle', 'marker'], '-')
            if len(node.args) > 2: style = ast.unparse(node.args[2])
            style = next((a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)), style)   # also behind a starred one
            if isinstance(words.get('color'), ast.Subscript) and ast.unparse(words['color'].value) == 'ROLE_COLOURS' and isinstance(words['color'].slice, ast.Constant): colour = ast.literal_eval(words['color'].slice)
        else: continue
        if colour is not None and style is not None: on.setdefault(ast.unparse(axes), []).append((ROLE_COLOURS.get(colour, colour), style))
    return on

def confused(code):
    "Pairs of colours that look alike and are drawn on the same axes in the same line style."
    return [(a, b) for calls in drawn(code).values() for (a, s), (b, t) in itertools.combinations(calls, 2) if a != b and s == t and apart(a, b) < ENOUGH]

def test_the_search_for_confused_roles():
    assert confused("show_boxes(a, ax, role='positive'); show_boxes(b, ax, role='negative')") == [(ROLE_COLOURS['positive'], ROLE_COLOURS['negative'])]
    assert not confused("show_boxes(a, ax, role='positive'); show_boxes(b, ax, role='negative', style='--')")
    assert not confused("show_boxes(a, axes[0], role='positive'); show_boxes(b, axes[1], role='negative')")
    assert not confused("show_boxes(a, ax, role='positive'); show_boxes(b, ax)")
    assert confused("ax.plot(x, color='#22c55e'); ax.plot(y, color=ROLE_COLOURS['negative'])") and not confused("ax.plot(x, color='#22c55e'); ax.plot(y, color='#ef4444', ls='--')")

@pytest.mark.parametrize('path', sorted((root/'nbs').rglob('[0-9]*.ipynb')), ids=lambda p: str(p.relative_to(root/'nbs')))
def test_figures_do_not_rely_on_red_and_green(path):
    cells = [''.join(c['source']) for c in json.loads(path.read_text(encoding='utf-8'))['cells'] if c['cell_type'] == 'code']
    found = {next(l for l in c.splitlines() if not l.startswith('#|')): pairs for c in cells if re.search(r'show_boxes|plot', c) and not c.startswith('%%') and (pairs := confused(re.sub(r'^\s*[%!].*$', 'pass', c, flags=re.M)))}
    assert not found, f'give one of the two another line style, `style=\'--\'` or `ls=\'--\'`: {found}'

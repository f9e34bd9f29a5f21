"""Draws the overview diagram: every box carries its module's name as id and links to its notebook.

`python tools/overview.py` writes nbs/images/overview.svg and its copy inside the package.
"""
from pathlib import Path

root = Path(__file__).resolve().parent.parent
targets = root/'nbs/images/overview.svg', root/'maskrcnn_edu/overview.svg'
width, height = 1150, 950
notebooks = dict(enumerate(
    'core boxes shapes anchors resnet fpn rpn_head rpn_targets rpn_loss nms proposals rpn roi_align head_targets '
    'box_head box_loss mask_head mask_loss detections mask_rcnn learner evaluate'.split())) | {23: 'nuclei', 24: 'train', 55: 'checkpoints'}
number = {('data' if name == 'shapes' else name): n for n, name in notebooks.items()}   # module -> notebook number
style = '''
.mrcnn-overview text {font-family: Helvetica, Arial, "Liberation Sans", sans-serif; fill: #1f2937; text-anchor: middle}
.mrcnn-overview .name {font-size: 15px; font-weight: 600}
.mrcnn-overview .data .name {font-size: 14px}
.mrcnn-overview .note {font-size: 12px; fill: #4b5563}
.mrcnn-overview .nb {font-size: 11px; fill: #4b5563; text-anchor: start}
.mrcnn-overview .shape {font-size: 11.5px; fill: #6b7280}
.mrcnn-overview .heading {font-size: 17px; font-weight: 700; text-anchor: start; fill: #475569}
.mrcnn-overview .title {font-size: 25px; font-weight: 700; text-anchor: start}
.mrcnn-overview .key {font-size: 13px; text-anchor: start}
.mrcnn-overview a {text-decoration: none; cursor: pointer}
.mrcnn-overview .box rect {stroke: #334155; stroke-width: 1.3}
.mrcnn-overview .frame rect {fill: #f8fafc; stroke: #94a3b8; stroke-width: 1.5}
.mrcnn-overview .datagen rect {fill: #fde68a} .mrcnn-overview .model rect {fill: #a9cdf8}
.mrcnn-overview .filter rect {fill: #dcc5f5} .mrcnn-overview .loss rect {fill: #b4e5b0}
.mrcnn-overview .tool rect {fill: #e5e7eb}
.mrcnn-overview .data path {fill: #ffffff; stroke: #334155; stroke-width: 1.3}
.mrcnn-overview .predict rect, .mrcnn-overview .predict path {stroke-dasharray: 6 4}
.mrcnn-overview .halo {fill: none; stroke: #f8fafc; stroke-width: 8; stroke-dasharray: none !important}
.mrcnn-overview .arrow {fill: none; stroke: #334155; stroke-width: 1.6}
.mrcnn-overview .tip {fill: #334155; stroke: none}
.mrcnn-overview.phase-train .predict, .mrcnn-overview.phase-predict .train {opacity: .16}
.mrcnn-overview .lit {opacity: 1 !important}
.mrcnn-overview .lit > a > rect {stroke: #dc2626; stroke-width: 4.5; stroke-dasharray: none}
.mrcnn-overview .lit > a > path {stroke: #dc2626; stroke-width: 4.5; stroke-dasharray: none}
.mrcnn-overview .lit > a > .title {fill: #dc2626}
'''


def text(x, y, words, cls): return f'<text x="{x}" y="{y}" class="{cls}">{words}</text>'

def rect(x, y, w, h, r=7): return f'<rect x="{x}" y="{y}" width="{w}" height="{h}" rx="{r}"/>'

def rhombus(x, y, w, h):
    return f'<path d="M{x-w/2:g} {y} L{x} {y-h/2:g} L{x+w/2:g} {y} L{x} {y+h/2:g} Z"/>'

def link(module, inside):
    file = f'{number[module]:02}_{notebooks[number[module]]}.ipynb'
    return f'<a href="../{file}"><title>{file}</title>{inside}</a>'

def ident(module): return f'id="{module}" ' if module else ''

def box(module, role, x, y, w, h, *lines, phase='', text_w=None):
    "A rectangle that computes; `lines`: its name, then what it does, centred in the first `text_w` pixels."
    top = y + h/2 - 8.5*(len(lines) - 1) + 5
    words = ''.join(text(x + (text_w or w)/2, f'{top + 17*i:g}', s, 'note' if i else 'name') for i, s in enumerate(lines))
    nb = text(x + 6, y + 13, f'{number[module]:02}', 'nb')
    return f'<g id="{module}" class="box {role} {phase}">{link(module, rect(x, y, w, h) + nb + words)}</g>'

def data(x, y, name, shape='', w=120, h=50, phase='', module=None, at=(0, 16)):
    "A diamond that holds data; its shape in letters stands beside it."
    body = rhombus(x, y, w, h) + text(x, y + 5, name, 'name')
    body = link(module, body) if module else body
    note = text(x + at[0], f'{y + h/2 + at[1]:g}', shape, 'shape') if shape else ''
    return f'<g {ident(module)}class="data {phase}">{body}{note}</g>'

def frame(x, y, w, h, name, module=None, indent=16):
    body = rect(x, y, w, h, 12) + text(x + indent, y + h - 14, name, 'heading')
    if module: body = link(module, body + text(x + indent + 42, y + h - 14, f'{number[module]:02}', 'nb'))
    return f'<g {ident(module)}class="frame">{body}</g>'

def arrow(*points, phase='', over=False, tip=True):
    "A line through `points` with right angles; `over`: it bridges the line that it crosses."
    (x0, y0), (x1, y1) = points[-2:]
    dx, dy = (x1 > x0) - (x1 < x0), (y1 > y0) - (y1 < y0)
    ends = [*points[:-1], (x1 - 6*dx*tip, y1 - 6*dy*tip)]
    d = 'M' + ' L'.join(f'{x} {y}' for x, y in ends)
    head = f'<polygon class="tip" points="{x1},{y1} {x1-9*dx+4.5*dy},{y1-9*dy+4.5*dx} {x1-9*dx-4.5*dy},{y1-9*dy-4.5*dx}"/>'
    halo = f'<path class="halo" d="{d}"/>' if over else ''
    return f'<g class="{phase}">{halo}<path class="arrow" d="{d}"/>{head if tip else ""}</g>'

def chip(module, x, name, w):
    return box(module, 'tool', x, 894, w, 34, name)


frames = [frame(20, 182, 160, 292, 'Backbone'), frame(250, 124, 880, 350, 'RPN', 'rpn', indent=62), frame(20, 530, 1110, 322, 'Head')]

arrows = [   # data
    arrow((170, 85), (310, 85)), arrow((205, 85), (205, 118), phase='train'), arrow((95, 108), (95, 126)),
    # backbone
    arrow((95, 170), (95, 206)), arrow((95, 260), (95, 284)), arrow((95, 338), (95, 362)),
    # rpn
    arrow((205, 164), (205, 197), (280, 197), phase='train'), arrow((370, 110), (370, 166), phase='train'),
    arrow((205, 197), (205, 566), phase='train'),
    arrow((430, 85), (926, 85), (926, 330)),
    arrow((460, 197), (492, 197), phase='train'), arrow((632, 197), (672, 197), phase='train'),
    arrow((163, 388), (238, 388), over=True, tip=False), arrow((238, 388), (312, 388)), arrow((472, 388), (830, 388)),
    arrow((757, 388), (757, 228), phase='train'),
    # from the pyramid and from the proposals to the head
    arrow((926, 426), (926, 512), (365, 512), tip=False),
    arrow((365, 512), (250, 512), (250, 566), phase='train'),
    arrow((365, 512), (365, 571), phase='predict'),
    arrow((270, 388), (270, 492), (480, 492), tip=False), arrow((480, 492), (512, 492), (512, 566), over=True),
    # head, box branch
    arrow((275, 596), (305, 596), phase='train'), arrow((425, 596), (452, 596)),
    arrow((572, 596), (597, 596)), arrow((727, 596), (752, 596)), arrow((892, 596), (942, 596), phase='train'),
    # prediction: detections, and the way back to ROIAlign
    arrow((822, 626), (822, 668), phase='predict'), arrow((752, 698), (717, 698), phase='predict'),
    arrow((607, 698), (572, 698), phase='predict'), arrow((892, 698), (952, 698), phase='predict'),
    # head, mask branch
    arrow((572, 792), (587, 792)), arrow((737, 792), (752, 792)), arrow((892, 792), (942, 792), phase='train'),
    arrow((822, 762), (822, 744), (1017, 744), (1017, 725), phase='predict'),
    # head targets
    arrow((155, 626), (155, 669), phase='train'),
    arrow((155, 725), (155, 840), (1017, 840), (1017, 822), phase='train'),
    arrow((1017, 840), (1112, 840), (1112, 596), (1092, 596), phase='train'),
]

nodes = [
    box('data', 'datagen', 20, 62, 150, 46, 'Dataset / loader'),
    data(95, 148, 'Image', 'B,3,H,W', w=110, h=44, at=(58, -2)),
    data(205, 141, 'GT', w=72, h=46, phase='train'),
    data(370, 85, 'Anchors', 'A,4', module='anchors', at=(38, 1)),
    box('resnet', 'model', 32, 206, 126, 54, 'ResNet', 'bottom-up'),
    box('fpn', 'model', 32, 284, 126, 54, 'FPN', 'top-down'),
    data(95, 388, 'Features', 'P2 … P6 · B,C,Hi,Wi', w=136, h=52),
    box('rpn_targets', 'datagen', 280, 166, 180, 62, 'Build rpn targets', 'match anchors to GT', phase='train'),
    data(562, 197, 'rpn_targets', 'B,A · B,A,4', w=140, h=56, phase='train'),
    box('rpn_loss', 'loss', 672, 166, 170, 62, 'class / bbox', 'objectness, deltas', phase='train'),
    box('rpn_head', 'model', 312, 357, 160, 62, 'rpn', '1×512'),
    box('proposals', 'filter', 830, 330, 284, 96, 'Proposals', 'apply deltas, clip,', 'top scores', text_w=192),
    box('nms', 'filter', 1018, 348, 80, 60, 'NMS'),
    box('head_targets', 'datagen', 35, 566, 240, 60, 'Build head targets and rois', 'match, sample, encode', phase='train'),
    data(365, 596, 'rois', 'B,R,4', at=(42, 2)),
    box('roi_align', 'filter', 452, 566, 120, 256, 'ROIAlign', 'levels P2 … P5'),
    data(662, 596, 'roi_features', 'B,R,C,7,7', w=130),
    box('box_head', 'model', 752, 566, 140, 60, 'head', '2×1024'),
    box('box_loss', 'loss', 942, 566, 150, 60, 'class / bbox', 'B,R,K · B,R,K,4', phase='train'),
    box('detections', 'filter', 752, 668, 140, 60, 'detections', 'filter, per class', phase='predict'),
    data(662, 698, 'mask rois', 'B,D,4', w=110, phase='predict'),
    data(1017, 698, 'instances', 'boxes, labels, scores, masks', w=130, h=54, phase='predict', at=(-2, -59)),
    data(662, 792, 'mask_features', 'B,M,C,14,14', w=150, h=56, at=(0, 14)),
    box('mask_head', 'model', 752, 762, 140, 60, 'mask_head', '5×256'),
    box('mask_loss', 'loss', 942, 762, 150, 60, 'mask', 'B,M,K,28,28', phase='train'),
    data(155, 697, 'head_targets', 'B,R · B,R,4 · B,M,S,S', w=150, h=56, phase='train', at=(92, 0)),
    '<g>' + text(556, 588, '7×7', 'note') + text(550, 812, '14×14', 'note') + '</g>',
]

def legend(x=452, y=22):
    keys = [('datagen', 'makes data'), ('model', 'model'), ('filter', 'filter'), ('loss', 'loss')]
    out, step = [], [0, 110, 188, 258]
    for (role, words), dx in zip(keys, step):
        out.append(f'<g class="box {role}">{rect(x + dx, y, 20, 15, 3)}{text(x + dx + 27, y + 12.5, words, "key")}</g>')
    out.append(f'<g class="data">{rhombus(x + 338, y + 7.5, 26, 17)}{text(x + 358, y + 12.5, "data", "key")}</g>')
    out.append(f'<g><path class="arrow" style="stroke-dasharray: 6 4" d="M{x + 412} {y + 7.5} h36"/></g>' + text(x + 455, y + 12.5, 'prediction only', 'key'))
    return ''.join(out)

def chips():
    "The notebooks that stand around the model: tools below it, training and data after it."
    out = [text(22, 884, 'tools', 'note').replace('class="note"', 'class="key"'),
           text(282, 884, 'train, measure, use', 'key')]
    for module, x, w in [('core', 20, 96), ('boxes', 126, 96), ('learner', 280, 130), ('evaluate', 420, 130),
                         ('checkpoints', 560, 150), ('nuclei', 720, 130), ('train', 860, 130)]:
        out.append(chip(module, x, module, w))
    return ''.join(out)

def draw():
    title = link('mask_rcnn', text(20, 38, 'Mask R-CNN', 'title') + text(178, 38, number['mask_rcnn'], 'nb'))
    title = f'<g id="mask_rcnn" class="">{title}</g>'
    head = (f'<svg xmlns="http://www.w3.org/2000/svg" class="mrcnn-overview" viewBox="0 0 {width} {height}" '
            f'width="100%" style="max-width:{width}px" role="img" aria-label="Overview of Mask R-CNN">')
    parts = [head, f'<style>{style}</style>', f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
             title, legend(), *frames, *arrows, *nodes, chips(), '</svg>']
    return '\n'.join(parts) + '\n'


if __name__ == '__main__':
    for path in targets:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(draw(), encoding='utf-8', newline='\n')

"Sphinx reads this; build.py prepares the pages and calls it."
import configparser, os
from pathlib import Path
from docutils.nodes import SkipNode
from docutils.utils.math import latex2mathml

here = Path(__file__).resolve().parent
settings = configparser.ConfigParser(delimiters=['='])
settings.read(here.parent/'settings.ini', encoding='utf-8')
project = settings['DEFAULT']['lib_name']
version = settings['DEFAULT']['version']

extensions = ['myst_nb']
nb_execution_mode = 'off'
nb_output_stderr = 'remove'
nb_render_markdown_format = 'myst'
nb_ipywidgets_js = {}                       # nothing comes from the net
nb_merge_streams = True
myst_enable_extensions = ['colon_fence', 'dollarmath', 'attrs_block']
myst_heading_anchors = 3
suppress_warnings = ['mystnb.unknown_mime_type', 'myst.header']
html_math_renderer = 'mathml'

html_theme = 'furo'
html_title = project
html_static_path = ['static']
html_css_files = ['site.css']
html_extra_path = [os.environ['SITE_EXTRA']] if 'SITE_EXTRA' in os.environ else []
html_show_sourcelink = html_copy_source = False
html_show_search_summary = False            # would fetch pages, which a browser forbids from a disk
html_theme_options = dict(navigation_with_keys=True)
pygments_style, pygments_dark_style = 'friendly', 'github-dark'


def mathml(self, node, block):
    "Formulas as MathML, which browsers draw themselves."
    formula = latex2mathml.tex2mathml(node.astext(), as_block=block)
    self.body.append(f'<div class="math">{formula}</div>' if block else formula)
    raise SkipNode

def setup(app):
    app.add_html_math_renderer('mathml', (lambda self, node: mathml(self, node, False), None), (lambda self, node: mathml(self, node, True), None))

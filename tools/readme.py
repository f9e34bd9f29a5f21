"""Writes README.md from nbs/index.ipynb.

`python tools/readme.py` runs the notebook first, so that its pictures and numbers are those of today.
"""
import base64, json, os, re, subprocess, sys
from pathlib import Path

root = Path(__file__).resolve().parent.parent
index = root/'nbs/index.ipynb'
notice = '<!-- written by tools/readme.py from nbs/index.ipynb: edit the notebook, then `make readme` -->\n\n'
source = lambda cell: ''.join(cell['source'])
joined = lambda value: value if isinstance(value, str) else ''.join(value)


def from_root(markdown):
    "Links that start in nbs/ made to start in the root."
    return re.sub(r'\]\((?!https?:|#|mailto:)', '](nbs/', markdown)

def option(code, name):
    "Value of a `#| name: value` line."
    found = re.search(rf'^#\| {name}: (.*)$', re.sub(r'\n#\|[ \t]{3,}', ' ', code), re.M)
    return found[1] if found else None

def output(out, code, pictures):
    "One stored output as markdown; a png is added to `pictures`."
    if out['output_type'] == 'stream': return f"```\n{joined(out['text']).rstrip()}\n```" if out['name'] == 'stdout' else ''
    data = out.get('data', {})
    if 'text/markdown' in data: return from_root(joined(data['text/markdown']))
    if 'image/png' not in data: return ''
    file = f'nbs/images/index_{len(pictures)}.png'
    pictures[file] = base64.b64decode(joined(data['image/png']))
    return f'![{option(code, "fig-alt") or ""}]({file})'

def convert():
    "README's text, and the pictures it shows: file -> bytes."
    parts, pictures = [], {}
    for cell in json.loads(index.read_text(encoding='utf-8'))['cells']:
        code = source(cell)
        if cell['cell_type'] == 'markdown': parts.append(from_root(code))
        elif cell['cell_type'] == 'code':
            if option(code, 'echo') != 'false': parts.append(f'```python\n{code}\n```')
            parts += [output(o, code, pictures) for o in cell['outputs']]
    return notice + '\n\n'.join(filter(None, parts)) + '\n', pictures

def run():
    "Run the index in place and clean it."
    bin, env = Path(sys.executable).parent, {**os.environ, 'PYTHONPATH': str(root)}
    subprocess.run([bin/'jupyter', 'execute', '--inplace', index], check=True, env=env)
    subprocess.run([bin/'nbdev-clean', '--fname', index], check=True, cwd=root)


if __name__ == '__main__':
    run()
    text, pictures = convert()
    (root/'README.md').write_text(text, encoding='utf-8', newline='\n')
    for file, content in pictures.items(): (root/file).write_bytes(content)

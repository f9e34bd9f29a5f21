"Run notebooks in place and keep their outputs: `python tools/run.py nbs/07_rpn_targets.ipynb …`; cells with `#| eval: false` are left alone."
import json, os, re, sys, time
from pathlib import Path
import nbformat
from nbclient import NotebookClient
from nbdev.clean import clean_nb

root = Path(__file__).resolve().parent.parent


def left_alone(cell): return cell.cell_type == 'code' and re.search(r'^#\|\s*eval:\s*false', cell.source, re.M)

def run(path):
    "All cells in a fresh kernel, then clean as nbdev-clean does it."
    nb = nbformat.read(path, as_version=4)
    for c in filter(left_alone, nb.cells): c.metadata['tags'], c.outputs = ['skip-execution'], []
    NotebookClient(nb, timeout=1800, resources=dict(metadata=dict(path=str(path.parent))), skip_cells_with_tag='skip-execution',
                   store_widget_state=False, coalesce_streams=True).execute()
    plain = json.loads(nbformat.writes(nb))
    clean_nb(plain)
    path.write_text(json.dumps(plain, indent=1, ensure_ascii=False, sort_keys=True) + '\n', encoding='utf-8')


if __name__ == '__main__':
    os.environ['PYTHONPATH'] = f"{root}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    os.environ['MASKRCNN_EDU_STATIC'] = '1'      # pictures instead of sliders
    for path in map(Path, sys.argv[1:]):
        start = time.time()
        run(path.resolve())
        print(f'{path.name}: {time.time() - start:.0f} s', flush=True)

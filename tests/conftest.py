"Options of the test command."
from pathlib import Path


def pytest_addoption(parser):
    parser.addoption('--oracles', default=str(Path(__file__).resolve().parent.parent.parent/'shared/oracles'),
                     help='folder with what other programs computed: an inventory .json and a recording .npz a system, and make_weights.py')

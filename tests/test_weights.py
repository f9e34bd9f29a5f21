"The models that ship: small enough, and as good as promised, on whole images that took no part in training."
import pytest

from maskrcnn_edu.checkpoints import load_weights, shipped
from maskrcnn_edu.data import CLASSES, open_dataset, shapes_folder
from maskrcnn_edu.nuclei import find_nuclei, load_nuclei
from maskrcnn_edu.train import evaluate


@pytest.mark.parametrize('name', ['shapes', 'nuclei'])
def test_size(name):
    assert shipped(name).stat().st_size < 10e6


def test_shapes():
    model, classes = load_weights('shapes')
    assert classes == CLASSES
    scores = evaluate(model, open_dataset(shapes_folder())[1])
    assert scores['images'] == 100
    assert scores['mask_ap'] >= .95 and scores["box_ap"] >= .925 and scores["mask_ap50"] >= .99


def test_nuclei():
    if find_nuclei() is None: pytest.skip('the real nuclei are not here: put dsb2018_stage1_train.zip into shared/data')
    model, classes = load_weights('nuclei')
    _, valid, kinds = load_nuclei(find_nuclei())
    scores = evaluate(model, valid, kinds)
    assert scores['images'] == 80
    kind = {k: v['dsb'] for k, v in scores['by_kind'].items()}
    assert scores['dsb'] >= .575 and kind['fluorescence'] >= .61 and kind['histology'] >= .39 and kind['brightfield'] >= .52
    assert scores['by_kind']['fluorescence']['ap_by_iou'][.5] >= .835 and scores['mask_ap'] >= .605

"The models that ship find what they found before: recorded detections, within what processors differ by."
import json
from pathlib import Path
import numpy as np
import pytest

from maskrcnn_edu.checkpoints import load_weights
from maskrcnn_edu.data import make_shapes
from maskrcnn_edu.learner import predict_instances

file = Path(__file__).parent/'recordings/detections.json'     # written by `python tests/test_same.py`


def found(name):
    "Boxes, labels, scores and mask areas on a few drawn pictures, rounded as they are stored."
    model, _ = load_weights(name)
    out = []
    for s in make_shapes(12, seed=7)[:12 if name == 'shapes' else 3]:
        f = predict_instances(model, s.image, .05)
        out.append(dict(boxes=f.boxes.astype(float).round(4).tolist(), labels=f.labels.tolist(), scores=f.scores.astype(float).round(7).tolist(),
                        areas=[int(c.sum()) for c in f.crops]))
    return out


@pytest.mark.parametrize('name', ['shapes', 'nuclei'])
def test_detections_are_the_recorded_ones(name):
    for i, (ours, before) in enumerate(zip(found(name), json.loads(file.read_text())[name], strict=True)):
        assert ours['labels'] == before['labels'], f'{name} {i}'
        assert np.allclose(ours['boxes'], before['boxes'], rtol=0, atol=1e-3), f'{name} {i}'
        assert np.allclose(ours['scores'], before['scores'], rtol=0, atol=1e-5), f'{name} {i}'
        assert np.allclose(ours['areas'], before['areas'], rtol=0, atol=2), f'{name} {i}'


if __name__ == '__main__': file.write_text(json.dumps({name: found(name) for name in ('shapes', 'nuclei')}) + '\n')

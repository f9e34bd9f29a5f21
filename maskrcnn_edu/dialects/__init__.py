"""Other programs' ways with the same network, by name"""
from .detectron import DETECTRON, DETECTRON_PYTORCH, MASKRCNN_BENCHMARK
from .detectron2 import DETECTRON2
from .matterport import MATTERPORT, MULTIMODAL
from .torchvision import TORCHVISION, TORCHVISION_PUBLISHED, TORCHVISION_V2

__all__ = ['DIALECTS', 'SYSTEMS', 'OLD_KEY', 'OLD_RULES']

# By the name in the header of a weight file.
# Version 2 of torchvision has the keys of version 1 too, so it stands first.
DIALECTS = {d.name: d for d in (TORCHVISION_V2, TORCHVISION, DETECTRON2, DETECTRON,
                                DETECTRON_PYTORCH, MASKRCNN_BENCHMARK, MATTERPORT, MULTIMODAL)}
# By the layout of a file.
SYSTEMS = DIALECTS | {'torchvision_published': TORCHVISION_PUBLISHED}

# Headers of version 0.1 held 37 rules under this key.
# The first digits of their hash tell the dialect that had just these.
OLD_KEY = 'conventions'
OLD_RULES = {'87140fdd2c53': 'detectron2', '94970685ce31': 'detectron',
             '9001b046b420': 'maskrcnn_benchmark', 'f1df927ec037': 'multimodal',
             '2f08c984842d': 'matterport', '94c0dbec236f': 'torchvision', 'a71eba142bfc': None}

"Images and their objects: from the files of people to what a model learns from (02, 30 to 39)."
from ..instances import Instances
from .files import DataError, write_atomic
from .images import read_image, read_pixels, to_picture
from .shapes import CLASSES, LEVELS, Sample, make_shapes
from .records import Fault, InstanceDataset
from .writing import coco_dict, from_coco, png_bytes, write_coco
from .sources import recognise
from .opening import examine, fault_table, open_dataset, open_part, repair, shapes_folder

"""Modules:

- `maskrcnn_edu.cuda.rules`: What PyTorch has to know of a native op beside its result: shapes, vmap, autocast and gradients"""

__version__ = "0.1.0"

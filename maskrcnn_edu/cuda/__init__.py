"""Native ops for CPU and GPU, compiled at first import; without a compiler the PyTorch of the lessons runs"""
import os, warnings
import torch
from .build import BuildError, load

__all__ = ['backend', 'BuildError']


def choose() -> tuple[str, list[str]]:   # backend, and why no better one
    "Load the best backend that this machine can have; MASKRCNN_EDU_BACKEND=torch, cpp or cuda forces one."
    forced = os.environ.get('MASKRCNN_EDU_BACKEND') or None
    if forced not in (None, 'torch', 'cpp', 'cuda'): raise ValueError(f'MASKRCNN_EDU_BACKEND={forced}: say torch, cpp or cuda, or leave it unset.')
    best, reasons = 'torch', []
    for kind in ('cpp', 'cuda'):
        if forced in ('torch', 'cpp') and kind != forced: continue
        if kind == 'cuda' and not torch.cuda.is_available():
            if forced: reasons.append('cuda: torch finds no GPU')
            continue
        try:
            load(kind)
            best = kind
        except BuildError as e: reasons.append(f'{kind}: {e}')
    if forced and best != forced: raise ImportError(f'MASKRCNN_EDU_BACKEND={forced} cannot be had. {"; ".join(reasons)}.')
    return best, reasons


NAMES = dict(torch='the PyTorch backend runs, which is slower', cpp='the C++ backend runs, and PyTorch on the GPU', cuda='the CUDA backend runs, and PyTorch on the CPU')
_backend, _reasons = choose()
if _reasons: warnings.warn(f'maskrcnn_edu: {NAMES[_backend]}. {"; ".join(_reasons)}.', RuntimeWarning, stacklevel=2)


def backend() -> str:
    "What runs the native ops: 'cuda' (and C++ for tensors on the CPU), 'cpp', or 'torch'."
    return _backend

"""What PyTorch has to know of an op beside its result: shapes, vmap, autocast and gradients"""
# Each `register_…` takes the PyTorch of a lesson and gives back an op of the same arguments.
# Where the compiled library has a kernel of that name, the kernel runs; elsewhere the PyTorch does.
import inspect, re
from functools import wraps
from pathlib import Path
import torch
from torch import Tensor

__all__ = ['without_autocast', 'register_nms', 'register_roi_align', 'register_paste',
           'kernel_source']


def without_autocast(f):
    "`f` with every sum in the type of its arguments, whatever the caller's autocast says."
    @wraps(f)
    def run(*args, **kwargs):
        first = next(a[0] if isinstance(a, (list, tuple)) else a for a in args)
        with torch.autocast(first.device.type, enabled=False): return f(*args, **kwargs)
    return run


def put_first(
    info,              # of the vmap: info.batch_size = V
    dims,              # the mapped dimension of each tensor, or None
    tensors,
) -> list[Tensor]:     # each (V, ...)
    "The mapped dimension in front; what is not mapped is repeated."
    return [t.expand(info.batch_size, *t.shape) if d is None else t.movedim(d, 0)
            for t, d in zip(tensors, dims)]


def check_nms(boxes, scores):
    "One score a box."
    torch._check(boxes.shape == (*scores.shape, 4), lambda: (
        'nms_keep: boxes must be (..., N, 4) and scores (..., N), '
        f'not {tuple(boxes.shape)} and {tuple(scores.shape)}'))


def register_nms(function):
    "`nms_keep`: every leading index on its own, so vmap only puts one more in front."
    @wraps(function)
    def checked(boxes, scores, iou):
        check_nms(boxes, scores)
        return function(boxes, scores, iou)
    op = torch.library.custom_op('maskrcnn_edu::nms_keep', checked, mutates_args=())

    @op.register_fake
    def _(boxes, scores, iou):
        check_nms(boxes, scores)
        return scores.new_empty(scores.shape, dtype=torch.bool)

    @op.register_vmap
    def _(info, dims, boxes, scores, iou):
        return torch.ops.maskrcnn_edu.nms_keep(*put_first(info, dims, (boxes, scores)), iou), 0

    for device in ('cpu', 'cuda'): op.register_autocast(device, torch.float32)
    return op


def save_for_backward(ctx, inputs, output):
    "Only the maps' shapes and the boxes are needed again."
    features, *boxes, ctx.scales, ctx.height, ctx.width, ctx.sampling, ctx.aligned = inputs
    ctx.save_for_backward(*features, *boxes)


def backward(ctx, grad):
    "Gradients of the maps; boxes get none."
    *features, boxes, image, level = ctx.saved_tensors
    grads = torch.ops.maskrcnn_edu.roi_align_backward(
        grad, features, boxes, image, level, ctx.scales, ctx.height, ctx.width, ctx.sampling,
        ctx.aligned, torch.are_deterministic_algorithms_enabled())
    return grads, *[None] * 8


def no_second(ctx, *grads):
    "A second derivative is asked for."
    raise NotImplementedError('roi_align has no second derivative; leave out create_graph=True, '
                              'or write it in PyTorch alone, as the loop of lesson 12 does.')


def merge(info, dims, features, boxes):
    "Images of all runs behind each other, boxes too."
    features = put_first(info, dims[0] or [None] * len(features), features)  # each (V, B, C, H, W)
    boxes, image, level = put_first(info, dims[1:4], boxes)          # (V, N, 4), (V, N), (V, N)
    n = features[0].shape[1]
    run = torch.arange(info.batch_size, device=image.device)[:, None]
    image = torch.where((image >= 0) & (image < n), image + run * n, -1)
    return [f.flatten(0, 1) for f in features], *(t.flatten(0, 1) for t in (boxes, image, level))


def backward_of(forward):
    "The gradient of the maps, found by autograd in the PyTorch of the forward pass."
    def backwards(
        grad: Tensor, features: list[Tensor], boxes: Tensor, image: Tensor, level: Tensor,
        scales: list[float], height: int, width: int, sampling: int, aligned: bool,
        deterministic: bool,
    ) -> list[Tensor]:
        def out(maps):
            return forward(maps, boxes, image, level, scales, height, width, sampling, aligned)
        pull = torch.func.vjp(out, [f.detach() for f in features])[1]
        return list(pull(grad.to(features[0].dtype))[0])
    return backwards


def register_roi_align(forward):
    "`roi_align` and its gradient, for the maps; images of a vmap stand behind each other."
    op = torch.library.custom_op(
        'maskrcnn_edu::roi_align', without_autocast(forward), mutates_args=())
    back = torch.library.custom_op(
        'maskrcnn_edu::roi_align_backward', without_autocast(backward_of(forward)), mutates_args=())

    @op.register_fake
    def _(features, boxes, image, level, scales, height, width, sampling, aligned):
        return features[0].new_empty(len(boxes), features[0].shape[1], height, width)

    @back.register_fake
    def _(grad, features, *args): return [torch.empty_like(f) for f in features]

    op.register_autograd(backward, setup_context=save_for_backward)
    back.register_autograd(no_second)

    @op.register_vmap
    def _(info, dims, features, boxes, image, level, *args):
        flat = merge(info, dims, features, (boxes, image, level))
        out = torch.ops.maskrcnn_edu.roi_align(*flat, *args)
        return out.unflatten(0, (info.batch_size, -1)), 0

    @back.register_vmap
    def _(info, dims, grad, features, boxes, image, level, *args):
        grad, = put_first(info, dims[:1], [grad])
        flat = merge(info, dims[1:], features, (boxes, image, level))
        grads = torch.ops.maskrcnn_edu.roi_align_backward(grad.flatten(0, 1), *flat, *args)
        return [g.unflatten(0, (info.batch_size, -1)) for g in grads], [0] * len(grads)
    return op, back


def register_paste(function):
    "`paste_masks`: masks of a vmap stand behind each other."
    op = torch.library.custom_op(
        'maskrcnn_edu::paste_masks', without_autocast(function), mutates_args=())

    @op.register_fake
    def _(masks, boxes, height, width, threshold, aligned=False):
        return masks.new_empty(len(masks), height, width, dtype=torch.bool)

    @op.register_vmap
    def _(info, dims, masks, boxes, *args):
        masks, boxes = put_first(info, dims, (masks, boxes))   # (V, D, S, S), (V, D, 4)
        flat = torch.ops.maskrcnn_edu.paste_masks(masks.flatten(0, 1), boxes.flatten(0, 1), *args)
        return flat.unflatten(0, masks.shape[:2]), 0
    return op


def kernel_source(
    file: str,  # of maskrcnn_edu/cuda/csrc
    name: str,  # of a function in it
) -> str:
    "A function of the native sources, with the comment above it."
    lines = (Path(__file__).parent/'csrc'/file).read_text(encoding='utf-8').splitlines()
    is_code = lambda line: not line.strip().startswith('//') and not line.endswith(';')
    found = [i for i, line in enumerate(lines) if re.search(rf'\b{name}\(', line) and is_code(line)]
    if not found: raise ValueError(f'{file} has no function {name}.')
    first = found[0]
    indent = re.match(' *', lines[first])[0]
    last = next(i for i in range(first + 1, len(lines)) if lines[i].startswith(indent + '}'))
    while lines[first - 1].strip().startswith(('//', 'template')): first -= 1
    return inspect.cleandoc('\n'.join(lines[first:last + 1]))

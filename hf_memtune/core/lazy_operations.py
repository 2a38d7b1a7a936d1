"""What can be done to logits that are not there, and what must go to the tensor as it is: the tables of `hf_memtune.core.logits`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten
Geometry = tuple[tuple[int, ...], tuple[int, ...], int | torch.SymInt]  # size, stride, offset


def geometry_of(func: Any, tensor: Tensor, *args: Any, **kwargs: Any) -> Geometry | None:
    """Where the result of `func` lies in the memory of `tensor` if it is a view of whole tokens; None if it is anything else."""
    view = _VIEWS.get(func)
    return None if view is None else view(tensor, *args, **kwargs)


def operation(func: Any, tensor: Tensor, *args: Any, **kwargs: Any) -> torch.dtype | None:
    """The dtype of the result of `func` if it is a copy, a cast or a pointwise operation with a constant on one device; None if not."""
    known = _OPERATIONS.get(func)
    return None if known is None else known(tensor, *args, **kwargs)


def is_cast(func: Any) -> bool:
    """Whether an operation changes no more than the precision."""
    return func in (aten._to_copy.default, aten.clone.default)


def contiguous_stride(size: Sequence[int]) -> tuple[int, ...]:
    """Those of a contiguous tensor, as torch counts them."""
    stride = [1]
    for length in reversed(size[1:]):
        stride.insert(0, stride[0] * max(length, 1))
    return tuple(stride)


# -- views


def _whole(tensor: Tensor) -> Geometry:
    return tuple(tensor.size()), tensor.stride(), tensor.storage_offset()


def _reshaped(tensor: Tensor, size: list[int]) -> Geometry | None:
    if tuple(size) == tuple(tensor.size()):
        return _whole(tensor)
    known = prod(length for length in size if length != -1)
    whole = tuple(tensor.numel() // known if length == -1 and known else length for length in size)
    keeps_tokens = whole[-1:] == tensor.size()[-1:] and prod(whole) == tensor.numel() > 0
    if not keeps_tokens or not tensor.is_contiguous():
        return None
    return whole, contiguous_stride(whole), tensor.storage_offset()


def _sliced(tensor: Tensor, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1) -> Geometry | None:
    dim %= tensor.dim()
    if dim == tensor.dim() - 1:
        return None
    size, stride, offset = _whole(tensor)
    taken = range(*slice(start, end, step).indices(size[dim]))
    if not taken:
        return None
    spread = (*stride[:dim], stride[dim] * step, *stride[dim + 1 :])
    return (*size[:dim], len(taken), *size[dim + 1 :]), spread, offset + taken[0] * stride[dim]


def _selected(tensor: Tensor, dim: int, index: int) -> Geometry | None:
    dim, (size, stride, offset) = dim % tensor.dim(), _whole(tensor)
    if dim == tensor.dim() - 1 or not -size[dim] <= index < size[dim]:
        return None
    return (*size[:dim], *size[dim + 1 :]), (*stride[:dim], *stride[dim + 1 :]), offset + index % size[dim] * stride[dim]


_VIEWS: dict[Any, Callable[..., Geometry | None]] = {
    aten.detach.default: _whole,
    aten.alias.default: _whole,
    aten.view.default: _reshaped,
    aten._unsafe_view.default: _reshaped,
    aten.slice.Tensor: _sliced,
    aten.select.int: _selected,
}

# -- copies and pointwise operations


def _copied(tensor: Tensor, *, dtype=None, layout=None, device=None, pin_memory=None, non_blocking=False, memory_format=None):
    dtype = tensor.dtype if dtype is None else dtype
    stays = layout in (None, torch.strided) and device in (None, tensor.device) and not pin_memory
    is_plain = memory_format in (None, torch.preserve_format, torch.contiguous_format)
    return dtype if stays and is_plain and dtype.is_floating_point else None


def _scaled(tensor: Tensor, factor: Any) -> torch.dtype | None:
    return tensor.dtype if isinstance(factor, (int, float)) else None


def _shifted(tensor: Tensor, other: Any, alpha: Any = 1) -> torch.dtype | None:
    """A constant for each class, as BART adds to its logits."""
    is_constant = isinstance(other, Tensor) and not other.requires_grad and other.dtype.is_floating_point
    if not is_constant or not other.dim() or not other.numel() == other.shape[-1] == tensor.size(-1):
        return None
    return torch.promote_types(tensor.dtype, other.dtype)  # under autocast the constants stay in float32


def _same_dtype(tensor: Tensor) -> torch.dtype:
    return tensor.dtype


_OPERATIONS: dict[Any, Callable[..., torch.dtype | None]] = {
    aten._to_copy.default: _copied,
    aten.clone.default: _copied,
    aten.mul.Tensor: _scaled,
    aten.div.Tensor: _scaled,
    aten.tanh.default: _same_dtype,
    aten.add.Tensor: _shifted,
}

# -- functions of torch that are told by name, as methods and as functions


def _all_named(*names: str) -> set:
    return {getattr(home, name) for home in (Tensor, torch) for name in names if hasattr(home, name)}


def _read(*names: str) -> set:
    return {getattr(Tensor, name).__get__ for name in names if hasattr(Tensor, name)}


_ON_DEMAND = _all_named(
    "float", "double", "half", "bfloat16", "to", "type", "type_as", "cpu", "cuda", "contiguous", "clone", "detach", "view", "view_as",
    "reshape", "reshape_as", "flatten", "unflatten", "narrow", "select", "__getitem__", "mul", "multiply", "div", "divide", "true_divide",
    "__mul__", "__rmul__", "__truediv__", "tanh", "add", "__add__",
)  # fmt: skip
_METADATA = _all_named(
    "size", "stride", "storage_offset", "dim", "ndimension", "numel", "nelement", "element_size", "is_contiguous", "get_device",
    "is_floating_point", "is_complex", "is_signed", "is_inference", "__len__", "__hash__", "has_names", "is_tensor", "_is_view",
    "requires_grad_", "retain_grad", "register_hook", "register_post_accumulate_grad_hook",
) | _read(
    "shape", "dtype", "device", "layout", "ndim", "itemsize", "nbytes", "names", "requires_grad", "is_leaf", "retains_grad", "grad",
    "grad_fn", "output_nr", "_version", "_base", "_backward_hooks", "_post_accumulate_grad_hooks", "is_cpu", "is_cuda", "is_xpu", "is_mps",
    "is_meta", "is_sparse", "is_quantized", "is_nested", "is_mkldnn", "is_xla", "is_ipu", "is_vulkan", "is_maia", "is_mtia",
)  # fmt: skip
_OF_THE_GRAPH = {torch.autograd.grad, torch.autograd.backward}
_OF_THE_GRAPH |= {getattr(Tensor, name).__set__ for name in ("grad", "requires_grad", "_backward_hooks", "_post_accumulate_grad_hooks")}

AS_IS = _ON_DEMAND | _METADATA | _OF_THE_GRAPH  # reach autograd, and no value
HOOKING = _all_named("retain_grad", "register_hook")  # ask for a gradient
# give a way to the memory that leaves no trace in the version counter
EXPOSING = _all_named("numpy", "__array__", "__dlpack__", "data_ptr", "untyped_storage", "storage", "_typed_storage") | _read("data")
COPYING = _all_named("__deepcopy__", "__reduce_ex__")  # ask whether a tensor is a leaf
REFUSED = _all_named("resize_", "resize_as_") | {getattr(Tensor, "data").__set__}  # replace the memory
REPLACING = {aten.set_, aten.resize_}  # the same below dispatch; torch takes `set_` there at once

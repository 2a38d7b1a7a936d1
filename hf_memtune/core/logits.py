"""Logits on demand: a tensor in place of the logits of a head, whose values are made when something needs them, and whose cross entropy
is taken without them.

How it works. `LazyLogits` is a wrapper subclass: for autograd an ordinary tensor, with a `grad_fn` and a version counter, and nothing
behind it. What is done to it goes through autograd as ever, and arrives in `__torch_dispatch__`, which answers views, casts and scalar
pointwise operations with further LazyLogits, and everything else from the values. So every path to it has the right values and the right
gradient, also that of a user's autograd Function. `__torch_function__` does two things more: it takes the cross entropy, and hands plain
tensors to what would read memory below dispatch (`numpy`, `tolist`, `pickle`).

Shape legend: B rows, T tokens in a row, D hidden size, V classes, N tokens of all rows. B, T stand for any leading dimensions.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map_only

from hf_memtune._compat import is_fake, is_sink_of_ddp
from hf_memtune.core.head_call import HeadCall, HeadOnDemand, Pointwise
from hf_memtune.core.lazy_operations import (
    AS_IS,
    COPYING,
    EXPOSING,
    HOOKING,
    REFUSED,
    REPLACING,
    Geometry,
    contiguous_stride,
    geometry_of,
    is_cast,
    operation,
)
from hf_memtune.core.loss import IGNORED
from hf_memtune.errors import LogitsError

REPLACED = "{} would replace the memory of logits that are made on demand: do it to `logits + 0`."


class LazyLogits(torch.Tensor):
    """Logits, or what views, casts and scalar pointwise operations made of them, without values until these are needed.

    `torch.nn.functional.cross_entropy` of all tokens' classes, summed or averaged, is taken by the head (`HeadOnDemand.cross_entropy`).
    Everything else sees the plain tensor: values are made once, and kept.

    Raises:
        LogitsError: values are asked for when hidden states or weights were changed in place since; a hook or `retain_grad` is asked
            for after the loss was taken, which would then never see a gradient; or memory is to be replaced (`set_`, `resize_`).
    """

    _memory: _Memory

    @classmethod
    def of(cls, hidden_BTD: Tensor, head: HeadOnDemand) -> LazyLogits:
        """The logits (B, T, V) of `head` for `hidden_BTD`, with a gradient to it, to the head's weight and to its bias."""
        call = HeadCall(head, hidden_BTD)
        logits = _Logits.apply(hidden_BTD, call.weight, head.bias, call)
        call.node = logits.grad_fn
        return logits

    @classmethod
    def _on(cls, memory: _Memory, geometry: Geometry) -> LazyLogits:
        size, stride, offset = geometry
        made = torch.Tensor._make_wrapper_subclass(
            cls, size, strides=stride, storage_offset=offset, dtype=memory.dtype, device=memory.call.hidden.device
        )
        made._memory = memory
        return made

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.cross_entropy and (loss := _cross_entropy_on_demand(*args, **kwargs)) is not None:
            return loss
        if func in HOOKING:
            _watch(*args)
        if func in AS_IS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        return _plainly(func, args, kwargs)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # type: ignore[override]  # torch calls it with its classes first
        kwargs = kwargs or {}
        if func.overloadpacket in REPLACING:
            raise LogitsError(REPLACED.format(func))
        if isinstance(args[0], LazyLogits) and not args[0]._is_modified():
            if (geometry := geometry_of(func, *args, **kwargs)) is not None:
                return cls._on(args[0]._memory, geometry)
            if (dtype := operation(func, *args, **kwargs)) is not None:
                # constants may change until it is done
                constants = tuple(each.clone() if isinstance(each, Tensor) else each for each in args[1:])
                return args[0]._made_by(partial(_applied, func, constants, kwargs), dtype, is_cast(func))
            # inference mode sends whole what autograd would have taken apart
            if torch.is_inference_mode_enabled() and (out := func.decompose(*args, **kwargs)) is not NotImplemented:
                return out
        return _with_plain(func, args, kwargs, LazyLogits._values)

    @property
    def _geometry(self) -> Geometry:
        return tuple(self.size()), self.stride(), self.storage_offset()

    def _made_by(self, done: Pointwise, dtype: torch.dtype, is_cast: bool) -> LazyLogits:
        memory = _Memory(self._memory.call, dtype, self, done, is_cast)
        return LazyLogits._on(memory, (tuple(self.size()), contiguous_stride(self.size()), 0))

    def _is_modified(self) -> bool:
        return self._memory.is_exposed or (not self.is_inference() and self._version != 0)

    def _values(self) -> Tensor:
        """The plain tensor, without a gradient, on the memory that all views share."""
        return self._memory.made().as_strided(*self._geometry)

    def _targets(self, target: Tensor) -> Tensor:
        """`target`, one for each row of these logits, as those of the head's tokens (B, T): IGNORED where there is none."""
        memory, classes = self._memory, self.size(-1)
        size, stride, offset = self._geometry
        whole = target.new_full(memory.size[:-1], IGNORED)
        whole.as_strided(size[:-1], [step // classes for step in stride[:-1]], offset // classes).copy_(target.view(size[:-1]))
        return whole if memory.parent is None else memory.parent._targets(whole)


class _Memory:
    """What stands for the memory of a tensor and all its views: of the head's logits, or of what `done` makes of `parent`.

    is_exposed: it may be written to without a trace, so what was made of it is not made anew.
    """

    def __init__(
        self,
        call: HeadCall,
        dtype: torch.dtype,
        parent: LazyLogits | None = None,
        done: Pointwise | None = None,
        is_cast: bool = False,
    ):
        self.call, self.dtype, self.parent, self.done = call, dtype, parent, done
        self.size = call.size if parent is None else tuple(parent.size())
        before = () if parent is None else parent._memory.chain
        self.chain: tuple[tuple[Pointwise, bool], ...] = before if done is None else (*before, (done, is_cast))
        self.values: Tensor | None = None
        self.is_exposed = False

    def made(self) -> Tensor:
        if self.values is None:
            self.values = self._make()
        return self.values

    def _make(self) -> Tensor:
        if self.parent is None:
            return self.call.logits()
        memory = self.parent._memory
        # a parent that was changed since is made anew as it was: this is a copy from before
        source = memory._make() if memory.values is None or self.parent._is_modified() else memory.values
        assert self.done is not None
        with torch.inference_mode(False), torch.no_grad():
            return self.done(source.as_strided(*self.parent._geometry)).contiguous()

    def pointwise(self) -> Pointwise | None:
        """What was done to the logits on the way here, for the loss, which is exact enough not to need casts alone."""
        return None if all(is_cast for _, is_cast in self.chain) else partial(_through, self.call.device, self.chain)


class _Logits(torch.autograd.Function):
    """Z = H W^T + b, of which no value is made:  dL/dH = dL/dZ W,  dL/dW = dL/dZ^T H,  dL/db = sum_n dL/dz_n.

    Under autocast in the dtype of Z, as torch does. Differentiable again.
    """

    @staticmethod
    def forward(ctx, hidden_BTD, weight_VD, bias_V, call):
        ctx.save_for_backward(hidden_BTD, weight_VD)
        ctx.bias_dtype, ctx.dtype = None if bias_V is None else bias_V.dtype, call.dtype
        return LazyLogits._on(_Memory(call, call.dtype), (call.size, contiguous_stride(call.size), 0))

    @staticmethod
    def backward(ctx, upstream_BTV):
        hidden_BTD, weight_VD = ctx.saved_tensors
        wants_hidden, wants_weight, wants_bias, _ = ctx.needs_input_grad
        upstream_NV = upstream_BTV.flatten(0, -2).to(ctx.dtype)
        hidden, weight, bias = None, None, None
        with torch.autocast(hidden_BTD.device.type, enabled=False):
            if wants_hidden:
                hidden = (upstream_NV @ weight_VD.to(ctx.dtype)).view(hidden_BTD.shape).to(hidden_BTD.dtype)
            if wants_weight:
                weight = (upstream_NV.T @ hidden_BTD.flatten(0, -2).to(ctx.dtype)).to(weight_VD.dtype)
            if wants_bias:
                bias = upstream_NV.sum(0).to(ctx.bias_dtype)
        return hidden, weight, bias, None


def _applied(func: Callable, args: tuple, kwargs: dict, values: Tensor) -> Tensor:
    return func(values, *args, **kwargs)


def _through(device: str, chain: tuple, logits: Tensor) -> Tensor:
    """The operations of `chain` on logits; they were recorded below autocast, whose casts are among them."""
    with torch.autocast(device, enabled=False):
        for done, _ in chain:
            logits = done(logits)
    return logits


# -- the loss


def _cross_entropy_on_demand(
    input: Tensor, target: Tensor, weight: Tensor | None = None, size_average: bool | None = None, ignore_index: int = -100,
    reduce: bool | None = None, reduction: str = "mean", label_smoothing: float = 0.0,
) -> Tensor | None:  # fmt: skip
    """`torch.nn.functional.cross_entropy` without the logits, or None where it must be taken of them."""
    is_plain = weight is None and size_average is None and reduce is None and reduction in ("mean", "sum") and 0 <= label_smoothing <= 1
    if not (is_plain and isinstance(input, LazyLogits) and _are_classes(target, input, ignore_index)) or input._is_modified():
        return None
    call, is_learning = input._memory.call, input.requires_grad and torch.is_grad_enabled()
    if call.is_stale() or is_learning and (call.is_watched or not _is_reached(call.node, input)):
        return None
    call.is_fused |= is_learning
    with torch.set_grad_enabled(is_learning), call.as_called():
        target = input._targets(_ignoring(target, ignore_index, input.size(-1)))
        loss, count = call.head.cross_entropy(call.hidden, call.weight, target, label_smoothing, input._memory.pointwise())
    for signal in call.signals if is_learning else ():
        loss.register_hook(signal)
    return (loss if reduction == "sum" else loss / count).to(_loss_dtype(input))


def _are_classes(target: Any, logits: LazyLogits, ignore_index: int) -> bool:
    """Whether `target` holds a class for each of the rows (N, V); what torch refuses, it shall refuse itself."""
    if not isinstance(target, Tensor) or isinstance(target, LazyLogits) or target.dtype != torch.int64:
        return False
    if logits.dim() != 2 or target.shape != logits.shape[:1] or target.device != logits.device:
        return False
    if target.device.type != "cpu" or is_fake(target):  # whose values would have to be waited for: looking them up raises later
        return True
    return bool(((target >= 0) & (target < logits.size(-1)) | (target == ignore_index)).all())


def _ignoring(target: Tensor, ignore_index: int, classes: int) -> Tensor:
    """With IGNORED for `ignore_index`, and for any other class below 0 one that is out of range, for which looking it up raises."""
    return target.where(target >= 0, classes).where(target != ignore_index, IGNORED)


def _is_reached(node: Any, logits: Tensor) -> bool:
    """Whether the way back from `logits` leads to `node` through torch's own operations alone, so that a loss may go past them."""
    start, number = logits.grad_fn, logits.output_nr
    while start is not None and start is not node:
        edges = start.next_functions
        if is_sink_of_ddp(start):
            edges = edges[number : number + 1]  # each output comes from the input of its place
        elif isinstance(start, torch.autograd.function.BackwardCFunction):  # a user's, which may do anything
            return False
        following = [edge for edge in edges if edge[0] is not None]
        start, number = following[0] if len(following) == 1 else (None, 0)
    return start is not None


def _loss_dtype(logits: LazyLogits) -> torch.dtype:
    """What torch makes of logits of this dtype here: under autocast it depends on the device."""
    if not torch.is_autocast_enabled(logits.device.type):
        return logits.dtype
    one = torch.zeros(1, 1, dtype=logits.dtype, device=logits.device)
    return F.cross_entropy(one, torch.zeros(1, dtype=torch.long, device=logits.device)).dtype


def _watch(logits: LazyLogits, hook: Callable | None = None) -> None:
    """From now on a gradient of the logits themselves is wanted, so no loss may go past them."""
    call = logits._memory.call
    if hook is not None and call.head.is_signal(hook):
        call.signals.append(hook)
        return
    if logits.grad_fn is not None and call.is_fused:
        raise LogitsError(
            f"a hook, or retain_grad, on logits {tuple(logits.shape)} of which a loss was taken already without making them: "
            "it would never see the gradient of that loss. Call the model without labels, ask for the gradient, and take the loss then."
        )
    call.is_watched |= logits.grad_fn is not None


# -- everything else


def _plainly(func: Callable, args: tuple, kwargs: dict) -> Any:
    """`func` of plain tensors that share the memory and the graph of the logits."""
    if func in REFUSED:
        raise LogitsError(REPLACED.format(func))
    return _with_plain(func, args, kwargs, partial(_plain, func))


def _plain(func: Callable, logits: LazyLogits) -> Tensor:
    memory = logits._memory
    memory.made()  # here, where dispatch modes see it
    if func in EXPOSING or logits.is_inference() or torch.is_inference_mode_enabled():
        memory.is_exposed = True
    if func in COPYING and logits.is_leaf:
        return logits._values().detach().requires_grad_(logits.requires_grad)
    with torch._C.DisableTorchFunctionSubclass():
        return logits.expand(logits.size())  # a view that is not made on demand


def _with_plain(func: Callable, args: tuple, kwargs: dict, plain: Callable[[LazyLogits], Tensor]) -> Any:
    """`func` with `plain` of every LazyLogits among its arguments; where it returns one of these, changed in place, the LazyLogits."""
    found: list[tuple[LazyLogits, Tensor]] = []

    def replaced(logits: LazyLogits) -> Tensor:
        found.append((logits, plain(logits)))
        return found[-1][1]

    args, kwargs = tree_map_only(LazyLogits, replaced, (args, kwargs))
    out = func(*args, **kwargs)
    return next((logits for logits, values in found if values is out), out)

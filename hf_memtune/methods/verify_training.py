"""Before the first step: what a model does in training alone, which a probe in evaluation mode does not see.

A part of a model that runs on some tokens, or twice, must do so without a trace: a norm over a batch, a power iteration or a counter in a
buffer knows how often it ran, and on how many tokens.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_memtune._compat import is_fake
from hf_memtune.architectures import Architecture
from hf_memtune.core.rng import RandomTape
from hf_memtune.errors import UnsupportedModelError
from hf_memtune.methods.attention.batch import BodyCall
from hf_memtune.methods.overrides import modes_kept
from hf_memtune.methods.verify import probe_batch
from hf_memtune.methods.verify_parts import FAILURES

REMEMBERED = 2**22  # numbers in a buffer that is copied; what is larger is no statistic of a forward pass
# Of PEFT: chances with which an adapter, or a block of it, is left out of a whole call, by the names that its layers have for them
_PER_CALL = ("module_dropout", "rank_dropout", "boft_dropout")


@dataclass(frozen=True)
class _Kept:
    """A buffer of a module, and its values. Kernels that write running averages do not count as changes in place."""

    owner: nn.Module
    name: str
    buffer: Tensor
    values: Tensor

    @property
    def has_changed(self) -> bool:
        return self.owner._buffers.get(self.name) is not self.buffer or not torch.equal(self.buffer, self.values)


def _kept(module: nn.Module) -> dict[str, _Kept]:
    found = {}
    for path, part in module.named_modules():
        for name, buffer in part._buffers.items():
            if buffer is not None and _is_small(buffer):
                found[f"{path}.{name}".lstrip(".")] = _Kept(part, name, buffer, buffer.clone())
    return found


@contextmanager
def buffers_kept(module: nn.Module) -> Iterator[dict[str, _Kept]]:
    """Put back what is written into buffers meanwhile. Those of traced tensors have no values."""
    before = _kept(module)
    try:
        yield before
    finally:
        with torch.no_grad():
            for kept in before.values():
                if kept.has_changed:
                    kept.buffer.copy_(kept.values)
                    kept.owner._buffers[kept.name] = kept.buffer


def _is_small(buffer: Tensor) -> bool:
    return not is_fake(buffer) and buffer.device.type != "meta" and buffer.numel() <= REMEMBERED


def require_no_trace(architecture: Architecture) -> None:
    """Refuse a body whose forward in training mode changes buffers. Nothing that it changes, or draws at random, stays."""
    base = architecture.base
    call = BodyCall(architecture, base.forward, (), probe_batch(architecture))
    tape = RandomTape({p.device for p in base.parameters()})
    tape.record("probe")
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        before = stack.enter_context(buffers_kept(base))
        stack.enter_context(tape.replaying("probe"))
        stack.enter_context(_training(base))
        try:
            base(**call.arguments | {"use_cache": False})
        except FAILURES:
            return  # what it cannot do on a few tokens tells nothing
        changed = [name for name, kept in before.items() if kept.has_changed]
    if changed:
        raise UnsupportedModelError(
            f"{architecture.name}: a forward pass in training mode changes its buffer {changed[0]}{_and_more(changed)}, as norms over a batch and power "
            "iterations do; here parts of it run several times, on other tokens each time. Train with activation checkpointing alone; or, in a loop of "
            "your own, put the module that owns it into evaluation mode after model.train(), and before this."
        )


@contextmanager
def _training(base: nn.Module) -> Iterator[None]:
    """As it is where it trains already, and else as `train()` makes it."""
    with modes_kept(base):
        if not base.training:
            base.train()
        yield


def _and_more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def require_no_dropout_per_call(architecture: Architecture) -> None:
    """Refuse adapters that are left out at random of a whole call: in chunks each would be left out of others."""
    for name, module in architecture.base.named_modules():
        for kind in _PER_CALL:
            if _chance(getattr(module, kind, None)) > 0:
                raise UnsupportedModelError(
                    f"{architecture.name}: {name}.{kind} leaves an adapter, or a part of it, out of a whole call at random, and in chunks would leave "
                    f"it out of some of them. Expected 0. Make the adapter with {kind}=0; dropout of single numbers (lora_dropout) works."
                )


def _chance(found) -> float:
    """Of a number, or of the largest of those that adapters have by name; a module tells its own `p`."""
    if isinstance(found, (dict, nn.ModuleDict)):
        return max((_chance(each) for each in found.values()), default=0.0)
    found = getattr(found, "p", found) if isinstance(found, nn.Module) else found
    return float(found) if isinstance(found, (int, float)) and not isinstance(found, bool) else 0.0

"""Before the first step: what does the coupling change, and does its inverse hold on this model and device?"""

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_memtune.core.reversible import Tape
from hf_memtune.core.rng import RandomTape
from hf_memtune.methods.overrides import evaluating


@dataclass(frozen=True)
class StartReport:
    """What `verify` found on one batch, at the parameters of that moment.

    state_change: size of the change of the last layer's output, relative to it; of several stacks the largest. plain_loss, loss:
    without and with the coupling and its adapters; None where the batch has no labels. inverse_error: of the rebuilt input of the
    first layer, relative to it; 0 is exact. headroom_bits: left before overflow; None in float numerics.
    """

    state_change: float
    plain_loss: float | None
    loss: float | None
    inverse_error: float
    headroom_bits: float | None

    @property
    def is_exact(self) -> bool:
        """Whether backward sees, bit by bit, the activations of forward."""
        return self.inverse_error == 0

    @property
    def loss_change(self) -> float | None:
        return None if self.loss is None or self.plain_loss is None else self.loss - self.plain_loss


def look_at_start(handle: Any, batch: dict[str, Tensor]) -> StartReport:
    """Two forwards without dropout, and one forward and backward as in training. Nothing is learned; random numbers go on as before."""
    device = next(handle.model.parameters()).device
    tape = RandomTape([device])
    tape.record("before")
    with tape.replaying("before"):
        with torch.no_grad(), evaluating(handle.model):
            states, loss = _last_states(handle, batch)
            with handle.off():
                plain_states, plain_loss = _last_states(handle, batch)
        error = _inverse_error(handle, batch)
    change = max(_relative(found, plain) for found, plain in zip(states, plain_states))
    return StartReport(change, plain_loss, loss, error, handle.headroom_bits)


def _last_states(handle: Any, batch: dict[str, Tensor]) -> tuple[list[Tensor], float | None]:
    """The output of the last layer of every stack, and the loss."""
    found: list[Tensor] = []

    def keep(module: nn.Module, args: tuple, output: Any) -> None:
        found.append(output[0] if isinstance(output, tuple) else output)

    with ExitStack() as stack:
        for each in handle.stacks:
            stack.callback(each.layers[-1].register_forward_hook(keep).remove)
        outputs = handle.model(**batch)
    loss = getattr(outputs, "loss", None)
    return found, None if loss is None else loss.item()


def _inverse_error(handle: Any, batch: dict[str, Tensor]) -> float:
    compared: list[tuple[Tape, Tensor]] = []
    for shared in handle.shared:
        shared.compared = compared
    try:
        with torch.enable_grad():
            outputs = handle.model(**batch)
            loss = outputs.loss if getattr(outputs, "loss", None) is not None else outputs[0].float().square().mean()
            torch.autograd.grad(loss, [hidden for _, hidden in compared])
    finally:
        for shared in handle.shared:
            shared.compared = None
    return max(tape.start_error() for tape, _ in compared)


def _relative(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).double().norm() / expected.double().norm().clamp_min(1e-30)).item()

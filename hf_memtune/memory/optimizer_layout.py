"""Optimizers whose kernels cannot run without values, as the state they keep: for predicting bytes, not for training."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from hf_memtune.levers.facts import BLOCKWISE_FROM

# bitsandbytes' layout (bitsandbytes/optim/optimizer.py, Optimizer2State and Optimizer1State): parameters of fewer elements than BLOCKWISE_FROM,
# and those of embeddings, for which transformers asks for 32 bits, have float32 state; the others one byte an element, and a float32 scale a block.
BLOCK = 256
TWO_STATES = ("adam", "ademamix")


def unwrapped_optimizer(optimizer: Any) -> Any:
    """What accelerate's wrapper, which has no hooks of its own, is around; or the optimizer itself."""
    return getattr(optimizer, "optimizer", optimizer)


class LaidOutOptimizer(torch.optim.Optimizer):
    """Makes the state of a bitsandbytes optimizer at its first step, and does nothing else.

    bits: 8 or 32. states: moments kept for each element. wide: parameters whose state is float32 whatever their size.
    The state of paged optimizers counts in full, although a GPU may send it to the host when it runs short.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], bits: int, states: int, wide: set[int]):
        self.bits, self.states, self.wide = bits, states, wide
        self._codes: list[torch.Tensor] | None = None
        super().__init__(parameters, {"lr": 0.0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for parameter in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
            if not self.state[parameter]:
                self.state[parameter] = self._state_of(parameter)

    def _state_of(self, parameter: nn.Parameter) -> dict[str, torch.Tensor]:
        wide = self.bits == 32 or parameter.numel() < BLOCKWISE_FROM or id(parameter) in self.wide
        found = {}
        for number in range(1, self.states + 1):
            found[f"state{number}"] = torch.empty(parameter.shape, dtype=torch.float32 if wide else torch.uint8)
            if not wide:
                found[f"absmax{number}"] = torch.empty(math.ceil(parameter.numel() / BLOCK))
                found[f"qmap{number}"] = self._code(number)
        return found

    def _code(self, number: int) -> torch.Tensor:
        """What the 256 values of a byte stand for, one table for all parameters."""
        self._codes = self._codes or [torch.empty(256) for _ in range(self.states)]
        return self._codes[number - 1]


def laid_out(model: nn.Module, optim: str) -> LaidOutOptimizer | None:
    """The layout of the optimizer with that name in transformers, of `model`; None for one that can run without values itself."""
    if "8bit" not in optim and not optim.startswith("paged") and "bnb" not in optim:
        return None
    embeddings = {id(p) for module in model.modules() if isinstance(module, nn.Embedding) for p in module.parameters()}
    states = (3 if "ademamix" in optim else 2) if any(name in optim for name in TWO_STATES) else 1
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return LaidOutOptimizer(trained, 8 if "8bit" in optim else 32, states, embeddings)

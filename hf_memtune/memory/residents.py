"""What is in memory before a step and after it: weights, gradients, the state of the optimizer, the batch; each with a name."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .ledger import Trackable, tensors_of

Resident = tuple[str, str | None, Tensor]
"""Category, name or None, tensor."""


def residents(model: nn.Module, optimizer: torch.optim.Optimizer | None, batch: Trackable) -> Iterator[Resident]:
    """All of them, as they are now."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        yield "weights", name, tensor
    for tensor in _quantisation_of(model):
        yield "weights", None, tensor
    for tensor in tensors_of(batch):
        yield "batch", None, tensor
    yield from gradients(model)
    yield from optimizer_state(model, optimizer)


def bytes_held(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> int:
    """Of all of them but a batch, each storage once."""
    storages = (tensor.untyped_storage() for _, _, tensor in residents(model, optimizer, ()))
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())


def gradients(model: nn.Module) -> Iterator[Resident]:
    """Those that parameters have now."""
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            yield "gradients", name, parameter.grad


def optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> Iterator[Resident]:
    """The tensors of `optimizer.state`."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for parameter, state in () if optimizer is None else optimizer.state.items():
        for key, value in state.items():
            if isinstance(value, Tensor):
                yield "optimizer_state", f"{names.get(id(parameter), 'parameter')}: {key}", value


def vocabulary_of(model: nn.Module) -> int | None:
    """Values of a token's logits, by the config of the model; None without one."""
    config = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return getattr(text, "vocab_size", None)


def _quantisation_of(model: nn.Module) -> list[Tensor]:
    """Scales and codes beside 4-bit weights, which are neither parameters nor buffers."""
    found: list[Tensor] = []
    pending: list[Any] = [getattr(parameter, "quant_state", None) for parameter in model.parameters()]
    while pending:
        if (state := pending.pop()) is None:
            continue
        found += [value for value in vars(state).values() if isinstance(value, Tensor)]
        pending += [value for value in vars(state).values() if type(value) is type(state)]
    return found

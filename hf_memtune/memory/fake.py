"""A model of shapes alone: a copy of any model whose tensors have no values, and batches for it. Made and run inside one FakeTensorMode."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


def fake_copy(model: nn.Module) -> nn.Module:
    """A deep copy of `model`, on real or meta tensors, in which every tensor is a fake one on the CPU; shared ones stay shared.

    Needs a FakeTensorMode in force. No data are read or copied; the model is not changed.
    """
    memo: dict[int, Any] = {}
    for holder in _holders(model):
        for value in _tensors_in(holder):
            if id(value) not in memo:
                memo[id(value)] = _fake(value, memo)
    return copy.deepcopy(model, memo)


def _holders(model: nn.Module) -> Iterator[dict]:
    for module in model.modules():
        yield from (module._parameters, module._buffers, vars(module))
    for parameter in model.parameters():  # 4-bit weights have scales beside them, and those have scales
        state = getattr(parameter, "quant_state", None)
        while state is not None:
            yield vars(state)
            state = getattr(state, "state2", None)


def _tensors_in(holder: dict) -> list[Tensor]:
    return [value for value in holder.values() if isinstance(value, Tensor)]


def _fake(tensor: Tensor, memo: dict[int, Any]) -> Tensor:
    made = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
    if not isinstance(tensor, nn.Parameter):
        return made
    made = nn.Parameter(made, tensor.requires_grad)
    if (state := getattr(tensor, "quant_state", None)) is not None:
        for part in (state, getattr(state, "state2", None)):
            for value in _tensors_in(vars(part)) if part is not None else ():
                memo.setdefault(id(value), _fake(value, memo))
        made.quant_state, made.bnb_quantized = copy.deepcopy(state, memo), True
    return made


@contextmanager
def maskless_sdpa() -> Iterator[str]:
    """SDPA under a name for which transformers makes no mask.

    Whether a mask is needed is decided by the values of positions, which traced tensors lack; transformers then makes one, and
    with it copies of keys and values, that a real run on unpadded rows does not have.
    """
    name = "hf_memtune-traced-sdpa"
    AttentionInterface.register(name, ALL_ATTENTION_FUNCTIONS["sdpa"])
    try:
        yield name
    finally:
        AttentionInterface._global_mapping.pop(name, None)


def set_attention(model: nn.Module, name: str) -> None:
    """Choose the attention function of every part of a model."""
    for module in model.modules():
        if hasattr(getattr(module, "config", None), "_attn_implementation_internal"):
            module.config._attn_implementation_internal = name

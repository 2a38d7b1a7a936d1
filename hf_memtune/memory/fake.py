"""A model of shapes alone: a copy of any model whose tensors have no values, and batches for it. Made and run inside one FakeTensorMode."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_memtune.architectures.stacks import layer_stacks, unwrapped
from hf_memtune.errors import UnsupportedModelError
from hf_memtune.methods.layer_override import override_of


def fake_copy(model: nn.Module) -> nn.Module:
    """A deep copy of `model`, on real or meta tensors, in which every tensor is a fake one on the CPU; shared ones stay shared.

    Needs a FakeTensorMode in force. No data are read or copied; the model is not changed.

    Raises UnsupportedModelError for a model whose layers were changed (reversible, on two levels): their changes are of that very model.
    """
    if any(override_of(module) is not None for module in model.modules()):
        raise UnsupportedModelError(
            f"{type(model).__name__}: its layers are reversible, or checkpointed on two levels, already. Estimate before the trainer is made."
        )
    memo: dict[int, Any] = {}
    for holder in _holders(model):
        for value in _tensors_in(holder):
            if id(value) not in memo:
                memo[id(value)] = _fake(value, memo)
    copied = copy.deepcopy(model, memo)
    if "_original_forward" in vars(copied):  # accelerate's wrapper around forward is a closure, which still runs the model itself
        del copied.forward, copied._original_forward
    vars(copied).pop("_is_accelerate_prepared", None)
    return copied


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


def shorten(model: nn.Module, layers: int) -> nn.Module:
    """Leave `model`, with one stack of layers, its first `layers` of them; returns the first one."""
    (stack,) = layer_stacks(model)
    found = unwrapped(model).get_submodule(stack.name)
    del found[layers:]
    stack.config.num_hidden_layers = layers
    return found[0]


_TRACED = "hf_memtune-traced-sdpa"


@contextmanager
def sdpa_without_padding() -> Iterator[str]:
    """SDPA under a name for which transformers makes a mask only where one is needed for rows without padding.

    It decides that by the values of masks and positions. Traced tensors have none, and it then makes masks, and with them copies of keys
    and values, that a real run on such rows does not have.
    """
    AttentionInterface.register(_TRACED, ALL_ATTENTION_FUNCTIONS["sdpa"])
    AttentionMaskInterface.register(_TRACED, _mask_where_needed)
    try:
        yield _TRACED
    finally:
        AttentionInterface._global_mapping.pop(_TRACED, None)
        AttentionMaskInterface._global_mapping.pop(_TRACED, None)


def _mask_where_needed(*args: Any, kv_length: int, local_size: int | None = None, **kwargs: Any) -> Tensor | None:
    if local_size is None or kv_length < local_size:
        return None
    return sdpa_mask(*args, kv_length=kv_length, local_size=local_size, **kwargs)


def use_sdpa(model: nn.Module, name: str) -> None:
    """Put the attention function of that name in place of SDPA, where a part of the model has that under either name."""
    for module in model.modules():
        if getattr(getattr(module, "config", None), "_attn_implementation_internal", None) in ("sdpa", _TRACED):
            module.config._attn_implementation_internal = name

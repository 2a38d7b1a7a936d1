"""Positions of chosen tokens, for modules that number the tokens they are given by themselves.

Shape legend: B rows of a batch, H heads, S tokens of a pass, C channels of a head.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from hf_memtune.architectures import Architecture
from hf_memtune.methods.attention.batch import BodyCall
from hf_memtune.methods.attention.spans import Span
from hf_memtune.methods.overrides import forwards_as


def at_positions(architecture: Architecture, call: BodyCall, spans: dict[str, Span]) -> AbstractContextManager:
    """While open, the model's position modules embed the positions of the tokens of `spans`."""
    modules = architecture.position_modules
    return forwards_as((m, positions_at(m.forward, call, spans[stack], stack)) for stack, m in modules.items())


def positions_at(forward: Callable, call: BodyCall, span: Span, stack: str) -> Callable:
    """Position embeddings of the tokens of `span`, from a module that numbers the tokens it is given, or their shape, itself."""

    def run(given: Tensor | tuple | None, *args, **kwargs) -> Tensor:
        shape = (span.rows.batch, span.rows.length)
        ids = call.input_ids(stack)
        whole: Tensor | torch.Size
        if isinstance(given, tuple):  # torch.Size is one
            whole = torch.Size(shape)
        else:
            whole = ids if ids is not None else torch.zeros(shape, dtype=torch.long, device=span.index.device)
        numbers = {} if kwargs.get("position_ids") is None else {"position_ids": torch.arange(shape[1], device=span.index.device)}
        embedded = forward(whole, **numbers)
        return span.take(embedded if embedded.dim() == 3 else embedded[None])

    return run


def at_temperature(module: nn.Module, query: Tensor, span: Span) -> Tensor:
    """Queries (B, H, S, C) of the tokens of `span`, scaled as in a run over whole rows.

    Llama 4 scales the queries of layers without rotary embeddings by the logarithm of their position, counted from the first token given.
    """
    if not getattr(module, "attn_temperature_tuning", False) or module.use_rope or span.start == 0:
        return query
    counted = torch.arange(span.index.shape[1], device=query.device)[None]
    # in float64: both are float32 in the model, and only one of them shall be rounded to it
    ratio = _temperature(module, span.index).double() / _temperature(module, counted).double()
    return (query * ratio[:, None, :, None].to(torch.promote_types(query.dtype, torch.float32))).to(query.dtype)


def _temperature(module: Any, positions: Tensor) -> Tensor:
    return torch.log1p(torch.floor((positions.float() + 1) / module.floor_scale)) * module.attn_scale + 1

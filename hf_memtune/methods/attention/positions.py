"""Position embeddings of chosen tokens, for modules that number the tokens they are given by themselves."""

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from hf_memtune.architectures import Architecture
from hf_memtune.methods.attention.batch import BodyCall
from hf_memtune.methods.overrides import forwards_as
from hf_memtune.methods.attention.spans import Span


def at_positions(architecture: Architecture, call: BodyCall, spans: dict[str, Span]) -> AbstractContextManager:
    """While open, the model's position modules embed the positions of the tokens of `spans`."""
    modules = architecture.position_modules
    return forwards_as((m, positions_at(m.forward, call, spans[stack], stack)) for stack, m in modules.items())


def positions_at(forward: Callable, call: BodyCall, span: Span, stack: str) -> Callable:
    """Position embeddings of the tokens of `span`, from a module that numbers the tokens it is given, or their shape, itself."""

    def run(given: Tensor | tuple | None, *args, **kwargs) -> Tensor:
        shape = (span.rows.batch, span.rows.length)
        ids = call.input_ids(stack)
        if isinstance(given, tuple):  # torch.Size is one
            whole = torch.Size(shape)
        else:
            whole = ids if ids is not None else torch.zeros(shape, dtype=torch.long, device=span.index.device)
        embedded = forward(whole)
        return span.take(embedded if embedded.dim() == 3 else embedded[None])

    return run

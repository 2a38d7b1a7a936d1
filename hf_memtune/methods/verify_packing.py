"""Before the first step: do the masks of this very model tell sequences of a row apart by positions that begin anew?

transformers packs rows so where a body hands its positions to the function that makes masks, and not every body does.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from hf_memtune.methods.attention.routing import Router
from hf_memtune.methods.attention.spans import Span
from hf_memtune.methods.verify_parts import FAILURES


class _Told(Exception):
    """Whether the first token of a second sequence sees the one before it."""


class _Asking:
    """In place of a pass: looks at the first rule that comes, and goes no further."""

    stack = "decoder"
    spans: dict[str, Span] = {}

    def __init__(self, first: int, device: torch.device):
        self.first, self.device = first, device

    def mask(self, mask_function: Callable, finish: Callable[[Tensor], Tensor], may_skip: bool = True) -> Tensor | None:
        zero = torch.zeros(1, 1, dtype=torch.long, device=self.device)
        raise _Told(bool(mask_function(zero, zero, zero + self.first, zero + self.first - 1).all()))

    def attend(self, *args):
        raise _Told(True)  # no mask was asked for


def packs_by_positions(router: Router, tokens: int = 8) -> bool:
    """False only where a body was seen not to: rules of masks that it writes by itself are taken at their word."""
    base = router.architecture.base
    embedding = base.get_input_embeddings().weight
    assert isinstance(embedding, Tensor)
    positions = torch.arange(tokens, device=embedding.device)[None] % (tokens // 2)
    if router.architecture.is_encoder_decoder:
        return True
    try:
        with torch.no_grad(), router.routed(_Asking(tokens // 2, embedding.device)):
            base(input_ids=torch.full_like(positions, 1), position_ids=positions, use_cache=False)
    except _Told as told:
        return not told.args[0]
    except FAILURES:
        pass
    return True

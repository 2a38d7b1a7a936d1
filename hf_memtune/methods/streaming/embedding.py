"""The gradient of a trained embedding, summed row by row: of a large vocabulary, a dense one for each chunk is most of what a chunk needs."""

from contextlib import AbstractContextManager

from torch import Tensor, nn

from hf_memtune.core.tied import embed_summed
from hf_memtune.methods.lookups import looking_up


def _summed(weight: Tensor, ids: Tensor, padding_idx: int | None) -> Tensor | None:
    return embed_summed(weight, ids, padding_idx) if weight.is_leaf else None


def rows_summed_in_place(embedding: nn.Embedding) -> AbstractContextManager[None]:
    """While open, `embedding`, whose weight is a leaf of ours, sums its gradient in place."""
    return looking_up(embedding, _summed)

"""Let the embedding and the head of a model share one gradient buffer where they share one matrix."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from hf_memtune.architectures import Architecture
from hf_memtune.core.tied import embed_tied
from hf_memtune.methods.lookups import looking_up


class TiedMatrix:
    """The matrix of a head that a model embeds its tokens with too. `of_head` is what the head shall use."""

    def __init__(self, head: nn.Linear):
        self._head = head
        self._shared: Tensor | None = None

    def of_head(self) -> Tensor:
        """The head's matrix, linked to the embedding that came last; used once, or there would be two gradients to wait for."""
        shared, self._shared = self._shared, None
        return self._head.weight if shared is None else shared

    def embed(self, weight: Tensor, ids: Tensor, padding_idx: int | None) -> Tensor | None:
        """The embeddings of `ids`, linked to the head where they are of the same matrix; None where they are not."""
        if weight is not self._head.weight or not torch.is_grad_enabled():
            return None
        embedded, self._shared = embed_tied(weight, ids, padding_idx)
        return embedded


@contextmanager
def tied_matrix(architecture: Architecture) -> Iterator[TiedMatrix | None]:
    """While open, the model's embedding is linked to its head, if both are of one matrix. None where they are not, or two stacks embed."""
    if not is_tied(architecture):
        yield None
        return
    tied = TiedMatrix(architecture.head)
    with looking_up(architecture.base.get_input_embeddings(), tied.embed):
        yield tied


def is_tied(architecture: Architecture) -> bool:
    """Whether the embedding of the one stack there is, and the head, are of one matrix."""
    embedding, head = architecture.base.get_input_embeddings(), architecture.output_head
    return head is not None and not architecture.is_encoder_decoder and getattr(embedding, "weight", None) is head.weight

"""Let the embedding and the head of a model share one gradient buffer where they share one matrix."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from hf_memtune.architectures import Architecture
from hf_memtune.core.tied import embed_tied
from hf_memtune.methods.overrides import forward_as


class TiedMatrix:
    """The matrix of a head that a model embeds its tokens with too. `of_head` is what the head shall use."""

    def __init__(self, head: nn.Module):
        self._head = head
        self._shared: Tensor | None = None

    def of_head(self) -> Tensor:
        """The head's matrix, linked to the embedding that came last; used once, or there would be two gradients to wait for."""
        shared, self._shared = self._shared, None
        return self._head.weight if shared is None else shared

    def embed(
        self, embedding: Callable, input: Tensor, weight: Tensor, padding_idx: int | None = None, max_norm: float | None = None,
        norm_type: float = 2.0, scale_grad_by_freq: bool = False, sparse: bool = False,
    ) -> Tensor:  # fmt: skip
        """`torch.nn.functional.embedding`, linked to the head where it is of the same matrix and its gradient is the plain one."""
        is_plain = max_norm is None and not scale_grad_by_freq and not sparse
        is_trained = weight.requires_grad and torch.is_grad_enabled()
        if is_plain and is_trained and weight is self._head.weight:
            embedded, self._shared = embed_tied(weight, input, padding_idx)
            return embedded
        return embedding(input, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse)


class _Embedding(TorchFunctionMode):
    """While on, lookups go through a TiedMatrix: whatever a model's own embedding does before and after them stays."""

    def __init__(self, tied: TiedMatrix):
        super().__init__()
        self._tied = tied

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.embedding:
            return self._tied.embed(func, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


@contextmanager
def tied_matrix(architecture: Architecture) -> Iterator[TiedMatrix | None]:
    """While open, the model's embedding is linked to its head, if both are of one matrix. None where they are not, or two stacks embed."""
    embedding, head = architecture.base.get_input_embeddings(), architecture.output_head
    if head is None or architecture.is_encoder_decoder or getattr(embedding, "weight", None) is not head.weight:
        yield None
        return
    tied = TiedMatrix(head)
    with forward_as(embedding, partial(_embedding_with, tied, embedding.forward)):
        yield tied


def _embedding_with(tied: TiedMatrix, forward: Callable, *args, **kwargs) -> Tensor:
    with _Embedding(tied):
        return forward(*args, **kwargs)

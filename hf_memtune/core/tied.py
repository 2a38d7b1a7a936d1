"""One buffer for the gradient of a matrix that is both the embedding and the head of a model.

Autograd makes three of them: the head's, a dense one of the embedding, and their sum. Of large vocabularies that is most of what a
step with a logit-free loss needs when every parameter is trained.

Shape legend: N tokens, V classes, D hidden size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def embed_tied(weight_VD: Tensor, ids: Tensor, padding_idx: int | None = None) -> tuple[Tensor, Tensor]:
    """The embeddings of `ids`, (*ids.shape, D), and the matrix for the head to use in place of `weight_VD`, of which it is a view.

    The gradient that the head finds for that view waits until those of the embeddings are known, and these are added to it in place:
    whoever makes it must not use it any more. Rows of one token are summed in float32 at least, and added to half precision once.
    """
    return _TiedEmbedding.apply(weight_VD, ids, _from_the_start(padding_idx, weight_VD))


class _TiedEmbedding(torch.autograd.Function):
    """E = W[ids], W' = W: for a loss L(E, W'), dL/dW = dL/dW' + sum over n of onehot(id_n) (dL/dE_n)^T, without rows of padding_idx."""

    @staticmethod
    def forward(ctx, weight_VD, ids, padding_idx):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(ids)
        ctx.classes, ctx.padding_idx = weight_VD.shape[0], padding_idx
        return F.embedding(ids, weight_VD), weight_VD.view_as(weight_VD)

    @staticmethod
    def backward(ctx, embedded, weight_VD):
        if embedded is not None:
            (ids,) = ctx.saved_tensors
            if weight_VD is None:
                weight_VD = embedded.new_zeros(ctx.classes, embedded.shape[-1])
            elif 0 in weight_VD.stride():  # expanded, and not to be written to
                weight_VD = weight_VD.clone()
            add_rows(weight_VD, ids.flatten().long(), embedded.reshape(-1, embedded.shape[-1]), ctx.padding_idx)
        return weight_VD, None, None


def embed_summed(weight_VD: Tensor, ids: Tensor, padding_idx: int | None = None) -> Tensor:
    """The embeddings of `ids`, (*ids.shape, D), whose gradient is added to `weight_VD.grad` row by row, in place.

    weight_VD: a leaf that nobody else waits for a gradient of: no tensor of its size is made for each call, and no hook of it runs.
    """
    return _SummedEmbedding.apply(weight_VD, ids, _from_the_start(padding_idx, weight_VD))


class _SummedEmbedding(torch.autograd.Function):
    """E = W[ids]: dL/dW += sum over n of onehot(id_n) (dL/dE_n)^T, without rows of padding_idx."""

    @staticmethod
    def forward(ctx, weight_VD, ids, padding_idx):
        ctx.save_for_backward(ids)
        ctx.weight_VD, ctx.padding_idx = weight_VD, padding_idx
        return F.embedding(ids, weight_VD)

    @staticmethod
    def backward(ctx, embedded):
        (ids,), weight_VD = ctx.saved_tensors, ctx.weight_VD
        if weight_VD.grad is None:
            weight_VD.grad = torch.zeros_like(weight_VD)
        add_rows(weight_VD.grad, ids.flatten().long(), embedded.reshape(-1, embedded.shape[-1]), ctx.padding_idx)
        return None, None, None


def _from_the_start(padding_idx: int | None, weight_VD: Tensor) -> int | None:
    """torch lets it be counted from the end."""
    return padding_idx + weight_VD.shape[0] if padding_idx is not None and padding_idx < 0 else padding_idx


@torch.no_grad()
def add_rows(into_VD: Tensor, ids_N: Tensor, rows_ND: Tensor, padding_idx: int | None) -> None:
    """Add each row to that of its token. One of a token's rows takes the sum of them all, the others become 0."""
    order_N = torch.arange(len(ids_N), device=ids_N.device)
    chosen_V = torch.empty(len(into_VD), dtype=torch.long, device=ids_N.device).scatter_(0, ids_N, order_N)
    chosen_N = chosen_V[ids_N]
    dtype = torch.promote_types(into_VD.dtype, torch.float32)
    sums_ND = torch.zeros(rows_ND.shape, dtype=dtype, device=rows_ND.device).index_add_(0, chosen_N, rows_ND.to(dtype))
    if padding_idx is not None:
        sums_ND.masked_fill_((ids_N == padding_idx)[:, None], 0)
    into_VD.index_add_(0, ids_N, sums_ND.to(into_VD.dtype))

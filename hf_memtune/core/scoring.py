"""Token scores: how much attention a token receives, and how large the gradient at it is.

Sources: TokenSeek (arXiv 2601.19739), eq. 3 (context), eq. 4 (gradient), eq. 5 (combined).
Shape legend: B rows of a batch, H query heads, K key heads, T tokens, R query rows of one chunk, C channels of a head.
"""

from collections.abc import Callable

import torch
from torch import Tensor

SCORE_CHUNK_ELEMENTS = 2**22  # attention weights alive at a time, in elements: 16 MiB in float32; 16 times that on a GPU

VisibleRows = Callable[[int, int], tuple[Tensor | None, int]]
"""Maps query rows [start, stop) to (mask, keys): mask (B or 1, 1, R, keys) bool, or None where all of the first `keys` are seen."""


def attention_received(
    query: Tensor,
    key: Tensor,
    visible: VisibleRows,
    *,
    scaling: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    real: Tensor | None = None,
    row_chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Column sums of the attention matrix: eq. 3, I1(t_j) = sum_i A_ij, averaged over heads.

    query: (B, H, T, C) and key: (B, K, T, C), after rotary embedding, K dividing H. real: (B, T) bool, rows of padding
    do not count. sinks: (H,), logits that take part in each row's softmax and receive nothing (gpt-oss). Softmax is taken
    in float32 at least. Only `row_chunk` rows of the matrix exist at a time, so that memory grows with T, not with T
    squared; by default the chunk is as large as SCORE_CHUNK_ELEMENTS allows.
    Returns (received, seen_by), both (B, T): the sum, and the number of rows that can see the token.
    """
    rows, heads, length, _ = query.shape
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    received = torch.zeros(rows, key.shape[2], dtype=dtype, device=query.device)
    seen_by = torch.zeros_like(received)
    budget = SCORE_CHUNK_ELEMENTS * (16 if query.is_cuda else 1)  # small chunks keep a GPU waiting for their launches
    row_chunk = row_chunk or max(1, budget // (rows * heads * key.shape[2]))
    for start in range(0, length, row_chunk):
        stop = min(start + row_chunk, length)
        mask, keys = visible(start, stop)
        weights = _attention_rows(query[:, :, start:stop], key[:, :, :keys], mask, scaling, softcap, sinks, dtype)
        counted = torch.ones((rows, stop - start), dtype=dtype, device=query.device)
        if real is not None:
            counted = real[:, start:stop].to(dtype)
        received[:, :keys] += torch.einsum("bhrt,br->bt", weights, counted) / heads
        sees = torch.ones((1, 1, 1, 1), dtype=dtype, device=query.device) if mask is None else mask.to(dtype)
        seen_by[:, :keys] += (sees[:, 0] * counted[:, :, None]).sum(1)
    return received, seen_by


def _attention_rows(query, key, mask, scaling, softcap, sinks, dtype) -> Tensor:
    """(B, H, R, keys): softmax of the scaled products, grouped heads sharing their key without a copy of it."""
    rows, heads, chunk, channels = query.shape
    grouped = query.reshape(rows, key.shape[1], -1, channels)
    products = (grouped @ key.transpose(2, 3)).reshape(rows, heads, chunk, -1).to(dtype).mul_(scaling)
    if softcap is not None:
        products = torch.tanh(products / softcap) * softcap
    if mask is not None:
        # a finite minimum, not -inf: a row of padding that sees nothing must not become NaN
        products = products.masked_fill_(~mask, torch.finfo(dtype).min)
    if sinks is not None:
        sink = sinks.to(dtype).view(1, -1, 1, 1).expand(rows, heads, chunk, 1)
        return torch.cat([products, sink], dim=-1).softmax(-1)[..., :-1]
    return products.softmax(-1)


def gradient_magnitude(gradient: Tensor, norm: str) -> Tensor:
    """Eq. 4: the gradient at the input of the last block, (B, T, D), accumulated over D: (B, T).

    norm: "l2" (Euclidean), "l1" (sum of magnitudes) or "sum" (signed sum, as eq. 4 reads literally).
    """
    gradient = gradient if gradient.dtype == torch.float64 else gradient.float()
    if norm == "sum":
        return gradient.sum(-1)
    return torch.linalg.vector_norm(gradient, ord={"l1": 1, "l2": 2}[norm], dim=-1)


def minmax(scores: Tensor, real: Tensor | None = None) -> Tensor:
    """Scale the real tokens of each row, (B, T), to [0, 1]. A row whose scores are all equal becomes 0."""
    low, high = scores, scores
    if real is not None:
        low, high = scores.masked_fill(~real, torch.inf), scores.masked_fill(~real, -torch.inf)
    low, high = low.amin(1, keepdim=True), high.amax(1, keepdim=True)
    spread = high - low
    return torch.where(spread > 0, (scores - low) / spread, 0.0)


def combined_score(context: Tensor, gradient: Tensor, context_weight: float, gradient_weight: float, real: Tensor | None = None) -> Tensor:
    """Eq. 5: I = alpha * log(I1) + beta * minmax(I2), each (B, T). The logarithm tames the attention sink."""
    log_context = context.clamp_min(torch.finfo(context.dtype).tiny).log()
    return context_weight * log_context + gradient_weight * minmax(gradient, real)

"""The loss of a linear head without its logits.

Shape legend: N tokens, D hidden size, V classes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from hf_memtune._compat import chunked_linear_cross_entropy

IGNORED = -100  # the label that transformers and torch give to a token without loss
LOGIT_CHUNK_BYTES = 32 * 2**20  # float32 logits alive at a time


def logit_rows(classes: int) -> int:
    """Tokens whose float32 logits fit LOGIT_CHUNK_BYTES, at least 16."""
    return max(16, LOGIT_CHUNK_BYTES // (4 * classes))


def linear_loss(
    hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, target_N: Tensor, label_smoothing: float = 0.0
) -> Tensor:
    """Sum over tokens of the cross entropy of a linear head, a scalar; tokens with target -100 cost nothing, exactly 0.

    torch's `linear_cross_entropy` serves float32 and float64. It returns the loss in the dtype of its input and ignores
    chunking with label smoothing, so half precision and smoothing go through chunks that are recomputed in backward,
    whose loss is float32. Backward through torch's can run once: retain_graph=True does not help.
    """
    if target_N.numel() == 0:
        # connected to every parameter all the same: distributed training waits for the gradient of each
        bias_sum = 0 if bias_V is None else bias_V.sum()
        return (hidden_ND.sum() + weight_VD.reshape(-1)[:1].sum() + bias_sum) * 0
    rows = logit_rows(weight_VD.shape[0])
    exact_scalar = hidden_ND.dtype == weight_VD.dtype and hidden_ND.dtype in (torch.float32, torch.float64)
    exact_scalar = exact_scalar and not torch.is_autocast_enabled(hidden_ND.device.type)
    if chunked_linear_cross_entropy is not None and exact_scalar and not label_smoothing:
        return chunked_linear_cross_entropy(hidden_ND, weight_VD, bias_V, target_N, rows)
    # the backward of cross_entropy holds logits, log-probabilities and their gradient at once
    return _checkpointed_loss(hidden_ND, weight_VD, bias_V, target_N, label_smoothing, max(16, rows // 2))


def _checkpointed_loss(hidden, weight, bias, target, label_smoothing, rows) -> Tensor:
    def chunk_loss(hidden, target):
        logits = F.linear(hidden, weight, bias)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        return F.cross_entropy(
            logits, target, reduction="sum", ignore_index=IGNORED, label_smoothing=label_smoothing
        )

    pairs = zip(hidden.split(rows), target.split(rows))
    losses = [
        checkpoint(chunk_loss, *pair, use_reentrant=False, preserve_rng_state=False, determinism_check="none")
        for pair in pairs
    ]
    return torch.stack(losses).sum()


@torch.no_grad()
def linear_loss_gradient(
    hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, target_N: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradient of the summed cross entropy with respect to the hidden states, (N, D), and the loss of each token, (N,).

    d(loss)/d(logits) = softmax(logits) - onehot(target), so the gradient is two products a chunk, without autograd.
    Tokens with target -100 have gradient 0 and loss 0.
    """
    gradient, losses = torch.zeros_like(hidden_ND), []
    rows = logit_rows(weight_VD.shape[0])
    for start in range(0, hidden_ND.shape[0], rows):
        target = target_N[start : start + rows]
        hidden = hidden_ND[start : start + rows].to(weight_VD.dtype)
        residual, loss = _softmax_residual(F.linear(hidden, weight_VD, bias_V), target)
        gradient[start : start + rows] = residual.to(weight_VD.dtype) @ weight_VD
        losses.append(loss)
        del residual  # or it would live on beside that of the next chunk
    return gradient, torch.cat(losses) if losses else hidden_ND.new_zeros(0)


def _softmax_residual(work: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """softmax - onehot of logits `work` (rows, V), in place and in float32 at least, and the loss of each row."""
    work = work if work.dtype == torch.float64 else work.float()
    chosen, labelled = target.clamp_min(0)[:, None], target != IGNORED
    highest = work.amax(1, keepdim=True)
    correct = work.gather(1, chosen) - highest
    work = work.sub_(highest).exp_()
    total = work.sum(1, keepdim=True)
    loss = (total.log() - correct)[:, 0] * labelled
    work.div_(total).scatter_add_(1, chosen, -torch.ones_like(correct)).mul_(labelled[:, None])
    return work, loss

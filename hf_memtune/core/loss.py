"""The loss of a linear head without its logits.

Shape legend: N tokens, D hidden size, V classes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_memtune._compat import chunked_linear_cross_entropy

IGNORED = -100  # the label that transformers and torch give to a token without loss
LOGIT_CHUNK_BYTES = 32 * 2**20  # float32 logits alive at a time


def logit_rows(classes: int) -> int:
    """Tokens whose float32 logits fit LOGIT_CHUNK_BYTES, at least 16."""
    return max(16, LOGIT_CHUNK_BYTES // (4 * classes))


def linear_loss(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    target_N: Tensor,
    label_smoothing: float = 0.0,
    token_weight_N: Tensor | None = None,
) -> Tensor:
    """Sum over tokens of the cross entropy of a linear head, a scalar; tokens with target -100 cost nothing, exactly 0.

    token_weight_N: factors of the tokens' losses, finite, constants of the differentiation; None: the plain sum.

    torch's `linear_cross_entropy` serves float32 and float64 where the head is not trained. It returns the loss in the dtype of its
    input, ignores chunking with label smoothing, knows no weights of tokens, and has two gradients of the size of the head at once in
    backward. So half precision, autocast, smoothing, token weights and trained heads go through `LinearLoss`, whose loss is float32
    (float64 where the weight is).
    Backward can run once: both form their gradients in forward and hand them over.
    """
    if target_N.numel() == 0:
        # connected to every parameter all the same: distributed training waits for the gradient of each
        bias_sum = 0 if bias_V is None else bias_V.sum()
        return (hidden_ND.sum() + weight_VD.reshape(-1)[:1].sum() + bias_sum) * 0
    exact_scalar = hidden_ND.dtype == weight_VD.dtype and hidden_ND.dtype in (torch.float32, torch.float64)
    exact_scalar = exact_scalar and not torch.is_autocast_enabled(hidden_ND.device.type)
    plain_sum = not label_smoothing and token_weight_N is None
    is_trained = weight_VD.requires_grad and torch.is_grad_enabled()
    if chunked_linear_cross_entropy is not None and exact_scalar and plain_sum and not is_trained:
        return chunked_linear_cross_entropy(hidden_ND, weight_VD, bias_V, target_N, logit_rows(weight_VD.shape[0]))
    return LinearLoss.apply(hidden_ND, weight_VD, bias_V, target_N, label_smoothing, token_weight_N)


class LinearLoss(torch.autograd.Function):
    """L = sum_n w_n CE(W h_n + b, t_n), with label smoothing e over V classes and token weights w_n (1 where none are given).

    With p_n = softmax(W h_n + b) and q_n = (1 - e) onehot(t_n) + e / V, the residual is r_n = w_n (p_n - q_n), and
        dL/dh_n = W^T r_n,    dL/dW = sum_n r_n h_n^T,    dL/db = sum_n r_n.
    The w_n are constants: nothing flows to them.
    All are formed in forward, a chunk of tokens at a time, dL/dW in place: logits are made once, and there is one buffer of the
    size of W, where autograd over chunks would have two. Backward scales them in place, so it can run once.
    """

    @staticmethod
    def forward(ctx, hidden_ND, weight_VD, bias_V, target_N, label_smoothing, token_weight_N=None):
        weight = torch.zeros_like(weight_VD) if ctx.needs_input_grad[1] else None
        bias = torch.zeros_like(bias_V) if bias_V is not None and ctx.needs_input_grad[2] else None
        hidden, losses = linear_loss_gradient(
            hidden_ND, weight_VD, bias_V, target_N, label_smoothing, weight, bias, token_weight_N
        )
        ctx.save_for_backward(hidden, weight, bias)
        return losses.sum() if token_weight_N is None else (losses * token_weight_N.to(losses.dtype)).sum()

    @staticmethod
    def backward(ctx, upstream):
        # scaled in place: a second backward finds them changed, and torch raises
        hidden, weight, bias = (g if g is None else g.mul_(upstream) for g in ctx.saved_tensors)
        return hidden, weight, bias, None, None, None


@torch.no_grad()
def linear_loss_gradient(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    target_N: Tensor,
    label_smoothing: float = 0.0,
    weight_gradient_VD: Tensor | None = None,
    bias_gradient_V: Tensor | None = None,
    token_weight_N: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradient of the summed cross entropy with respect to the hidden states, (N, D), and the loss of each token, (N,).

    The gradients of weight and bias are added to the buffers given for them. Equations: `LinearLoss`. Tokens with target -100
    have gradient 0 and loss 0. All gradients are of the sum weighted by `token_weight_N`; the token losses are not weighted.
    """
    gradient, losses = torch.zeros_like(hidden_ND), []
    rows, cast_VD = logit_rows(weight_VD.shape[0]), _as_autocast(weight_VD)
    for start in range(0, hidden_ND.shape[0], rows):
        target = target_N[start : start + rows]
        hidden = hidden_ND[start : start + rows].to(weight_VD.dtype)
        factor = None if token_weight_N is None else token_weight_N[start : start + rows]
        residual, loss = _softmax_residual(F.linear(hidden, cast_VD, bias_V), target, label_smoothing, factor)
        residual = residual.to(weight_VD.dtype)
        gradient[start : start + rows] = residual @ cast_VD
        if weight_gradient_VD is not None:
            weight_gradient_VD.addmm_(residual.T, hidden)
        if bias_gradient_V is not None:
            bias_gradient_V.add_(residual.sum(0))
        losses.append(loss)
        del residual  # or it would live on beside that of the next chunk
    return gradient, torch.cat(losses) if losses else hidden_ND.new_zeros(0)


def _as_autocast(weight_VD: Tensor) -> Tensor:
    """What matrix products of `weight_VD` use: its cast under autocast, made once. Autocast itself keeps those of parameters alone."""
    kind = weight_VD.device.type
    if not torch.is_autocast_enabled(kind) or weight_VD.dtype == torch.float64:
        return weight_VD
    return weight_VD.to(torch.get_autocast_dtype(kind))


def _softmax_residual(work: Tensor, target: Tensor, smoothing: float, factor: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """softmax - target distribution of logits `work` (rows, V), in place and in float32 at least, and the loss of each row.

    factor: (rows,), multiplies the former in that precision, before any rounding to half; the loss is as without it.
    """
    work = work if work.dtype == torch.float64 else work.float()
    chosen, labelled = target.clamp_min(0)[:, None], target != IGNORED
    work = work.sub_(work.amax(1, keepdim=True))  # the loss does not change with a shift, and exp cannot overflow
    expected = (1 - smoothing) * work.gather(1, chosen) + smoothing * work.mean(1, keepdim=True)
    work = work.exp_()
    total = work.sum(1, keepdim=True)
    loss = (total.log() - expected)[:, 0] * labelled
    work.div_(total).sub_(smoothing / work.shape[1]).scatter_add_(1, chosen, torch.full_like(expected, smoothing - 1))
    scale = labelled if factor is None else factor.to(work.dtype) * labelled
    return work.mul_(scale[:, None]), loss

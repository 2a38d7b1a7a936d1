"""The loss of a linear head without its logits.

Shape legend: N tokens, D hidden size, V classes.
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from hf_memtune._compat import is_fake
from hf_memtune.errors import LogitsError

IGNORED = -100  # the label that transformers and torch give to a token without loss
LOGIT_CHUNK_BYTES = 32 * 2**20  # float32 logits alive at a time
FLOAT16_SCALE = 2.0**8  # of residuals in a product in float16, which knows nothing below 6e-8: as much as many classes have
RESIDUAL_BYTES = 64 * 2**20  # residuals in half precision, of the tokens whose part of a head's gradient is rounded once


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
    pointwise: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Sum over tokens of the cross entropy of a linear head, a float32 scalar, or a float64 one where the weight is.

    Tokens with target -100 cost nothing, do not go through the head, and have a gradient of exactly 0 whatever comes from above, inf and
    nan included: of a batch without any label, torch's mean sends such.

    token_weight_N: factors of the tokens' losses, finite, constants of the differentiation; None: the plain sum.
    pointwise: what is done to each logit first (a scale, a soft cap), differentiable and without parameters; None: nothing.

    Backward can run once: gradients are formed in forward and handed over. Differentiating twice raises.
    """
    tensors = (hidden_ND, weight_VD, bias_V)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return LinearLoss.apply(*tensors, target_N, label_smoothing, token_weight_N, pointwise)
    return _total(_token_losses(*tensors, target_N, label_smoothing, pointwise), token_weight_N)


class LinearLoss(torch.autograd.Function):
    """L = sum_n w_n CE(f(W h_n + b), t_n), with label smoothing e over V classes and token weights w_n (1 where none are given).

    With p_n = softmax(f(W h_n + b)) and q_n = (1 - e) onehot(t_n) + e / V, the residual is r_n = w_n f' (p_n - q_n), and
        dL/dh_n = W^T r_n,    dL/dW = sum_n r_n h_n^T,    dL/db = sum_n r_n.
    f works on each logit alone (nothing is done to them where `pointwise` is None). The w_n are constants: nothing flows to them.
    All are formed in forward, a chunk of tokens at a time, dL/dW in place: logits are made once, and there is one buffer of the
    size of W, where autograd over chunks would have two. Backward scales them in place, so it can run once.

    dL/dW has the dtype of W. Where W is of half precision each addition rounds it, and under autocast each reads and writes all of a
    float32 buffer. There the residuals of RESIDUAL_BYTES are kept, and added with one product that accumulates in float32 (256 tokens of
    128K classes). Autocast to bfloat16 takes part in these products as it does in those of autograd; that to float16 does not, for sums
    over tokens, which no gradient scaler has scaled yet, may be too large for it.
    """

    @staticmethod
    def forward(ctx, hidden_ND, weight_VD, bias_V, target_N, label_smoothing, token_weight_N=None, pointwise=None):
        weight = torch.zeros_like(weight_VD) if ctx.needs_input_grad[1] else None
        bias = torch.zeros_like(bias_V) if bias_V is not None and ctx.needs_input_grad[2] else None
        hidden, losses = linear_loss_gradient(
            hidden_ND, weight_VD, bias_V, target_N, label_smoothing, weight, bias, token_weight_N, pointwise
        )
        ctx.save_for_backward(hidden, weight, bias, target_N != IGNORED)
        ctx.came_back = False
        return _total(losses, token_weight_N)

    @staticmethod
    def backward(ctx, upstream):
        if ctx.came_back:
            raise LogitsError(
                "backward came a second time to a loss taken without logits, whose gradient is handed over once. Call the model again for "
                "each backward, or add the losses up and go backward once."
            )
        ctx.came_back = True
        if torch.is_grad_enabled():  # create_graph: the second derivative would be 0, without a word
            raise LogitsError("a loss taken without logits can be differentiated once only: take it of `logits + 0`.")
        # scaled in place
        hidden, weight, bias, labelled = ctx.saved_tensors
        hidden.mul_(upstream).masked_fill_(~labelled[:, None], 0)  # 0 times inf is nan
        upstream = upstream.where(labelled.any(), 0)
        weight, bias = (g if g is None else g.mul_(upstream) for g in (weight, bias))
        return hidden, weight, bias, None, None, None, None


def _total(losses_N: Tensor, token_weight_N: Tensor | None) -> Tensor:
    return losses_N.sum() if token_weight_N is None else (losses_N * token_weight_N.to(losses_N.dtype)).sum()


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
    pointwise: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradient of the summed cross entropy with respect to the hidden states, (N, D), and the loss of each token, (N,).

    The gradients of weight and bias are added to the buffers given for them. Equations: `LinearLoss`. Tokens with target -100
    have gradient 0 and loss 0. All gradients are of the sum weighted by `token_weight_N`; the token losses are not weighted.
    """
    gradient, losses, cast_VD = torch.zeros_like(hidden_ND), _no_losses(target_N, weight_VD), _as_autocast(weight_VD)
    bias_V = None if bias_V is None else bias_V.detach()  # of a parameter autocast would keep a cast that is made without gradient
    dtype = cast_VD.dtype if cast_VD.dtype == torch.bfloat16 else weight_VD.dtype
    rows = logit_rows(weight_VD.shape[0]) if weight_gradient_VD is None else _summed_rows(weight_VD.shape[0], dtype)
    for part in _labelled_parts(target_N, rows):
        hidden, factor = hidden_ND[part].to(dtype), None if token_weight_N is None else token_weight_N[part]
        residual, loss = _residuals(hidden, cast_VD, bias_V, target_N[part], label_smoothing, factor, pointwise)
        losses[part] = loss.to(losses.dtype)
        gradient[part] = _of_hidden(residual, cast_VD).to(gradient.dtype)
        if weight_gradient_VD is not None:
            _add_product(weight_gradient_VD, residual, hidden)
        if bias_gradient_V is not None:
            bias_gradient_V.add_(residual.sum(0, dtype=bias_gradient_V.dtype))
        del residual  # or it would live on beside that of the next chunk
    return gradient, losses


def _summed_rows(classes: int, dtype: torch.dtype) -> int:
    """Tokens whose residuals are alive at a time, for a trained weight: more than whose logits are, where `dtype` rounds the sum."""
    rows = logit_rows(classes)
    return max(rows, RESIDUAL_BYTES // (dtype.itemsize * classes)) if dtype.itemsize < 4 else rows


def _residuals(
    hidden_ND: Tensor,
    cast_VD: Tensor,
    bias_V: Tensor | None,
    target_N: Tensor,
    label_smoothing: float,
    factor_N: Tensor | None,
    pointwise: Callable[[Tensor], Tensor] | None,
) -> tuple[Tensor, Tensor]:
    """Residuals (N, V) in the dtype of the hidden states, and the loss of each token, (N,). No more logits are alive than LOGIT_CHUNK_BYTES."""
    rows, count = logit_rows(cast_VD.shape[0]), len(target_N)
    if count <= rows:
        residual, loss = _residual(F.linear(hidden_ND, cast_VD, bias_V), pointwise, target_N, label_smoothing, factor_N)
        return residual.to(hidden_ND.dtype), loss
    residuals_NV, losses = hidden_ND.new_empty(count, cast_VD.shape[0]), []
    for start in range(0, count, rows):
        part = slice(start, start + rows)
        factor = None if factor_N is None else factor_N[part]
        residuals_NV[part], loss = _residuals(hidden_ND[part], cast_VD, bias_V, target_N[part], label_smoothing, factor, pointwise)
        losses.append(loss)
    return residuals_NV, torch.cat(losses)


def _of_hidden(residual_NV: Tensor, cast_VD: Tensor) -> Tensor:
    """residual W, (N, D)."""
    if cast_VD.dtype != torch.float16 or residual_NV.dtype == torch.float16:
        return residual_NV @ cast_VD
    return (residual_NV * FLOAT16_SCALE @ cast_VD).to(residual_NV.dtype) / FLOAT16_SCALE


def _add_product(sum_VD: Tensor, residual_NV: Tensor, hidden_ND: Tensor) -> None:
    """sum += residual^T hidden, in place; of another dtype than theirs, which it is under autocast, for some classes at a time."""
    if sum_VD.dtype == hidden_ND.dtype:
        sum_VD.addmm_(residual_NV.T, hidden_ND)
        return
    classes = max(1, LOGIT_CHUNK_BYTES // (4 * sum_VD.shape[1]))
    for sums, residual in zip(sum_VD.split(classes), residual_NV.split(classes, dim=1)):
        sums.add_(residual.T @ hidden_ND)


@torch.no_grad()
def _token_losses(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    target_N: Tensor,
    label_smoothing: float,
    pointwise: Callable[[Tensor], Tensor] | None,
) -> Tensor:
    """The loss of each token, (N,), where nothing learns."""
    losses, cast_VD = _no_losses(target_N, weight_VD), _as_autocast(weight_VD)
    bias_V = None if bias_V is None else bias_V.detach()
    for part in _labelled_parts(target_N, logit_rows(weight_VD.shape[0])):
        logits = F.linear(hidden_ND[part].to(weight_VD.dtype), cast_VD, bias_V)
        logits = logits if pointwise is None else pointwise(logits)
        losses[part] = losses_of_logits(logits, target_N[part], label_smoothing).to(losses.dtype)
        del logits  # or they would live on beside those of the next chunk
    return losses


def _labelled_parts(target_N: Tensor, rows: int) -> Iterator[slice | Tensor]:
    """Which `rows` tokens are taken at once, of those that have a label: slices of them where all have one, and places where not.

    Traced tensors have no values: of them every token counts as labelled, and is looked up, which is the most there can be.
    """
    count = len(target_N)
    places = torch.zeros_like(target_N) if is_fake(target_N) else (target_N != IGNORED).nonzero()[:, 0]
    if len(places) == count and not is_fake(target_N):
        yield from (slice(start, min(start + rows, count)) for start in range(0, count, rows))
    elif len(places):
        yield from places.split(rows)


def _no_losses(target_N: Tensor, weight_VD: Tensor) -> Tensor:
    return weight_VD.new_zeros(len(target_N), dtype=torch.promote_types(weight_VD.dtype, torch.float32))


def _residual(
    logits: Tensor, pointwise: Callable[[Tensor], Tensor] | None, target: Tensor, smoothing: float, factor: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`_softmax_residual` of `pointwise(logits)`, with respect to `logits` (rows, V), which may be written to."""
    if pointwise is None:
        return _softmax_residual(logits, target, smoothing, factor)
    # hooks in force, which offload or recompute what is saved, are for what lives until backward
    with torch.enable_grad(), saved_tensors_hooks(Tensor.detach, lambda saved: saved):
        logits = logits.detach().requires_grad_()
        values = pointwise(logits)
    # a copy: autograd may have saved the values, and they are written to
    residual, loss = _softmax_residual(values.detach().clone(), target, smoothing, factor)
    return torch.autograd.grad(values, logits, residual.to(values.dtype))[0], loss


def losses_of_logits(logits: Tensor, target: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Cross entropy of each row of logits (N, V), (N,), in float32 at least; differentiable, 0 where the target is -100."""
    work = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(work, target, reduction="none", label_smoothing=label_smoothing)


@torch.no_grad()
def softmax_residual_norm(logits: Tensor, target: Tensor) -> Tensor:
    """Norm of softmax - onehot(target) of each row of logits (N, V), (N,), in float32 at least: that of the loss's gradient at the logits."""
    work = (logits if logits.dtype == torch.float64 else logits.float()).softmax(1)
    return torch.linalg.vector_norm(work.scatter_add_(1, target[:, None], -torch.ones_like(work[:, :1])), dim=1)


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

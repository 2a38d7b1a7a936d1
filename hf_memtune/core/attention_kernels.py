"""Attention of some queries to a part of the keys, with what it takes to merge it with their attention to other parts.

A kernel gives, beside its output, the logarithm of the sum of the exponentials of each query's scores (lse). Backward, it takes the output
and the lse of a query's attention to all keys: the weights of the keys at hand are then exp(score - lse), whatever the other keys are
(FlashAttention, arXiv 2205.14135, section 3.1 and appendix B).

The fused ones are torch's own, those of `scaled_dot_product_attention`. Those of CUDA are called in the tests by stand-ins that demand of their
arguments what the kernels do.
Shape legend: B rows, H query heads, K key heads (H = G·K), S queries, L keys, C channels of a head.
"""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.backends import cuda
from torch.nn.functional import pad

_aten = torch.ops.aten
_CPU_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_FLASH_STEP = 8  # to whose multiples scaled_dot_product_attention fills up channels before it calls the flash kernel
_NO_FLASH_BACKWARD = range(193, 225)  # channels for which cards with compute capability 8.6 and 8.9 have none
_MASK_STEP = 8  # the efficient kernel reads masks in 16 bytes at most: so many numbers of two bytes


class Attended(NamedTuple):
    """output: (B, H, S, C). lse: (B, H, S), float32 or wider."""

    output: Tensor
    lse: Tensor


class Kernel(Protocol):
    """mask: None, or (B or 1, 1, S or 1, L) to be added to the scores, 0 or -inf. causal: query n sees keys 0 to n, of as many."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float) -> Attended: ...

    def backward(
        self, gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, of: Attended, mask: Tensor | None, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """dL/dquery, dL/dkey, dL/dvalue, in their shapes."""
        ...


def kernel_for(query: Tensor, value: Tensor, masked: bool) -> Kernel:
    """The fastest kernel for these; masked: whether a mask will be added."""
    has_wider_values = value.shape[-1] > query.shape[-1]
    found = _fused(value if has_wider_values else query, masked)
    return found if found is PLAIN or value.shape[-1] == query.shape[-1] else _Filled(found)


def _fused(widest: Tensor, masked: bool) -> Kernel:
    if widest.device.type == "cpu" and widest.dtype in _CPU_DTYPES:
        return _CPU
    return _on_cuda(widest, masked) if widest.device.type == "cuda" else PLAIN


def _on_cuda(query: Tensor, masked: bool) -> Kernel:
    """What torch finds the card, the dtype and the channels fit for, and is allowed to use (`torch.nn.attention.sdpa_kernel`)."""
    sample = _dense(query[:1, :1, :1].detach())  # one token tells
    asked = cuda.SDPAParams(sample, sample, sample, None, 0.0, False, False)
    channels = query.shape[-1]
    takes_channels = channels % _FLASH_STEP == 0 and channels not in _NO_FLASH_BACKWARD
    if not masked and takes_channels and cuda.can_use_flash_attention(asked):
        return _FLASH
    return _EFFICIENT if cuda.can_use_efficient_attention(asked) else PLAIN


class _CPUKernel:
    """Fused attention of torch on a CPU; keys and values are not repeated for the queries that share them."""

    def forward(self, query, key, value, mask, causal, scale):
        mask = _for_all_queries(mask, query)
        parts = (_dense(part) for part in (query, key, value))
        return Attended(*_aten._scaled_dot_product_flash_attention_for_cpu(*parts, 0.0, causal, attn_mask=mask, scale=scale))

    def backward(self, gradient, query, key, value, of, mask, causal, scale):
        mask = _for_all_queries(mask, query)
        parts = (_dense(part) for part in (gradient, query, key, value))
        return _aten._scaled_dot_product_flash_attention_for_cpu_backward(*parts, *of, 0.0, causal, attn_mask=mask, scale=scale)


class _FlashKernel:
    """Flash attention of torch on CUDA, without masks."""

    def forward(self, query, key, value, mask, causal, scale):
        parts = (_dense(part) for part in (query, key, value))
        output, lse, *_ = _aten._scaled_dot_product_flash_attention(*parts, 0.0, causal, False, scale=scale)
        return Attended(output, lse)

    def backward(self, gradient, query, key, value, of, mask, causal, scale):
        parts = (_dense(part) for part in (gradient, query, key, value))
        no_dropout = query.new_zeros(2, dtype=torch.int64)
        sizes = query.shape[2], key.shape[2]
        return _aten._scaled_dot_product_flash_attention_backward(
            *parts, *of, None, None, *sizes, 0.0, causal, no_dropout, no_dropout[0], scale=scale
        )


class _EfficientKernel:
    """Memory-efficient attention of torch on CUDA. Queries that share keys stand behind one another, unless causality numbers them."""

    def forward(self, query, key, value, mask, causal, scale):
        folded, keys, values, bias = self._prepared(query, key, value, mask, causal)
        output, lse, *_ = _aten._scaled_dot_product_efficient_attention(folded, keys, values, bias, True, 0.0, causal, scale=scale)
        lse = lse[..., : folded.shape[2]]  # the kernel rounds its length up
        return Attended(output.reshape(query.shape), lse.reshape(query.shape[:3]))

    def backward(self, gradient, query, key, value, of, mask, causal, scale):
        folded, keys, values, bias = self._prepared(query, key, value, mask, causal)
        length = folded.shape[2]
        lse = of.lse.new_full((*folded.shape[:2], -(-length // 32) * 32), torch.inf)
        lse[..., :length] = of.lse.reshape(folded.shape[:3])
        given = (part.reshape(folded.shape) for part in (gradient, of.output))
        gradient, output = given
        seed = query.new_zeros((), dtype=torch.int64)
        found = _aten._scaled_dot_product_efficient_attention_backward(
            gradient, folded, keys, values, bias, output, lse, seed, seed, 0.0, [True, True, True, False], causal, scale=scale
        )
        of_query, of_key, of_value = found[0].reshape(query.shape), found[1], found[2]
        if of_key.shape != key.shape:
            of_key, of_value = (part.unflatten(1, (key.shape[1], -1)).sum(2) for part in (of_key, of_value))
        return of_query, of_key, of_value

    def _prepared(self, query, key, value, mask, causal):
        rows, heads, length, channels = query.shape
        groups = heads // key.shape[1]
        if causal or mask is not None and mask.shape[2] > 1:
            key, value = (part.repeat_interleave(groups, 1) if groups > 1 else part for part in (key, value))
            folded = query
        else:
            folded = query.reshape(rows, key.shape[1], groups * length, channels)
        bias = None if mask is None else _in_steps(mask).expand(rows, folded.shape[1], folded.shape[2], -1)
        return _dense(folded), _dense(key), _dense(value), bias


class _Filled:
    """A fused kernel, which takes as many channels of queries, keys and values, for values that have fewer or more.

    What has fewer is filled up with zeros. They add nothing to a score, (q, 0) · (k, 0) = q · k, nor to the other channels of the output or of a
    gradient, and backward, (dL/do, 0) · (o, 0) and (dL/do, 0) · (v, 0) are what they are without. The channels that are zeros again are left out.
    """

    def __init__(self, kernel: Kernel):
        self._kernel = kernel

    def forward(self, query, key, value, mask, causal, scale):
        query, key, filled = _of_one_width(query, key, value)
        found = self._kernel.forward(query, key, filled, mask, causal, scale)
        return Attended(found.output[..., : value.shape[-1]].contiguous(), found.lse)

    def backward(self, gradient, query, key, value, of, mask, causal, scale):
        gradient, output, *filled = _of_one_width(gradient, of.output, query, key, value)
        of_query, of_key, of_value = self._kernel.backward(
            gradient, filled[0], filled[1], filled[2], Attended(output, of.lse), mask, causal, scale
        )
        return of_query[..., : query.shape[-1]], of_key[..., : key.shape[-1]], of_value[..., : value.shape[-1]]


def _of_one_width(*parts: Tensor) -> list[Tensor]:
    channels = max(part.shape[-1] for part in parts)
    return [pad(part, (0, channels - part.shape[-1])) if part.shape[-1] < channels else part for part in parts]


class _PlainKernel:
    """The formulas themselves, in float32 or wider, for what no fused kernel takes: other devices, and on CUDA other dtypes and channels."""

    def forward(self, query, key, value, mask, causal, scale):
        with torch.autocast(query.device.type, enabled=False):
            scores = self._scores(query, key, mask, causal, scale)
            lse = scores.logsumexp(-1)
            weights = (scores - torch.where(lse == -torch.inf, 0, lse)[..., None]).exp_()
            output = (weights @ self._wide(value)[:, :, None]).flatten(1, 2).to(query.dtype)
        return Attended(output, lse.flatten(1, 2))

    def backward(self, gradient, query, key, value, of, mask, causal, scale):
        groups = (key.shape[1], -1)
        with torch.autocast(query.device.type, enabled=False):
            weights = (self._scores(query, key, mask, causal, scale) - of.lse.unflatten(1, groups)[..., None]).exp_()
            given, output, queries = (self._wide(part).unflatten(1, groups) for part in (gradient, of.output, query))
            of_value = torch.einsum("bkgsl,bkgsc->bklc", weights, given)
            of_weights = given @ self._wide(value)[:, :, None].mT
            of_scores = weights * (of_weights - (given * output).sum(-1, keepdim=True)) * scale
            of_query = (of_scores @ self._wide(key)[:, :, None]).flatten(1, 2)
            of_key = torch.einsum("bkgsl,bkgsc->bklc", of_scores, queries)
        return of_query.to(query.dtype), of_key.to(key.dtype), of_value.to(value.dtype)

    def _scores(self, query: Tensor, key: Tensor, mask: Tensor | None, causal: bool, scale: float) -> Tensor:
        """(B, K, G, S, L)."""
        scores = self._wide(query).unflatten(1, (key.shape[1], -1)) @ self._wide(key)[:, :, None].mT * scale
        if mask is not None:
            scores = scores + mask[:, :, None]
        if causal:
            after = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
            scores = scores.masked_fill(after, -torch.inf)
        return scores

    @staticmethod
    def _wide(part: Tensor) -> Tensor:
        return part.to(torch.promote_types(part.dtype, torch.float32))


_CPU, _FLASH, _EFFICIENT, PLAIN = _CPUKernel(), _FlashKernel(), _EfficientKernel(), _PlainKernel()


def _dense(part: Tensor) -> Tensor:
    """The fused kernels want the channels of a head side by side."""
    return part if part.stride(-1) == 1 else part.contiguous()


def _in_steps(mask: Tensor) -> Tensor:
    """The mask, in memory whose rows begin where the efficient kernel can read."""
    keys = mask.shape[-1]
    return pad(mask, (0, -keys % _MASK_STEP))[..., :keys] if keys % _MASK_STEP else mask.contiguous()


def _for_all_queries(mask: Tensor | None, query: Tensor) -> Tensor | None:
    return None if mask is None else mask.expand(-1, -1, query.shape[2], -1)

"""Floating point operations of an op, by torch's own formulas, and of two kernels that it has none for."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count


def flops_of(func: Any, args: tuple, kwargs: dict, out: Any) -> int:
    """What one call costs: matrix products, attention and convolutions; everything else counts 0, as in torch's FlopCounterMode."""
    packet = getattr(func, "_overloadpacket", None)
    formula = flop_registry.get(packet)
    if formula is not None:
        return formula(*args, **kwargs, out_val=out)
    own = _OWN.get(str(packet))
    return 0 if own is None else own(*args, **kwargs)


def _attention(query, key, value, *args: Any, **kwargs: Any) -> int:
    return sdpa_flop_count(query.shape, key.shape, value.shape)


def _attention_backward(upstream, query, key, value, *args: Any, **kwargs: Any) -> int:
    return sdpa_backward_flop_count(upstream.shape, query.shape, key.shape, value.shape)


def _add_product(into: torch.Tensor, one: torch.Tensor, other: torch.Tensor, **kwargs: Any) -> int:
    """addmm in place, which torch counts only where it is decomposed."""
    return 2 * one.shape[0] * one.shape[1] * other.shape[1]


def _four_bits(hidden: torch.Tensor, weight: torch.Tensor, shape: Any, *args: Any, **kwargs: Any) -> int:
    """A product with a 4-bit weight, (rows, K) x (K, N) with `shape` (N, K)."""
    return 2 * hidden.numel() // hidden.shape[-1] * prod(shape)


_OWN = {
    "aten._scaled_dot_product_flash_attention_for_cpu": _attention,
    "aten._scaled_dot_product_flash_attention_for_cpu_backward": _attention_backward,
    "aten.addmm_": _add_product,
    "bitsandbytes.gemm_4bit": _four_bits,
}

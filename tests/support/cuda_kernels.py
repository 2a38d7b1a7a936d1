"""Stand-ins for torch's attention kernels of CUDA: their formulas, on whatever device, and what the kernels demand of their arguments.

Demands: torch 2.13, aten/src/ATen/native/transformers: attention.cpp (what `scaled_dot_product_attention` prepares before it calls them),
cuda/sdp_utils.cpp, cuda/mem_eff_attention/kernel_forward.h (`check_supported`). The lse of the efficient kernel is rounded up, in length, to 32.
"""

import torch
from torch import Tensor
from torch.backends import cuda

BYTES_READ_AT_ONCE = 16


def flash(query, key, value, dropout=0.0, causal=False, debug=False, *, scale=None):
    _flash_demands(query, key, value, dropout, causal)
    output, lse = _forward(query, key, value, None, causal, scale)
    seed = torch.zeros(2, dtype=torch.int64)
    return output, lse, None, None, query.shape[2], key.shape[2], seed, seed[0], output.new_empty(0)


def flash_backward(
    gradient, query, key, value, output, lse, first, second, queries, keys, dropout, causal, seed, offset, *, scale=None
):  # fmt: skip
    _flash_demands(query, key, value, dropout, causal)
    assert (queries, keys) == (query.shape[2], key.shape[2]) and gradient.stride(-1) == output.stride(-1) == 1 and lse.is_contiguous()
    return _backward(gradient, query, key, value, output, lse, None, causal, scale)


def efficient(query, key, value, bias, wants_lse, dropout=0.0, causal=False, *, scale=None):
    _efficient_demands(query, key, value, bias, dropout)
    output, lse = _forward(query, key, value, bias, causal, scale)
    seed = torch.zeros((), dtype=torch.int64)
    return output, _rounded_up(lse), seed, seed


def efficient_backward(
    gradient, query, key, value, bias, output, lse, seed, offset, dropout, wanted, causal=False, *, scale=None
):  # fmt: skip
    _efficient_demands(query, key, value, bias, dropout)
    assert lse.shape[2] % 32 == 0
    return (*_backward(gradient, query, key, value, output, lse[..., : query.shape[2]], bias, causal, scale), None)


def can_use_flash(asked: cuda.SDPAParams, debug: bool = False) -> bool:
    return cuda.flash_sdp_enabled() and asked.query.dtype in (torch.bfloat16, torch.float16)


def can_use_efficient(asked: cuda.SDPAParams, debug: bool = False) -> bool:
    is_known = asked.query.dtype in (torch.bfloat16, torch.float16, torch.float32)
    return cuda.mem_efficient_sdp_enabled() and is_known and asked.query.shape[-1] % _step(asked.query) == 0


ATEN = {
    "_scaled_dot_product_flash_attention": flash,
    "_scaled_dot_product_flash_attention_backward": flash_backward,
    "_scaled_dot_product_efficient_attention": efficient,
    "_scaled_dot_product_efficient_attention_backward": efficient_backward,
}


def _step(tensor: Tensor) -> int:
    """Numbers that are read at once."""
    return BYTES_READ_AT_ONCE // tensor.element_size()


def _flash_demands(query, key, value, dropout, causal):
    assert query.dtype in (torch.bfloat16, torch.float16) and query.shape[-1] % 8 == 0 and query.shape[-1] <= 256
    assert all(part.stride(-1) == 1 and part.dtype == query.dtype for part in (query, key, value)) and not dropout
    assert not causal or query.shape[2] == key.shape[2], "another side of the square is aligned than elsewhere in torch"


def _efficient_demands(query, key, value, bias, dropout):
    assert query.shape[1] == key.shape[1] == value.shape[1] and query.shape[-1] % _step(query) == 0 and not dropout
    assert all(part.stride(-1) == 1 and part.dtype == query.dtype for part in (query, key, value))
    if bias is None:
        return
    assert bias.shape == (*query.shape[:3], key.shape[2]) and bias.dtype == query.dtype and bias.stride(-1) == 1
    for size, stride in zip(bias.shape[:3], bias.stride()):
        assert size <= 1 or stride % _step(bias) == 0, f"attn_bias is not correctly aligned: strides {bias.stride()}"


def _forward(query, key, value, bias, causal, scale):
    scores = _scores(query, key, bias, causal, scale)
    lse = scores.logsumexp(-1)
    weights = (scores - torch.where(lse == -torch.inf, 0, lse)[..., None]).exp()
    return (weights @ _repeated(value, query)).to(query.dtype), lse


def _backward(gradient, query, key, value, output, lse, bias, causal, scale):
    gradient, output = gradient.float(), output.float()
    weights = (_scores(query, key, bias, causal, scale) - lse[..., None]).exp()
    of_value = weights.mT @ gradient
    of_scores = weights * (gradient @ _repeated(value, query).mT - (gradient * output).sum(-1, keepdim=True)) * scale
    of_query, of_key = of_scores @ _repeated(key, query), of_scores.mT @ query.float()
    of_key, of_value = (part.unflatten(1, (key.shape[1], -1)).sum(2).to(key.dtype) for part in (of_key, of_value))
    return of_query.to(query.dtype), of_key, of_value


def _scores(query, key, bias, causal, scale):
    scores = query.float() @ _repeated(key, query).mT * scale
    scores = scores if bias is None else scores + bias.float()
    return scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -torch.inf) if causal else scores


def _repeated(part, query):
    return part.float().repeat_interleave(query.shape[1] // part.shape[1], 1)


def _rounded_up(lse):
    rounded = lse.new_full((*lse.shape[:2], -(-lse.shape[2] // 32) * 32), torch.inf)
    rounded[..., : lse.shape[2]] = lse
    return rounded

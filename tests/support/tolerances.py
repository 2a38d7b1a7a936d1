"""How far two computations of the same number may lie apart: the one table, by dtype, relative to the larger of the two.

Float64 is where exactness is shown: what is left there is the order of summation. Half precision is judged by the norm of a
whole gradient, against float64.
"""

import torch

RELATIVE = {
    torch.float64: 1e-12,
    torch.float32: 2e-5,
    torch.bfloat16: 6e-2,
    torch.float16: 1e-2,
}

# Models that are called in float64 and compute a part of themselves in float32: Gemma 3's norms, DeepSeek's router, every eager
# softmax. How such a part rounds follows from the kernels of the machine. With random errors of one eps put on float32 products,
# softmaxes and sums over tokens, the worst gradient of the tests' models was off by 12 eps (one seed); the bound leaves room.
FLOAT32_INSIDE = 32 * torch.finfo(torch.float32).eps  # 3.8e-6

# What a wrong twin must be off by, at least, for a comparison to count as one that can fail.
NOTICED = 1e-3


def tolerance(dtype: torch.dtype, float32_inside: bool = False) -> float:
    return max(RELATIVE[dtype], FLOAT32_INSIDE) if float32_inside else RELATIVE[dtype]


def close(dtype: torch.dtype, float32_inside: bool = False) -> dict[str, float]:
    """Keywords for torch.testing.assert_close of values of order 1."""
    return {"rtol": tolerance(dtype, float32_inside), "atol": tolerance(dtype, float32_inside)}

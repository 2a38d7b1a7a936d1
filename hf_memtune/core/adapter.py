"""The bottleneck adapter of MEFT (arXiv 2306.00477, section 3.1; Houlsby et al. 2019, without their residual)."""

import torch
from torch import Tensor, nn

_ACTIVATIONS = {"relu": torch.relu, "gelu": nn.functional.gelu, "silu": nn.functional.silu, "tanh": torch.tanh}


class Adapter(nn.Module):
    """x (..., width) -> up(dropout(activation(down(x)))) (..., width), in the dtype of x. Weights N(0, std^2), biases 0.

    dtype: of the weights, float32 or float64, for the steps of an optimizer are lost in half precision.
    """

    def __init__(self, width: int, rank: int, activation: str, dropout: float, std: float, device: torch.device, dtype: torch.dtype):
        super().__init__()
        self.down = nn.Linear(width, rank, device=device, dtype=dtype)
        self.up = nn.Linear(rank, width, device=device, dtype=dtype)
        self.activation, self.dropout = activation, nn.Dropout(dropout)
        for linear in (self.down, self.up):
            nn.init.normal_(linear.weight, std=std)
            nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        hidden = _ACTIVATIONS[self.activation](self.down(x.to(self.down.weight.dtype)))
        return self.up(self.dropout(hidden)).to(x.dtype)

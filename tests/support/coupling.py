"""What the tests of coupling share with others."""

import torch
from torch import nn

SHAPE = (2, 5, 8)  # rows, tokens, channels


class Block(nn.Module):
    """What stands in for a layer: two functions with dropout, one of which uses its argument twice and a tensor beside it."""

    def __init__(self, dtype=torch.float64, dropout=0.1):
        super().__init__()
        self.one, self.two = (nn.Linear(SHAPE[-1], SHAPE[-1], dtype=dtype) for _ in range(2))
        self.dropout = dropout

    def layer(self, x, beside):
        return x + self.adapter(x, beside)[0] + torch.tanh(self.one(x)) * beside, None

    def adapter(self, x, beside):
        return torch.dropout(torch.sin(self.two(x)), self.dropout, train=True), None

    def functions(self):
        return {"layer": self.layer, "adapter": self.adapter, "attention": self.layer, "mlp": self.adapter}


def stack_of(depth, dtype=torch.float64, dropout=0.1):
    return [Block(dtype, dropout) for _ in range(depth)]


def gradients_of(output, blocks, *inputs):
    """Gradients of a loss with weights of its own at every element; the last stands for the parameters' in one list."""
    torch.manual_seed(7)
    loss = (output * torch.randn_like(output)).sum()
    parameters = [p for block in blocks for p in block.parameters()]
    found = torch.autograd.grad(loss, [*inputs, *parameters], allow_unused=True)
    return [torch.zeros(()) if g is None else g for g in found]


def inputs(dtype=torch.float64):
    torch.manual_seed(3)
    return [torch.randn(SHAPE, dtype=dtype, requires_grad=True) for _ in range(2)]

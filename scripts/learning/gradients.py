"""Gradients of a model on one batch, to be compared."""

import torch
from torch import Tensor, nn


def without_dropout(model: nn.Module) -> nn.Module:
    """In training mode, in which methods act, but so that nothing but the choice of tokens differs."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.eval()
    return model


def gradient(model: nn.Module, batch: dict) -> Tensor:
    """All gradients in one float32 vector."""
    model(**batch, use_cache=False).loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    flat = torch.cat([torch.zeros(p.numel()) if p.grad is None else p.grad.float().flatten().cpu() for p in trained])
    model.zero_grad(set_to_none=True)
    return flat

"""Models that pretend to run out of memory."""

import torch
from torch import Tensor

MESSAGE = "CUDA out of memory. Tried to allocate 2.00 GiB\nof statistics, many lines"


class FailsInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx, gradient: Tensor):
        raise torch.OutOfMemoryError(MESSAGE)


def small(model, most: int, where: str = "forward"):
    """The model with memory for `most` rows in training: more fail before the first layer, or when backward has come to it.

    By then the layers after it have their gradients.
    """

    def fail(module, inputs, output):
        rows = output.shape[0]
        if rows <= most or not torch.is_grad_enabled():
            return output
        if where == "forward":
            raise torch.OutOfMemoryError(MESSAGE)
        return FailsInBackward.apply(output)

    fail.__module__ = "torch.cuda"  # the device's, not a hook of a user, which is told in every pass that gradients are on
    layers = [m for name, m in model.named_modules() if name.endswith(("layers.0.mlp", "h.0.mlp", "layer.0.intermediate"))]
    layers[0].register_forward_hook(fail)
    return model

"""Differences between the supported versions of torch and transformers. Each shim names the version at which it goes."""

import torch
import torch.nn.functional as F


def _linear_cross_entropy(hidden, weight, bias, target, rows):
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=rows, chunking_method=None)
    return F.linear_cross_entropy(
        hidden, weight, target, linear_bias=bias, reduction="sum", ignore_index=-100, options=options
    )


# torch >= 2.13 has it; goes when 2.13 is the oldest supported version
chunked_linear_cross_entropy = _linear_cross_entropy if hasattr(F, "linear_cross_entropy") else None


def is_fake(tensor: torch.Tensor) -> bool:
    """Whether a tensor has a shape but no values (FakeTensorMode: memory is being traced, not used)."""
    from torch._subclasses.fake_tensor import FakeTensor

    return isinstance(tensor, FakeTensor)


def with_values():
    """Context manager in which new tensors have values even while memory is being traced."""
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    return unset_fake_temporarily()

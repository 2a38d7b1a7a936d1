"""A digest of a model's weights, quick enough to take before every run."""

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn

Marks = dict[str, list]
"""By name of a parameter: its shape, and a digest of its content, or None where that depends on how the model was loaded."""


def parameter_marks(parameters: Mapping[str, Tensor]) -> Marks:
    """What tells a model from others, tensor by tensor, however its weights are rounded to bfloat16, float32 or float64 when loaded.

    Packed weights (4 bits) and float16 have no digest: they are not what was stored, rounded. Packed ones have no shape either.
    """
    return {name: _mark(p.detach()) for name, p in parameters.items()}


def same_marks(found: list | None, expected: list) -> bool:
    """Whether two marks can be of one tensor: what one of them does not know is not compared."""
    return found is not None and all(a == b or a is None or b is None for a, b in zip(found, expected, strict=True))


def _mark(tensor: Tensor) -> list:
    if not tensor.is_floating_point():
        return [None, None]
    if tensor.dtype not in (torch.bfloat16, torch.float32, torch.float64):
        return [list(tensor.shape), None]
    digest = hashlib.blake2b(digest_size=8)
    for part in tensor.reshape(-1).split(2**24):  # a copy of a part at a time
        digest.update(part.to(torch.bfloat16).view(torch.int16).cpu().numpy())
    return [list(tensor.shape), digest.hexdigest()]


def model_fingerprint(model: nn.Module) -> str:
    """Digest of every parameter's name, shape, dtype and content.

    Content is two sums over the raw words of a tensor, one of them weighted by position, taken on the tensor's own device.
    LoRA matrices A count only once some B is not zero: until then the adapter is the identity, whatever A drew at random.
    """
    digest = hashlib.blake2b(digest_size=16)
    parameters = dict(model.named_parameters())
    identity = not any(bool(p.any()) for name, p in parameters.items() if ".lora_B." in name)
    for name, parameter in sorted(parameters.items()):
        if identity and ".lora_A." in name:
            continue
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype} {_content(parameter.detach())};".encode())
    return digest.hexdigest()


def _content(tensor: Tensor, chunk: int = 2**22) -> tuple[int, ...]:
    """Sums of 32-bit words that change with any word and with any exchange of two."""
    raw = tensor.contiguous().reshape(-1).view(torch.uint8)
    raw = torch.nn.functional.pad(raw, (0, -len(raw) % 4)).view(torch.int32)
    plain, weighted = 0, 0
    for number, part in enumerate(raw.split(chunk)):
        words = part.long()
        position = torch.arange(1, len(words) + 1, device=words.device)
        plain += int(words.sum())
        # products wrap around 2**64, which loses nothing that a digest needs
        weighted += int((words * (position * 2654435761 % 1000003)).sum()) * (number + 1)
    return plain, weighted % 2**128

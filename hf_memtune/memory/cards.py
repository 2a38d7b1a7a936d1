"""How much memory cards have, and how much of it a process has for tensors: a table, and an allowance that is said to be one.

The allowance is no measurement of ours. A CUDA process keeps its context and its kernels on the card: 1.3 GB in the documentation of
transformers ("Model training anatomy": memory after the kernels are loaded). PyTorch's allocator keeps blocks that no tensor uses: in
reports of full 40 GB cards, about 3.7 % of what tensors have.
"""

from __future__ import annotations

from dataclasses import dataclass

from hf_memtune.units import GIB, format_bytes

CONTEXT_BYTES = 1_300_000_000
ALLOCATOR_SHARE = 0.04

# GiB of a card, as nvidia-smi gives them, rounded to a whole number: what it is sold with, but for T4, A10, A40, L4 and L40(S), whose error
# correction keeps a part. Most of the 30 and 40 series, A100 and H100 are held against Hugging Face's list (huggingface.js, hardware.ts).
CARDS = {
    "rtx2080ti": 11, "rtx3060": 12, "rtx3060ti": 8, "rtx3070": 8, "rtx3070ti": 8, "rtx3080": 10, "rtx3080ti": 12, "rtx3090": 24,
    "rtx3090ti": 24, "rtx4060": 8, "rtx4060ti-8gb": 8, "rtx4060ti-16gb": 16, "rtx4070": 12, "rtx4070super": 12, "rtx4070ti": 12,
    "rtx4070tisuper": 16, "rtx4080": 16, "rtx4080super": 16, "rtx4090": 24, "rtx5060": 8, "rtx5060ti-8gb": 8, "rtx5060ti-16gb": 16,
    "rtx5070": 12, "rtx5070ti": 16, "rtx5080": 16, "rtx5090": 32, "t4": 15, "p100": 16, "v100-16gb": 16, "v100-32gb": 32, "a4000": 16,
    "a5000": 24, "a6000": 48, "rtx6000ada": 48, "a10": 22, "a40": 45, "l4": 22, "l40": 45, "l40s": 45, "a100-40gb": 40, "a100-80gb": 80,
    "h100": 80, "h200": 140,
}  # fmt: skip


@dataclass(frozen=True)
class Room:
    """Bytes that the tensors of a step may take, and where the figure is from."""

    tensor_bytes: int
    source: str

    @classmethod
    def of_card(cls, name: str) -> Room:
        """Of a card of the table, less the allowance. Raises KeyError for another name."""
        return cls.of_device(CARDS[name.lower()] * GIB, name.lower())

    @classmethod
    def of_device(cls, total_bytes: int, name: str) -> Room:
        """Of a device with so much memory, less the allowance."""
        room = max(0, int((total_bytes - CONTEXT_BYTES) / (1 + ALLOCATOR_SHARE)))
        lost = f"{format_bytes(total_bytes)} less an allowance of {format_bytes(total_bytes - room)} for context and allocator"
        return cls(room, f"{name}: {lost}")

"""The memory ledger: bytes saved for backward, bytes alive, and what the device and the process report.

``SavedBytes`` and ``LiveBytes`` are exact and need no device, so tests and estimates rest on them; the functions below
read what an allocator or the operating system says.
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import torch

from .account import CATEGORIES, PHASES, LiveTensor, MemoryAccount, PhaseBytes, TimelinePoint
from .cards import ALLOCATOR_SHARE
from .ledger import Entry, SavedBytes
from .live import LiveBytes
from .step_ledger import StepLedger

__all__ = [
    "CATEGORIES",
    "PHASES",
    "Entry",
    "LiveBytes",
    "LiveTensor",
    "MemoryAccount",
    "PhaseBytes",
    "SavedBytes",
    "StepLedger",
    "TimelinePoint",
    "available_bytes",
    "peak_device_bytes",
    "reset_peak_device_bytes",
    "resident_bytes",
]

CONTROL_GROUP = Path("/sys/fs/cgroup")  # of this process, as a container shows it


def peak_device_bytes(device: torch.device | str | int) -> int | None:
    """Most bytes the tensors on ``device`` occupied since the last reset; None where nothing counts them (CPU, MPS).

    On CUDA ``torch.cuda.max_memory_allocated``, which leaves out the allocator's cache and the CUDA context.
    """
    allocator = _allocator(torch.device(device))
    return None if allocator is None else allocator.max_memory_allocated(device)


def reset_peak_device_bytes(device: torch.device | str | int) -> None:
    """Start the peak of ``device`` again from what it holds now. Does nothing where ``peak_device_bytes`` is None."""
    allocator = _allocator(torch.device(device))
    if allocator is not None:
        allocator.reset_peak_memory_stats(device)


def resident_bytes() -> int:
    """Bytes of this process in main memory now (resident set size), Python and libraries included."""
    import psutil  # accelerate requires it; imported here to keep the package's import light

    return psutil.Process().memory_info().rss


def available_bytes(device: torch.device | str | int, held_bytes: int) -> int:
    """Bytes that a run's tensors may take on ``device``, the held_bytes of them that are there already included.

    On CUDA what is free and what the allocator holds, but for tensors of others (an average of the weights, a second model), less what blocks
    without a tensor take of it; on a CPU what the system can still give.
    """
    device = torch.device(device)
    allocator = _allocator(device)
    if allocator is None:
        import psutil

        return min([psutil.virtual_memory().available, *_left_of_control_group()]) + held_bytes
    free, _ = allocator.mem_get_info(device)
    of_others = max(0, allocator.memory_allocated(device) - held_bytes)
    return int((free + allocator.memory_reserved(device)) / (1 + ALLOCATOR_SHARE)) - of_others


def _left_of_control_group() -> list[int]:
    """Bytes that the limit of a container leaves, in a list; empty where there is none. What a file cache holds can be had."""
    try:
        limit, used = (int((CONTROL_GROUP / name).read_text()) for name in ("memory.max", "memory.current"))
        held = dict(line.split() for line in (CONTROL_GROUP / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # no such file, or a limit of "max"
        return []
    return [max(0, limit - used + int(held.get("inactive_file", 0)))]


def _allocator(device: torch.device) -> ModuleType | None:
    return {"cuda": torch.cuda, "xpu": torch.xpu}.get(device.type)

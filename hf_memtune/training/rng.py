"""Looking at data or at the model between steps must not change what training draws next."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_memtune.core.rng import device_state, set_device_state


@dataclass(frozen=True)
class Generators:
    """The state of every generator that training draws from: Python's, numpy's, torch's on the CPU and on one device."""

    device: torch.device
    python: Any
    numpy: Any
    host: Tensor
    on_device: Tensor | None

    @classmethod
    def now(cls, device: torch.device) -> "Generators":
        """As they are."""
        on_device = None if device.type == "cpu" else device_state(device)
        return cls(device, random.getstate(), np.random.get_state(), torch.get_rng_state(), on_device)

    def restore(self) -> None:
        """As they were. May be called again and again."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.host)
        if self.on_device is not None:
            set_device_state(self.device, self.on_device)


@contextmanager
def preserved_rng(device: torch.device) -> Iterator[None]:
    """Put back every generator that training draws from: Python's, numpy's, torch's on the CPU and on `device`."""
    before = Generators.now(device)
    try:
        yield
    finally:
        before.restore()

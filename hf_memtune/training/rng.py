"""Looking at data or at the model between steps must not change what training draws next."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def preserved_rng(device: torch.device) -> Iterator[None]:
    """Put back every generator that training draws from: Python's, numpy's, torch's on the CPU and on `device`."""
    python, numpy = random.getstate(), np.random.get_state()
    devices, kind = ([], "cuda") if device.type == "cpu" else ([device], device.type)  # torch always keeps the CPU's
    try:
        with torch.random.fork_rng(devices, device_type=kind):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)

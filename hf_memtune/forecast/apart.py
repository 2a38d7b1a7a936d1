"""A second trainer in one process, which leaves the first as it was: accelerate's state and all random numbers are of the process.

It is alone, also where the process is one of several: what a launcher wrote into the environment is not there for it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate.state import AcceleratorState, GradientState, PartialState

from hf_memtune.training.rng import preserved_rng

_SHARED = (PartialState, AcceleratorState, GradientState)
_LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


@contextmanager
def apart() -> Iterator[None]:
    """While open, a trainer can be made and run; afterwards no other notices. accelerate begins with no state at all."""
    states = [dict(kind._shared_state) for kind in _SHARED]
    for kind in _SHARED:
        kind._shared_state.clear()
    launched = {name: os.environ.pop(name) for name in list(os.environ) if name in _LAUNCHED or name.startswith(("ACCELERATE_", "FSDP_"))}
    try:
        with preserved_rng(torch.device("cpu")):
            yield
    finally:
        for kind, state in zip(_SHARED, states):
            kind._shared_state.clear()
            kind._shared_state.update(state)
        os.environ.update(launched)

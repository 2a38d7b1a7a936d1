"""A second trainer in one process, which leaves the first as it was: accelerate's state and all random numbers are of the process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate.state import AcceleratorState, GradientState, PartialState

from hf_memtune.training.rng import preserved_rng

_SHARED = (PartialState, AcceleratorState, GradientState)


@contextmanager
def apart() -> Iterator[None]:
    """While open, a trainer can be made and run; afterwards no other notices. accelerate begins with no state at all."""
    states = [dict(kind._shared_state) for kind in _SHARED]
    for kind in _SHARED:
        kind._shared_state.clear()
    try:
        with preserved_rng(torch.device("cpu")):
            yield
    finally:
        for kind, state in zip(_SHARED, states):
            kind._shared_state.clear()
            kind._shared_state.update(state)

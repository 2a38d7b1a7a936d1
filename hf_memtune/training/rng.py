"""Looking at data or at the model between steps must not change what training draws next."""

import copy
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_memtune.core.rng import device_state, set_device_state

_GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)


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
def preserved_rng(device: torch.device, collator: object = None) -> Iterator[None]:
    """Put back every generator that training draws from: Python's, numpy's, torch's on the CPU and on `device`, and the collator's own."""
    before = Generators.now(device)
    try:
        with _with_copies(collator):
            yield
    finally:
        before.restore()


@contextmanager
def _with_copies(collator: object) -> Iterator[None]:
    """Let a collator, and one inside of it, draw from copies of its generators, or from such as it makes now and will not keep."""
    holders = [each for each in (collator, getattr(collator, "data_collator", None)) if isinstance(getattr(each, "__dict__", None), dict)]
    kept = [(vars(each), vars(each).copy()) for each in holders]
    for attributes, before in kept:
        attributes.update({name: _copied(value) for name, value in before.items() if isinstance(value, _GENERATORS)})
    try:
        yield
    finally:
        for attributes, before in kept:
            for name in [name for name, value in attributes.items() if isinstance(value, _GENERATORS)]:
                if name in before:
                    attributes[name] = before[name]
                else:
                    del attributes[name]


def _copied(generator: Any) -> Any:
    return generator.clone_state() if isinstance(generator, torch.Generator) else copy.deepcopy(generator)

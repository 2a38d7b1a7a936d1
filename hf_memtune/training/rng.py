"""Looking at data or at the model between steps must not change what training draws next."""

import copy
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
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
    """Let a collator, and those inside of it, draw from copies of their generators, or from such as they make now and will not keep."""
    kept = [(attributes, attributes.copy()) for attributes in _attributes(collator, set())]
    try:
        for attributes, before in kept:
            attributes.update({name: _copied(value) for name, value in before.items() if _draws(value)})
        yield
    finally:
        for attributes, before in kept:
            for name in [name for name in {**attributes, **before} if _draws(attributes.get(name)) or _draws(before.get(name))]:
                if name in before:
                    attributes[name] = before[name]
                else:
                    del attributes[name]


def _attributes(collator: Any, seen: set[int]) -> Iterator[dict[str, Any]]:
    """Those of an object, of what a bound method or a partial is of, and of callables that it holds."""
    if collator is None or isinstance(collator, (torch.nn.Module, ModuleType)) or id(collator) in seen:
        return
    seen.add(id(collator))
    attributes = getattr(collator, "__dict__", None)
    own = attributes if isinstance(attributes, dict) else {}
    if own is attributes:
        yield own
    for inside in (getattr(collator, "__self__", None), getattr(collator, "func", None), *filter(callable, [*own.values()])):
        yield from _attributes(inside, seen)


def _draws(value: object) -> bool:
    return isinstance(value, _GENERATORS) and not isinstance(value, random.SystemRandom)  # which has no state


def _copied(generator: Any) -> Any:
    return generator.clone_state() if isinstance(generator, torch.Generator) else copy.deepcopy(generator)

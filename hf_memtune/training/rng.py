"""Looking at data or at the model between steps must not change what training draws next."""

import copy
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import chain
from types import FunctionType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_memtune.core.rng import device_state, set_device_state

_GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
_CONTAINERS = (list, tuple, set, frozenset, dict)
_MANY = 1000  # a container of more is data


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
def preserved_rng(device: torch.device, *given: object) -> Iterator[None]:
    """Put back every generator that training draws from: Python's, numpy's, torch's on the CPU and on `device`, and those of what is given.

    given: collators and data sets. Theirs are the generators in their attributes, in what these are made of (functions, methods and partials,
    lists and dicts of moderate size), and those that a function draws from by a name outside of it. One that is first made meanwhile is forgotten.
    """
    before = Generators.now(device)
    found = [*chain.from_iterable(_inside(each, {}) for each in given)]
    states = [(restore, copy.deepcopy(state())) for state, restore in map(_state_of, filter(_draws, found))]
    attributes = [(each, each.copy()) for each in found if isinstance(each, dict)]
    try:
        yield
    finally:
        before.restore()
        for now, then in attributes:
            for name in [name for name in {**now, **then} if _draws(now.get(name)) or _draws(then.get(name))]:
                now.pop(name, None)
                now.update({name: then[name]} if name in then else {})
        for restore, state in states:
            restore(state)


def _inside(value: Any, seen: dict[int, Any]) -> Iterator[Any]:
    """The generators in an object, and the dicts of attributes that such may be put into. seen: objects by id, which so stay theirs."""
    if id(value) in seen or isinstance(value, (torch.nn.Module, ModuleType, type)):
        return
    seen[id(value)] = value
    if _draws(value):
        yield value
        return
    own = getattr(value, "__dict__", None)
    if isinstance(own, dict):
        yield own
    for part in _parts(value):
        if _draws(part) or callable(part) or isinstance(part, (*_CONTAINERS, torch.utils.data.Dataset)):
            yield from _inside(part, seen)


def _parts(value: Any) -> Iterator[Any]:
    """What an object is made of, as far as generators may be in it."""
    if isinstance(value, _CONTAINERS):
        if len(value) <= _MANY:
            yield from value.values() if isinstance(value, dict) else value
    elif isinstance(value, FunctionType):
        yield from _outside(value)
    elif isinstance(value, partial):
        yield from (value.func, value.args, value.keywords)
    else:
        yield from (getattr(value, name, None) for name in ("__self__", "__func__"))
        yield from _attributes(value)


def _outside(function: FunctionType) -> Iterator[Any]:
    """What it takes from outside of its arguments; of what its module has, generators alone."""
    yield from (function.__defaults__, function.__kwdefaults__)
    for cell in function.__closure__ or ():
        with suppress(ValueError):  # an empty one
            yield cell.cell_contents
    yield from filter(_draws, (function.__globals__.get(name) for name in function.__code__.co_names))


def _attributes(value: Any) -> Iterator[Any]:
    """Of an object, and the functions of its classes."""
    own = getattr(value, "__dict__", None)
    yield from [*own.values()] if isinstance(own, dict) else ()
    for cls in type(value).__mro__:
        slots = vars(cls).get("__slots__", ())
        yield from (getattr(value, name, None) for name in ([slots] if isinstance(slots, str) else slots))
        yield from filter(callable, vars(cls).values()) if cls.__module__ != "builtins" else ()


def _draws(value: object) -> bool:
    return isinstance(value, _GENERATORS) and not isinstance(value, random.SystemRandom)  # which has no state


def _state_of(generator: Any) -> tuple[Callable[[], Any], Callable[[Any], Any]]:
    """What reads its state, and what sets it."""
    if isinstance(generator, np.random.Generator):
        bits = generator.bit_generator
        return lambda: bits.state, partial(setattr, bits, "state")
    if isinstance(generator, random.Random):
        return generator.getstate, generator.setstate
    return generator.get_state, generator.set_state

"""Tensors of modules, put in the places of others for a while."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn

Place = tuple[dict, str, Tensor]
"""The `_parameters` or `_buffers` of a module, a name among them, and a tensor."""


def places_of(module: nn.Module) -> list[Place]:
    """All tensors of a module and of those within it: parameters and buffers, those that stand in several places several times."""
    found: list[Place] = []
    left = [module]
    while left:  # modules() would take longer than all the rest
        own = left.pop().__dict__
        for entries in (own["_parameters"], own["_buffers"]):
            for name, tensor in entries.items():
                if tensor is not None:
                    found.append((entries, name, tensor))
        if own["_modules"]:
            left.extend(child for child in reversed(own["_modules"].values()) if child is not None)
    return found


@contextmanager
def in_place(places: Iterable[Place]) -> Iterator[None]:
    """While open, these tensors are in their places; afterwards what was there on entry, where nobody has put something else since.

    Who calls, and who goes backward, may find different tensors there (`torch.func.functional_call`): each is left what was its own.
    """
    earlier: list[tuple[dict, str, bool, Tensor | None, Tensor]] = []
    for entries, name, tensor in places:
        if entries.get(name) is not tensor:
            earlier.append((entries, name, name in entries, entries.get(name), tensor))
            entries[name] = tensor
    try:
        yield
    finally:
        for entries, name, was_there, there, tensor in reversed(earlier):
            if entries.get(name) is not tensor:
                continue
            if was_there:
                entries[name] = there
            else:
                del entries[name]

"""Temporary changes to instances: context managers that put back exactly what was there."""

import copy
import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from types import MethodType

from torch import nn

from hf_memtune._compat import is_quantised_kernel


def set_on_instance(target: object, name: str, value: object) -> Callable[[], None]:
    """Set an attribute on one instance, shadowing its class. Returns what restores or deletes it; until that is called, it stays."""
    had_own = name in vars(target)
    previous = vars(target).get(name)
    object.__setattr__(target, name, value)

    def put_back() -> None:
        if had_own:
            object.__setattr__(target, name, previous)
        else:
            object.__delattr__(target, name)

    return put_back


class Override:
    """Runs `function(forward, ...)` in place of the forward of one module instance, until it is taken off.

    forward is what the instance had before: its own, or one that somebody else has put there. A copy of the module, deep or pickled, has the
    forward of its class: what is put on one model is not on its copies.
    """

    def __init__(self, module: nn.Module, function: Callable):
        self.module, self.function, self.is_on = module, function, True
        self.earlier = module.forward
        self.had_own = "forward" in vars(module)
        self.__signature__ = inspect.signature(self.earlier)  # by which trainers choose columns of data

    def put_on(self) -> Callable[[], None]:
        """Returns what takes it off."""
        object.__setattr__(self.module, "forward", self)
        return self.take_off

    def take_off(self) -> None:
        """Where somebody has put another forward over this one since, that one stays, and finds the earlier one through this."""
        self.is_on = False
        if vars(self.module).get("forward") is not self:
            return
        if self.had_own:
            object.__setattr__(self.module, "forward", self.earlier)
        else:
            object.__delattr__(self.module, "forward")

    def __call__(self, *args, **kwargs):
        return self.function(self.earlier, *args, **kwargs) if self.is_on else self.earlier(*args, **kwargs)

    def __deepcopy__(self, memo: dict) -> Callable:
        return _forward_of(copy.deepcopy(self.module, memo), copy.deepcopy(self.earlier, memo) if self.had_own else None)

    def __reduce__(self) -> tuple:
        return _forward_of, (self.module, self.earlier if self.had_own else None)


def runs_its_own(module: nn.Module) -> bool:
    """Whether the forward of a module is that of its class, whatever this package has put in its place."""
    own = vars(module).get("forward")
    is_of_copy = own == _forward_of(module, None)  # made while it was overridden
    return own is None or is_of_copy or (isinstance(own, Override) and not own.had_own)


def _forward_of(module: nn.Module, earlier: Callable | None) -> Callable:
    return MethodType(type(module).forward, module) if earlier is None else earlier


@contextmanager
def instance_attribute(target: object, name: str, value: object) -> Iterator[None]:
    """`set_on_instance` for as long as the context is open."""
    put_back = set_on_instance(target, name, value)
    try:
        yield
    finally:
        put_back()


@contextmanager
def forward_as(module: nn.Module, forward: Callable) -> Iterator[None]:
    """Let one module instance run `forward` in place of its own."""
    with instance_attribute(module, "forward", forward):
        yield


@contextmanager
def modes_kept(model: nn.Module) -> Iterator[None]:
    """Put every module back into the mode, training or evaluation, that it had."""
    before = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, mode in before:
            module.training = mode


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Dropout and activation checkpointing off, without losing which submodules were in training mode."""
    training = [m for m in module.modules() if m.training and not is_quantised_kernel(m)]
    for m in training:
        m.training = False
    try:
        yield
    finally:
        for m in training:
            m.training = True


@contextmanager
def not_checkpointing(module: nn.Module) -> Iterator[None]:
    """Activation checkpointing off, with all else, dropout too, as it is."""
    with ExitStack() as stack:
        for part in module.modules():
            if vars(part).get("gradient_checkpointing"):
                stack.enter_context(instance_attribute(part, "gradient_checkpointing", False))
        yield


@contextmanager
def forwards_as(pairs: Iterable[tuple[nn.Module, Callable]]) -> Iterator[None]:
    """`forward_as` for several modules."""
    with ExitStack() as stack:
        for module, forward in pairs:
            stack.enter_context(forward_as(module, forward))
        yield

"""What the settings of every method have in common, so that a trainer's arguments can be all of them at once.

Flat dataclass fields, each with a default and a help text; `of`, `problems` and `ineffective`. Each class speaks of its own fields alone and
hands on to the next (`super()`): the messages of several, mixed into one class of arguments, are those of all.
"""

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import Field, dataclass, field, fields
from typing import Any, Self, TypeVar

from hf_memtune.errors import ConfigError

Value = TypeVar("Value")


def filled_in(value: Value | None) -> Value:
    """A setting that may be left out, of settings in which it has been filled in."""
    assert value is not None
    return value


def setting(default: Any, help_text: str, choices: Sequence[str] | None = None, **metadata: Any) -> Any:
    """A field. help_text: what it does, its unit, and what a larger value does. metadata: more for the parser of flags, such as aliases."""
    metadata |= {"help": help_text} if choices is None else {"help": help_text, "choices": list(choices)}
    return field(default=default, metadata=metadata)


_is_told: ContextVar[bool] = ContextVar("_is_told", default=False)


@contextmanager
def told() -> Iterator[None]:
    """While open, settings that are made say nothing of what has no effect: somebody else does."""
    before = _is_told.set(True)
    try:
        yield
    finally:
        _is_told.reset(before)


@dataclass
class MethodSettings:
    """Settings of one method, or of several. When it is made, raises ConfigError with every problem, and warns of what has no effect."""

    def __post_init__(self) -> None:
        if found := self.problems():
            raise ConfigError(found)
        self.warn_of_ineffective(stacklevel=5)  # whoever makes it: between are __init__ and the method of a subclass

    def warn_of_ineffective(self, stacklevel: int) -> None:
        """Warn of what has no effect, where nobody else tells of it (`told`)."""
        for name, reason in () if _is_told.get() else self.ineffective().items():
            warnings.warn(no_effect(name, reason), stacklevel=stacklevel)

    @classmethod
    def of(cls, settings: "MethodSettings", **changed: Any) -> Self:
        """These settings alone, out of arguments that have more fields, with some of them changed; what has no effect was told of the arguments."""
        with told():
            return cls(**{each.name: getattr(settings, each.name) for each in fields(cls)} | changed)

    def problems(self) -> list[str]:
        """Every value that cannot work, as one message each: setting, got, expected."""
        return []

    def ineffective(self) -> dict[str, str]:
        """Names of settings that were given but have no effect under the others, each with the reason: nothing is ignored in silence."""
        return {}


def no_effect(name: str, reason: str) -> str:
    """What is said of a setting without effect. reason: begins with "with" or "without"."""
    return f"{name} has no effect {reason}"


Condition = tuple[bool, str, str]
"""Whether it holds, the setting that it is of, and what is expected of that."""


def one_of(settings: Any, allowed: Mapping[str, Sequence[Any]]) -> list[Condition]:
    """By setting, the values that it may have, None where it may be left out."""
    return [
        (getattr(settings, name) in values, name, f"one of {tuple(value for value in values if value is not None)}")
        for name, values in allowed.items()
    ]


def unmet(settings: Any, conditions: Iterable[Condition]) -> list[str]:
    """A message for each condition that does not hold."""
    return [f"{name}: got {getattr(settings, name)!r}, expected {wanted}." for holds, name, wanted in conditions if not holds]


def changed_fields(settings: Any, kind: type[MethodSettings]) -> list[Field[Any]]:
    """The fields of one kind that are not as by default."""
    return [each for each in fields(kind) if getattr(settings, each.name) != each.default]

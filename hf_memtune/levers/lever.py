"""What is known of a setting that saves memory: the columns of the table in table.py."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from hf_memtune.levers.facts import Idle, Run, Seen, Settings

EXACT, APPROXIMATE = "exact", "approximate"


@dataclass(frozen=True)
class Offer:
    """One change that needs less memory.

    name: in words. setting: what to write, and in brackets what comes of it. changes: the settings that go over those of the run.
    gradient: EXACT: that of the settings as they are; exact of something else (in brackets what); or APPROXIMATE.
    missing: what it needs and is not there, or None.
    """

    name: str
    setting: str
    changes: Mapping[str, Any]
    gradient: str = EXACT
    missing: str | None = None

    @property
    def is_exact(self) -> bool:
        """Whether gradients stay exact, if of something else."""
        return self.gradient != APPROXIMATE

    def __str__(self) -> str:
        return f"{self.setting} ({self.gradient})"


@dataclass(frozen=True)
class Lever:
    """A row of the table.

    name: the setting that turns it on. is_on: whether it is. written: how it stands in the settings, for reports. off: settings that take
    it out again; None: it cannot be taken out of a model that has it.
    offers: what it could still give a run, least change first. judge: what it should have done in a step and did not.
    excludes: training arguments that it cannot work with, each with the reason, and what to do instead.
    sharded: why it does not work under FSDP; empty: that is not its concern. fsdp2: whether version 2 of FSDP is all right.
    """

    name: str
    is_on: Callable[[Settings], bool] = lambda args: False
    written: Callable[[Settings], str] = lambda args: ""
    off: Callable[[Settings], Mapping[str, Any] | None] = lambda args: None
    offers: Callable[[Run], Iterable[Offer]] = lambda run: ()
    judge: Callable[[Settings, Seen], Iterable[Idle]] = lambda args, seen: ()
    excludes: Callable[[Settings], Mapping[str, str]] = lambda args: {}
    sharded: str = ""
    fsdp2: bool = False

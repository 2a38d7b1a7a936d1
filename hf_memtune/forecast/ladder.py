"""The rungs of a ladder: what can be changed about a run so that it needs less memory, exact things first, each with what is below it.

Exact are the logit-free loss, activation checkpointing, streaming and smaller micro-batches: the gradients are those of the settings as
given. 8-bit optimizer state changes what is made of them, LoRA and QLoRA what is trained: exact gradients of something else. Keeping a part
of the tokens changes the gradients, and comes last.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hf_memtune.levers.facts import Run
from hf_memtune.levers.lever import APPROXIMATE, EXACT
from hf_memtune.levers.table import offers_of

OF_STREAMING = {"kv_offload": False, "keep_attention_outputs": False}  # settings that streaming alone has, switched off


@dataclass(frozen=True)
class Rung:
    """One way to run. name: what it adds to the rungs below. gradient: exact, exact of something else (in brackets what), or approximate.

    changes: settings, by the names of flags, that go over those given. missing: what it needs and is not there, or None.
    """

    name: str
    gradient: str
    changes: dict[str, Any]
    missing: str | None = None

    @property
    def is_exact(self) -> bool:
        return self.gradient != APPROXIMATE


def ladder(run: Run) -> list[Rung]:
    """All rungs above the settings as given, which are the first."""
    rungs = [Rung("as given", APPROXIMATE if run.args.token_seeking else EXACT, {})]
    for offer in offers_of(run):
        there = [rung for rung in rungs if rung.missing is None]  # what cannot be had is no step to others
        last, below = there[-1], there[-1].changes
        if not offer.is_exact and rungs[0].is_exact:
            below = _without_streaming(there) | {name: off for name, off in OF_STREAMING.items() if getattr(run.args, name) != off}
        kind = last.gradient if offer.gradient == EXACT or not last.is_exact else offer.gradient
        rungs.append(Rung(offer.name, kind, {**below, **offer.changes}, offer.missing))
    return rungs


def _without_streaming(rungs: list[Rung]) -> dict[str, Any]:
    """The changes of the highest exact rung; token seeking goes in the place of its streaming."""
    highest = [rung for rung in rungs if rung.is_exact][-1]
    return {name: value for name, value in highest.changes.items() if name != "sequence_chunk_size"}

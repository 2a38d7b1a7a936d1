"""What the memory of one training step goes to: bytes by category at the peak of every phase. Estimates, plans and reports share it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

CATEGORIES = ("weights", "gradients", "optimizer_state", "saved_activations", "stored_kv", "temporaries", "logits", "batch")
"""weights: parameters and buffers. gradients: `p.grad`. optimizer_state: tensors of `optimizer.state`. batch: inputs of all micro-batches.
stored_kv: keys and values that a context pass leaves, and the sums of their gradients. logits: floating, one value a token of the
vocabulary, and their gradients. saved_activations: made by a forward pass and alive when its backward begins. temporaries: all else,
recomputation too. A storage that could be two of them is the one that comes first in weights, optimizer_state, gradients, batch, stored_kv,
logits, saved_activations; and it is that from its first byte to its last."""

PHASES = ("context_pass", "forward", "backward", "optimizer", "evaluation")
"""context_pass: all tokens without gradient, and what is chosen from them. forward: until backward begins, the loss too. backward: until
the optimizer or another forward begins, clipping of gradients too. optimizer: inside `optimizer.step`. evaluation: a forward pass apart."""


class LiveTensor(NamedTuple):
    """A storage that was alive at the peak. name: of a parameter, or the path of the module that made it; None where neither is known."""

    name: str | None
    category: str
    n_bytes: int
    shape: tuple[int, ...]
    dtype: str
    op: str | None


class TimelinePoint(NamedTuple):
    """Live bytes after one event, the making or the death of a storage. event: its number in the step."""

    event: int
    phase: str
    live_bytes: int


@dataclass(frozen=True)
class PhaseBytes:
    """The bytes alive at the peak of one phase, by category. Categories without bytes are there, as 0."""

    phase: str
    by_category: dict[str, int]

    @property
    def peak_bytes(self) -> int:
        return sum(self.by_category.values())


@dataclass(frozen=True)
class MemoryAccount:
    """Where the bytes of one step were (or will be). All counts are of tensors: neither the allocator's rounding nor the device's context.

    phases: those that ran, in the order of PHASES. tensors: the largest alive at the peak of the whole step, largest first.
    timeline: live bytes over the step, thinned out, the peak among them; empty where the account was extrapolated.
    """

    phases: tuple[PhaseBytes, ...]
    tensors: tuple[LiveTensor, ...] = ()
    timeline: tuple[TimelinePoint, ...] = ()

    @property
    def peak_phase(self) -> str:
        """The phase with the largest peak; of several, the first."""
        return max(self.phases, key=lambda phase: phase.peak_bytes).phase

    @property
    def peak_bytes(self) -> int:
        """The most bytes alive at any moment of the step."""
        return max(phase.peak_bytes for phase in self.phases)

    @property
    def by_category(self) -> dict[str, int]:
        """Of the peak of the whole step."""
        return self.phase(self.peak_phase).by_category

    def phase(self, name: str) -> PhaseBytes:
        """Raises KeyError for a phase that did not run."""
        return {phase.phase: phase for phase in self.phases}[name]

    def to_dict(self) -> dict[str, Any]:
        """For JSON: numbers, strings, lists and dicts."""
        plain = asdict(self)
        plain["tensors"] = [tensor._asdict() | {"shape": list(tensor.shape)} for tensor in self.tensors]
        plain["timeline"] = [list(point) for point in self.timeline]
        return plain | {"peak_bytes": self.peak_bytes, "peak_phase": self.peak_phase}

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> MemoryAccount:
        """What `to_dict` made."""
        tensors = (LiveTensor(**tensor | {"shape": tuple(tensor["shape"])}) for tensor in plain["tensors"])
        phases = (PhaseBytes(phase["phase"], dict(phase["by_category"])) for phase in plain["phases"])
        return cls(tuple(phases), tuple(tensors), tuple(TimelinePoint(*point) for point in plain["timeline"]))

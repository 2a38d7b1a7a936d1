"""What an estimate says: the account of a step that has not run, what it holds for, and how it was found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .account import MemoryAccount


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one whole training step, without running it.

    account: bytes by phase and category; peak_bytes, peak_phase and by_category are those of its peak. conditions: what it was traced
    for (rows, tokens, micro-batches, dtypes, versions of torch and transformers). flops: floating point operations of the step, for
    comparing times. extrapolated: how the account follows from shorter models, or None where every layer was traced. All
    bytes are of tensors: what a device needs beside them (its context, the allocator's rounding and cache, workspaces of kernels) is not
    in it.
    """

    account: MemoryAccount
    conditions: dict[str, Any]
    flops: int
    extrapolated: str | None = None

    @property
    def peak_bytes(self) -> int:
        return self.account.peak_bytes

    @property
    def peak_phase(self) -> str:
        return self.account.peak_phase

    @property
    def by_category(self) -> dict[str, int]:
        """Of the peak."""
        return self.account.by_category

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        found = {"account": self.account.to_dict(), "conditions": self.conditions, "flops": self.flops, "extrapolated": self.extrapolated}
        return {"peak_bytes": self.peak_bytes, "peak_phase": self.peak_phase, **found}

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> MemoryEstimate:
        """What `to_dict` made."""
        return cls(MemoryAccount.from_dict(plain["account"]), plain["conditions"], plain["flops"], plain["extrapolated"])

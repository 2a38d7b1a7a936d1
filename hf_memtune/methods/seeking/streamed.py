"""One call with token_gradient=stream or skip: the loss is that of the kept tokens, the gradient goes through all, or those that matter.

Shape legend: B rows of a batch, T tokens in a row, D hidden size.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hf_memtune.methods.attention.batch import BodyCall
from hf_memtune.methods.attention.records import Records
from hf_memtune.methods.seeking.choice import Choice
from hf_memtune.methods.seeking.ditched import ChosenCall
from hf_memtune.methods.seeking.last_block import LastBlock
from hf_memtune.methods.streaming.chunk_stream import ChunkStream, Means


class ChosenStream(ChunkStream, ChosenCall):
    """The stream of a call whose tokens are chosen. records: what the context pass leaves for scores.

    carries_loss: whether the gradient that comes is, if only in part, that of the loss that chose the tokens.
    """

    def __init__(self, means: Means, call: BodyCall, choice: Choice, records: Records):
        super().__init__(means, call, keeps_last=not records.wanted)
        self.choice, self.records, self.carries_loss = choice, records, False

    def run_context(self) -> None:
        """The pass over all tokens."""
        self.run_forward(self.records)
        self.choice.block = LastBlock(self.router, self.call, self.records, self.store, self.chunk)

    def backward(self, cotangents: Sequence[Tensor | None], nodes: Sequence[Any]) -> list[Tensor | None]:
        found = super().backward(cotangents, nodes)
        self.choice.chooser.listeners.tell("counted", recomputed=self.tokens_run)
        return found

    def going(self, cotangents: list[Tensor | None]) -> list[Tensor | None]:
        """Those of the kept tokens, weighted; where they were chosen before the loss was taken, they are that already.

        A further loss of the same call, which has no kept tokens of its own, is then learned from all.
        """
        if not self.carries_loss:
            cotangents = self._chosen_now(cotangents)
        self.let_go_of_scores()
        return cotangents

    def _chosen_now(self, cotangents: list[Tensor | None]) -> list[Tensor | None]:
        self.choose_by(cotangents[0])
        kept, weight = self.choice.decoder.kept_mask(), self.choice.weight
        factor = kept if weight is None else kept * weight
        return [None if c is None else _times(c, factor) for c in cotangents]


class SkippingStream(ChosenStream):
    """The stream that leaves out tokens without loss whose incoming key and value gradient is below `skip_threshold` of the row's total."""

    leaves_out = True

    def __init__(self, means: Means, call: BodyCall, choice: Choice, records: Records):
        super().__init__(means, call, choice, records)
        self._passed: dict[int, Tensor] = {}  # by chunk, the gradient mass of tokens whose turn has come, (B, 1)
        self._learning: Tensor | None = None  # (B, T) bool: tokens with a gradient of their own

    def going(self, cotangents: list[Tensor | None]) -> list[Tensor | None]:
        cotangents = super().going(cotangents)
        shape = self.rows.batch, self.rows.length
        own = [(c != 0).reshape(*shape, -1).any(-1) for c in cotangents if c is not None]
        self._learning = torch.stack([torch.zeros(shape, dtype=torch.bool, device=self.rows.positions.device), *own]).any(0)
        return cotangents

    def wanted(self, start: int, stop: int) -> Tensor:
        """Tokens with a loss, those whose keys and values are owed more than the threshold by later chunks, and those before any of these:
        what the chunk owes to itself is known only once it has run."""
        assert self._learning is not None  # set when the gradient came
        wanted, mass = self._learning[:, start:stop], self.owed.mass(stop)
        if mass is not None:
            self._passed[start] = mass[:, start:].sum(1, keepdim=True)
            total = mass[:, :start].sum(1, keepdim=True) + sum(self._passed.values())
            wanted = wanted | (mass[:, start:] > self.choice.chooser.config.skip_threshold * total)
        wanted = wanted.flip(1).cumsum(1).flip(1) > 0
        if not start and not self.tokens_run:
            wanted[:, 0] = True  # or parameters would be left without a gradient, where plain training finds 0
        return wanted


def _times(cotangent: Tensor, factor: Tensor) -> Tensor:
    """(B, T, ...) or (B * T, ...) times (B, T)."""
    flat = factor if cotangent.shape[:2] == factor.shape else factor.flatten()
    return cotangent * flat.reshape(*flat.shape, *[1] * (cotangent.dim() - flat.dim())).to(cotangent.dtype)

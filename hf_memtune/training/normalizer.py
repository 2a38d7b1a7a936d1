"""One mean over all kept, labelled tokens of an accumulated batch, although their number is known only as it goes.

Which tokens are kept is decided in each micro-batch, so the count of the whole accumulation is not known when the first one
goes backward. Invariant: after micro-batch i the accumulated gradients are those of (sum of losses so far) / (tokens so far).
To keep it, gradients that are there already are scaled by (tokens before) / (tokens now) before the next are added.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn


class RunningMean:
    """Counts and losses of one accumulation, over all processes that share it."""

    def __init__(self):
        self.restart()

    def restart(self) -> None:
        """Begin the next accumulated batch."""
        self.tokens: Tensor | None = None
        self._loss_sum: Tensor | float = 0.0
        self._reported: Tensor | float = 0.0

    def add_tokens(self, count: Tensor, parameters: Iterable[nn.Parameter]) -> Tensor:
        """Count the tokens of a micro-batch (all processes) and rescale the gradients so far. Returns the divisor, at least 1."""
        before = self.tokens
        self.tokens = count if before is None else before + count
        divisor = self.tokens.clamp_min(1)
        if before is not None:
            _rescale([p.grad for p in parameters if p.grad is not None], before.clamp_min(1), divisor)
        return divisor

    def report(self, loss_sum: Tensor) -> Tensor:
        """What this micro-batch adds to the mean loss of the accumulation: the reports of an accumulation sum up to it."""
        self._loss_sum = self._loss_sum + loss_sum.detach()
        mean = self._loss_sum / self.tokens.clamp_min(1)
        added, self._reported = mean - self._reported, mean
        return added


def _rescale(gradients: list[Tensor], before: Tensor, now: Tensor) -> None:
    """Multiply by before / now, divided in float32 at least: bfloat16 cannot even hold a count of 257."""
    groups: dict[tuple, list[Tensor]] = {}
    for gradient in gradients:
        groups.setdefault((gradient.device, gradient.dtype), []).append(gradient)
    for (device, dtype), group in groups.items():
        wide = torch.float64 if dtype == torch.float64 else torch.float32  # two integers would divide to float32
        torch._foreach_mul_(group, before.to(device, wide) / now.to(device, wide))

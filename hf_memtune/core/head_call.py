"""A linear head whose logits are made on demand, and one call of it. Shape legend: see `hf_memtune.core.logits`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from hf_memtune.core.loss import IGNORED, linear_loss
from hf_memtune.errors import LogitsError

Pointwise = Callable[[Tensor], Tensor]


class HeadOnDemand:
    """What makes the logits of a linear head, and takes their cross entropy without them. Strategies choose tokens in a subclass.

    Args:
        forward: the head itself, (B, T, D) to (B, T, V). It must do what `F.linear` of weight and bias does.
        weight: gives the (V, D) matrix, with its graph; asked once for each `LazyLogits.of`.
        bias: (V,) or None.
    """

    def __init__(self, forward: Callable[[Tensor], Tensor], weight: Callable[[], Tensor], bias: Tensor | None = None):
        self.forward, self.weight, self.bias = forward, weight, bias

    def is_signal(self, hook: Callable) -> bool:
        """Whether a hook on the logits changes no gradient, and wants no more than to be called before the head goes backward."""
        return False

    def cross_entropy(
        self, hidden_BTD: Tensor, weight_VD: Tensor, target_BT: Tensor, label_smoothing: float, pointwise: Pointwise | None
    ) -> tuple[Tensor, Tensor]:
        """The summed loss, a scalar, and the number of tokens with a label, an int64 scalar tensor.

        weight_VD: what `weight` gave. target_BT: int64, IGNORED (-100) also where the logits were sliced off. pointwise: what was done to
        the logits, casts apart; None: nothing. Called with the autocast state in which the logits were made, without grad mode if they
        have no gradient.
        """
        hidden_ND, target_N = hidden_BTD.reshape(-1, hidden_BTD.shape[-1]), target_BT.reshape(-1)
        loss = linear_loss(hidden_ND, weight_VD, self.bias, target_N, label_smoothing, pointwise=pointwise)
        return loss, (target_BT != IGNORED).sum()


class HeadCall:
    """One call of a head: all that its logits, or their loss, are made of.

    node: what autograd knows the logits by. is_watched: a hook wants their gradient. is_fused: a loss went past them. signals: hooks that
    want to be called before backward, of a loss that goes past them too.
    """

    def __init__(self, head: HeadOnDemand, hidden_BTD: Tensor):
        self.head, self.hidden, self.weight = head, hidden_BTD, head.weight()
        self.device = hidden_BTD.device.type
        self._is_autocast = torch.is_autocast_enabled(self.device)
        self._autocast_dtype = torch.get_autocast_dtype(self.device)
        self._versions = self._versions_now()
        self.node, self.is_watched, self.is_fused = None, False, False
        self.signals: list[Callable] = []

    @property
    def dtype(self) -> torch.dtype:
        """Of the logits: autocast leaves float64 alone."""
        return self._autocast_dtype if self._is_autocast and self.weight.dtype != torch.float64 else self.weight.dtype

    @property
    def size(self) -> tuple[int, ...]:
        return *self.hidden.shape[:-1], self.weight.shape[0]

    def is_stale(self) -> bool:
        """Whether hidden states, weight or bias were changed in place since."""
        return self._versions_now() != self._versions

    @contextmanager
    def as_called(self) -> Iterator[None]:
        """The autocast state of the call. Raises LogitsError where what it worked on is not any more."""
        if self.is_stale():
            raise LogitsError(
                f"logits {self.size} are wanted only now, but hidden states or weights of the head were changed in place since the model "
                "was called (an optimizer step?): read the logits before, or keep logits.clone() + 0 of them."
            )
        with torch.autocast(self.device, self._autocast_dtype, self._is_autocast, cache_enabled=False):
            yield

    def logits(self) -> Tensor:
        """Plain, contiguous, without a gradient. Made outside of inference mode, for they may be saved for a gradient."""
        with self.as_called(), torch.inference_mode(False), torch.no_grad():
            logits = self.head.forward(self.hidden.detach()).detach().contiguous()
        if (tuple(logits.shape), logits.dtype) != (self.size, self.dtype):
            raise LogitsError(
                f"the head made logits of {logits.dtype} {tuple(logits.shape)}, where its weight makes {self.dtype} {self.size}: "
                "a head that does more than its weight and bias cannot have logits on demand."
            )
        return logits

    def _versions_now(self) -> list[int]:
        tensors = [self.hidden, self.weight] + ([] if self.head.bias is None else [self.head.bias])
        return [0 if t.is_inference() else t._version for t in tensors]  # inference tensors count none

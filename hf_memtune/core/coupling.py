"""Reversible couplings of two streams (RevNet's additive coupling with factors; MEFT, arXiv 2306.00477, section 3), and float arithmetic.

A layer is one or two half steps. With s the streams, a its scale and U its update, which is any function:
    forward     s[target] <- a s[target] + U(s[source])
    inverse     s[target] <- (s[target] - U(s[source])) / a
    gradient    g[source] <- g[source] + (dU/ds[source])^T g[target],  g[target] <- a g[target]
U(x) = gain f(x) + rest x, where f is the function the half step names. Then, where the coupling says so, the streams swap.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

NEWEST, OLDER = 0, 1  # indices of the streams: the newest one has gone through every function of the layers before


@dataclass(frozen=True)
class HalfStep:
    """s[target] <- scale s[target] + gain f(s[source]) + rest s[source], with f the function called `function`."""

    target: int
    source: int
    scale: float
    function: str
    gain: float = 1.0
    rest: float = 0.0

    def update(self, found: Tensor, source: Tensor) -> Tensor:
        """U of the function's value and its argument, in float32, or float64 where they are."""
        found = widened(found) if self.gain == 1 else self.gain * widened(found)
        return found if self.rest == 0 else found + self.rest * widened(source)


@dataclass(frozen=True)
class Coupling:
    """How one layer turns a pair of streams into the next: half steps in the order of the forward pass, and whether they swap."""

    halves: tuple[HalfStep, ...]
    swaps: bool

    def settled(self, pair: tuple) -> tuple:
        """The pair after the half steps, as the next layer takes it. Its own inverse."""
        return (pair[1], pair[0]) if self.swaps else pair


def centred(scale: float, post_norm: bool) -> Coupling:
    """z[n+1] = c z[n-1] + g L(z[n]) + (1 - c - g) z[n] with g = 1 for post-norm layers, 1 + c for pre-norm ones.

    Wherever z[n-1] = z[n], and so at rest, it is the layer itself; it differs by terms of c times what the stream changes by.
    """
    gain = 1.0 if post_norm else 1.0 + scale
    return Coupling((HalfStep(OLDER, NEWEST, scale, "layer", gain, 1.0 - scale - gain),), swaps=True)


def meft1(scale: float, beta: float) -> Coupling:
    """h1' = lam h1 + Layer(h2), h2' = beta h2 + Adapter(h1'), then swapped: (h1, h2) are the older and the newest stream."""
    return Coupling((HalfStep(OLDER, NEWEST, scale, "layer"), HalfStep(NEWEST, OLDER, beta, "adapter")), swaps=True)


def meft2(scale: float, beta: float) -> Coupling:
    """h1' = lam h1 + Adapter(h2), h2' = beta h2 + Layer(h1'), then swapped: (h1, h2) are the newest and the older stream."""
    return Coupling((HalfStep(NEWEST, OLDER, scale, "adapter"), HalfStep(OLDER, NEWEST, beta, "layer")), swaps=True)


def meft3(scale: float, beta: float) -> Coupling:
    """h1' = lam h1 + Attention(h2), h2' = beta h2 + MLP(h1'): (h1, h2) are the older and the newest stream."""
    return Coupling((HalfStep(OLDER, NEWEST, scale, "attention"), HalfStep(NEWEST, OLDER, beta, "mlp")), swaps=False)


class FloatArithmetic:
    """Streams in floating point, float32 at least. The inverse divides its rounding errors by the scale: see `expected_error`."""

    exact: ClassVar[bool] = False

    def __init__(self, dtype: torch.dtype):
        self.dtype = dtype

    def enter(self, value: Tensor) -> Tensor:
        """The stream of a value, which is in `dtype`."""
        return widened(value)

    def value(self, stream: Tensor) -> Tensor:
        """What functions see of a stream, in `dtype`."""
        return stream.to(self.dtype)

    def blend(self, stream: Tensor, scale: float, update: Tensor) -> tuple[Tensor, Tensor | None]:
        """scale * stream + update, and what is needed beside it to go back: nothing."""
        return torch.add(update, stream, alpha=scale), None

    def unblend(self, blended: Tensor, lost: Tensor | None, scale: float, update: Tensor) -> Tensor:
        return blended.sub(update).div_(scale)

    def check(self, steps: int = 1, names: Sequence[str] = ()) -> float | None:
        """Nothing can go out of range that would not be seen: there is no head-room to tell."""
        return None


def widened(value: Tensor) -> Tensor:
    """Half precision as float32; float32 and float64 as they are."""
    return value if value.dtype in (torch.float32, torch.float64) else value.float()


def expected_error(layers: int, scale: float, beta: float = 1.0, dtype: torch.dtype = torch.float32) -> float:
    """Relative error of the float inverse at the first layer, about: the last bit of `dtype`, divided by both factors in each layer.

    By both, since the error of the stream that is rebuilt first goes through a function into the other one. Layers that enlarge what
    they are given make it larger.
    """
    return torch.finfo(dtype).eps * (scale * beta) ** -layers

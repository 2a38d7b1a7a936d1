"""Streams in fixed point, which reverse bit by bit: what a multiplication by 2^-k shifts out is kept."""

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from hf_memtune._compat import is_fake
from hf_memtune.core.coupling import widened
from hf_memtune.errors import StreamOverflowError

# A stream and an update are bounded apart, in floats: the last millionth of the range is given up for their rounding.
_LIMIT = 2.0**31 * (1 - 2.0**-20)


def stored_bits(scale: float) -> int:
    """k of a scale 2^-k; raises ValueError for any other, or one below 2^-8."""
    mantissa, exponent = math.frexp(scale)
    if mantissa != 0.5 or not -7 <= exponent <= 1:
        raise ValueError(f"scale: got {scale}, expected a power of two from 1/256 to 1 (such as 0.125 or 0.0625).")
    return 1 - exponent


class FixedPointArithmetic:
    """Streams z = 2^-f Z with Z int32 and f `fraction_bits`, for one forward pass and its backward.

    With Q(u) = round(2^f u) and a scale of 2^-k,
        forward     Z' = floor(2^-k Z) + Q(u),    lost = Z mod 2^k
        inverse     Z  = 2^k (Z' - Q(u)) + lost,
    exactly, as long as u comes out the same and nothing leaves the range of int32, which `check` looks at.
    dtype: of the values that functions see.
    """

    exact: ClassVar[bool] = True

    def __init__(self, dtype: torch.dtype, fraction_bits: int):
        self.dtype, self.fraction_bits = dtype, fraction_bits
        self._wide = torch.float64 if dtype == torch.float64 else torch.float32
        self._peaks: list[Tensor] = []  # scalars, bounds of |Z|: of what came in, and of every half step

    def enter(self, value: Tensor) -> Tensor:
        """Z (int32) of a value in `dtype`."""
        scaled = self._scaled(value)
        self._peaks.append(scaled.abs().amax().double())
        return scaled.to(torch.int32)

    def value(self, stream: Tensor) -> Tensor:
        """z of Z, rounded to `dtype`."""
        return stream.to(self._wide).mul_(2.0**-self.fraction_bits).to(self.dtype)

    def blend(self, stream: Tensor, scale: float, update: Tensor) -> tuple[Tensor, Tensor | None]:
        """Z', and the bits that were shifted out, packed (see `pack`)."""
        bits, scaled = stored_bits(scale), self._scaled(update)
        kept = stream >> bits
        self._peaks.append(kept.abs().amax().double() + scaled.abs().amax().double())
        lost = pack(stream, bits) if bits else None
        return kept.add_(scaled.to(torch.int32)), lost

    def unblend(self, blended: Tensor, lost: Tensor | None, scale: float, update: Tensor) -> Tensor:
        """Z of Z', the bits and the same update."""
        kept = blended - self._scaled(update).to(torch.int32)
        bits = stored_bits(scale)
        if not bits:
            return kept
        assert lost is not None
        return kept.bitwise_left_shift_(bits).bitwise_or_(unpack(lost, bits, kept.shape))

    def peaks(self) -> list[float]:
        """Bounds of |Z| so far; of tensors without values: none. Waits for the device."""
        if not self._peaks or is_fake(self._peaks[0]):
            return []
        return torch.stack(self._peaks).tolist()

    def check(self, steps: int = 1, names: Sequence[str] = ()) -> float:
        """Bits of head-room that are left. Raises StreamOverflowError, which names the place, where there were none.

        steps: half steps of a layer. names: of the layers.
        """
        peaks, self._peaks = self.peaks(), []
        for number, peak in enumerate(peaks):
            if not peak < _LIMIT:  # NaN is not, either
                place = "the input of the first reversible layer" if number == 0 else names[(number - 1) // steps]
                raise StreamOverflowError(self._explained(place, peak))
        return 31 - math.log2(max([1.0, *peaks]))

    def _explained(self, place: str, peak: float) -> str:
        if not math.isfinite(peak):
            return f"{place}: its output is not finite, so it cannot be kept in fixed point. Lower the learning rate, or look at the data."
        needed = max(0, self.fraction_bits - math.ceil(math.log2(peak / _LIMIT)) - 1)
        return (
            f"{place}: its output reaches {peak * 2.0**-self.fraction_bits:.3g}, and {self.fraction_bits} fractional bits in 32 hold "
            f"less than {2.0 ** (31 - self.fraction_bits):.3g}. Set reversible_fraction_bits to {needed} or less, or use "
            "reversible_numerics=float."
        )

    def _scaled(self, value: Tensor) -> Tensor:
        return widened(value).to(self._wide).mul(2.0**self.fraction_bits).round_()


def pack(stream: Tensor, bits: int) -> Tensor:
    """The lowest `bits` bits (1 to 8) of every element, as (bits, ceil(elements / 8)) uint8, to be read along the first dimension.

    Elements are taken as eight rows; in a column of `bits` bytes, the bits of row i start at bit i * bits.
    """
    flat = stream.flatten()
    if flat.numel() % 8:
        flat = torch.nn.functional.pad(flat, (0, 8 - flat.numel() % 8))
    rows = (flat & ((1 << bits) - 1)).to(torch.uint8).view(8, -1)
    packed = torch.zeros(bits, rows.shape[1], dtype=torch.uint8, device=flat.device)
    for i, row in enumerate(rows):
        byte, shift = divmod(i * bits, 8)
        packed[byte] |= row << shift
        if shift + bits > 8:
            packed[byte + 1] |= row >> (8 - shift)
    return packed


def unpack(packed: Tensor, bits: int, shape: torch.Size) -> Tensor:
    """int32 of `shape`, between 0 and 2^bits - 1: what `pack` was given, of which it keeps the lowest bits."""
    rows = torch.empty(8, packed.shape[1], dtype=torch.uint8, device=packed.device)
    for i, row in enumerate(rows):
        byte, shift = divmod(i * bits, 8)
        row.copy_(packed[byte] >> shift)
        if shift + bits > 8:
            row |= packed[byte + 1] << (8 - shift)
    return (rows & ((1 << bits) - 1)).flatten()[: shape.numel()].view(shape).to(torch.int32)

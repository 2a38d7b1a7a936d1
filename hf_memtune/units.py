"""Byte counts for people: ``format_bytes(240123904) == "229 MiB"`` and back."""

from __future__ import annotations

import re

KIB = 1024
MIB = 1024 * KIB
GIB = 1024 * MIB
TIB = 1024 * GIB

_BINARY = {"B": 1, "KiB": KIB, "MiB": MIB, "GiB": GIB, "TiB": TIB}
_SCALES = {unit.lower(): scale for unit, scale in _BINARY.items()} | {
    "": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
}  # fmt: skip
_PATTERN = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([A-Za-z]*)\s*")


def format_bytes(n_bytes: float) -> str:
    """``n_bytes`` in the largest binary unit that keeps it at 1 or above, to three figures.

    Differences may be negative. ``format_bytes(1536) == "1.5 KiB"``, ``format_bytes(64 * MIB) == "64 MiB"``.
    """
    # A value that would be printed as 1024 belongs to the next unit, hence 1023.5.
    unit, scale = next(((u, s) for u, s in _BINARY.items() if abs(n_bytes) < 1023.5 * s), ("TiB", TIB))
    value = n_bytes / scale
    decimals = max(0, 3 - len(str(int(abs(value)))))
    text = f"{value:.{decimals}f}"
    return f"{text.rstrip('0').rstrip('.') if '.' in text else text} {unit}"


def parse_bytes(text: str | int) -> int:
    """Bytes in ``"24 GiB"`` (binary), ``"24GB"`` (decimal, as the SI has it) or ``"1024"``; an int is returned as is.

    Raises:
        ValueError: ``text`` is not a number of bytes.
    """
    if isinstance(text, int):
        return text
    match = _PATTERN.fullmatch(text)
    if match is None or match[2].lower() not in _SCALES:
        raise ValueError(f"not a number of bytes: got {text!r}, expected for example '24 GiB', '512MB' or '1024'")
    return round(float(match[1]) * _SCALES[match[2].lower()])

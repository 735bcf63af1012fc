"""Byte sizes as people write them, and the ranges they cut files into."""

from __future__ import annotations

import re

KiB = 1 << 10
MiB = 1 << 20
GiB = 1 << 30

_FACTORS = {
    "": 1,
    "B": 1,
    "K": KiB, "KB": 1000, "KIB": KiB,
    "M": MiB, "MB": 1000**2, "MIB": MiB,
    "G": GiB, "GB": 1000**3, "GIB": GiB,
    "T": 1 << 40, "TB": 1000**4, "TIB": 1 << 40,
}  # fmt: skip
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")


def parse_size(text: str) -> int:
    """Bytes of a size such as ``6GiB``, ``500MB``, ``1.5G`` or ``4096``.

    A single letter counts in powers of 1024, as in dd and docker; ``KB``, ``MB`` and ``GB`` are decimal.

    Raises:
        ValueError: the text is not a size.
    """
    match = _SIZE.fullmatch(text)
    factor = _FACTORS.get(match[2].upper()) if match else None
    if match is None or factor is None:
        raise ValueError(f"{text!r} is not a size; write a number and a unit, such as 6GiB, 500MB or 4096")
    return int(float(match[1]) * factor)


def format_size(size_bytes: float) -> str:
    """``1536`` as ``1.5 KiB``: three significant digits at most, binary units."""
    value = float(size_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024:
            return f"{value:.0f} {unit}" if unit == "B" or abs(value) >= 100 else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"

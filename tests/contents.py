"""Contents of files in tests."""

from __future__ import annotations

import os

from penstock.units import MiB


def contents(size_bytes: int) -> bytes:
    """Random bytes, the same in each MiB but for its number: to make them takes seconds under emulation."""
    piece = os.urandom(MiB - 8)
    whole = b"".join(number.to_bytes(8, "little") + piece for number in range(-(-size_bytes // MiB)))
    return whole[:size_bytes]

"""Pages that stay in the page cache for as long as a test needs them, and how exactly the others can be counted."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from penstock.linux.libc import function
from penstock.units import KiB, MiB

_mlock = function("mlock", [ctypes.c_void_p, ctypes.c_size_t])


@contextmanager
def kept_cached(path: Path, start: int, stop: int) -> Iterator[None]:
    """Have the pages of bytes ``[start, stop)`` read in, no others with them, and locked.

    Without the lock a kernel that reclaims ahead of need (DAMON, a busy cgroup) takes some back meanwhile.

    Raises:
        OSError: ENOMEM or EPERM, more than may be locked (``ulimit -l``).
    """
    start -= start % mmap.PAGESIZE
    with path.open("rb", buffering=0) as file:
        mapping = mmap.mmap(file.fileno(), stop - start, prot=mmap.PROT_READ, offset=start)
    mapping.madvise(mmap.MADV_RANDOM)  # without it the lock reads ahead
    _mlock(np.frombuffer(mapping, np.uint8).ctypes.data, stop - start)
    try:
        yield
    finally:
        mapping.close()


@dataclass(frozen=True, slots=True, eq=False)
class About:
    """Equals a number of cached bytes, but for what the kernel does by itself.

    It may take back clean pages at any moment, and keep more than was asked for. Seen, where DAMON pages out what
    nobody maps: 0.8 MiB of 24 within a second of their being read.
    """

    size_bytes: int
    taken_back_bytes: int = 2 * MiB
    beyond_bytes: int = 256 * KiB

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, int):
            return NotImplemented
        return self.size_bytes - self.taken_back_bytes <= other <= self.size_bytes + self.beyond_bytes

    __hash__ = None  # type: ignore[assignment]  # equal to many

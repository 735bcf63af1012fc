"""Pages that stay in the page cache for as long as a test needs them."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from penstock.linux.libc import function

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

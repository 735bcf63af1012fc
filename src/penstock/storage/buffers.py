"""Memory for direct reads.

A buffer of 4 KiB pages is scattered over physical memory, and a device takes only so many pieces a request
(`max_segments`, 254 on virtio): a 4 MiB read, 1024 pages, becomes five requests. Seen on a virtual machine:
1.0 to 1.3 GB/s into such buffers, 3.0 to 3.3 GB/s into huge pages, 8 threads of 4 MiB each.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap

import numpy as np
from numpy.typing import NDArray

from penstock.linux.libc import function
from penstock.units import MiB

HUGE_PAGE_BYTES = 2 * MiB
_MADV_HUGEPAGE, _MADV_POPULATE_WRITE = 14, 23

_madvise = function("madvise", [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int])  # mmap's keeps the interpreter lock


def huge_buffer(size_bytes: int) -> memoryview:
    """A writable buffer, aligned to 2 MiB, in huge pages where the kernel gives them, touched already.

    Raises:
        MemoryError: there is not so much memory to be had.
    """
    try:
        memory = mmap.mmap(-1, size_bytes + HUGE_PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"no {size_bytes} bytes for a buffer: {error.strerror}") from error
    with contextlib.suppress(OSError):  # a kernel without huge pages
        memory.madvise(_MADV_HUGEPAGE)
    skip_bytes = -ctypes.addressof(ctypes.c_char.from_buffer(memory)) % HUGE_PAGE_BYTES
    buffer = memoryview(memory)[skip_bytes : skip_bytes + size_bytes]
    ctypes.memset(ctypes.addressof(ctypes.c_char.from_buffer(buffer)), 0, size_bytes)
    return buffer


def touch(memory: NDArray[np.uint8]) -> None:
    """Have fresh memory backed by pages; the interpreter lock is released meanwhile.

    Args:
        memory: writable, and nobody has written to it yet.

    Raises:
        MemoryError: there is not so much memory.
    """
    start = memory.ctypes.data // mmap.PAGESIZE * mmap.PAGESIZE
    try:
        _madvise(start, memory.ctypes.data + memory.nbytes - start, _MADV_POPULATE_WRITE)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise MemoryError(f"no {memory.nbytes} bytes for tensors: {error.strerror}") from error
        memory[:: mmap.PAGESIZE] = 0  # before Linux 5.14

"""Disk space that is had before anything is measured.

A disk that is provided thinly, as virtual machines' are, has to find room for what is written to a new file. See
docs/decisions/0018.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
from pathlib import Path

from bench.errors import BenchError
from penstock.linux.libc import function
from penstock.storage.buffers import huge_buffer
from penstock.units import MiB, format_size

_WRITE_BYTES = 4 * MiB
_BLOCK_BYTES = 4096
_FALLOC_FL_ZERO_RANGE = 0x10

_fallocate = function("fallocate", (ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long))


def require_space(directory: Path, wanted_bytes: int) -> None:
    """See that there is room for files that a benchmark is about to write.

    Raises:
        BenchError: there is not.
    """
    free_bytes = shutil.disk_usage(directory).free
    if wanted_bytes > free_bytes:
        raise BenchError(
            f"{directory}: {format_size(free_bytes)} are free, and this takes {format_size(wanted_bytes)}; "
            "give --dir on a larger disk, or a smaller --size"
        )


def use_space(path: Path, start: int = 0) -> None:
    """Have the disk find the space of a file from a byte on, which is a multiple of 4 KiB.

    What was there reads as zeros afterwards, and is written to as if it never had been: no page of it has to be read
    first. What lies behind the last whole block, and a file system that cannot do that, are left alone.
    """
    fd = os.open(path, os.O_WRONLY | os.O_DIRECT | os.O_CLOEXEC)
    try:
        stop = os.fstat(fd).st_size // _BLOCK_BYTES * _BLOCK_BYTES
        if stop <= start:
            return
        try:
            _fallocate(fd, _FALLOC_FL_ZERO_RANGE, start, stop - start)
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP:
                raise
            return
        zeros = huge_buffer(_WRITE_BYTES)
        for offset in range(start, stop, _WRITE_BYTES):
            os.pwrite(fd, zeros[: min(_WRITE_BYTES, stop - offset)], offset)
        _fallocate(fd, _FALLOC_FL_ZERO_RANGE, start, stop - start)
        os.fsync(fd)
    finally:
        os.close(fd)

"""A part of a file mapped to be read in or touched: how the page cache is filled.

A mapping with MADV_HUGEPAGE that is filled by MADV_POPULATE_READ reads in units of 2 MiB whatever ``read_ahead_kb``
says, makes 2 MiB folios where the file system can, and copies nothing: 2.1 GB/s for 0.03 CPU seconds a GB, where preadv
took 0.2-0.7 and WILLNEED was cut at the read-ahead limit (seen on 6.18). Populating past the end of a truncated file is
EFAULT, never SIGBUS.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
from array import array
from collections.abc import Sequence

from penstock.linux.libc import function
from penstock.linux.numa import move_pages_to

PAGE_BYTES = mmap.PAGESIZE
IOV_MAX = 1024

_MADV_HUGEPAGE = 14
_MADV_POPULATE_READ = 22

_mmap = function(
    "mmap",
    [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long],
    ctypes.c_ssize_t,
)
_munmap = function("munmap", [ctypes.c_void_p, ctypes.c_size_t])
_madvise = function("madvise", [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int])
_pwritev = function("pwritev", [ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_int64], ctypes.c_ssize_t)


class FileWindow:
    """A shared read-only mapping of ``[start, stop)`` of a file; start must be a multiple of the page size.

    Nothing is read ahead beyond it, neither when it is populated nor when it is touched: the first page of each unit
    populated is marked to start a read-ahead. Whoever wants the neighbour will come to it, in units as large; the
    kernel's read-ahead grows to read_ahead_kb, and with 8 MiB of that a mapping took 3.7 s where it takes 3.2 without.
    """

    def __init__(self, fd: int, start: int, stop: int) -> None:
        self._length = stop - start
        self._address = _mmap(None, self._length, mmap.PROT_READ, mmap.MAP_SHARED, fd, start)
        _madvise(self._address, self._length, mmap.MADV_RANDOM)

    def populate(self) -> None:
        """Read it into the cache without copying it, in units of 2 MiB where it can; blocks until it is there.

        Raises:
            OSError: EINVAL before Linux 5.14; EFAULT where the file ends before stop; EIO for a failed read.
        """
        try:
            _madvise(self._address, self._length, _MADV_HUGEPAGE)
        except OSError as error:
            if error.errno != errno.EINVAL:  # EINVAL: a kernel without transparent huge pages
                raise
        while True:
            try:
                _madvise(self._address, self._length, _MADV_POPULATE_READ)
            except InterruptedError:
                continue
            return

    def move_to(self, node: int) -> None:
        """Have its pages on a NUMA node: those that are mapped here (populate it first) and by nobody else.

        Raises:
            OSError: see `penstock.linux.numa.move_pages_to`.
        """
        move_pages_to(node, self._address, self._length)

    def touch(self, sink: int, start: int = 0, stop: int | None = None) -> None:
        """Have the CPU read one byte of every page, by writing those bytes into a scratch file.

        A load instruction would do, but where the file has been truncated meanwhile it ends the process by
        SIGBUS; a system call that reads the same memory returns EFAULT.

        Args:
            sink: a descriptor of a memory file (memfd), which is overwritten.
            start: offset in the window.
            stop: offset in the window; its length by default.

        Raises:
            OSError: EFAULT where the file has become shorter.
        """
        stop = self._length if stop is None else stop
        for first in range(start, stop, IOV_MAX * PAGE_BYTES):
            pages = min(IOV_MAX, -(-(stop - first) // PAGE_BYTES))
            address = self._address + first
            vectors = io_vectors(range(address, address + pages * PAGE_BYTES, PAGE_BYTES), [1] * pages)
            if _pwritev(sink, vectors.buffer_info()[0], pages, 0) != pages:
                raise OSError(errno.EFAULT, "the file ends before the window")

    def close(self) -> None:
        """Unmap it; the pages stay in the cache."""
        _munmap(self._address, self._length)

    def __enter__(self) -> FileWindow:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def io_vectors(addresses: Sequence[int], lengths: Sequence[int]) -> array[int]:
    """An array of struct iovec."""
    vectors = array("Q", bytes(16 * len(addresses)))
    vectors[0::2] = array("Q", addresses)
    vectors[1::2] = array("Q", lengths)
    return vectors

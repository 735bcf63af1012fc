"""Which pages of a process's mappings are present, polled from /proc without stopping it.

Facts, seen on 6.18:

- An open descriptor of /proc/PID/pagemap belongs to the address space, not to the process: after exec or
  exit it reads as end of file, and PAGEMAP_SCAN on it succeeds with no pages.
- A read fault on a file maps the cached neighbours too (fault-around, 64 KiB), so a present page was
  touched or lies next to one that was.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
from functools import cache
from types import TracebackType
from typing import Literal, Self, TypeAlias

import numpy as np
from numpy.typing import NDArray

from penstock.linux.process import PAGE_SIZE_BYTES, ended, open_file

Ranges: TypeAlias = NDArray[np.int64]
Method: TypeAlias = Literal["pagemap_scan", "pagemap"]


@cache
def best_method() -> Method:
    """What this kernel offers, tried on this very process."""
    with Pagemap(os.getpid()) as pagemap:
        return pagemap.method


class Pagemap:
    """Which pages of a process's mappings are present, that is, mapped into it.

    Args:
        pid: the process, of the same user or with CAP_SYS_PTRACE.
        method: ``pagemap_scan`` (Linux 6.7) lets the kernel skip what was never touched; ``pagemap`` reads
            one word for each page. None takes the first where the kernel has it.
    """

    def __init__(self, pid: int, method: Method | None = None) -> None:
        self.pid = pid
        self._fd = open_file(pid, "pagemap")
        self._regions = np.zeros((_REGIONS, 3), dtype=np.uint64)  # struct page_region: start, end, categories
        try:
            self.method: Method = method or self._best_method()
        except BaseException:
            self.close()
            raise

    def present_ranges(self, start: int, stop: int) -> Ranges:
        """Address ranges ``[start, stop)`` of present pages among these pages; shape [n, 2], ascending.

        Args:
            start: first address, a multiple of the page size.
            stop: end address, a multiple of the page size.

        Raises:
            ProcessLookupError: the process has ended, or has replaced this address space by exec.
            ValueError: an address is not aligned.
        """
        if start % PAGE_SIZE_BYTES or stop % PAGE_SIZE_BYTES or start > stop:
            raise ValueError(
                f"[{start:#x}, {stop:#x}) of process {self.pid} is not a range of whole pages; "
                f"round both to multiples of {PAGE_SIZE_BYTES}"
            )
        if start == stop:
            return np.empty((0, 2), dtype=np.int64)
        return self._scan(start, stop) if self.method == "pagemap_scan" else self._read(start, stop)

    def close(self) -> None:
        """Close the descriptor; a second time does nothing."""
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _best_method(self) -> Method:
        try:
            self._scan(0, PAGE_SIZE_BYTES, check_end=False)
        except OSError as error:
            if error.errno not in (errno.ENOTTY, errno.EINVAL, errno.ENOSYS, errno.EPERM):
                raise
            return "pagemap"
        return "pagemap_scan"

    def _scan(self, start: int, stop: int, check_end: bool = True) -> Ranges:
        argument = _ScanArgument(
            size=ctypes.sizeof(_ScanArgument),
            end=stop,
            vec=self._regions.ctypes.data,
            vec_len=_REGIONS,
            category_mask=_PAGE_IS_PRESENT,
            return_mask=_PAGE_IS_PRESENT,
        )
        parts = []
        at = start
        while at < stop:
            argument.start = at
            count = fcntl.ioctl(self._fd, _PAGEMAP_SCAN, argument)
            parts.append(self._regions[:count, :2].astype(np.int64))
            # The kernel fills an inner buffer of 512 regions repeatedly, and walk_end stays at the last time
            # that one was full: with 1,022 regions it lay 1,020 pages before the last one (6.18).
            at = max(argument.walk_end, int(self._regions[count - 1, 1])) if count else stop
        ranges = _joined(np.concatenate(parts))
        # An address space that is gone has no pages and reports no error; only a read tells.
        if check_end and not len(ranges) and not os.pread(self._fd, 8, start // PAGE_SIZE_BYTES * 8):
            raise ended(self.pid)
        return ranges

    def _read(self, start: int, stop: int) -> Ranges:
        parts = []
        page, last = start // PAGE_SIZE_BYTES, stop // PAGE_SIZE_BYTES
        while page < last:
            data = os.pread(self._fd, min(last - page, _WORDS) * 8, page * 8)
            if not data:
                raise ended(self.pid)
            words = np.frombuffer(data, dtype=np.uint64)  # [pages]; bit 63: present
            present = np.zeros(len(words) + 2, dtype=np.int8)
            present[1:-1] = words >> np.uint64(63)
            edges = np.flatnonzero(np.diff(present)).astype(np.int64)
            parts.append((edges.reshape(-1, 2) + page) * PAGE_SIZE_BYTES)
            page += len(words)
        return _joined(np.concatenate(parts))


class _ScanArgument(ctypes.Structure):
    """struct pm_scan_arg of linux/fs.h."""

    _fields_ = [
        ("size", ctypes.c_uint64),
        ("flags", ctypes.c_uint64),
        ("start", ctypes.c_uint64),
        ("end", ctypes.c_uint64),
        ("walk_end", ctypes.c_uint64),
        ("vec", ctypes.c_uint64),
        ("vec_len", ctypes.c_uint64),
        ("max_pages", ctypes.c_uint64),
        ("category_inverted", ctypes.c_uint64),
        ("category_mask", ctypes.c_uint64),
        ("category_anyof_mask", ctypes.c_uint64),
        ("return_mask", ctypes.c_uint64),
    ]


_PAGEMAP_SCAN = 3 << 30 | ctypes.sizeof(_ScanArgument) << 16 | ord("f") << 8 | 16  # _IOWR('f', 16, pm_scan_arg)
_PAGE_IS_PRESENT = 1 << 3
_REGIONS = 1024  # regions a call; chosen without measurement
_WORDS = 1 << 16  # pages a read: 512 KiB of words; chosen without measurement


def _joined(ranges: Ranges) -> Ranges:
    """Neighbours that a boundary between two calls has cut become one range."""
    if len(ranges) < 2:
        return ranges
    cut = ranges[1:, 0] != ranges[:-1, 1]
    if cut.all():
        return ranges
    starts = ranges[np.concatenate(([True], cut)), 0]
    stops = ranges[np.concatenate((cut, [True])), 1]
    return np.stack((starts, stops), axis=1)

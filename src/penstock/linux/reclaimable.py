"""Anonymous memory that the kernel takes back when it needs some, as it does with the page cache.

Facts:

- After MADV_FREE (Linux 4.5) a page stays as it is until memory is short, and reads as zeros from then on; nobody is
  told. No swap is needed for that (since 4.12).
- It lies among the file pages: MemAvailable and a cgroup's ``inactive_file`` count it, and a cgroup's limit can be set
  below it. Seen on 6.18: 4 GiB of it, the limit lowered from 6 to 3 GiB, 0.02 s.
- Writing to a page makes it ordinary memory again, until the next MADV_FREE.
- mlockall brings all addresses that may be written to into memory, and MADV_FREE and MADV_DONTNEED are EINVAL from
  then on. So an address may be written to only when something is put there.
- khugepaged makes a huge page of what is left of one, and that is ordinary memory; MADV_NOHUGEPAGE keeps it away, and
  leaves the huge pages that there are.
- Who writes where a whole huge page was taken gets a new one of zeros, and so does all that lay beside it. To the page
  table (/proc/PID/pagemap, PAGEMAP_SCAN) it looks as it did before.

So a word that is not zero is noted of every page. When a copy has been made of a page and its word is there
afterwards, the page had not been taken by then, and the copy is right. That needs no more than what madvise(2)
promises, whatever else has been put in a page's place.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray

from penstock.linux.libc import function

PAGE_BYTES = 4096  # or larger ones, of several of these
_HUGE_PAGE_BYTES = 2 << 20
_PAGE_WORDS = PAGE_BYTES // 8
_NO_WORD = _PAGE_WORDS  # a page of zeros, which is right even when it has been taken
_MADV_DONTNEED, _MADV_FREE, _MADV_HUGEPAGE, _MADV_NOHUGEPAGE, _MADV_DONTDUMP = 4, 8, 14, 15, 16
_MAP_NORESERVE = 0x4000
_PROT_NONE = 0

_madvise = function("madvise", [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int])  # mmap's keeps the interpreter lock
_mprotect = function("mprotect", [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int])


class ReclaimableMemory:
    """A range of addresses; what is put there may be gone when it is looked at. Safe to use from several threads.

    Args:
        size_bytes: of the range. It costs nothing until something is put there.

    Raises:
        OSError: such a range cannot be had (a limit on addresses, strict overcommit), or the process locks its memory.
    """

    def __init__(self, size_bytes: int) -> None:
        self.size_bytes = -(-size_bytes // _HUGE_PAGE_BYTES) * _HUGE_PAGE_BYTES
        memory = _addresses(self.size_bytes + _HUGE_PAGE_BYTES)
        skipped = -memory.ctypes.data % _HUGE_PAGE_BYTES
        self._memory = memory[skipped : skipped + self.size_bytes]
        self._words = self._memory.view(np.uint64).reshape(-1, _PAGE_WORDS)
        self._word_of_page = _addresses(2 * len(self._words)).view(np.uint16)  # mostly 0, which takes no memory
        self._address = self._memory.ctypes.data
        self._lock = threading.Lock()
        self._being_put: list[tuple[int, int]] = []  # whole huge pages
        self._advise(0, self.size_bytes, _MADV_FREE)  # EINVAL where memory is locked
        self._advise(0, self.size_bytes, _MADV_DONTDUMP)
        _mprotect(self._address, self.size_bytes, _PROT_NONE)

    def put(self, start: int, data: NDArray[np.uint8], within: tuple[int, int]) -> None:
        """Copy bytes there. Nobody may be putting or dropping the same ones.

        Args:
            start: a multiple of `PAGE_BYTES`.
            data: [bytes], whole pages of `PAGE_BYTES`.
            within: what else will be put around it: huge pages are made of that only.

        Raises:
            OSError: the process has locked its memory meanwhile; the kernel will not take these bytes.
        """
        stop = start + len(data)
        with self._putting(start, stop, within):
            np.copyto(self._memory[start:stop], data)
        noted = self._word_of_page[start // PAGE_BYTES : stop // PAGE_BYTES]
        words = data.view(np.uint64).reshape(-1, _PAGE_WORDS)
        if not words[:, 0].all():
            is_set = words != 0
            noted[:] = np.where(is_set.any(axis=1), is_set.argmax(axis=1), _NO_WORD)
        elif noted.any():  # memory of what was never written to is not touched
            noted[:] = 0

    @contextmanager
    def _putting(self, start: int, stop: int, within: tuple[int, int]) -> Iterator[None]:
        low = start // _HUGE_PAGE_BYTES * _HUGE_PAGE_BYTES
        high = -(-stop // _HUGE_PAGE_BYTES) * _HUGE_PAGE_BYTES
        huge_low = max(low, -(-within[0] // _HUGE_PAGE_BYTES) * _HUGE_PAGE_BYTES)
        huge_high = min(high, within[1] // _HUGE_PAGE_BYTES * _HUGE_PAGE_BYTES)
        with self._lock:
            _mprotect(self._address + low, high - low, mmap.PROT_READ | mmap.PROT_WRITE)
            self._being_put.append((low, high))
            self._try_to_advise(huge_low, huge_high, _MADV_HUGEPAGE)
        try:
            yield
        finally:
            with self._lock:
                self._being_put.remove((low, high))
                # What others are putting beside it must not be taken before they are done; they see to it then.
                for other_low, other_high in self._being_put:
                    if other_low < high <= other_high:
                        high = max(low, other_low)
                    if other_low <= low < other_high:
                        low = min(high, other_high)
                self._try_to_advise(low, high, _MADV_NOHUGEPAGE)
                self._advise(low, high, _MADV_FREE)

    def view(self, start: int, stop: int) -> NDArray[np.uint8]:
        """The bytes as they are now."""
        return self._memory[start:stop]

    def is_there(self, start: int, stop: int) -> bool:
        """Nothing of what was put into a range of pages has been taken back so far."""
        return self._has_words(slice(start // PAGE_BYTES, stop // PAGE_BYTES))

    def seems_to_be_there(self, start: int, stop: int, step_bytes: int) -> bool:
        """One page in so many bytes is; memory is taken back in long pieces."""
        return self._has_words(slice(start // PAGE_BYTES, stop // PAGE_BYTES, step_bytes // PAGE_BYTES))

    def _has_words(self, pages: slice) -> bool:
        words, noted = self._words[pages], self._word_of_page[pages]
        if not noted.any():
            return bool(words[:, 0].all())
        is_zeros = noted == _NO_WORD
        found = words[np.arange(len(words)), np.where(is_zeros, 0, noted)]
        return bool(((found != 0) | is_zeros).all())

    def drop(self, start: int, stop: int) -> None:
        """Give memory back: all whole pages of a range; what lies behind the end is nobody's. Locked memory stays."""
        start = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
        stop = min(stop, self.size_bytes) // mmap.PAGESIZE * mmap.PAGESIZE
        self._try_to_advise(start, stop, _MADV_DONTNEED)

    def _advise(self, start: int, stop: int, advice: int) -> None:
        if start < stop:
            _madvise(self._address + start, stop - start, advice)

    def _try_to_advise(self, start: int, stop: int, advice: int) -> None:
        with contextlib.suppress(OSError):  # a kernel without huge pages, a process with locked memory
            self._advise(start, stop, advice)


def _addresses(size_bytes: int) -> NDArray[np.uint8]:
    """Zeros that take no memory, and count for none, before they are written to."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
    return np.frombuffer(mmap.mmap(-1, size_bytes, flags=flags), np.uint8)

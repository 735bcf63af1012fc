"""What is to be read through the page cache is brought there first, in folios of 2 MiB, several at a time.

A read that finds nothing fills the page cache page by page, and a thread that fills it waits for the device at every
folio. With two of those, as many as copy, the first step after a prefill of 4.5 GB took 3.7 s.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from penstock.kv.layout import FOLIO_BYTES
from penstock.linux.pagecache import FileResidency, populate

_THREADS = 8


class Filler:
    """Fills the page cache with ranges of one file, in the order in which they are asked for.

    Args:
        fd: of the file, open for as long as this is.
        threads: that fill at once, started when they are needed.

    Attributes:
        filled: ranges that were not there, so far.
    """

    def __init__(self, fd: int, threads: int = _THREADS) -> None:
        self._fd = fd
        self._residency = FileResidency(fd)
        self.filled = 0
        self._own: set[int] = set()  # who the threads are
        self._threads = ThreadPoolExecutor(
            threads, "penstock-kv-fill", initializer=lambda: self._own.add(threading.get_ident())
        )

    def fill(
        self, start: int, stop: int, steady_stop: int, is_wanted: Callable[[], bool], then: Callable[[], None]
    ) -> None:
        """Have ``[start, stop)`` in the page cache, and call something then: at once, if most of it is there.

        Only whole folios before ``steady_stop`` are filled: a direct write to a folio drops all of it, and what it held
        would have to be read again. The rest is left to whoever reads it, page by page, as when a tensor has grown by a
        block: folios would start a read-ahead behind its end. So is what cannot be filled: the reader will see why.

        Args:
            start: in bytes.
            stop: in bytes.
            steady_stop: where what is going to be written begins.
            is_wanted: asked before it is filled.
            then: called by one of the threads, or by the caller's.
        """
        start = start // FOLIO_BYTES * FOLIO_BYTES
        stop = min(-(-stop // FOLIO_BYTES), steady_stop // FOLIO_BYTES) * FOLIO_BYTES
        if start >= stop or 2 * self._residency.resident_bytes(start, stop) > stop - start:
            then()
            return

        self.filled += 1

        def work() -> None:
            if is_wanted():
                with contextlib.suppress(OSError):
                    populate(self._fd, start, stop)
            then()

        self._threads.submit(work)

    def close(self) -> None:
        """Wait until all of it has been filled, or is not wanted any more; a second time does nothing."""
        self._threads.shutdown(wait=threading.get_ident() not in self._own)  # one of them can be who collects garbage

"""Pays the first touch of freshly read pages, where a virtual machine makes it dear.

A guest whose freed memory went back to its host has no mapping for a page that the disk has just been read
into; the first touch by a CPU costs 2.75 µs (seen on a Firecracker guest; 4.3 s for 6.4 GB), which would fall on
the program's one loading thread. Threads of our own can pay it while the disk goes on. On bare metal, or where
the page has been used before, a touch costs 0.3 µs for a few sampled pages, and no more are touched.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections import deque

from penstock.linux.window import PAGE_BYTES, FileWindow
from penstock.pagecache.ledger import FileRecord, Ledger

# Of two CPUs one: with two threads the program itself got a sixth of its speed. Medians on a 2-CPU guest, 6.4 GB
# through one mapping: none 7.7 s, one 5.5 s, two 6.5 s; the newest chunk first 5.5 s, the oldest first 6.0 s.
_MOST_THREADS = 4
_SAMPLE_PAGES = 64  # of a chunk, to see what a touch costs
_SLOW_S = 1.0e-6  # a page: between the 0.3 µs of the system call and the 2.75 µs of a page without backing
_QUEUE_CHUNKS = 4096  # 16 GiB: the oldest fall out


class Toucher:
    """Touches the chunk that was read in last, away from where the program is; those that it has come to, last.

    Not never: a page that is entered in the program's page tables need not have been touched, as one
    fault maps up to 2 MiB.

    Args:
        ledger: knows what was accessed.
    """

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._queue: deque[tuple[FileRecord, int, int]] = deque(maxlen=_QUEUE_CHUNKS)
        self._overtaken: deque[tuple[FileRecord, int, int]] = deque()
        self._condition = threading.Condition()
        self._sink = threading.local()
        self._closing = False
        self._threads: list[threading.Thread] = []

    def offer(self, window: FileWindow, record: FileRecord, start: int, stop: int) -> None:
        """A chunk was read in and is mapped by window: sample it, and touch the rest soon if that is dear."""
        pages = min(_SAMPLE_PAGES, -(-(stop - start) // PAGE_BYTES))
        began = time.perf_counter()
        window.touch(self._descriptor(), 0, min(pages * PAGE_BYTES, stop - start))
        if (time.perf_counter() - began) / pages < _SLOW_S or stop - start <= pages * PAGE_BYTES:
            return
        with self._condition:
            if not self._threads:
                self._start_threads()
            self._queue.append((record, start, stop))
            self._condition.notify()

    def _start_threads(self) -> None:
        for number in range(max(1, min(_MOST_THREADS, (os.cpu_count() or 1) // 2))):
            thread = threading.Thread(target=self._work, name=f"penstock-toucher-{number}", daemon=True)
            try:
                thread.start()
            except RuntimeError:  # the cgroup's pids are all in use: fewer touch, or nobody, and the program does
                break
            self._threads.append(thread)

    def close(self) -> None:
        """End the threads; what is queued stays untouched."""
        with self._condition:
            self._closing = True
            self._condition.notify_all()
        for thread in self._threads:
            thread.join(1.0)

    def _descriptor(self) -> int:
        """A memory file for this thread: writers of one file wait for each other."""
        sink: int | None = getattr(self._sink, "fd", None)
        if sink is None:
            sink = self._sink.fd = os.memfd_create("penstock-touch", os.MFD_CLOEXEC)
        return sink

    def _next(self) -> tuple[FileRecord, int, int] | None:
        """Wait for a chunk; None at the end."""
        with self._condition:
            while not self._closing:
                while self._queue:
                    record, start, stop = self._queue.pop()
                    if not self._ledger.is_accessed(record, start, stop):
                        return record, start, stop
                    self._overtaken.append((record, start, stop))
                if self._overtaken:
                    return self._overtaken.popleft()
                self._condition.wait()
        return None

    def _work(self) -> None:
        while (item := self._next()) is not None:
            record, start, stop = item
            # OSError: truncated meanwhile, or the run has ended; the program will see for itself.
            with contextlib.suppress(OSError), FileWindow(record.fd, start, stop) as window:
                window.touch(self._descriptor())

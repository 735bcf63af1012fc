"""Fills the page cache: a few threads work through a queue that may be replaced at any moment."""

from __future__ import annotations

import errno
import mmap
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from penstock.linux import numa
from penstock.linux.window import PAGE_BYTES, FileWindow
from penstock.pagecache.base import Prefetch
from penstock.pagecache.ledger import FileRecord, Ledger
from penstock.pagecache.toucher import Toucher
from penstock.units import MiB

# On idle CPUs two threads keep a virtio disk of 2.2 GB/s busy; sixteen come closest to one of 3 GB/s. Beside a program
# that keeps both CPUs busy each thread wakes up late between two folios of 2 MiB. Between two chunks a thread
# runs Python, and waits for the interpreter: with 8 MiB a chunk a mapping took 2.4 s where 4 MiB took 2.8, read() 2.2
# where it took 2.7; 16 MiB gave no more. Figures: docs/decisions/0002.
THREADS = 16
_CHUNK_BYTES = 8 * MiB
_SCRATCH_BYTES = 1 * MiB


@dataclass(frozen=True, slots=True)
class LoaderStatistics:
    """How the loader did."""

    method: str  # "populate" or "pread"
    interruptions: int  # queues replaced while not empty
    warnings: tuple[str, ...]


class Loader:
    """Reads requested ranges into the page cache, in order, skipping what is there.

    Args:
        ledger: what is cached already; the loader claims ranges in it before reading them.
        node_of_worker: NUMA node whose memory a worker's pages belong on; None for wherever they fall.
        threads: how many chunks are read at once.
    """

    def __init__(
        self,
        ledger: Ledger,
        node_of_worker: Callable[[int], int | None] = lambda _: None,
        threads: int = THREADS,
    ) -> None:
        self._ledger = ledger
        self._node_of_worker = node_of_worker
        lock = threading.RLock()
        self._condition = threading.Condition(lock)
        self._became_idle = threading.Condition(lock)
        self._queue: deque[Prefetch] = deque()
        self._allowance_bytes = 1 << 62
        self._most_threads = threads
        self._active_limit = threads
        self._active = 0
        self._closing = False
        self._interruptions = 0
        self._method = "populate"
        self._may_move = True  # cached pages, from one NUMA node to another
        self._toucher = Toucher(ledger)
        self._warnings: list[str] = []
        self._threads: list[threading.Thread] = []

    def submit(self, requests: Iterable[Prefetch]) -> None:
        """Replace the queue. Chunks already being read are finished; none of what they read is lost.

        Only one thread may submit at a time.
        """
        with self._condition:
            self._interruptions += bool(self._queue)
            self._queue = deque(requests)
            if not self._threads and all(map(self._is_cached, self._queue)):
                self._queue.clear()
            are_missing = bool(self._queue) and not self._threads and not self._closing
            self._condition.notify_all()
        if are_missing:
            self._start_threads()

    def _start_threads(self) -> None:
        """Not before there is work: a run that is only observed, or whose model is cached, needs none.

        Without the lock, so that the first reads while the others start: on busy CPUs these took 0.05 s.
        """
        for number in range(self._most_threads):
            thread = threading.Thread(target=self._work, name=f"penstock-loader-{number}", daemon=True)
            try:
                thread.start()
            except RuntimeError:  # the cgroup's pids are all in use: fewer read
                if not self._threads:
                    raise
                break
            self._threads.append(thread)

    def set_limits(self, allowance_bytes: int, threads: int = THREADS) -> None:
        """How many bytes may be cached ahead of the readers, and how many chunks may be read at once."""
        with self._condition:
            raised = allowance_bytes > self._allowance_bytes or threads > self._active_limit
            self._allowance_bytes = allowance_bytes
            self._active_limit = min(threads, self._most_threads)
            if raised:
                self._condition.notify_all()

    def nudge(self) -> None:
        """Readers have moved on: look again whether the allowance lets another chunk in."""
        with self._condition:
            self._condition.notify_all()

    @property
    def idle(self) -> bool:
        """Nothing queued and nothing being read."""
        with self._condition:
            return not self._queue and not self._active

    def wait_idle(self, timeout_s: float | None = None) -> bool:
        """Block until all that was submitted is cached; False when the time ran out."""
        with self._condition:
            return self._became_idle.wait_for(lambda: not self._queue and not self._active, timeout_s)

    def statistics(self) -> LoaderStatistics:
        """Method, interruptions and warnings so far."""
        with self._condition:
            return LoaderStatistics(self._method, self._interruptions, tuple(self._warnings))

    def close(self, timeout_s: float = 5.0) -> None:
        """Drop the queue and end the threads once their present chunks are read."""
        with self._condition:
            self._closing = True
            self._queue.clear()
            self._condition.notify_all()
        deadline = time.monotonic() + timeout_s
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        self._toucher.close()

    def _work(self) -> None:
        scratch = mmap.mmap(-1, _SCRATCH_BYTES)
        node: int | None = None
        cpus = os.sched_getaffinity(0)
        while True:
            with self._condition:
                chunk = self._next_chunk()
                while chunk is None and not self._closing:
                    self._condition.wait()
                    chunk = self._next_chunk()
                if chunk is None:
                    break
                self._active += 1
            record, start, stop, worker = chunk
            try:
                wanted = None if worker is None else self._node_of_worker(worker)
                if wanted is not None and wanted != node:
                    os.sched_setaffinity(0, cpus)  # a node's CPUs are none of another's
                    numa.bind_thread(wanted)
                    node = wanted
                self._load(record, start, stop, wanted, scratch)
            except OSError as error:
                self._give_up(record, start, stop, error)
            finally:
                with self._condition:
                    self._active -= 1
                    self._condition.notify_all()
        scratch.close()

    def _next_chunk(self) -> tuple[FileRecord, int, int, int | None] | None:
        """Take the next chunk off the queue, or find that there is none. Needs the lock."""
        chunk = self._take_chunk()
        if chunk is None and not self._queue and not self._active:
            self._became_idle.notify_all()
        return chunk

    def _take_chunk(self) -> tuple[FileRecord, int, int, int | None] | None:
        """Take the next chunk that is not cached yet off the queue, if the limits allow one. Needs the lock."""
        while self._queue and not self._closing and self._active < self._active_limit:
            if self._ledger.totals().waiting_bytes + _CHUNK_BYTES > self._allowance_bytes:
                return None
            request = self._queue[0]
            try:
                record = self._ledger.record(request.file)
            except OSError as error:
                self._warn(f"{request.file.path}: not prefetched: {error.strerror}")
                self._drop_queued(request)
                continue
            if record.failed or request.start >= request.stop:
                self._queue.popleft()
                continue
            start = request.start // PAGE_BYTES * PAGE_BYTES
            stop = min(request.stop, (start // _CHUNK_BYTES + 1) * _CHUNK_BYTES)
            if stop < request.stop:
                self._queue[0] = Prefetch(request.file, stop, request.stop, request.worker)
            else:
                self._queue.popleft()
            missing = self._ledger.claim(record, start, stop)
            if not missing:
                continue
            for low, high in missing[1:]:  # come to the others next
                self._ledger.abandon(record, low, high)
                self._queue.appendleft(Prefetch(request.file, low, high, request.worker))
            return record, missing[0][0], missing[0][1], request.worker
        return None

    def _is_cached(self, request: Prefetch) -> bool:
        """By what is known, without asking the kernel."""
        try:
            record = self._ledger.record(request.file)
        except OSError:  # whoever takes it off the queue says so
            return False
        return self._ledger.is_present(record, request.start, request.stop)

    def _drop_queued(self, request: Prefetch) -> None:
        self._queue = deque(queued for queued in self._queue if queued.file != request.file)

    def _load(self, record: FileRecord, start: int, stop: int, node: int | None, scratch: mmap.mmap) -> None:
        # Asking costs nothing where the answer is exact; sampling reads pages in, and populating what is cached
        # already is as cheap.
        cached = record.residency.resident_bytes(start, stop) if record.residency.exact else 0
        if cached >= stop - start and (node is None or not self._may_move):
            self._ledger.settle(record, start, stop, 0)
            return
        if self._method == "populate":
            first = start // PAGE_BYTES * PAGE_BYTES
            try:
                with FileWindow(record.fd, first, stop) as window:
                    window.populate()
                    if node is not None and self._may_move:
                        self._move(window, node)
                    self._toucher.offer(window, record, first, stop)
            except OSError as error:
                if error.errno not in (errno.EINVAL, errno.ENODEV, errno.ENOSYS):
                    raise
                # No MADV_POPULATE_READ (Linux < 5.14), or a file system without mmap.
                self._method = "pread"
        if self._method == "pread":
            self._read(record, start, stop, scratch)
        self._ledger.settle(record, start, stop, stop - start - cached)

    def _move(self, window: FileWindow, node: int) -> None:
        """What was cached already may lie on another node: a copy in memory is quicker than reading it again."""
        try:
            window.move_to(node)
        except OSError as error:
            if error.errno in (errno.EPERM, errno.EACCES, errno.ENOSYS):
                self._may_move = False
                with self._condition:
                    self._warn(f"what is cached on another NUMA node stays there: {error}")

    def _read(self, record: FileRecord, start: int, stop: int, scratch: mmap.mmap) -> None:
        view = memoryview(scratch)
        offset = start
        while offset < stop:
            got = os.preadv(record.fd, [view[: min(len(view), stop - offset)]], offset)
            if got == 0:
                raise OSError(errno.EFAULT, "the file ends before the range wanted")
            offset += got

    def _give_up(self, record: FileRecord, start: int, stop: int, error: OSError) -> None:
        self._ledger.abandon(record, start, stop)
        if error.errno == errno.EFAULT:
            reason = f"ends at byte {os.fstat(record.fd).st_size} while bytes {start}–{stop} were to be prefetched"
        else:
            reason = f"bytes {start}–{stop} could not be read: {error.strerror}"
        with self._condition:
            record.failed = reason
            self._warn(f"{record.file.path}: {reason}; nothing more of it is prefetched")

    def _warn(self, text: str) -> None:
        if text not in self._warnings:
            self._warnings.append(text)

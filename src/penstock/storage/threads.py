"""Transfers by preadv and pwritev from a few threads: works everywhere, and is what other engines are compared with."""

from __future__ import annotations

import contextlib
import errno
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import TypeAlias

import numpy as np

from penstock.storage.base import COMPLETION_DTYPE, READ, Completions, Engine, Requests, resume_at
from penstock.storage.exiting import before_exit

# A virtio disk gave 2.0 to 2.5 GB/s to 8 threads of large direct reads, what it gives at all.
THREADS = 8
_LARGEST_TRANSFER_BYTES = 0x7FFFF000  # of one call: MAX_RW_COUNT
_RETRY_S = 0.001

_Item: TypeAlias = tuple[int, int, int, int, int, int, int]  # in the order of REQUEST_DTYPE


class ThreadEngine(Engine):
    """One blocking call for each request, from a bounded pool of threads, begun in the order of submission.

    Args:
        threads: how many requests are under way at once. They are started with the first request.
    """

    name = "threads"

    def __init__(self, threads: int = THREADS) -> None:
        super().__init__()
        if threads < 1:
            raise ValueError(f"threads: at least 1 thread is needed, not {threads}")
        self._lock = threading.Lock()
        self._work = threading.Condition(self._lock)
        self._progress = threading.Condition(self._lock)
        self._queue: deque[_Item] = deque()
        self._done: list[tuple[int, ...]] = []
        self._active = 0
        self._ending = False
        self._thread_count = threads
        self._threads: list[threading.Thread] = []
        self._forget_exit: Callable[[], None] = lambda: None
        self._largest_transfer_bytes = _LARGEST_TRANSFER_BYTES

    def _submit(self, requests: Requests) -> None:
        with self._lock:
            self._check_open()
            self._queue.extend(requests.tolist())
            if self._ending:  # with the interpreter
                self._cancel_queued()
                return
            try:
                self._start_threads()
            except RuntimeError as error:  # no more threads for this user or cgroup
                if not self._threads:
                    self._done += [(*item, -errno.EAGAIN) for item in self._queue]
                    self._queue.clear()
                    raise OSError(errno.EAGAIN, f"threads: none can be started: {error}") from error
            self._work.notify(len(requests))

    def _start_threads(self) -> None:
        """As many as there is work for. Needs the lock."""
        if not self._threads:
            self._forget_exit()
            self._forget_exit = before_exit(self._end)
        while len(self._threads) < min(self._thread_count, len(self._queue) + self._active):
            name = f"penstock-engine-{len(self._threads)}"
            thread = threading.Thread(target=self._serve, name=name, daemon=True)
            thread.start()
            self._threads.append(thread)

    def _wait(self, count: int, timeout_s: float | None) -> Completions:
        with self._lock:
            self._progress.wait_for(
                lambda: len(self._done) >= count or not (self._queue or self._active),
                timeout_s,
            )
            done, self._done = self._done, []
        return np.array(done, COMPLETION_DTYPE)

    def cancel(self) -> None:
        with self._lock:
            self._cancel_queued()

    def _cancel_queued(self) -> None:
        """Needs the lock."""
        self._done += [(*item, -errno.ECANCELED) for item in self._queue]
        self._queue.clear()
        self._progress.notify_all()

    def _reset(self) -> None:
        with self._lock:
            self._queue.clear()
            self._progress.wait_for(lambda: not self._active)
            self._done.clear()

    def _close(self) -> None:
        self._forget_exit()
        self._end()

    def _end(self) -> None:
        with self._lock:
            self._ending = True
            self._cancel_queued()
            self._work.notify_all()
            threads = list(self._threads)
        for thread in threads:
            thread.join()

    def _serve(self) -> None:
        while True:
            with self._lock:
                while not self._queue:
                    if self._ending:
                        return
                    self._work.wait()
                item = self._queue.popleft()
                self._active += 1
            result, is_over = -errno.EIO, True
            try:
                result = self._transfer(item)
                is_over = False
            except OSError as error:
                result, is_over = -(error.errno or errno.EIO), False
            except Exception:  # noqa: BLE001 — MemoryError, for one
                is_over = False
            finally:  # whatever ends this thread, the request comes back, and another thread takes up the rest
                with self._lock:
                    self._active -= 1
                    self._done.append((*item, result))
                    if is_over:
                        self._threads.remove(threading.current_thread())
                        with contextlib.suppress(RuntimeError):
                            self._start_threads()
                    self._progress.notify_all()

    def _transfer(self, item: _Item) -> int:
        """Bytes transferred."""
        _, offset, length, buffer_offset, buffer, file, operation = item
        memory = self._memory[buffer]
        assert memory is not None
        view = memory.data[buffer_offset : buffer_offset + length]
        fd, is_direct = int(self._fds[file]), bool(self._direct[file])
        call = os.preadv if operation == READ else os.pwritev
        done = 0
        while True:
            at = resume_at(done, is_direct)
            try:
                moved = call(fd, [view[at : at + self._largest_transfer_bytes]], offset + at)
            except BlockingIOError:
                time.sleep(_RETRY_S)
                continue
            if moved == 0 and operation != READ:
                return -errno.EIO
            if at + moved <= done:  # no further: the file ends here
                return done
            if done:
                self._count_continued()
            done = at + moved
            if done >= length:
                return done

    def _count_continued(self) -> None:
        with self._registry:
            self._continued += 1

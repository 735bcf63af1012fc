"""Reads into fresh memory: threads touch it piece by piece, and submit what is to be read into each piece.

Whoever begins a direct read faults in the pages that it goes to, and the kernel clears each of them: 0.3 s a GB of CPU
time, 1.2 to 3.5 where a virtual machine has to get them from its host. One thread that fills a ring is busy with that
and not with the disk. Medians on 2 CPUs and a virtio disk that gives 3.1 GB/s into memory touched before, 6.4 GB:
eight threads of blocking reads 2.48 s, io_uring 2.41, two threads that touch and submit to io_uring 2.05, to eight
threads of blocking reads 2.31; in pieces of 4 or 64 MiB 2.23.

Clearing pages takes time from a virtual disk, whose host copies with the same processors. So one thread feeds, and the
others help while little is in flight: at the beginning, and where the disk is faster than one CPU clears. On 2 CPUs and
a disk that gives 3.0 GB/s, 6.4 GB took 2.69 s so, 2.75 with one thread and 3.00 with two that feed all the time.
"""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Self

import numpy as np
from numpy.typing import NDArray

from penstock.storage.base import Completions, Engine, Requests
from penstock.storage.buffers import touch
from penstock.storage.exiting import before_exit
from penstock.units import MiB

_PIECE_BYTES = 16 * MiB
_FIRST_BYTES = np.array([4, 8]) * MiB  # where the first pieces end: the disk is to begin soon
_MOST_THREADS = 4  # a CPU clears 6 to 10 GB/s
_ENOUGH_BYTES = 32 * MiB  # in flight: one thread keeps up
_WORTH_BYTES = 64 * MiB  # less is submitted at once


class Feeder:
    """Submits reads in their order, more or less, as the memory they go to becomes ready.

    Args:
        engine: to submit to; nobody else waits for its completions.
        requests: reads, with the tokens that `wait` is to return.
        memory: of each request's buffer, by the engine's number.
    """

    def __init__(self, engine: Engine, requests: Requests, memory: dict[int, NDArray[np.uint8]]) -> None:
        self._engine = engine
        self._requests = requests
        self._memory = memory
        self._condition = threading.Condition()
        self._submitted = self._returned = 0
        self._in_flight_bytes = 0
        self._error: BaseException | None = None
        self._closing = False
        self._submitting = threading.RLock()  # a collection of garbage may close it in a thread of its own
        self._ended = threading.Event()
        self._forget_exit: Callable[[], None] = lambda: None
        self._pieces: Iterator[tuple[int, int]] = iter(_pieces(requests))
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        """Begin."""
        if int(self._requests["length"].sum()) < _WORTH_BYTES:
            self._submit(0, len(self._requests))
            return
        self._forget_exit = before_exit(self.close)
        for number in range(min(_MOST_THREADS, len(os.sched_getaffinity(0)))):
            work = partial(self._work, helps=number > 0)
            thread = threading.Thread(target=work, name=f"penstock-feeder-{number}", daemon=True)
            self._threads.append(thread)
            try:
                thread.start()
            except RuntimeError:  # no more threads for this user or cgroup
                self._threads.pop()
                if not self._threads:
                    self._submit(0, len(self._requests))
                return

    def wait(self) -> Completions:
        """Completions of at least one read; to be called while not all have been returned.

        Raises:
            MemoryError: there is none for a piece.
            OSError: the engine takes no requests.
        """
        with self._condition:
            self._condition.wait_for(lambda: self._error is not None or self._returned < self._submitted)
            if self._error is not None:
                raise self._error
        done = self._engine.wait(1)
        with self._condition:
            self._returned += len(done)
            self._in_flight_bytes -= int(done["length"].sum())
            self._condition.notify_all()
        return done

    def stop(self) -> None:
        """Submit nothing more. Threads stay for what they have submitted: the kernel may want to go on in them."""
        self._closing = True  # first, and without a lock that an interrupt could keep us from
        with self._submitting:
            pass

    def close(self) -> None:
        """`stop`, and end the threads; a second time does nothing."""
        self.stop()
        self._ended.set()
        with self._condition:
            self._condition.notify_all()
        for thread in self._threads:
            # One that an interrupt left half started ends by itself.
            if thread.is_alive() and thread is not threading.current_thread():
                thread.join()
        self._forget_exit()

    def _work(self, *, helps: bool) -> None:
        try:
            while (piece := self._next(helps)) is not None:
                for place in self._places(*piece):
                    touch(place)
                self._submit(*piece)
        except BaseException as error:  # noqa: BLE001 — whatever it is, the caller is to get it
            with self._condition:
                self._error = error
                self._condition.notify_all()
        self._ended.wait()

    def _next(self, helps: bool) -> tuple[int, int] | None:
        """The next piece; None where there is no more. Who only helps waits until little is in flight."""
        with self._condition:
            if helps:
                self._condition.wait_for(lambda: self._closing or self._in_flight_bytes < _ENOUGH_BYTES)
            return None if self._closing else next(self._pieces, None)

    def _places(self, first: int, last: int) -> Iterator[NDArray[np.uint8]]:
        """The memory of some requests, which lie side by side in each buffer."""
        requests = self._requests[first:last]
        for buffer in np.unique(requests["buffer"]).tolist():
            mine = requests[requests["buffer"] == buffer]
            start = int(mine["buffer_offset"].min())
            yield self._memory[buffer][start : int((mine["buffer_offset"] + mine["length"]).max())]

    def _submit(self, first: int, last: int) -> None:
        with self._submitting:
            if self._closing:
                return
            self._engine.submit(self._requests[first:last])
        with self._condition:
            self._submitted += last - first
            self._in_flight_bytes += int(self._requests["length"][first:last].sum())
            self._condition.notify_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _pieces(requests: Requests) -> Sequence[tuple[int, int]]:
    """The numbers of the first request of each piece, and of the one after its last."""
    reached = np.cumsum(requests["length"])
    total = int(reached[-1]) if len(reached) else 0
    bounds = np.concatenate((_FIRST_BYTES, np.arange(_PIECE_BYTES, total + _PIECE_BYTES, _PIECE_BYTES)))
    ends = np.searchsorted(reached, bounds, side="right")
    edges = np.unique(np.concatenate(([0], ends, [len(requests)]))).tolist()
    return list(itertools.pairwise(edges))

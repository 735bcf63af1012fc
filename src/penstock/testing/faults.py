"""An engine whose transfers fail where a test wants them to."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable

import numpy as np

from penstock.storage.base import Completions, Engine, EngineStatistics, Requests, completed


class FaultyEngine(Engine):
    """Passes everything on to another engine, but for the requests that are to fail: those never reach it.

    Args:
        engine: closed with this one.
        error: called with each request's number, counted from 0 over all batches; a positive errno has it fail, 0 lets
            it pass. What it raises, `submit` raises.
    """

    def __init__(self, engine: Engine, error: Callable[[int], int]) -> None:
        super().__init__()
        self.inner = engine
        self.name = f"faulty {engine.name}"
        self._error = error
        self._lock = threading.Lock()
        self._number = 0
        self._failed_requests: list[Completions] = []

    def add_file(self, fd: int) -> int:
        return self.inner.add_file(fd)

    def remove_file(self, number: int) -> None:
        self.inner.remove_file(number)

    def add_buffer(self, buffer: object, *, pin: bool = True) -> int:
        return self.inner.add_buffer(buffer, pin=pin)

    def remove_buffer(self, number: int) -> None:
        self.inner.remove_buffer(number)

    def submit(self, requests: Requests) -> None:
        with self._lock:
            first = self._number
            self._number += len(requests)
        errors = np.array([self._error(first + index) for index in range(len(requests))], np.int64)
        with self._lock:
            self._failed_requests.append(completed(requests[errors > 0], -errors[errors > 0]))
        self.inner.submit(requests[errors == 0])

    def wait(self, count: int = 1, timeout_s: float | None = None) -> Completions:
        with self._lock:
            failed, self._failed_requests = self._failed_requests, []
        ready = sum(map(len, failed))
        return np.concatenate([*failed, self.inner.wait(max(0, count - ready), timeout_s)])

    def cancel(self) -> None:
        self.inner.cancel()

    @property
    def in_flight(self) -> int:
        return self.inner.in_flight + sum(map(len, self._failed_requests))

    def statistics(self) -> EngineStatistics:
        return self.inner.statistics()

    def reset(self) -> None:
        self._failed_requests.clear()
        self.inner.reset()

    def close(self) -> None:
        self._failed_requests.clear()
        self.inner.close()

    def _submit(self, requests: Requests) -> None:
        raise NotImplementedError

    def _wait(self, count: int, timeout_s: float | None) -> Completions:
        raise NotImplementedError

    def _reset(self) -> None:
        raise NotImplementedError

    def _close(self) -> None:
        raise NotImplementedError


def fail_at(number: int, error: int = errno.EIO) -> Callable[[int], int]:
    """The request with that number fails."""
    return lambda current: error if current == number else 0

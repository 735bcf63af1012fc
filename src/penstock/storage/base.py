"""What every engine does: move batches of requests between files and memory.

A batch is a numpy array, one element a request, so that nothing is done for each request in Python on the way to an
engine that can do without it.

Contract, checked by `penstock.testing.engine` for each engine:

- Each request submitted comes back from `Engine.wait` exactly once, in any order, with what was transferred or why not.
- A transfer is whole, or it failed. It is shorter than asked for only where a file ends.
- Alignment is the caller's: with O_DIRECT, offset, length and address in memory are multiples of `BLOCK_BYTES` (the
  file's last block is asked for in full, and comes back short). What is not comes back as EINVAL.
- Memory is not touched once its requests have come back. `Engine.close` waits for that.
"""

from __future__ import annotations

import fcntl
import os
import threading
from abc import ABC, abstractmethod
from dataclasses import dataclass
from types import TracebackType
from typing import Self, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from penstock.records import as_records, words

BLOCK_BYTES = 4096  # aligned enough for any O_DIRECT of today: logical blocks are of 512 or 4096 bytes

READ, WRITE = 0, 1

_REQUEST_FIELDS = [
    ("token", np.uint64),  # the caller's own, returned as it is
    ("offset", np.int64),  # in the file, bytes
    ("length", np.int64),  # bytes
    ("buffer_offset", np.int64),  # bytes
    ("buffer", np.int32),  # of Engine.add_buffer
    ("file", np.int32),  # of Engine.add_file
    ("operation", np.int64),  # READ or WRITE
]
REQUEST_DTYPE = np.dtype(_REQUEST_FIELDS)
# Words of a request in which those are; buffer and file share one.
_OFFSET, _LENGTH, _BUFFER_OFFSET, _PLACE, _OPERATION, _RESULT = range(1, 7)
COMPLETION_DTYPE = np.dtype([*_REQUEST_FIELDS, ("result", np.int64)])  # bytes transferred, or −errno
Requests: TypeAlias = NDArray[np.void]  # of REQUEST_DTYPE, [requests]
Completions: TypeAlias = NDArray[np.void]  # of COMPLETION_DTYPE, [completions]


def batch(
    operation: int,
    *,
    file: ArrayLike,
    offset: ArrayLike,
    length: ArrayLike,
    buffer: ArrayLike,
    buffer_offset: ArrayLike,
    token: ArrayLike | None = None,
) -> Requests:
    """Requests from their fields, each one value for all or an array [requests]; tokens count from 0 by default."""
    fields = {
        "file": file,
        "offset": offset,
        "length": length,
        "buffer": buffer,
        "buffer_offset": buffer_offset,
    }
    size = max((np.size(values) for values in fields.values() if not isinstance(values, int)), default=1)
    requests = np.zeros(size, REQUEST_DTYPE)
    requests["operation"] = operation
    requests["token"] = np.arange(size) if token is None else token
    for name, values in fields.items():
        requests[name] = values
    return requests


@dataclass(frozen=True, slots=True)
class EngineStatistics:
    """What an engine has done so far."""

    engine: str
    requests: int  # that have come back
    failed: int  # of them, cancelled ones included
    bytes_read: int
    bytes_written: int
    continued: int  # transfers that the kernel cut short, or refused for the moment, and that were taken up again
    in_flight: int  # submitted, and not returned by wait yet


class Engine(ABC):
    """Moves batches between files and memory. Every method may be called from any thread.

    What one thread has submitted, another may get from `wait`: users who share an engine tell theirs by the tokens.
    """

    name: str  # as in --engine

    def __init__(self) -> None:
        self._registry = threading.Lock()
        self._fds = np.full(0, -1, np.int32)  # [files]
        self._direct = np.zeros(0, bool)  # [files], opened with O_DIRECT
        self._memory: list[NDArray[np.uint8] | None] = []  # [buffers]
        self._addresses = np.zeros(0, np.uint64)  # [buffers]
        self._sizes = np.full(0, -1, np.int64)  # [buffers], −1 where there is none
        self._writable = np.zeros(0, bool)  # [buffers], may be read into
        self._file_uses = np.zeros(0, np.int64)  # [files], requests in flight
        self._buffer_uses = np.zeros(0, np.int64)  # [buffers], requests in flight
        self._in_flight = 0
        self._requests = self._failed = self._bytes_read = self._bytes_written = 0
        self._continued = 0
        self._closed = self._released = False

    def add_file(self, fd: int) -> int:
        """Make a file known; returns its number in requests. The descriptor stays the caller's, and open meanwhile.

        Raises:
            OSError: EBADF.
        """
        is_direct = bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT)
        with self._registry:
            self._check_open()
            number = _free_slot(self._fds, -1)
            if number == len(self._fds):
                self._fds = np.append(self._fds, np.int32(-1))
                self._direct = np.append(self._direct, False)
                self._file_uses = np.append(self._file_uses, 0)
            self._file_added(number, fd)
            self._fds[number] = fd
            self._direct[number] = is_direct
            return number

    def remove_file(self, number: int) -> None:
        """Forget a file.

        Raises:
            ValueError: there is no such file, or requests for it are in flight.
        """
        with self._registry:
            if not 0 <= number < len(self._fds) or self._fds[number] < 0:
                raise ValueError(f"{self.name}: there is no file {number}")
            if self._file_uses[number]:
                raise ValueError(f"{self.name}: {self._file_uses[number]} requests for file {number} are in flight")
            self._fds[number] = -1
            if not self._released:
                self._file_removed(number)

    def add_buffer(self, buffer: object, *, pin: bool = True) -> int:
        """Make memory known; returns its number in requests.

        Args:
            buffer: contiguous memory, such as a memoryview, a numpy array or an mmap; not resized meanwhile. Read-only
                memory can be written from.
            pin: an engine may pin it while it is known, which is worth it for memory that is used again and again.
        """
        memory = np.frombuffer(buffer, np.uint8)  # type: ignore[call-overload]
        with self._registry:
            self._check_open()
            number = _free_slot(self._sizes, -1)
            if number == len(self._sizes):
                self._memory.append(None)
                self._addresses = np.append(self._addresses, np.uint64(0))
                self._sizes = np.append(self._sizes, np.int64(-1))
                self._writable = np.append(self._writable, False)
                self._buffer_uses = np.append(self._buffer_uses, 0)
            self._memory[number] = memory
            self._addresses[number] = memory.ctypes.data
            self._sizes[number] = memory.nbytes
            self._writable[number] = memory.flags.writeable
            self._buffer_added(number, pin)
            return number

    def remove_buffer(self, number: int) -> None:
        """Forget memory.

        Raises:
            ValueError: there is no such buffer, or requests for it are in flight.
        """
        with self._registry:
            if not 0 <= number < len(self._sizes) or self._sizes[number] < 0:
                raise ValueError(f"{self.name}: there is no buffer {number}")
            if self._buffer_uses[number]:
                raise ValueError(f"{self.name}: {self._buffer_uses[number]} requests for buffer {number} are in flight")
            if not self._released:
                self._buffer_removed(number)
            self._memory[number] = None
            self._sizes[number] = -1

    def submit(self, requests: Requests) -> None:
        """Begin a batch; never waits for the device: what it cannot take yet waits here, however much that is.

        Raises:
            ValueError: a request names a file or a buffer that is not there, or does not lie inside its buffer; then
                nothing of the batch was begun.
            RuntimeError: the engine is closed.
        """
        if requests.dtype != REQUEST_DTYPE or requests.ndim != 1:
            raise ValueError(f"{self.name}: requests are an array of REQUEST_DTYPE, not of {requests.dtype}")
        if not len(requests):
            return
        with self._registry:
            self._check_open()
            requests = as_records(words(requests).copy(), REQUEST_DTYPE)
            low, high = _bounds(requests)
            if not self._is_plain(low, high):
                self._check(requests)
            self._count_uses(requests, low[_PLACE], high[_PLACE], 1)
            self._in_flight += len(requests)
        self._submit(requests)

    def wait(self, count: int = 1, timeout_s: float | None = None) -> Completions:
        """Wait until that many requests are done, or all that are in flight, and take all that are.

        Args:
            count: 0 takes what is done already.
            timeout_s: take what is done after this time at the latest.
        """
        done = self._wait(count, timeout_s)
        if not len(done):
            return done
        low, high = _bounds(done)
        moved, failed = done["result"], 0
        if low[_RESULT] < 0:
            moved, failed = np.maximum(moved, 0), int(np.count_nonzero(moved < 0))
        moved_bytes = int(moved.sum())
        is_mixed = low[_OPERATION] != high[_OPERATION]
        written_bytes = int(np.dot(moved, done["operation"])) if is_mixed else moved_bytes * high[_OPERATION]
        with self._registry:
            self._count_uses(done, low[_PLACE], high[_PLACE], -1)
            self._in_flight -= len(done)
            self._requests += len(done)
            self._failed += failed
            self._bytes_read += moved_bytes - written_bytes
            self._bytes_written += written_bytes
        return done

    @abstractmethod
    def cancel(self) -> None:
        """End all requests that are in flight as soon as possible; those that did not get through are ECANCELED.

        All of them still come back from `wait`.
        """

    @property
    def in_flight(self) -> int:
        """Requests submitted that `wait` has not returned."""
        with self._registry:
            return self._in_flight

    def statistics(self) -> EngineStatistics:
        """What was done so far."""
        with self._registry:
            return EngineStatistics(
                self.name,
                self._requests,
                self._failed,
                self._bytes_read,
                self._bytes_written,
                self._continued,
                self._in_flight,
            )

    def reset(self) -> None:
        """Forget all requests, whoever submitted them: end them, and wait until memory is left alone.

        None of them comes back from `wait`. What an interrupted `submit` or `wait` has left half done is tidied up.
        """
        self._reset()
        with self._registry:
            self._file_uses[:] = 0
            self._buffer_uses[:] = 0
            self._in_flight = 0

    def close(self) -> None:
        """`reset`, and give everything back; a second time does nothing."""
        with self._registry:
            if self._released:
                return
            self._closed = True
        self.reset()
        self._close()
        self._released = True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @abstractmethod
    def _submit(self, requests: Requests) -> None:
        """Begin a batch that was checked."""

    @abstractmethod
    def _wait(self, count: int, timeout_s: float | None) -> Completions:
        """See `wait`."""

    @abstractmethod
    def _reset(self) -> None:
        """See `reset`."""

    @abstractmethod
    def _close(self) -> None:
        """Give everything back; nothing is in flight."""

    def _file_added(self, number: int, fd: int) -> None:  # noqa: B027 (may be left out)
        """A hook for engines that register files."""

    def _file_removed(self, number: int) -> None:  # noqa: B027 (may be left out)
        """A hook for engines that register files."""

    def _buffer_added(self, number: int, pin: bool) -> None:  # noqa: B027 (may be left out)
        """A hook for engines that register memory."""

    def _buffer_removed(self, number: int) -> None:  # noqa: B027 (may be left out)
        """A hook for engines that register memory."""

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError(f"{self.name}: the engine is closed")

    def _is_plain(self, low: list[int], high: list[int]) -> bool:
        """Whether the least and the most of each word are enough to see that a batch is good: it mostly has one file
        and one buffer. Of another, each request has to be looked at."""
        file, buffer = high[_PLACE] >> 32, high[_PLACE] & 0xFFFFFFFF
        return (
            low[_PLACE] == high[_PLACE]
            and 0 <= file < len(self._fds)
            and buffer < len(self._sizes)
            and self._fds[file] >= 0
            and low[_OFFSET] >= 0
            and low[_LENGTH] > 0
            and low[_BUFFER_OFFSET] >= 0
            and high[_BUFFER_OFFSET] + high[_LENGTH] <= self._sizes[buffer]
            and low[_OPERATION] >= READ
            and high[_OPERATION] <= WRITE
            and bool(low[_OPERATION] == WRITE or self._writable[buffer])
        )

    def _count_uses(self, requests: Requests, low: int, high: int, change: int) -> None:
        if low == high:
            self._file_uses[high >> 32] += change * len(requests)
            self._buffer_uses[high & 0xFFFFFFFF] += change * len(requests)
        else:
            np.add.at(self._file_uses, requests["file"], change)
            np.add.at(self._buffer_uses, requests["buffer"], change)

    def _check(self, requests: Requests) -> None:
        files, buffers = requests["file"], requests["buffer"]
        is_known = _most(files) < len(self._fds) and _most(buffers) < len(self._sizes)
        if is_known and np.minimum.reduce(self._fds.take(files)) >= 0:
            start, length, operation = requests["buffer_offset"], requests["length"], requests["operation"]
            is_good = np.minimum.reduce(start | length | requests["offset"]) >= 0 and length.all()
            is_good = is_good and (length <= self._sizes.take(buffers) - start).all()
            is_good = is_good and _most(operation) <= 1
            if is_good and (self._writable.take(buffers) | (operation == WRITE)).all():
                return
        self._complain(requests)

    def _complain(self, requests: Requests) -> None:
        """Raises ValueError for the first rule that is broken."""
        files, buffers = requests["file"], requests["buffer"]
        self._refuse(requests, (files < 0) | (files >= len(self._fds)), "names a file that is not there")
        self._refuse(requests, self._fds[files] < 0, "names a file that is not there")
        self._refuse(requests, (buffers < 0) | (buffers >= len(self._sizes)), "names a buffer that is not there")
        self._refuse(requests, self._sizes[buffers] < 0, "names a buffer that is not there")
        is_other = (requests["operation"] != READ) & (requests["operation"] != WRITE)
        self._refuse(requests, is_other, "is neither READ nor WRITE")
        self._refuse(
            requests, (requests["length"] <= 0) | (requests["offset"] < 0), "has no bytes, or a negative offset"
        )
        room = self._sizes[buffers] - requests["buffer_offset"]
        outside = (requests["buffer_offset"] < 0) | (requests["length"] > room)
        self._refuse(requests, outside, "does not lie inside its buffer")
        read_only = (requests["operation"] == READ) & ~self._writable[buffers]
        self._refuse(requests, read_only, "reads into read-only memory")
        raise AssertionError("a request was refused that breaks no rule")

    def _refuse(self, requests: Requests, wrong: NDArray[np.bool_], what: str) -> None:
        if wrong.any():
            index = int(np.argmax(wrong))
            fields = ", ".join(f"{name}={requests[index][name]}" for name in REQUEST_DTYPE.names or ())
            raise ValueError(f"{self.name}: request {index} of {len(requests)} {what}: {fields}")


def _bounds(requests: Requests | Completions) -> tuple[list[int], list[int]]:
    """The least and the most of each word."""
    rows = words(requests).view(np.int64)
    return np.minimum.reduce(rows).tolist(), np.maximum.reduce(rows).tolist()


def completed(requests: Requests, results: ArrayLike) -> Completions:
    """Requests with their results."""
    rows = np.empty((len(requests), COMPLETION_DTYPE.itemsize // 8), np.uint64)  # a request's, and one more
    rows[:, :-1] = words(requests)
    rows.view(np.int64)[:, -1] = results
    return as_records(rows, COMPLETION_DTYPE)


def failure(completion: np.void, path: str) -> OSError:
    """The error of a completion that failed, for a person: with file, offset and length."""
    number = -int(completion["result"])
    verb = "read" if completion["operation"] == READ else "written"
    start, length = int(completion["offset"]), int(completion["length"])
    return OSError(number, f"bytes {start}–{start + length} could not be {verb}: {os.strerror(number)}", path)


def resume_at(done_bytes: int, is_direct: bool) -> int:
    """Where to take up a transfer that was cut short: O_DIRECT goes on at a block only."""
    return done_bytes // BLOCK_BYTES * BLOCK_BYTES if is_direct else done_bytes


def _most(values: NDArray[np.int32] | NDArray[np.int64]) -> int:
    """The largest, a negative one counting as larger than all others; the values are not empty."""
    most: int = np.maximum.reduce(values.view(f"u{values.itemsize}"))
    return most


def _free_slot(values: NDArray[np.int32] | NDArray[np.int64], empty: int) -> int:
    """The first empty element, or the number of elements."""
    free = np.flatnonzero(values == empty)
    return int(free[0]) if len(free) else len(values)

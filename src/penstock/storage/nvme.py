"""Transfers by NVMe commands of our own, passed through io_uring to the drive: no file system, no block layer.

A request is cut into as many commands as its drive wants, all of which may be under way at once; a whole batch is cut
by a few array operations. What is known of a namespace is asked of it once, when it is added.

Facts:

- Memory is not registered: what Linux 6.1 takes of a registered buffer depends on how its pages lie. Any address will
  do; one that is no multiple of 4 costs a copy in the kernel.
- A command cannot be called back. What has gone to the drive completes.
- A write is done when the drive has said so. Its own volatile cache is emptied by fsync of the block device.
"""

from __future__ import annotations

import errno
import fcntl
import os
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from penstock.errors import UnsupportedError
from penstock.linux import nvme, uring
from penstock.linux.nvme import PAGE_BYTES
from penstock.linux.uring import Cqes, Sqes
from penstock.storage.base import COMPLETION_DTYPE, WRITE, Completions, Requests, completed
from penstock.storage.uring import DEPTH, UringEngine

_NAMESPACE_DTYPE = np.dtype(
    [
        ("number", np.uint32),
        ("lba_bytes", np.int64),
        ("size_bytes", np.int64),
        ("aligned_bytes", np.int64),  # of one command, its memory beginning at a page
        ("unaligned_bytes", np.int64),  # anywhere
        ("is_allowed", bool, (2,)),  # READ, WRITE
    ]
)
_OPCODES = np.array([nvme.READ, nvme.WRITE], np.uint8)  # [operation]
_TRIES = 6  # of a command whose status does not forbid another: as many as the kernel gives its own (nvme_max_retries)
_REMEMBERED = 256  # failed requests whose status can be asked for; chosen without measurement


@dataclass(frozen=True, slots=True)
class CommandLimits:
    """The most that one command may move, in bytes.

    Attributes:
        aligned: where its memory begins at a page.
        unaligned: where it begins within one, and so lies in one more.
    """

    aligned: int
    unaligned: int


def command_limits(controller: nvme.Controller, queue: nvme.QueueLimits, lba_bytes: int) -> CommandLimits:
    """What drive and kernel both take, wherever the pages of memory lie; whole blocks, and whole pages if there are."""
    most = min(
        controller.largest_transfer_bytes or queue.transfer_bytes,
        queue.transfer_bytes,
        nvme.LARGEST_BLOCKS * lba_bytes,
    )
    unit = max(PAGE_BYTES, lba_bytes)
    aligned, unaligned = (
        max(min(most, pages * PAGE_BYTES) // unit * unit, lba_bytes) for pages in (queue.segments, queue.segments - 1)
    )
    return CommandLimits(aligned, unaligned)


def split(requests: Requests, largest_bytes: NDArray[np.int64]) -> tuple[Requests, NDArray[np.int64]]:
    """Cut requests into parts of so many bytes at most each; returns the parts, and how many each request has.

    Args:
        largest_bytes: [requests].
    """
    counts = -(-requests["length"] // largest_bytes)
    whole = np.repeat(np.arange(len(requests)), counts)
    parts = requests[whole]
    at = (np.arange(len(parts)) - (np.cumsum(counts) - counts)[whole]) * largest_bytes[whole]
    parts["offset"] += at
    parts["buffer_offset"] += at
    parts["length"] = np.minimum(parts["length"] - at, largest_bytes[whole])
    return parts, counts


class _Wholes:
    """Requests of which parts are under way; each has a number, which is their token."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget all."""
        self._requests = np.zeros(0, COMPLETION_DTYPE)  # result: bytes so far
        self._left = np.zeros(0, np.int64)  # parts
        self._failed_at = np.zeros(0, np.int64)  # offset of the first part that failed
        self._error = np.zeros(0, np.int64)  # −errno of it
        self._free = np.zeros(0, np.int64)  # the first `_free_count` are numbers that are free
        self._free_count = 0

    def add(self, requests: Requests, counts: NDArray[np.int64]) -> NDArray[np.int64]:
        """Take requests with so many parts each; returns their numbers."""
        missing = len(requests) - self._free_count
        if missing > 0:
            self._grow(max(missing, len(self._left)))
        self._free_count -= len(requests)
        numbers = self._free[self._free_count : self._free_count + len(requests)].copy()
        self._requests[numbers] = completed(requests, 0)
        self._left[numbers] = counts
        self._failed_at[numbers] = np.iinfo(np.int64).max
        self._error[numbers] = 0
        return numbers

    def _grow(self, count: int) -> None:
        before = len(self._left)
        self._requests = np.concatenate((self._requests, np.zeros(count, COMPLETION_DTYPE)))
        self._left, self._failed_at, self._error = (
            np.concatenate((values, np.zeros(count, np.int64)))
            for values in (self._left, self._failed_at, self._error)
        )  # fmt: skip
        free = np.zeros(before + count, np.int64)
        free[: self._free_count] = self._free[: self._free_count]
        free[self._free_count : self._free_count + count] = np.arange(before, before + count)
        self._free, self._free_count = free, self._free_count + count

    def fold(self, done: Completions) -> tuple[Completions, NDArray[np.int64]]:
        """Account for parts; returns the requests that are whole now, and what their numbers were."""
        numbers = done["token"].view(np.int64)
        np.subtract.at(self._left, numbers, 1)
        np.add.at(self._requests["result"], numbers, np.maximum(done["result"], 0))
        is_failed = done["result"] < 0
        if is_failed.any():
            self._fail(done[is_failed], numbers[is_failed])
        ended = np.unique(numbers[self._left[numbers] == 0])
        wholes = self._requests[ended]
        wholes["result"] = np.where(self._error[ended] < 0, self._error[ended], wholes["result"])
        self._free[self._free_count : self._free_count + len(ended)] = ended
        self._free_count += len(ended)
        return wholes, ended

    def _fail(self, parts: Completions, numbers: NDArray[np.int64]) -> None:
        """The first of a request, by offset, is what it has failed of."""
        is_first = parts["offset"] < self._failed_at[numbers]
        parts, numbers = parts[is_first], numbers[is_first]
        order = np.argsort(-parts["offset"])  # of several the last assignment stays
        self._failed_at[numbers[order]] = parts["offset"][order]
        self._error[numbers[order]] = parts["result"][order]


class NvmeEngine(UringEngine):
    """Commands of the NVM command set to namespaces: files are /dev/ng0n1 and its like.

    Offset and length are multiples of the namespace's logical block, or the result is EINVAL. Its end is the end of the
    file: reads are cut short there, and writes that do not fit fail with ENOSPC. A status of the drive comes as errno;
    `describe` has it in the drive's words.

    Args:
        depth: commands that the kernel has at once, a power of two; more wait here.

    Raises:
        UnsupportedError: io_uring is not there, not permitted, or passes no commands through (Linux 5.19).
        OSError: no descriptor or memory is left.
    """

    name = "nvme"
    _sqe_dtype = nvme.SQE_DTYPE

    def __init__(self, depth: int = DEPTH) -> None:
        super().__init__(depth, register_buffers=False)
        self._namespaces = np.zeros(0, _NAMESPACE_DTYPE)  # [files]
        self._wholes = _Wholes()
        self._tries = np.zeros(len(self._slots), np.int64)  # [slots]
        self._statuses: dict[int, tuple[int, int]] = {}  # number of the request → offset, status
        self._failures: dict[bytes, int] = {}  # completion → status, oldest first
        if not self._ring.supports(uring.URING_CMD):
            self._ring.close()
            raise UnsupportedError("io_uring: this kernel passes no commands through; Linux 5.19 does")

    def add_file(self, fd: int) -> int:
        """Make a namespace known, opened as its character device; returns its number in requests.

        Raises:
            UnsupportedError: it is no namespace that this engine can read and write, or may not be asked.
            OSError: EBADF.
        """
        return super().add_file(fd)

    def limits(self, file: int) -> CommandLimits:
        """The most that one command to a namespace moves."""
        facts = self._namespaces[file]
        return CommandLimits(int(facts["aligned_bytes"]), int(facts["unaligned_bytes"]))

    def describe(self, completion: np.void) -> str:
        """Why a request has failed, in the drive's words where it was the drive; for the last few that did."""
        with self._lock:
            status = self._failures.get(completion.tobytes())
        return os.strerror(-int(completion["result"])) if status is None else nvme.status_name(status)

    def _prepared(self, requests: Requests) -> Requests:
        facts = self._namespaces[requests["file"]]
        blocks = facts["lba_bytes"]
        is_write = requests["operation"] == WRITE
        room = np.maximum(facts["size_bytes"] - requests["offset"], 0)
        results = np.zeros(len(requests), np.int64)
        results[is_write & (requests["length"] > room)] = -errno.ENOSPC
        results[(requests["offset"] % blocks != 0) | (requests["length"] % blocks != 0)] = -errno.EINVAL
        results[~facts["is_allowed"][np.arange(len(requests)), requests["operation"]]] = -errno.EBADF
        is_over = (results < 0) | (room == 0)
        if is_over.any():
            super()._finish(completed(requests[is_over], results[is_over]))
            self._lock.notify_all()
            requests, facts, room = requests[~is_over], facts[~is_over], room[~is_over]
        inside = requests.copy()
        inside["length"] = np.minimum(requests["length"], room)
        address = self._addresses[requests["buffer"]] + requests["buffer_offset"].view(np.uint64)
        largest = np.where(address % PAGE_BYTES == 0, facts["aligned_bytes"], facts["unaligned_bytes"])
        parts, counts = split(inside, np.minimum(largest, self._largest_transfer_bytes))
        parts["token"] = np.repeat(self._wholes.add(requests, counts), counts)
        return parts

    def _place(self, most: int) -> NDArray[np.intp]:
        slots = super()._place(most)
        self._tries[slots] = 0
        return slots

    def _entries(self, slots: NDArray[np.intp]) -> Sqes:
        requests = self._at(slots)
        files = requests["file"]
        facts = self._namespaces[files]
        block = requests["offset"] // facts["lba_bytes"]
        entries = np.zeros(len(slots), nvme.SQE_DTYPE)
        entries["opcode"] = uring.URING_CMD
        entries["flags"] = self._file_flags[files]
        entries["fd"] = self._file_fds[files]
        entries["offset"] = nvme.URING_CMD_IO
        entries["user_data"] = slots
        command = entries["command"]
        command["opcode"] = _OPCODES[requests["operation"]]
        command["namespace"] = facts["number"]
        command["address"] = self._addresses[requests["buffer"]] + requests["buffer_offset"].view(np.uint64)
        command["length"] = requests["length"]
        command["cdw10"] = block & 0xFFFFFFFF
        command["cdw11"] = block >> 32
        command["cdw12"] = requests["length"] // facts["lba_bytes"] - 1
        return entries

    def _moved(self, entries: Cqes, slots: NDArray[np.int64]) -> NDArray[np.int64]:
        results = entries["result"].astype(np.int64)
        moved = np.where(results == 0, self._slots["length"][slots], results)
        for index in np.flatnonzero(results > 0).tolist():
            moved[index] = -self._refused(int(slots[index]), int(results[index]))
        return moved

    def _refused(self, slot: int, status: int) -> int:
        """The errno of a command's status; EAGAIN where it is to be tried again."""
        self._tries[slot] += 1
        if not status & nvme.DO_NOT_RETRY and self._tries[slot] < _TRIES:
            return errno.EAGAIN
        number, offset = int(self._slots["token"][slot]), int(self._slots["offset"][slot])
        if offset < self._statuses.get(number, (offset + 1, 0))[0]:
            self._statuses[number] = offset, status
        return nvme.status_errno(status) or errno.EIO

    def _finish(self, done: Completions) -> None:
        wholes, numbers = self._wholes.fold(done)
        if self._statuses:
            for whole, number in zip(wholes, numbers.tolist(), strict=True):
                self._remember(whole, number)
        if len(wholes):
            super()._finish(wholes)

    def _remember(self, whole: np.void, number: int) -> None:
        """Keep the status that a request has failed of, if one did."""
        _, status = self._statuses.pop(number, (0, 0))
        if status and whole["result"] == -nvme.status_errno(status):
            self._failures.pop(whole.tobytes(), None)
            self._failures[whole.tobytes()] = status
            if len(self._failures) > _REMEMBERED:
                del self._failures[next(iter(self._failures))]

    def _reset(self) -> None:
        with self._lock:
            super()._reset()
            self._wholes.clear()
            self._statuses.clear()

    def _file_added(self, number: int, fd: int) -> None:
        facts = _facts(fd)
        super()._file_added(number, fd)
        if number == len(self._namespaces):
            self._namespaces = np.append(self._namespaces, facts)
        self._namespaces[number] = facts


def _facts(fd: int) -> NDArray[np.void]:
    """What a namespace is, of _NAMESPACE_DTYPE."""
    queue = nvme.queue_limits(fd)
    try:
        controller, namespace = nvme.identify_controller(fd), nvme.identify_namespace(fd)
    except OSError as error:
        reason = error.strerror or error
        if error.errno in (errno.EACCES, errno.EPERM):
            reason = "not permitted; before Linux 6.2 it needs CAP_SYS_ADMIN"
        raise UnsupportedError(f"nvme: the drive could not be asked what it is: {reason}") from error
    if namespace.metadata_bytes or queue.is_zoned:
        what = "is zoned" if queue.is_zoned else f"has {namespace.metadata_bytes} bytes of metadata beside each block"
        raise UnsupportedError(f"nvme: namespace {namespace.number} of {controller.serial} {what}")
    limits = command_limits(controller, queue, namespace.lba_bytes)
    mode = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE
    facts = np.zeros((), _NAMESPACE_DTYPE)
    facts["number"] = namespace.number
    facts["lba_bytes"] = namespace.lba_bytes
    facts["size_bytes"] = namespace.size_bytes
    facts["aligned_bytes"] = limits.aligned
    facts["unaligned_bytes"] = limits.unaligned
    facts["is_allowed"] = mode != os.O_WRONLY, mode != os.O_RDONLY
    return facts

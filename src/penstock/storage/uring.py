"""Transfers by io_uring, in batches: a whole one is put into the ring by a few array assignments.

What limits it is not Python, as long as the device has work while Python runs: entries for the next requests lie in the
submission ring before they are needed, and are submitted when others have completed, before those are looked at. On 2
CPUs and a virtio disk, random reads of 4 KiB, 64 in the kernel, take 9 to 10 µs of CPU each, fio's 8 to 9.
"""

from __future__ import annotations

import errno
import threading
import time
from collections import deque
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from penstock.linux import uring
from penstock.linux.uring import LARGEST_BUFFER_BYTES, SQE_DTYPE, Cqes, Ring, Sqes
from penstock.records import as_records, joined, words
from penstock.storage.base import (
    COMPLETION_DTYPE,
    WRITE,
    Completions,
    Engine,
    Requests,
    completed,
    resume_at,
)

# Requests that the kernel has at once. Devices take fewer (virtio 256, NVMe 1023 a queue); chosen without measurement.
DEPTH = 256
# Entries a system call. A virtio device begins with one group while the next is submitted: of random reads of 4 KiB,
# 64 deep, 53,000 a second instead of 47,000; of writes of 128 KiB, 32 deep, 17,200 instead of 14,300 (medians of
# four, without entries made beforehand). With them 4, 8 and 16 a call gave 0.93, 0.96 and 0.95 of fio's rate.
_GROUP = 8
_FIRST_GROUP = 2  # to a device that has nothing to do
# Three times as many requests as the kernel has are ready in the submission ring, or as many as that: more entries than
# these take more than the 64 KiB that an ordinary user may lock on old systems.
_FEW_ENTRIES = 512
# Of what the kernel has, this part is waited for at once, and replaced by what is ready. Of fio's rate of 4 KiB
# requests, 64 deep, reads had 0.91, 0.96 and 0.96 with a half, a quarter and an eighth (medians of 10 rounds), writes
# 0.90, 0.91 and 0.91 (of 24 to 36); the CPU that each takes is the same within 5 %.
_PART = 8
_FILE_SLOTS = _BUFFER_SLOTS = 256  # of the tables of registered files and buffers; what is beyond goes unregistered
_LARGEST_TRANSFER_BYTES = 0x7FFFF000  # of one entry: MAX_RW_COUNT
_NO_SLOT = np.uint64(0xFFFFFFFFFFFFFFFF)  # user_data of a cancellation
_LAST = np.uint64(0xFFFFFFFFFFFFFFFE)  # user_data of what comes after all others
_RETRY_S = 0.001
_Number = TypeVar("_Number", np.uint8, np.uint16, np.int32)


class UringEngine(Engine):
    """Requests in a submission ring, completions in another; one system call a batch.

    Files are registered, and buffers up to 1 GiB where RLIMIT_MEMLOCK allows; what cannot be is used unregistered.

    Args:
        depth: requests that the kernel has at once, a power of two; more wait here.
        register_buffers: False leaves buffers unpinned, which costs each request the pinning of its pages.

    Raises:
        UnsupportedError: io_uring is not there, or not permitted.
        OSError: no descriptor or memory is left.
    """

    name = "uring"
    _sqe_dtype = SQE_DTYPE

    def __init__(self, depth: int = DEPTH, *, register_buffers: bool = True) -> None:
        super().__init__()
        entries = max(2 * depth, min(4 * depth, _FEW_ENTRIES))
        self._ring = Ring(entries, entries, self._sqe_dtype)
        self._depth = self._ring.entries * depth // entries  # less where the kernel has no rings so large
        self._lock = threading.Condition()
        self._backlog: deque[Requests] = deque()
        self._ready: list[Completions] = []
        self._ready_count = 0
        self._pending = 0  # submitted, not ready
        self._is_awaited = False  # a thread is in the kernel, waiting for all of us
        self._others = 0  # that wait for it
        # Each request in the kernel has a slot, and its number is the entry's user_data; so have those that are ready.
        # Completions are answered with those, and looked at when there are as many as are waited for.
        slots = self._ring.entries
        self._slots = np.zeros(slots, COMPLETION_DTYPE)
        self._slot_words = words(self._slots)
        self._reached = np.zeros(slots, np.int64)  # [slots], bytes
        self._resumed = np.zeros(slots, np.int64)  # [slots], where the present try began
        self._faulted = np.zeros(slots, bool)  # [slots], EFAULT came once
        self._is_marked = False  # one of these three may be set somewhere
        self._free = np.arange(slots)
        self._free_count = slots
        self._again: list[int] = []  # slots whose transfer goes on
        self._is_cancelling = False
        self._largest_transfer_bytes = _LARGEST_TRANSFER_BYTES
        # What an entry says of a file or a buffer, by the engine's number.
        self._file_fds = np.zeros(0, np.int32)  # [files], the slot where registered
        self._file_flags = np.zeros(0, np.uint8)  # [files]
        self._buffer_opcodes = np.zeros(0, np.uint8)  # [buffers], of a read; a write's is the next one
        self._buffer_slots = np.zeros(0, np.uint16)  # [buffers], 0 where not registered
        self._has_file_table = self._has_buffer_table = False
        try:
            self._ring.register_files(_FILE_SLOTS)
            self._has_file_table = True
        except OSError:  # RLIMIT_NOFILE is lower
            pass
        try:
            if register_buffers:
                self._ring.register_buffers(_BUFFER_SLOTS)
                self._has_buffer_table = True
        except OSError:  # before Linux 5.19
            pass

    @property
    def registered_bytes(self) -> int:
        """Memory that is pinned for the ring."""
        with self._registry:
            is_fixed = self._buffer_opcodes == uring.READ_FIXED
            return int(self._sizes[: len(is_fixed)][is_fixed].sum())

    def cancel(self) -> None:
        with self._lock:
            for requests in self._backlog:
                self._finish(completed(requests, -errno.ECANCELED))
            self._backlog.clear()
            if self._ring.fd < 0:
                return
            stopped = np.concatenate((self._retract(), np.array(self._again, np.int64)))
            self._again.clear()
            self._give_back(stopped)
            cancelled = self._at(stopped)
            cancelled["result"] = -errno.ECANCELED
            self._finish(cancelled)
            self._cancel_in_kernel()
            self._lock.notify_all()

    def _retract(self) -> NDArray[np.int64]:
        """Take back what the kernel has not taken; returns the slots."""
        slots = self._ring.retract()["user_data"].view(np.int64)
        return slots[slots >= 0]

    def _cancel_in_kernel(self) -> None:
        """Ask it to end what it has; the submission ring is empty."""
        if self._free_count == len(self._slots):
            return
        self._is_cancelling = True
        entry = np.zeros(1, self._sqe_dtype)
        entry["opcode"] = uring.ASYNC_CANCEL
        entry["op_flags"] = uring.CANCEL_ALL | uring.CANCEL_ANY
        entry["user_data"] = _NO_SLOT
        self._ring.push(entry)
        self._flush(1)

    def _reset(self) -> None:
        with self._lock:
            self._backlog.clear()
            self._again.clear()
            self._pending = 0  # who waits, ends
            self._ready, self._ready_count = [], 0
            if self._ring.fd >= 0:
                self._give_back(self._retract())
                self._cancel_in_kernel()
                while self._is_awaited:  # it is woken by what it waits for, or by what was cancelled
                    self._lock.wait(_RETRY_S)
                self._wait_for_kernel()
            self._ready, self._ready_count, self._pending = [], 0, 0
            self._free = np.arange(len(self._slots))
            self._free_count = 0
            self._give_back(self._free)
            self._lock.notify_all()

    def _wait_for_kernel(self) -> None:
        """Until it has nothing of ours: told by an entry that it begins only when all before it are done."""
        self._ring.retract()
        entry = np.zeros(1, self._sqe_dtype)  # opcode 0: NOP
        entry["flags"] = uring.DRAIN
        entry["user_data"] = _LAST
        self._ring.push(entry)
        while True:
            self._flush(1)
            if (self._ring.pop()["user_data"] == _LAST).any():
                return
            try:
                self._ring.enter(0, 1, _RETRY_S)
            except OSError as error:
                if error.errno not in (errno.EINTR, errno.EAGAIN, errno.EBUSY):
                    raise

    def _submit(self, requests: Requests) -> None:
        with self._lock:
            self._check_open()
            self._pending += len(requests)
            self._backlog.append(self._prepared(requests))
            self._pump()

    def _prepared(self, requests: Requests) -> Requests:
        """What the kernel is given for them, one entry each. Needs the lock."""
        return requests

    def _wait(self, count: int, timeout_s: float | None) -> Completions:
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        with self._lock:
            while self._pending:
                self._flush()
                left_s = None if deadline is None else deadline - time.monotonic()
                is_late = left_s is not None and left_s <= 0
                if not self._is_awaited:  # who waits in the kernel counts on what is in the ring
                    # All at once: until there are enough, what is ready takes their places.
                    is_enough = self._ready_count + self._ring.completed >= count or is_late
                    if is_enough or not self._ring.unsubmitted or self._in_kernel <= 0:
                        self._take(self._ring.pop())
                        self._pump()
                if self._ready_count >= count or is_late:
                    break
                if self._is_awaited:
                    self._others += 1
                    try:
                        self._lock.wait(left_s)
                    finally:
                        self._others -= 1
                else:
                    self._wait_in_kernel(count - self._ready_count, left_s)
            ready, self._ready, self._ready_count = self._ready, [], 0
        return joined(ready) if ready else np.zeros(0, COMPLETION_DTYPE)

    def _wait_in_kernel(self, count: int, left_s: float | None) -> None:
        """Wait for completions in the ring, with the lock released: only one thread at a time may count on them."""
        completed, in_kernel = self._ring.completed, self._in_kernel
        if in_kernel <= 0 and completed:  # since they were last taken
            return
        if in_kernel <= 0:  # the kernel takes nothing for now, for lack of memory
            self._lock.wait(_RETRY_S if left_s is None else min(_RETRY_S, left_s))
            return
        self._is_awaited = True
        self._lock.release()
        try:
            self._ring.enter(0, min(count, completed + max(1, in_kernel // _PART)), left_s)
        except OSError as error:
            if error.errno not in (errno.EINTR, errno.EAGAIN, errno.EBUSY):
                raise
        finally:
            self._lock.acquire()
            self._is_awaited = False
            if self._others:
                self._lock.notify_all()

    @property
    def _in_kernel(self) -> int:
        """Requests under way there. Needs the lock."""
        return len(self._slots) - self._free_count - self._ring.unsubmitted - len(self._again) - self._ring.completed

    def _pump(self) -> None:
        """Give the kernel what it can take, and make the next ones ready. Needs the lock."""
        self._flush()
        while room := self._ring.entries - self._ring.unsubmitted:
            if self._again:
                slots, self._again = np.array(self._again[:room]), self._again[room:]
            elif self._backlog and self._free_count:
                slots = self._place(room)
            else:
                return
            self._ring.push(self._entries(slots))
            self._flush()

    def _place(self, most: int) -> NDArray[np.intp]:
        """Slots for as many requests of the backlog as there are."""
        taken = []
        count = 0
        most = min(most, self._free_count)
        while self._backlog and count < most:
            requests = self._backlog.popleft()
            if len(requests) > most - count:
                self._backlog.appendleft(requests[most - count :])
                requests = requests[: most - count]
            taken.append(requests)
            count += len(requests)
        self._free_count -= count
        slots = self._free[self._free_count : self._free_count + count].copy()
        self._slot_words[slots] = words(completed(joined(taken), 0))
        if self._is_marked:
            self._unmark(slots)
        return slots

    def _unmark(self, slots: NDArray[np.intp] | slice) -> None:
        self._reached[slots] = 0
        self._resumed[slots] = 0
        self._faulted[slots] = False

    def _at(self, slots: NDArray[np.intp]) -> Completions:
        """Copies of the requests in some slots."""
        return as_records(self._slot_words.take(slots, 0), COMPLETION_DTYPE)

    def _entries(self, slots: NDArray[np.intp]) -> Sqes:
        requests = self._at(slots)
        buffers, files = requests["buffer"], requests["file"]
        offset, length, buffer_offset = requests["offset"], requests["length"], requests["buffer_offset"]
        if self._is_marked:
            begun = self._resumed[slots]
            offset, length, buffer_offset = offset + begun, length - begun, buffer_offset + begun
        entries = np.zeros(len(slots), SQE_DTYPE)
        entries["opcode"] = self._buffer_opcodes.take(buffers) + requests["operation"]
        entries["flags"] = self._file_flags.take(files)
        entries["fd"] = self._file_fds.take(files)
        entries["offset"] = offset
        entries["address"] = self._addresses.take(buffers) + buffer_offset.view(np.uint64)
        entries["length"] = np.minimum(length, self._largest_transfer_bytes)
        entries["user_data"] = slots
        entries["buffer"] = self._buffer_slots.take(buffers)
        return entries

    def _flush(self, least_room: int = 0) -> None:
        """Have the kernel take entries of the submission ring; what it cannot take now stays there. Needs the lock."""
        unsubmitted = self._ring.unsubmitted
        if not unsubmitted:
            return
        room = self._depth - self._in_kernel
        group = _FIRST_GROUP if room >= self._depth else _GROUP
        most = min(unsubmitted, max(room, least_room))
        while most > 0:
            try:
                most -= self._ring.enter(min(most, group), 0)
            except OSError as error:
                if error.errno == errno.EINTR:
                    continue
                if error.errno not in (errno.EAGAIN, errno.EBUSY):
                    raise
                return
            group = _GROUP

    def _take(self, entries: Cqes) -> None:
        """Account for completions. Needs the lock."""
        if not len(entries):
            return
        slots = entries["user_data"].view(np.int64)
        if slots.min() < 0:  # a cancellation, or the last of all
            entries = entries[slots >= 0]
            slots = entries["user_data"].view(np.int64)
        moved = self._moved(entries, slots)
        finished = self._at(slots)
        results = finished["result"]
        results[:] = moved
        if self._is_marked:
            results += np.where(moved >= 0, self._resumed[slots], 0)
        is_whole = results >= finished["length"]
        if not is_whole.all():
            is_done = is_whole.copy()
            for index in np.flatnonzero(~is_whole).tolist():
                result = self._outcome(int(slots[index]), int(moved[index]))
                if result is None:
                    self._again.append(int(slots[index]))
                else:
                    is_done[index], finished["result"][index] = True, result
            finished, slots = finished[is_done], slots[is_done]
        self._finish(finished)
        self._give_back(slots)

    def _moved(self, entries: Cqes, slots: NDArray[np.int64]) -> NDArray[np.int64]:  # noqa: ARG002
        """Bytes that each completion tells of, or −errno."""
        return entries["result"].astype(np.int64)

    def _give_back(self, slots: NDArray[np.int64]) -> None:
        self._free[self._free_count : self._free_count + len(slots)] = slots
        self._free_count += len(slots)
        if self._free_count == len(self._slots):
            self._is_cancelling = False
            if self._is_marked:
                self._unmark(slice(None))
                self._is_marked = False

    def _outcome(self, slot: int, moved: int) -> int | None:
        """The result of a transfer that was not whole; None where it goes on."""
        request = self._slots[slot]
        if moved in (-errno.EAGAIN, -errno.EINTR, -errno.ECANCELED):  # the last where its submitter's thread has ended
            return -errno.ECANCELED if self._is_cancelling else None
        # A read through the page cache that had to wait goes on in the thread that submitted it. Where that has ended,
        # the kernel cannot reach the memory any more (seen on Linux 6.18); whoever waits here submits it again.
        if moved == -errno.EFAULT and not self._faulted[slot] and not self._is_cancelling:
            self._faulted[slot] = self._is_marked = True
            return None
        if moved < 0:
            return moved
        if moved == 0 and request["operation"] == WRITE:
            return -errno.EIO
        reached = int(self._resumed[slot]) + moved
        if reached <= self._reached[slot]:  # no further: the file ends here
            return int(self._reached[slot])
        self._reached[slot] = reached
        self._is_marked = True
        if self._is_cancelling:
            return -errno.ECANCELED
        self._resumed[slot] = resume_at(reached, bool(self._direct[request["file"]]))
        self._continued += 1
        return None

    def _finish(self, done: Completions) -> None:
        self._ready.append(done)
        self._ready_count += len(done)
        self._pending -= len(done)

    def _close(self) -> None:
        self._ring.close()

    def _file_added(self, number: int, fd: int) -> None:
        is_fixed = self._has_file_table and number < _FILE_SLOTS
        if is_fixed:
            self._ring.update_file(number, fd)
        self._file_fds = _with(self._file_fds, number, number if is_fixed else fd)
        self._file_flags = _with(self._file_flags, number, uring.FIXED_FILE if is_fixed else 0)

    def _file_removed(self, number: int) -> None:
        if self._file_flags[number]:
            self._ring.update_file(number, -1)

    def _buffer_added(self, number: int, pin: bool) -> None:
        is_fixed = False
        size_bytes = int(self._sizes[number])
        if pin and self._has_buffer_table and number < _BUFFER_SLOTS and 0 < size_bytes <= LARGEST_BUFFER_BYTES:
            try:
                self._ring.update_buffer(number, int(self._addresses[number]), size_bytes)
                is_fixed = True
            except OSError:  # over RLIMIT_MEMLOCK, or memory that cannot be pinned: a file's
                pass
        self._buffer_opcodes = _with(self._buffer_opcodes, number, uring.READ_FIXED if is_fixed else uring.READ)
        self._buffer_slots = _with(self._buffer_slots, number, number if is_fixed else 0)

    def _buffer_removed(self, number: int) -> None:
        if self._buffer_opcodes[number] == uring.READ_FIXED:
            self._ring.update_buffer(number, 0, 0)
            self._buffer_opcodes[number] = uring.READ


def _with(values: NDArray[_Number], number: int, value: int) -> NDArray[_Number]:
    if number == len(values):
        return np.append(values, values.dtype.type(value))
    values[number] = value
    return values

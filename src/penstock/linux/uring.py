"""io_uring by its three system calls: set-up, the mapped rings, registration. Requests are `penstock.storage.uring`'s.

Facts:

- The rings are shared memory. The kernel looks at the submission ring only within `io_uring_enter` (there is no
  polling thread here), so entries and tail may be written in any order before it. It fills the completion ring at any
  time, and moves the tail after the entries; their addresses are computed from the tail, so no CPU reads them before.
- A completion that finds the ring full is kept by the kernel (IORING_FEAT_NODROP) and the ring's flag CQ_OVERFLOW set;
  the next `io_uring_enter` that waits brings it in.
- Registered buffers are pinned. Without CAP_IPC_LOCK they count against RLIMIT_MEMLOCK, which may be as little as
  64 KiB, and registering fails with ENOMEM; a buffer has 1 GiB at most.
- Commands that are passed through to a driver (IORING_OP_URING_CMD) need entries of 128 bytes and completions of 32,
  for the whole ring (Linux 5.19).
- Seccomp profiles of container engines refuse `io_uring_setup` with EPERM or ENOSYS, kernel.io_uring_disabled does
  with EPERM.

Sources: io_uring_setup(2), io_uring_enter(2), io_uring_register(2), linux/io_uring.h.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from typing import Self, TypeAlias

import numpy as np
from numpy.typing import NDArray

from penstock.errors import UnsupportedError
from penstock.linux.libc import bare_syscall, failed, syscall
from penstock.records import as_records, words

_SETUP, _ENTER, _REGISTER = 425, 426, 427

READ_FIXED, WRITE_FIXED, ASYNC_CANCEL, READ, WRITE = 4, 5, 14, 22, 23  # opcodes
URING_CMD = 46
FIXED_FILE, DRAIN = 1 << 0, 1 << 1  # of SQE flags
CANCEL_ALL, CANCEL_ANY = 1 << 0, 1 << 2

_SETUP_CQSIZE, _SETUP_CLAMP, _SETUP_SUBMIT_ALL = 1 << 3, 1 << 4, 1 << 7
_BIG = 1 << 10 | 1 << 11  # IORING_SETUP_SQE128 and IORING_SETUP_CQE32
_FEAT_SINGLE_MMAP, _FEAT_NODROP, _FEAT_EXT_ARG = 1 << 0, 1 << 1, 1 << 8
_ENTER_GETEVENTS, _ENTER_EXT_ARG = 1 << 0, 1 << 3
_REGISTER_PROBE, _OP_SUPPORTED, _OPCODES = 8, 1 << 0, 256
_REGISTER_FILES, _REGISTER_FILES_UPDATE, _REGISTER_BUFFERS2, _REGISTER_BUFFERS_UPDATE = 2, 6, 15, 16
_RSRC_SPARSE = 1 << 0
_OFF_SQ_RING, _OFF_SQES = 0, 0x10000000

_enter = bare_syscall([ctypes.c_int, *[ctypes.c_uint] * 3, ctypes.c_void_p, ctypes.c_size_t])

LARGEST_BUFFER_BYTES = 1 << 30  # of a registered one

SQE_HEAD = [
    ("opcode", np.uint8),
    ("flags", np.uint8),
    ("ioprio", np.uint16),
    ("fd", np.int32),
    ("offset", np.uint64),  # of a command passed through: which
    ("address", np.uint64),
    ("length", np.uint32),
    ("op_flags", np.uint32),  # rw_flags, cancel_flags, …
    ("user_data", np.uint64),
    ("buffer", np.uint16),
    ("personality", np.uint16),
    ("file_index", np.int32),
]  # what all entries begin with, 48 bytes
SQE_DTYPE = np.dtype([*SQE_HEAD, ("address3", np.uint64), ("pad", np.uint64)])  # struct io_uring_sqe
_CQE_FIELDS = [("user_data", np.uint64), ("result", np.int32), ("flags", np.uint32)]
CQE_DTYPE = np.dtype(_CQE_FIELDS)  # struct io_uring_cqe
CQE32_DTYPE = np.dtype([*_CQE_FIELDS, ("result2", np.uint64), ("pad", np.uint64)])
Sqes: TypeAlias = NDArray[np.void]  # of Ring.sqe_dtype
Cqes: TypeAlias = NDArray[np.void]  # of Ring.cqe_dtype


class _Offsets(ctypes.Structure):
    """struct io_sqring_offsets and struct io_cqring_offsets: they differ in their last words' meaning only."""

    _fields_ = [
        ("head", ctypes.c_uint32),
        ("tail", ctypes.c_uint32),
        ("ring_mask", ctypes.c_uint32),
        ("ring_entries", ctypes.c_uint32),
        ("flags_or_overflow", ctypes.c_uint32),
        ("dropped_or_cqes", ctypes.c_uint32),
        ("array_or_flags", ctypes.c_uint32),
        ("resv1", ctypes.c_uint32),
        ("user_addr", ctypes.c_uint64),
    ]


class _Params(ctypes.Structure):
    """struct io_uring_params."""

    _fields_ = [
        ("sq_entries", ctypes.c_uint32),
        ("cq_entries", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("sq_thread_cpu", ctypes.c_uint32),
        ("sq_thread_idle", ctypes.c_uint32),
        ("features", ctypes.c_uint32),
        ("wq_fd", ctypes.c_uint32),
        ("resv", ctypes.c_uint32 * 3),
        ("sq_off", _Offsets),
        ("cq_off", _Offsets),
    ]


class _GetEventsArg(ctypes.Structure):
    """struct io_uring_getevents_arg."""

    _fields_ = [
        ("sigmask", ctypes.c_uint64),
        ("sigmask_sz", ctypes.c_uint32),
        ("min_wait_usec", ctypes.c_uint32),
        ("ts", ctypes.c_uint64),
    ]


class _Timespec(ctypes.Structure):
    """struct __kernel_timespec."""

    _fields_ = [("tv_sec", ctypes.c_int64), ("tv_nsec", ctypes.c_int64)]


class _RsrcRegister(ctypes.Structure):
    """struct io_uring_rsrc_register."""

    _fields_ = [
        ("nr", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("resv2", ctypes.c_uint64),
        ("data", ctypes.c_uint64),
        ("tags", ctypes.c_uint64),
    ]


class _RsrcUpdate2(ctypes.Structure):
    """struct io_uring_rsrc_update2."""

    _fields_ = [
        ("offset", ctypes.c_uint32),
        ("resv", ctypes.c_uint32),
        ("data", ctypes.c_uint64),
        ("tags", ctypes.c_uint64),
        ("nr", ctypes.c_uint32),
        ("resv2", ctypes.c_uint32),
    ]


class _FilesUpdate(ctypes.Structure):
    """struct io_uring_files_update."""

    _fields_ = [("offset", ctypes.c_uint32), ("resv", ctypes.c_uint32), ("fds", ctypes.c_uint64)]


class _ProbeOp(ctypes.Structure):
    """struct io_uring_probe_op."""

    _fields_ = [
        ("op", ctypes.c_uint8),
        ("resv", ctypes.c_uint8),
        ("flags", ctypes.c_uint16),
        ("resv2", ctypes.c_uint32),
    ]


class _Probe(ctypes.Structure):
    """struct io_uring_probe."""

    _fields_ = [
        ("last_op", ctypes.c_uint8),
        ("ops_len", ctypes.c_uint8),
        ("resv", ctypes.c_uint16),
        ("resv2", ctypes.c_uint32 * 3),
        ("ops", _ProbeOp * _OPCODES),
    ]


class _Iovec(ctypes.Structure):
    _fields_ = [("base", ctypes.c_uint64), ("length", ctypes.c_uint64)]


class Ring:
    """One io_uring. Not safe to use from several threads at once, but for `enter` without submissions.

    Args:
        entries: of the submission ring; a power of two.
        completions: of the completion ring; a power of two, at least entries.
        sqe_dtype: of an entry, which begins as `SQE_HEAD` does and has 64 bytes, or 128; then completions have 32.

    Raises:
        UnsupportedError: this kernel has no io_uring that can wait with a timeout (5.11), or it is not permitted here,
            or it has no entries of 128 bytes (5.19).
        OSError: no descriptor or memory is left.
    """

    def __init__(self, entries: int, completions: int, sqe_dtype: np.dtype[np.void] = SQE_DTYPE) -> None:
        self.fd = -1
        self.sqe_dtype = sqe_dtype
        self.cqe_dtype = CQE_DTYPE if sqe_dtype.itemsize == SQE_DTYPE.itemsize else CQE32_DTYPE
        self.fd, params = _setup(entries, completions, 0 if self.cqe_dtype == CQE_DTYPE else _BIG)
        try:
            missing = (_FEAT_SINGLE_MMAP | _FEAT_NODROP | _FEAT_EXT_ARG) & ~params.features
            if missing:
                raise UnsupportedError(f"io_uring: this kernel lacks features {missing:#x}; Linux 5.11 has them")
            self._map(params)
        except BaseException:
            self.close()
            raise

    def _map(self, params: _Params) -> None:
        sq, cq = params.sq_off, params.cq_off
        cqes_bytes = self.cqe_dtype.itemsize * params.cq_entries
        ring_bytes = max(sq.array_or_flags + 4 * params.sq_entries, cq.dropped_or_cqes + cqes_bytes)
        flags = mmap.MAP_SHARED | mmap.MAP_POPULATE
        self._ring = mmap.mmap(self.fd, ring_bytes, flags=flags, offset=_OFF_SQ_RING)
        self._entries = mmap.mmap(self.fd, self.sqe_dtype.itemsize * params.sq_entries, flags=flags, offset=_OFF_SQES)
        self.entries: int = params.sq_entries
        self.completions: int = params.cq_entries
        self._sq_head = self._word(sq.head)
        self._sq_tail = self._word(sq.tail)
        self._cq_head = self._word(cq.head)
        self._cq_tail = self._word(cq.tail)
        # Rows of words, [entries, words].
        self._sqes = np.frombuffer(self._entries, np.uint64).reshape(self.entries, -1)
        cqes = np.frombuffer(self._ring, np.uint64, cqes_bytes // 8, cq.dropped_or_cqes)
        self._cqes = cqes.reshape(self.completions, -1)
        # Entry number n of the ring is always SQE number n.
        np.frombuffer(self._ring, np.uint32, self.entries, sq.array_or_flags)[:] = np.arange(self.entries)

    def _word(self, offset: int) -> memoryview:
        return memoryview(self._ring)[offset : offset + 4].cast("I")  # read in a third of the time of an array's

    def push(self, sqes: Sqes) -> int:
        """Copy entries into the submission ring, as many as fit; returns their number. `enter` submits them."""
        tail = self._sq_tail[0]
        count = min(len(sqes), self.entries - self.unsubmitted)
        position = tail & (self.entries - 1)
        first = min(count, self.entries - position)
        rows = words(sqes)
        self._sqes[position : position + first] = rows[:first]
        if first < count:
            self._sqes[: count - first] = rows[first:count]
        self._sq_tail[0] = (tail + count) & 0xFFFFFFFF
        return count

    @property
    def unsubmitted(self) -> int:
        """Entries pushed that the kernel has not taken yet."""
        return (self._sq_tail[0] - self._sq_head[0]) & 0xFFFFFFFF

    @property
    def completed(self) -> int:
        """Completions that are in the ring."""
        return (self._cq_tail[0] - self._cq_head[0]) & 0xFFFFFFFF

    def retract(self) -> Sqes:
        """Take back the entries that the kernel has not taken."""
        head, count = self._sq_head[0], self.unsubmitted
        taken = self._sqes[(head + np.arange(count)) & (self.entries - 1)]
        self._sq_tail[0] = head
        return as_records(taken, self.sqe_dtype)

    def enter(self, submit: int, wait: int, timeout_s: float | None = None) -> int:
        """Submit entries and wait for completions; returns how many entries the kernel took.

        Args:
            submit: entries at most.
            wait: completions to be in the ring on return, those that are there already included.
            timeout_s: return without them after this time.

        Raises:
            OSError: EINTR, EAGAIN or EBUSY (no memory for more now, or completions to be taken first), or EBADR.
        """
        if not wait or timeout_s is None:
            taken: int = _enter(_ENTER, self.fd, submit, wait, _ENTER_GETEVENTS, None, 0)
        else:
            timespec = _Timespec(int(timeout_s), int(timeout_s % 1 * 1e9))
            argument = _GetEventsArg(ts=ctypes.addressof(timespec))
            flags = _ENTER_GETEVENTS | _ENTER_EXT_ARG
            taken = _enter(_ENTER, self.fd, submit, wait, flags, ctypes.byref(argument), ctypes.sizeof(argument))
        if taken == -1:
            error = failed("io_uring_enter")
            if error.errno == errno.ETIME:
                return 0
            raise error
        return taken

    def pop(self) -> Cqes:
        """Take all completions that are in the ring."""
        head, tail = self._cq_head[0], self._cq_tail[0]
        count = (tail - head) & 0xFFFFFFFF  # not self.completed: the tail moves
        position = (tail - count) & (self.completions - 1)
        first = min(count, self.completions - position)
        taken = self._cqes[position : position + first].copy()
        if first < count:
            taken = np.concatenate((taken, self._cqes[: count - first]))
        self._cq_head[0] = tail
        return as_records(taken, self.cqe_dtype)

    def supports(self, opcode: int) -> bool:
        """Whether this kernel knows an opcode."""
        probe = _Probe()
        self._register(_REGISTER_PROBE, ctypes.pointer(probe), _OPCODES)
        return bool(probe.ops[opcode].flags & _OP_SUPPORTED)

    def register_files(self, slots: int) -> None:
        """Make a table of that many descriptors, all empty.

        Raises:
            OSError: EMFILE where the table is larger than RLIMIT_NOFILE.
        """
        empty = (ctypes.c_int32 * slots)(*[-1] * slots)
        self._register(_REGISTER_FILES, ctypes.cast(empty, ctypes.POINTER(ctypes.c_int32)), slots)

    def update_file(self, slot: int, fd: int) -> None:
        """Put a descriptor into the table; -1 takes it out. The table holds the file open by itself."""
        value = ctypes.c_int32(fd)
        update = _FilesUpdate(offset=slot, fds=ctypes.addressof(value))
        self._register(_REGISTER_FILES_UPDATE, ctypes.pointer(update), 1)

    def register_buffers(self, slots: int) -> None:
        """Make a table of that many buffers, all empty.

        Raises:
            OSError: EINVAL before Linux 5.19.
        """
        table = _RsrcRegister(nr=slots, flags=_RSRC_SPARSE)
        self._register(_REGISTER_BUFFERS2, ctypes.pointer(table), ctypes.sizeof(table))

    def update_buffer(self, slot: int, address: int, length_bytes: int) -> None:
        """Put a buffer into the table, which pins it; address and length of 0 take it out.

        Raises:
            OSError: ENOMEM over RLIMIT_MEMLOCK; EFAULT or EOPNOTSUPP for memory that cannot be pinned.
        """
        vector = _Iovec(address, length_bytes)
        tag = ctypes.c_uint64(0)
        update = _RsrcUpdate2(offset=slot, data=ctypes.addressof(vector), tags=ctypes.addressof(tag), nr=1)
        self._register(_REGISTER_BUFFERS_UPDATE, ctypes.pointer(update), ctypes.sizeof(update))

    def _register(self, operation: int, argument: ctypes._Pointer[ctypes._CData], count: int) -> None:
        syscall(_REGISTER, "io_uring_register", self.fd, operation, argument, count)

    def close(self) -> None:
        """Unmap the rings and close the descriptor; a second time does nothing.

        Requests in flight go on writing into their buffers for a while: wait for them before.
        """
        for name in ("_sq_head", "_sq_tail", "_cq_head", "_cq_tail", "_sqes", "_cqes"):
            self.__dict__.pop(name, None)
        for name in ("_ring", "_entries"):
            mapping = self.__dict__.pop(name, None)
            if mapping is not None:
                mapping.close()
        if self.fd >= 0:
            fd, self.fd = self.fd, -1
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _setup(entries: int, completions: int, more_flags: int) -> tuple[int, _Params]:
    wanted = _SETUP_CQSIZE | _SETUP_CLAMP | more_flags
    for flags in (wanted | _SETUP_SUBMIT_ALL, wanted):  # a bad request is not to stop those behind it (Linux 5.18)
        params = _Params(cq_entries=completions, flags=flags)
        try:
            fd = syscall(_SETUP, "io_uring_setup", entries, ctypes.pointer(params))
        except OSError as error:
            if error.errno == errno.EINVAL and flags != wanted:
                continue
            if error.errno in (errno.ENOSYS, errno.EPERM, errno.EACCES, errno.EINVAL):
                raise UnsupportedError(f"io_uring: {_reason(error)}") from error
            raise
        return fd, params
    raise AssertionError("the last flags either work or raise")


def _reason(error: OSError) -> str:
    if error.errno == errno.ENOSYS:
        return "this kernel has none, or a seccomp filter hides it"
    if error.errno == errno.EINVAL:
        return "this kernel's is too old"
    try:
        with open("/proc/sys/kernel/io_uring_disabled", encoding="ascii") as file:
            setting = file.read().strip()
    except OSError:
        setting = "0"
    if setting != "0":
        return f"not permitted: kernel.io_uring_disabled is {setting}"
    return "not permitted: a seccomp filter refuses it, as those of container engines do"


def probe() -> str:
    """Why io_uring cannot be used here; "" where it can."""
    try:
        Ring(1, 2).close()
    except (UnsupportedError, OSError) as error:
        return str(error).removeprefix("io_uring: ")
    return ""

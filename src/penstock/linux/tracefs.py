"""Page-cache tracepoints through an own tracefs instance, read as binary ring-buffer pages.

Facts, each seen on 6.18:

- An instance (a directory made under ``instances/``) has rings, filters and switches of its own and leaves
  every other user of ftrace alone. It outlives the process that made it, so its name carries the maker's pid
  and start time, and anyone may remove those whose maker is gone (`remove_stale_instances`).
- tracefs need not be mounted: fsopen + fsmount give a detached mount that only this descriptor reaches and
  that goes away with it.
- ``set_event_pid`` with the option ``event-fork`` follows a process tree from before its first instruction.
- ``common_pid`` is a thread id as the initial pid namespace numbers it. In a container with a pid namespace of
  its own those numbers mean nothing, which is checked by reading back one own event.
- A mapping of whole 2 MiB folios is entered without an event: filemap_map_pages returns before its tracepoint
  once a page-table entry of that size fits. Whoever needs every mapped page reads /proc/PID/pagemap as well.
- Choosing another trace clock or ring size costs 10-20 ms each and removing an instance 100 ms (RCU grace
  periods), so the defaults stay (the local clock orders events of one CPU, and across CPUs as well as the TSC).

Sources: Documentation/trace/{ftrace,events,ring-buffer-map}.rst; the page layout is that of events/header_page
and header_event.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from penstock.errors import UnsupportedError
from penstock.linux.libc import syscall
from penstock.linux.pagecache import PAGE_BYTES

INSTANCE_PREFIX = "penstock-"

_NR_FSOPEN, _NR_FSCONFIG, _NR_FSMOUNT = 430, 431, 432
_FSCONFIG_CMD_CREATE = 6
_FSOPEN_CLOEXEC = _FSMOUNT_CLOEXEC = 1
_KNOWN_MOUNTS = ("/sys/kernel/tracing", "/sys/kernel/debug/tracing")

_PADDING, _TIME_EXTEND, _TIME_STAMP = 29, 30, 31
_COMMIT_MASK = (1 << 20) - 1
_MISSED_EVENTS = 1 << 31
_DEFAULT_RING_KIB = 1408  # what the kernel gives a CPU of a new instance: 32,000 events of 44 bytes
_RINGS_KIB = 96 << 10  # of all CPUs together

READ = "mm_filemap_get_pages"
FAULT = "mm_filemap_fault"
MAP = "mm_filemap_map_pages"
ADD = "mm_filemap_add_to_page_cache"
ACCESS_EVENTS = (READ, FAULT, MAP)

EVENT_DTYPE = np.dtype(
    [
        ("time_ns", np.int64),  # of the kernel's local trace clock: for ordering only
        ("thread", np.int32),
        ("kind", np.int32),  # index into the events an instance was opened with
        ("device", np.int64),  # as os.makedev counts
        ("inode", np.uint64),
        ("start", np.int64),  # bytes, half-open
        ("stop", np.int64),
    ]
)
Events = NDArray[np.void]  # of EVENT_DTYPE, [events]


@dataclass(frozen=True, slots=True)
class Field:
    """Where one field of a tracepoint's record lies."""

    offset_bytes: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Format:
    """The record of one tracepoint, as its ``format`` file describes it."""

    name: str
    identifier: int
    fields: dict[str, Field]


def parse_format(text: str) -> Format:
    """Read an ``events/…/format`` file.

    Raises:
        UnsupportedError: the text has no name or no ID.
    """
    name = re.search(r"^name: (\w+)$", text, re.MULTILINE)
    identifier = re.search(r"^ID: (\d+)$", text, re.MULTILINE)
    if name is None or identifier is None:
        raise UnsupportedError(
            "a tracepoint's format file lacks its name or ID line; penstock cannot read this kernel's tracefs"
        )
    fields = {
        match[1]: Field(int(match[2]), int(match[3]))
        for match in re.finditer(
            r"field:[^;]*?(\w+)(?:\[\d*\])?;\s*offset:(\d+);\s*size:(\d+);", text
        )
    }
    return Format(name[1], int(identifier[1]), fields)


class TraceFs:
    """A descriptor of a tracefs root: the machine's mount, or a detached one of our own.

    Raises:
        UnsupportedError: tracefs can be neither found nor mounted here.
    """

    def __init__(self) -> None:
        self.fd, self.source = self._open()

    @staticmethod
    def _open() -> tuple[int, str]:
        reasons = []
        for mount in _KNOWN_MOUNTS:
            try:
                fd = os.open(mount, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                try:
                    os.stat("instances", dir_fd=fd)
                    if os.access("instances", os.W_OK, dir_fd=fd):
                        return fd, mount
                    reasons.append(f"{mount}: not writable")
                except OSError as error:
                    reasons.append(f"{mount}: {error.strerror}")
                os.close(fd)
            except OSError as error:
                reasons.append(f"{mount}: {error.strerror}")
        try:
            return _detached_mount(), "detached mount"
        except OSError as error:
            reasons.append(f"mounting it: {error.strerror}")
        raise UnsupportedError("no tracefs: " + "; ".join(reasons))

    def read(self, path: str) -> str:
        """The text of a file below the root."""
        with open(os.open(path, os.O_RDONLY | os.O_CLOEXEC, dir_fd=self.fd), encoding="ascii", errors="replace") as f:
            return f.read()

    def write(self, path: str, text: str) -> None:
        """Write a file below the root in one call, as tracefs wants it."""
        fd = os.open(path, os.O_WRONLY | os.O_TRUNC | os.O_CLOEXEC, dir_fd=self.fd)
        try:
            os.write(fd, text.encode())
        finally:
            os.close(fd)

    def available_events(self, names: Iterable[str]) -> list[str]:
        """Those of the filemap tracepoints that this kernel has."""
        found = []
        for name in names:
            with contextlib.suppress(OSError):
                os.stat(f"events/filemap/{name}", dir_fd=self.fd)
                found.append(name)
        return found

    def close(self) -> None:
        """Close the descriptor; a detached mount is gone with the last one."""
        os.close(self.fd)


def _detached_mount() -> int:
    name = ctypes.cast(ctypes.create_string_buffer(b"tracefs"), ctypes.POINTER(ctypes.c_char))
    context = syscall(_NR_FSOPEN, "fsopen", name, _FSOPEN_CLOEXEC)
    try:
        syscall(_NR_FSCONFIG, "fsconfig", context, _FSCONFIG_CMD_CREATE, None, None, 0)
        return syscall(_NR_FSMOUNT, "fsmount", context, _FSMOUNT_CLOEXEC, 0)
    finally:
        os.close(context)


def instance_name(pid: int) -> str:
    """The name of a process's instance: it tells whether the maker is still alive."""
    return f"{INSTANCE_PREFIX}{pid}-{_start_time(pid)}"


def _start_time(pid: int) -> str | None:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    return stat.rpartition(")")[2].split()[19]


def remove_stale_instances(tracefs: TraceFs) -> list[str]:
    """Remove the instances whose makers are gone (killed before they could); returns their names."""
    directory = os.open("instances", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=tracefs.fd)
    removed = []
    try:
        for name in os.listdir(directory):
            match = re.fullmatch(re.escape(INSTANCE_PREFIX) + r"(\d+)-(\w+)", name)
            if match and _start_time(int(match[1])) != match[2]:
                with contextlib.suppress(OSError):  # someone else was quicker, or it is in use
                    os.rmdir(name, dir_fd=directory)
                    removed.append(name)
    finally:
        os.close(directory)
    return removed


class Instance:
    """An own tracefs instance that records page-cache events of chosen processes and files.

    Args:
        tracefs: where to make it.
        events: tracepoints of the ``filemap`` system, such as `ACCESS_EVENTS`.
        pid: the process whose tree is followed; None records everyone.

    Raises:
        UnsupportedError: a tracepoint is missing, or thread ids are not those of this pid namespace.
        OSError: the kernel refused a step.
    """

    def __init__(self, tracefs: TraceFs, events: Sequence[str] = ACCESS_EVENTS, pid: int | None = None) -> None:
        self._tracefs = tracefs
        self.name = instance_name(os.getpid())
        self._path = f"instances/{self.name}"
        self._events = tuple(events)
        self._rings: list[int] = []
        self.missed_pages = 0  # ring-buffer pages that were overwritten before they were read
        try:
            self._formats = [parse_format(tracefs.read(f"events/filemap/{name}/format")) for name in events]
        except FileNotFoundError as error:
            raise UnsupportedError(f"this kernel lacks a page-cache tracepoint: {error.filename}") from error
        os.mkdir(self._path, dir_fd=tracefs.fd)
        try:
            self._configure(pid)
        except BaseException:
            self.close()
            raise

    def _configure(self, pid: int | None) -> None:
        cpus = os.cpu_count() or 1
        if cpus * _DEFAULT_RING_KIB > _RINGS_KIB:
            self._write("buffer_size_kb", str(max(256, _RINGS_KIB // cpus)))
        if pid is not None:
            self._write("options/event-fork", "1")
            self._write("set_event_pid", str(pid))
        per_cpu = os.open(
            f"{self._path}/per_cpu", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=self._tracefs.fd
        )
        try:
            for cpu in sorted(os.listdir(per_cpu)):
                self._rings.append(
                    os.open(
                        f"{cpu}/trace_pipe_raw", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=per_cpu
                    )
                )
        finally:
            os.close(per_cpu)
        self._check_pid_namespace()

    def _check_pid_namespace(self) -> None:
        self._write("trace_marker", "penstock")
        for header, data in self._pages():
            del header
            # Any event starts with common_type, flags, preempt count and then the writer's pid.
            pids = {struct.unpack_from("<i", record, 4)[0] for record in _records(data)}
            if os.getpid() in pids:
                return
        raise UnsupportedError(
            "tracefs numbers processes of another pid namespace; start the container in the host's to use it"
        )

    def _write(self, name: str, text: str) -> None:
        self._tracefs.write(f"{self._path}/{name}", text)

    def watch(self, files: Iterable[tuple[int, int]]) -> None:
        """Record only these files, given as (device, inode); an empty list records every file."""
        clauses = [
            f"(s_dev == {_kernel_device(device)} && i_ino == {inode})" for device, inode in files
        ]
        text = " || ".join(clauses)
        if len(text) > 4000 or not text:  # the kernel takes one page; the reader sorts out the rest
            text = "0"
        for name in self._events:
            self._write(f"events/filemap/{name}/filter", text)

    def start(self) -> None:
        """Switch the tracepoints on."""
        for name in self._events:
            self._write(f"events/filemap/{name}/enable", "1")

    def read(self) -> Events:
        """All events since the last call, over all CPUs, in the order of their times."""
        pages = list(self._pages())
        if not pages:
            return np.zeros(0, EVENT_DTYPE)
        events = decode_pages(pages, self._formats)
        return events[np.argsort(events["time_ns"], kind="stable")]

    def _pages(self) -> Iterable[tuple[bytes, bytes]]:
        for ring in self._rings:
            while True:
                try:
                    page = os.read(ring, PAGE_BYTES)
                except BlockingIOError:
                    break
                if len(page) < 16:
                    break
                commit = struct.unpack_from("<Q", page, 8)[0]
                if commit & _MISSED_EVENTS:
                    self.missed_pages += 1
                yield page[:16], page[16 : 16 + (commit & _COMMIT_MASK)]

    def close(self) -> None:
        """Stop recording and remove the instance."""
        for ring in self._rings:
            os.close(ring)
        self._rings = []
        with contextlib.suppress(FileNotFoundError):
            os.rmdir(self._path, dir_fd=self._tracefs.fd)

    def __enter__(self) -> Instance:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _kernel_device(device: int) -> int:
    return os.major(device) << 20 | os.minor(device)


def _records(data: bytes) -> Iterable[bytes]:
    """The records of one page, one by one: for a handful of events, and the oracle of `decode_pages`."""
    position = 0
    while position + 4 <= len(data):
        header = struct.unpack_from("<I", data, position)[0]
        kind = header & 31
        if kind in (_TIME_EXTEND, _TIME_STAMP):
            position += 8
        elif kind == _PADDING or kind == 0:
            if kind == _PADDING and header >> 5 == 0:
                return
            length = struct.unpack_from("<I", data, position + 4)[0]
            if kind == 0:
                yield data[position + 8 : position + 4 + length]
            position += 4 + length
        else:
            yield data[position + 4 : position + 4 + 4 * kind]
            position += 4 + 4 * kind


def decode_pages(pages: Sequence[tuple[bytes, bytes]], formats: Sequence[Format]) -> Events:
    """Decode ring-buffer pages (header, data) of CPUs in any order into events.

    All pages are walked in step, one event of each at a time, so that the work in Python grows with the
    events of the fullest page and not with the number of pages.
    """
    words_per_page = max(len(data) for _, data in pages) // 4 + 16  # room to gather a record at the end
    words = np.zeros((len(pages), words_per_page), np.uint32)
    ends = np.zeros(len(pages), np.int64)
    clock = np.zeros(len(pages), np.int64)
    for number, (page_header, data) in enumerate(pages):
        length = len(data) // 4
        words[number, :length] = np.frombuffer(data, np.uint32, length)
        ends[number] = length
        clock[number] = struct.unpack_from("<Q", page_header)[0]

    rows = np.flatnonzero(ends > 0)
    position = np.zeros(len(pages), np.int64)
    found_rows, found_words, found_times = [], [], []
    while len(rows):
        at = position[rows]
        header = words[rows, at].astype(np.int64)
        kind, delta = header & 31, header >> 5
        following = words[rows, at + 1].astype(np.int64)
        extend, stamp = kind == _TIME_EXTEND, kind == _TIME_STAMP
        stretched = (following << 27) + delta
        # An absolute stamp holds 59 bits; the rest are those of the page's own time.
        clock[rows] = np.where(
            stamp, stretched | (clock[rows] & (0xF << 59)), clock[rows] + np.where(extend, stretched, delta)
        )
        is_data = (kind <= 28) & ~((kind == 0) & (following == 0))
        found_rows.append(rows[is_data])
        found_words.append(at[is_data] + 1 + (kind[is_data] == 0))
        found_times.append(clock[rows][is_data])
        counted = (kind == 0) | (kind == _PADDING)
        step = np.where(extend | stamp, 2, np.where(counted, 1 + (following + 3) // 4, 1 + kind))
        over = ((kind == _PADDING) & (delta == 0)) | ((kind == 0) & (following == 0))
        position[rows] = at + step
        rows = rows[~over & (position[rows] < ends[rows])]

    row = np.concatenate(found_rows) if found_rows else np.zeros(0, np.int64)
    word = np.concatenate(found_words) if found_words else np.zeros(0, np.int64)
    time_ns = np.concatenate(found_times) if found_times else np.zeros(0, np.int64)
    kinds = words[row, word] & 0xFFFF  # common_type
    parts = []
    for index, layout in enumerate(formats):
        chosen = np.flatnonzero(kinds == layout.identifier)
        if len(chosen):
            parts.append(_decode_records(words, row[chosen], word[chosen], time_ns[chosen], index, layout))
    return np.concatenate(parts) if parts else np.zeros(0, EVENT_DTYPE)


def _decode_records(
    words: NDArray[np.uint32],
    row: NDArray[np.int64],
    word: NDArray[np.int64],
    time_ns: NDArray[np.int64],
    index: int,
    layout: Format,
) -> Events:
    def values(name: str) -> NDArray[np.int64]:
        field = layout.fields[name]
        at = word + field.offset_bytes // 4
        low = words[row, at].astype(np.uint64)
        if field.size_bytes == 8:
            low |= words[row, at + 1].astype(np.uint64) << np.uint64(32)
        elif field.size_bytes == 1:
            low = low >> np.uint64(8 * (field.offset_bytes % 4)) & np.uint64(0xFF)
        return low.astype(np.int64)

    events = np.zeros(len(row), EVENT_DTYPE)
    events["time_ns"] = time_ns
    events["thread"] = values("common_pid")
    events["kind"] = index
    device = values("s_dev")
    events["device"] = _user_device(device)
    events["inode"] = values("i_ino").astype(np.uint64)
    start = values("index")
    if "last_index" in layout.fields:
        last = values("last_index")
        stop = np.maximum(last, start) + 1
    elif "order" in layout.fields:
        stop = start + (np.int64(1) << values("order"))
    else:
        stop = start + 1
    events["start"] = start * PAGE_BYTES
    events["stop"] = stop * PAGE_BYTES
    return events


def _user_device(device: NDArray[np.int64]) -> NDArray[np.int64]:
    major, minor = device >> 20, device & ((1 << 20) - 1)
    return (minor & 0xFF) | (major & 0xFFF) << 8 | (minor & ~0xFF) << 12 | (major & ~0xFFF) << 32

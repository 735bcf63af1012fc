"""What the kernel tells about another process: its mappings, files, counters, children and touched pages.

All of it is polled from /proc, without stopping the process. A process that is gone, or a zombie where only
a living one has an answer, raises ProcessLookupError; one that belongs to somebody else PermissionError.

Facts, seen on 6.18:

- A zombie keeps its directory in /proc. Its maps, environ and cmdline read as empty, and to an unprivileged
  reader they look like another user's, so both cases are checked against its state.
- An open descriptor of /proc/PID/pagemap belongs to the address space, not to the process: after exec or
  exit it reads as end of file, and PAGEMAP_SCAN on it succeeds with no pages.
- A read fault on a file maps the cached neighbours too (fault-around, 64 KiB), so a present page was
  touched or lies next to one that was.
- The counts of /proc/PID/io are the process's own until it waits for a child: then the child's are added.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import re
import stat
from collections.abc import Collection
from dataclasses import dataclass
from functools import cache
from types import TracebackType
from typing import Literal, Self, TypeAlias

import numpy as np
from numpy.typing import NDArray

Ranges: TypeAlias = NDArray[np.int64]

PAGE_SIZE_BYTES = os.sysconf("SC_PAGE_SIZE")
_READ_BYTES = 1 << 16
_GONE_STATES = frozenset("ZX")


@dataclass(frozen=True, slots=True)
class Mapping:
    """One mapping of a file: addresses ``[start, stop)`` show the file from ``offset_bytes`` on.

    ``device`` and ``inode`` are st_dev and st_ino on most file systems; btrfs and some overlay set-ups
    report another device here than stat(2) does. ``path`` is as the kernel prints it, in the name space of
    the reader; with ``deleted`` no file has this name any more.
    """

    start: int
    stop: int
    offset_bytes: int
    device: int
    inode: int
    path: str
    shared: bool
    readable: bool
    writable: bool
    executable: bool
    deleted: bool = False


@dataclass(frozen=True, slots=True)
class OpenFile:
    """A descriptor of a regular file."""

    descriptor: int
    path: str
    device: int
    inode: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class IoCounters:
    """Reads of a process so far: all kinds of read(2) count in the first two, not page faults of a mapping.

    ``device_read_bytes`` is what was fetched from storage on its behalf, faults included.
    """

    read_chars: int
    read_syscalls: int
    device_read_bytes: int


@dataclass(frozen=True, slots=True)
class Stat:
    """The useful fields of /proc/PID/stat. ``start_time_ticks`` with the pid names a process for good."""

    state: str
    parent: int
    process_group: int
    start_time_ticks: int


@dataclass(frozen=True, slots=True)
class Probe:
    """What this kernel offers: how pages and children are found."""

    pagemap: Literal["pagemap_scan", "pagemap"]
    children: Literal["children", "scan"]


@cache
def probe() -> Probe:
    """Try both on this very process."""
    with Pagemap(os.getpid()) as pagemap:
        method = pagemap.method
    children = os.path.exists("/proc/thread-self/children")
    return Probe(method, "children" if children else "scan")


def read_stat(pid: int) -> Stat:
    """State, parent, process group and start time."""
    data = _read(pid, "stat")
    # The name in field 2 may hold spaces and parentheses; the last one closes it.
    fields = data[data.rfind(b")") + 2 :].split()
    if len(fields) < 20:
        raise _gone(pid)
    return Stat(fields[0].decode(), int(fields[1]), int(fields[2]), int(fields[19]))


def start_time_ticks(pid: int) -> int:
    """When the process started, in clock ticks since boot: a reused pid has another one."""
    return read_stat(pid).start_time_ticks


def open_pidfd(pid: int) -> int:
    """A descriptor that keeps naming this process after its pid is reused. The caller closes it."""
    return os.pidfd_open(pid)


def environment(pid: int) -> dict[str, str]:
    """The environment that the process was started with; its own later changes do not show."""
    entries = _read_of_living(pid, "environ").split(b"\0")
    pairs = (os.fsdecode(entry).partition("=") for entry in entries if b"=" in entry)
    return {name: value for name, _, value in pairs}


def command(pid: int) -> list[str]:
    """The argument vector; empty for a kernel thread."""
    data = _read_of_living(pid, "cmdline")
    return [os.fsdecode(part) for part in data.removesuffix(b"\0").split(b"\0")] if data else []


def io_counters(pid: int) -> IoCounters:
    """Counts of the process with all its threads, ended ones included, and of the children it waited for."""
    values = dict(line.split(b": ") for line in _read(pid, "io").splitlines())
    if b"read_bytes" not in values:
        raise _gone(pid)
    return IoCounters(int(values[b"rchar"]), int(values[b"syscr"]), int(values[b"read_bytes"]))


def read_maps(
    pid: int,
    inodes: Collection[tuple[int, int]] | None = None,
    minimum_bytes: int = 0,
) -> list[Mapping]:
    """The file mappings of a process in address order; anonymous and special ones are left out.

    Args:
        pid: the process.
        inodes: only mappings of these ``(device, inode)``.
        minimum_bytes: only mappings of at least this length.
    """
    data = _read_of_living(pid, "maps")
    wanted = None if inodes is None else {b"%d" % inode for _, inode in inodes}
    mappings = []
    for line in data.splitlines():
        fields = line.split(None, 5)
        inode = fields[4]
        if inode == b"0" or (wanted is not None and inode not in wanted) or len(fields) < 6:
            continue
        first, _, last = fields[0].partition(b"-")
        start, stop = int(first, 16), int(last, 16)
        if stop - start < minimum_bytes:
            continue
        major, _, minor = fields[3].partition(b":")
        device = os.makedev(int(major, 16), int(minor, 16))
        if inodes is not None and (device, int(inode)) not in inodes:
            continue
        flags, name = fields[1], fields[5]
        # Of all characters only the newline is escaped (seq_path with "\n"); a backslash stays one.
        path = os.fsdecode(name.replace(b"\\012", b"\n"))
        mappings.append(
            Mapping(
                start=start,
                stop=stop,
                offset_bytes=int(fields[2], 16),
                device=device,
                inode=int(inode),
                path=path.removesuffix(" (deleted)"),
                shared=flags[3:4] == b"s",
                readable=flags[0:1] == b"r",
                writable=flags[1:2] == b"w",
                executable=flags[2:3] == b"x",
                deleted=path.endswith(" (deleted)"),
            )
        )
    return mappings


def open_files(pid: int) -> list[OpenFile]:
    """The descriptors of regular files that are open now, in ascending order."""
    return [
        OpenFile(descriptor, path.removesuffix(" (deleted)"), facts.st_dev, facts.st_ino, facts.st_size)
        for descriptor, path, facts in _descriptors(pid)
        if stat.S_ISREG(facts.st_mode)
    ]


def open_device_paths(pid: int) -> list[str]:
    """Paths of the character devices that are open now, each once: what tells a process's accelerator."""
    return sorted({path for _, path, facts in _descriptors(pid) if stat.S_ISCHR(facts.st_mode)})


def file_position(pid: int, descriptor: int) -> int:
    """The offset of the descriptor's next read(2). pread does not move it.

    Raises:
        OSError: EBADF, the process lives and this descriptor is not open.
    """
    try:
        data = _read(pid, f"fdinfo/{descriptor}")
    except ProcessLookupError:
        if os.path.exists(f"/proc/{pid}/fdinfo") and read_stat(pid).state not in _GONE_STATES:
            raise OSError(
                errno.EBADF, f"process {pid} has no descriptor {descriptor} open", f"/proc/{pid}/fdinfo"
            ) from None
        raise
    match = re.match(rb"pos:\t(\d+)", data)
    if match is None:
        raise _gone(pid)
    return int(match[1])


def descendants(pid: int, method: Literal["children", "scan"] | None = None) -> list[int]:
    """The process and everything it started, parents before their children; zombies are included.

    A process whose parent has ended belongs to init or a subreaper and is no longer found here.

    Args:
        pid: the process.
        method: ``children`` reads /proc/PID/task/TID/children, ``scan`` the stat of every process. None
            takes the first where the kernel has it (CONFIG_PROC_CHILDREN).
    """
    read_stat(pid)
    children = _children if (method or probe().children) == "children" else _all_children().get
    found = [pid]
    for process in found:  # grows while it is walked
        found += children(process) or ()
    return found


class Pagemap:
    """Which pages of a process's mappings are present, that is, mapped into it.

    Args:
        pid: the process, of the same user or with CAP_SYS_PTRACE.
        method: ``pagemap_scan`` (Linux 6.7) lets the kernel skip what was never touched; ``pagemap`` reads
            one word for each page. None takes the first where the kernel has it.
    """

    def __init__(self, pid: int, method: Literal["pagemap_scan", "pagemap"] | None = None) -> None:
        self.pid = pid
        self._fd = _open(pid, "pagemap")
        self._regions = np.zeros((_REGIONS, 3), dtype=np.uint64)  # struct page_region: start, end, categories
        try:
            self.method: Literal["pagemap_scan", "pagemap"] = method or self._best_method()
        except BaseException:
            self.close()
            raise

    def present_ranges(self, start: int, stop: int) -> Ranges:
        """Address ranges ``[start, stop)`` of present pages among these pages; shape [n, 2], ascending.

        Args:
            start: first address, a multiple of the page size.
            stop: end address, a multiple of the page size.

        Raises:
            ProcessLookupError: the process has ended, or has replaced this address space by exec.
            ValueError: an address is not aligned.
        """
        if start % PAGE_SIZE_BYTES or stop % PAGE_SIZE_BYTES or start > stop:
            raise ValueError(
                f"[{start:#x}, {stop:#x}) of process {self.pid} is not a range of whole pages; "
                f"round both to multiples of {PAGE_SIZE_BYTES}"
            )
        if start == stop:
            return np.empty((0, 2), dtype=np.int64)
        return self._scan(start, stop) if self.method == "pagemap_scan" else self._read(start, stop)

    def close(self) -> None:
        """Close the descriptor; a second time does nothing."""
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _best_method(self) -> Literal["pagemap_scan", "pagemap"]:
        try:
            self._scan(0, PAGE_SIZE_BYTES, check_end=False)
        except OSError as error:
            if error.errno not in (errno.ENOTTY, errno.EINVAL, errno.ENOSYS, errno.EPERM):
                raise
            return "pagemap"
        return "pagemap_scan"

    def _scan(self, start: int, stop: int, check_end: bool = True) -> Ranges:
        argument = _ScanArgument(
            size=ctypes.sizeof(_ScanArgument),
            end=stop,
            vec=self._regions.ctypes.data,
            vec_len=_REGIONS,
            category_mask=_PAGE_IS_PRESENT,
            return_mask=_PAGE_IS_PRESENT,
        )
        parts = []
        at = start
        while at < stop:
            argument.start = at
            count = fcntl.ioctl(self._fd, _PAGEMAP_SCAN, argument)
            parts.append(self._regions[:count, :2].astype(np.int64))
            # The kernel fills an inner buffer of 512 regions repeatedly, and walk_end stays at the last time
            # that one was full: with 1,022 regions it lay 1,020 pages before the last one (6.18).
            at = max(argument.walk_end, int(self._regions[count - 1, 1])) if count else stop
        ranges = _joined(np.concatenate(parts))
        # An address space that is gone has no pages and reports no error; only a read tells.
        if check_end and not len(ranges) and not os.pread(self._fd, 8, start // PAGE_SIZE_BYTES * 8):
            raise _gone(self.pid)
        return ranges

    def _read(self, start: int, stop: int) -> Ranges:
        parts = []
        page, last = start // PAGE_SIZE_BYTES, stop // PAGE_SIZE_BYTES
        while page < last:
            data = os.pread(self._fd, min(last - page, _WORDS) * 8, page * 8)
            if not data:
                raise _gone(self.pid)
            words = np.frombuffer(data, dtype=np.uint64)  # [pages]; bit 63: present
            present = np.zeros(len(words) + 2, dtype=np.int8)
            present[1:-1] = words >> np.uint64(63)
            edges = np.flatnonzero(np.diff(present)).astype(np.int64)
            parts.append((edges.reshape(-1, 2) + page) * PAGE_SIZE_BYTES)
            page += len(words)
        return _joined(np.concatenate(parts))


class _ScanArgument(ctypes.Structure):
    """struct pm_scan_arg of linux/fs.h."""

    _fields_ = [
        ("size", ctypes.c_uint64),
        ("flags", ctypes.c_uint64),
        ("start", ctypes.c_uint64),
        ("end", ctypes.c_uint64),
        ("walk_end", ctypes.c_uint64),
        ("vec", ctypes.c_uint64),
        ("vec_len", ctypes.c_uint64),
        ("max_pages", ctypes.c_uint64),
        ("category_inverted", ctypes.c_uint64),
        ("category_mask", ctypes.c_uint64),
        ("category_anyof_mask", ctypes.c_uint64),
        ("return_mask", ctypes.c_uint64),
    ]


_PAGEMAP_SCAN = 3 << 30 | ctypes.sizeof(_ScanArgument) << 16 | ord("f") << 8 | 16  # _IOWR('f', 16, pm_scan_arg)
_PAGE_IS_PRESENT = 1 << 3
_REGIONS = 1024  # regions a call; chosen without measurement
_WORDS = 1 << 16  # pages a read: 512 KiB of words; chosen without measurement


def _joined(ranges: Ranges) -> Ranges:
    """Neighbours that a boundary between two calls has cut become one range."""
    if len(ranges) < 2:
        return ranges
    cut = ranges[1:, 0] != ranges[:-1, 1]
    if cut.all():
        return ranges
    starts = ranges[np.concatenate(([True], cut)), 0]
    stops = ranges[np.concatenate((cut, [True])), 1]
    return np.stack((starts, stops), axis=1)


def _gone(pid: int) -> ProcessLookupError:
    return ProcessLookupError(errno.ESRCH, f"process {pid} has ended", f"/proc/{pid}")


def _open(pid: int, name: str) -> int:
    path = f"/proc/{pid}/{name}"
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise _gone(pid) from None
    except PermissionError as error:
        raise _refusal(pid, path, error) from None


def _refusal(pid: int, path: str, error: PermissionError) -> OSError:
    if state_of(pid) in _GONE_STATES:
        return _gone(pid)
    return PermissionError(error.errno, "another user's process, or one that is not dumpable; run as root", path)


def state_of(pid: int) -> str:
    """The letter of the process's state, R, S, D, T or Z; X where it is gone."""
    try:
        return read_stat(pid).state
    except ProcessLookupError:
        return "X"


def _read(pid: int, name: str) -> bytes:
    fd = _open(pid, name)
    try:
        parts = []
        while part := os.read(fd, _READ_BYTES):
            parts.append(part)
    except PermissionError as error:
        raise _refusal(pid, f"/proc/{pid}/{name}", error) from None
    finally:
        os.close(fd)
    return b"".join(parts)


def _read_of_living(pid: int, name: str) -> bytes:
    data = _read(pid, name)
    if not data and state_of(pid) in _GONE_STATES:
        raise _gone(pid)
    return data


def _descriptors(pid: int) -> list[tuple[int, str, os.stat_result]]:
    directory = f"/proc/{pid}/fd"
    try:
        names = sorted(map(int, os.listdir(directory)))
    except FileNotFoundError:
        raise _gone(pid) from None
    except PermissionError as error:
        raise _refusal(pid, directory, error) from None
    if not names and state_of(pid) in _GONE_STATES:
        raise _gone(pid)
    found = []
    for name in names:
        link = f"{directory}/{name}"
        with contextlib.suppress(FileNotFoundError):  # closed since the listing
            found.append((name, os.readlink(link), os.stat(link)))
    return found


def _children(pid: int) -> list[int]:
    found: list[int] = []
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for thread in os.listdir(f"/proc/{pid}/task"):
            with contextlib.suppress(ProcessLookupError):
                found += map(int, _read(pid, f"task/{thread}/children").split())
    return found


def _all_children() -> dict[int, list[int]]:
    children: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(ProcessLookupError):
                children.setdefault(read_stat(int(name)).parent, []).append(int(name))
    return children

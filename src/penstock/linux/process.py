"""What the kernel tells about another process: its mappings, files, counters and children.

All of it is polled from /proc, without stopping the process. A process that is gone, or a zombie where only
a living one has an answer, raises ProcessLookupError; one that belongs to somebody else PermissionError.

Facts, seen on 6.18:

- A zombie keeps its directory in /proc. Its maps, environ and cmdline read as empty, and to an unprivileged
  reader they look like another user's, so both cases are checked against its state.
- The counts of /proc/PID/io are the process's own until it waits for a child: then the child's are added.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import stat
import struct
from collections.abc import Collection
from dataclasses import dataclass
from functools import cache
from typing import Literal

PAGE_SIZE_BYTES = os.sysconf("SC_PAGE_SIZE")
_READ_BYTES = 1 << 16
_GONE_STATES = frozenset("ZX")
# struct procmap_query of linux/fs.h up to dev_minor, and the sizes and addresses of a name and a build ID: not wanted
_MAP_QUERY = struct.Struct("=9Q2I8x16x")
_PROCMAP_QUERY = 3 << 30 | _MAP_QUERY.size << 16 | ord("f") << 8 | 17  # _IOWR('f', 17, struct procmap_query)
_PF_EXITING = 0x4  # of the flags in /proc/PID/stat: it has given up its memory, and its files are not shown any more


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
    """The useful fields of /proc/PID/stat. ``start_time_ticks`` with the pid names a process for good.

    ``is_ending`` is true from when the process gives up its memory, which takes it 0.1 s for a large model, to its end:
    what /proc shows of it is root's by then, or nothing.
    """

    state: str
    parent: int
    process_group: int
    start_time_ticks: int
    is_ending: bool


@cache
def children_method() -> Literal["children", "scan"]:
    """How this kernel lets the children of a process be found: see `descendants`."""
    return "children" if os.path.exists("/proc/thread-self/children") else "scan"


def read_stat(pid: int) -> Stat:
    """State, parent, process group and start time."""
    data = _read(pid, "stat")
    # The name in field 2 may hold spaces and parentheses; the last one closes it.
    fields = data[data.rfind(b")") + 2 :].split()
    if len(fields) < 20:
        raise ended(pid)
    state = fields[0].decode()
    is_ending = state in _GONE_STATES or bool(int(fields[6]) & _PF_EXITING)
    return Stat(state, int(fields[1]), int(fields[2]), int(fields[19]), is_ending)


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
        raise ended(pid)
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


def is_still_mapped(pid: int, mapping: Mapping) -> bool:
    """Whether a mapping's addresses still show what they did: a process gets them again for the next file it maps.

    Asks for the one address (PROCMAP_QUERY, Linux 6.11), or reads all mappings.
    """
    fd = open_file(pid, "maps")
    try:
        query = bytearray(_MAP_QUERY.pack(_MAP_QUERY.size, 0, mapping.start, *(0,) * 8))
        fcntl.ioctl(fd, _PROCMAP_QUERY, query)
    except OSError as error:
        if error.errno == errno.ENOENT:
            return False
        if error.errno not in (errno.ENOTTY, errno.EINVAL, errno.ENOSYS, errno.EPERM):  # older, or a sandbox forbids it
            raise
        found = read_maps(pid, {(mapping.device, mapping.inode)})
        return any(_shows(mapping, m.device, m.inode, m.start, m.stop, m.offset_bytes) for m in found)
    finally:
        os.close(fd)
    _, _, _, start, stop, _, _, offset, inode, major, minor = _MAP_QUERY.unpack(query)
    return _shows(mapping, os.makedev(major, minor), inode, start, stop, offset)


def _shows(mapping: Mapping, device: int, inode: int, start: int, stop: int, offset_bytes: int) -> bool:
    """Whether a mapping found now shows at the first address what another one showed there."""
    if (device, inode) != (mapping.device, mapping.inode) or not start <= mapping.start < stop:
        return False
    return offset_bytes + mapping.start - start == mapping.offset_bytes


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
        if os.path.exists(f"/proc/{pid}/fdinfo") and not _is_ending(pid):
            raise OSError(
                errno.EBADF, f"process {pid} has no descriptor {descriptor} open", f"/proc/{pid}/fdinfo"
            ) from None
        raise
    match = re.match(rb"pos:\t(\d+)", data)
    if match is None:
        raise ended(pid)
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
    children = _children if (method or children_method()) == "children" else _all_children().get
    found = [pid]
    for process in found:  # grows while it is walked
        found += children(process) or ()
    return found


def ended(pid: int) -> ProcessLookupError:
    """The error that says that a process is no longer there."""
    return ProcessLookupError(errno.ESRCH, f"process {pid} has ended", f"/proc/{pid}")


def open_file(pid: int, name: str) -> int:
    """A descriptor of /proc/PID/name. The caller closes it."""
    path = f"/proc/{pid}/{name}"
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise ended(pid) from None
    except PermissionError as error:
        raise _refusal(pid, path, error) from None


def _refusal(pid: int, path: str, error: PermissionError) -> OSError:
    if _is_ending(pid):
        return ended(pid)
    return PermissionError(error.errno, "another user's process, or one that is not dumpable; run as root", path)


def memory_bytes(pid: int) -> dict[str, int]:
    """The sizes in /proc/PID/status by their names there, VmRSS and VmHWM for instance; none of a zombie.

    getrusage's ``ru_maxrss`` is something else: a process that was started by vfork takes it over from its parent.
    """
    found = re.findall(rb"^(\w+):\s+(\d+) kB$", _read(pid, "status"), re.MULTILINE)
    return {name.decode(): int(size) << 10 for name, size in found}


def _is_ending(pid: int) -> bool:
    try:
        return read_stat(pid).is_ending
    except ProcessLookupError:
        return True


def _read(pid: int, name: str) -> bytes:
    fd = open_file(pid, name)
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
    if not data and _is_ending(pid):
        raise ended(pid)
    return data


def _descriptors(pid: int) -> list[tuple[int, str, os.stat_result]]:
    directory = f"/proc/{pid}/fd"
    try:
        names = sorted(map(int, os.listdir(directory)))
    except FileNotFoundError:
        raise ended(pid) from None
    except PermissionError as error:
        raise _refusal(pid, directory, error) from None
    if not names and _is_ending(pid):
        raise ended(pid)
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

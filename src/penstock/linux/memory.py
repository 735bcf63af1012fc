"""How much memory a process may still fill: of the host, and of every cgroup above it.

Facts:

- cgroup v1 and v2 can be mounted at once, and only one of them has the memory controller; both are looked at.
- Every ancestor's limit holds, so the tightest of them counts. A limit may be changed while a service runs
  and is read again each time.
- /proc/PID/cgroup gives a path below the root of the hierarchy or of the cgroup name space; a container may
  see a mount of a subtree only, or a path that its mount does not show. Then the mount's own root is the
  closest cgroup there is.
- /sys/fs/cgroup/*/memory.stat is the dear part (the kernel sums it up), so it is read only for a cgroup that
  could be tighter than the host.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Literal, Self

_ROOT = Path("/")
_FILE_BYTES = 1 << 16  # more than any of the files read here


@dataclass(frozen=True, slots=True)
class MemoryState:
    """The tightest bound on a process's memory.

    Attributes:
        limit_bytes: what may be used in all.
        usage_bytes: what is in use, page cache included. For the host it is derived from MemAvailable, so
            that the headroom below is the kernel's own estimate.
        file_bytes: page cache of files that can be dropped at once: neither dirty nor under writeback, no
            shared memory.
        anon_bytes: memory of the programs themselves.
        source: ``host``, or ``cgroup v1 /path`` or ``cgroup v2 /path`` with the path below the mount.
    """

    limit_bytes: int
    usage_bytes: int
    file_bytes: int
    anon_bytes: int
    source: str

    @property
    def headroom_bytes(self) -> int:
        """What can be filled without swapping or killing: the free part and the reclaimable files."""
        return max(0, self.limit_bytes - self.usage_bytes + self.file_bytes)


@dataclass(frozen=True, slots=True)
class Pressure:
    """Time lost waiting for a resource: ``some`` task, or all (``full``).

    Averages over 10 s in percent, totals in microseconds since boot (or since the cgroup was made).
    ``source`` is ``host`` or ``cgroup v2 /path``.
    """

    some_avg10: float
    full_avg10: float
    some_total_us: int
    full_total_us: int
    source: str


class MemoryReader:
    """Reads the memory state again and again: paths are resolved and files opened once.

    Args:
        pid: the process; "self" is the caller.
        root: where proc and sys are, for tests on plain files.

    Raises:
        ProcessLookupError: the process has ended.
    """

    def __init__(self, pid: int | Literal["self"] = "self", root: Path = _ROOT) -> None:
        self._pid = pid
        self._root = root
        self._levels: list[_Level] = []
        self._meminfo = _open(root / "proc/meminfo")
        try:
            self._resolve()
        except BaseException:
            self.close()
            raise

    def read(self) -> MemoryState:
        """The tightest of the host and all cgroups above the process.

        Raises:
            ProcessLookupError: the process's cgroup was removed, and the process has ended.
        """
        try:
            return self._read()
        except OSError as error:
            if error.errno != errno.ENODEV:
                raise
        # ENODEV: the cgroup was removed, so its processes were moved or have ended.
        self._resolve()
        return self._read()

    def close(self) -> None:
        """Close the files; a second time does nothing."""
        self._close_levels()
        if self._meminfo >= 0:
            fd, self._meminfo = self._meminfo, -1
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _read(self) -> MemoryState:
        tightest = _host_state(_pread(self._meminfo))
        for level in self._levels:
            state = level.read(tightest.headroom_bytes)
            if state is not None and state.headroom_bytes < tightest.headroom_bytes:
                tightest = state
        return tightest

    def _resolve(self) -> None:
        self._close_levels()
        for version, mount, path in _cgroups(self._pid, self._root):
            for directory in (path, *path.parents):
                level = _Level.open(version, mount, directory)
                if level is not None:
                    self._levels.append(level)
                if directory == mount:
                    break

    def _close_levels(self) -> None:
        for level in self._levels:
            level.close()
        self._levels.clear()


def read_memory(pid: int | Literal["self"] = "self", root: Path = _ROOT) -> MemoryState:
    """One reading of `MemoryReader`."""
    with MemoryReader(pid, root) as reader:
        return reader.read()


def read_pressure(
    resource: Literal["memory", "io"] = "memory",
    pid: int | Literal["self"] = "self",
    root: Path = _ROOT,
) -> Pressure | None:
    """Pressure stall information of the process's v2 cgroup, else of the host; None without PSI."""
    places = [
        (path / f"{resource}.pressure", f"cgroup v2 {_name(path, mount)}")
        for version, mount, path in _cgroups(pid, root)
        if version == "v2"
    ]
    for path, source in [*places, (root / "proc/pressure" / resource, "host")]:
        # Absent, or EOPNOTSUPP where the kernel was started with psi=0.
        with contextlib.suppress(OSError):
            lines = {kind: (avg10, total) for kind, avg10, total in _PRESSURE.findall(path.read_text())}
            some, full = lines["some"], lines["full"]
            return Pressure(float(some[0]), float(full[0]), int(some[1]), int(full[1]), source)
    return None


_PRESSURE = re.compile(r"^(some|full) avg10=([\d.]+) .*total=(\d+)$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class _Names:
    """The files of a cgroup version and the lines of its memory.stat."""

    limits: tuple[str, ...]
    usage: str
    file: tuple[bytes, ...]
    busy: tuple[bytes, ...]
    anon: bytes


# memory.high only throttles, but a program that is throttled on every page has no headroom either.
_NAMES = {
    "v1": _Names(
        limits=("memory.limit_in_bytes",),
        usage="memory.usage_in_bytes",
        file=(b"total_active_file", b"total_inactive_file"),
        busy=(b"total_dirty", b"total_writeback"),
        anon=b"total_rss",
    ),
    "v2": _Names(
        limits=("memory.max", "memory.high"),
        usage="memory.current",
        file=(b"active_file", b"inactive_file"),
        busy=(b"file_dirty", b"file_writeback"),
        anon=b"anon",
    ),
}


@dataclass(frozen=True, slots=True)
class _Level:
    """One cgroup with its files open."""

    names: _Names
    source: str
    limits: tuple[int, ...]
    usage: int
    stat: int

    @classmethod
    def open(cls, version: str, mount: Path, directory: Path) -> _Level | None:
        """None where this directory has no memory accounting, as the root of v2."""
        names = _NAMES[version]
        fds: list[int] = []
        try:
            for name in (*names.limits, names.usage, "memory.stat"):
                fds.append(_open(directory / name))  # noqa: PERF401 (those that are open get closed below)
        except (FileNotFoundError, PermissionError):
            for fd in fds:
                os.close(fd)
            return None
        return cls(names, f"cgroup {version} {_name(directory, mount)}", tuple(fds[:-2]), fds[-2], fds[-1])

    def read(self, enough_bytes: int) -> MemoryState | None:
        """None where at least ``enough_bytes`` are free even before anything is reclaimed."""
        limits = [_number(os.pread(fd, 64, 0)) for fd in self.limits]
        limit = min((limit for limit in limits if limit is not None), default=None)
        if limit is None:
            return None
        usage = _number(os.pread(self.usage, 64, 0)) or 0
        if limit - usage >= enough_bytes:
            return None
        stat = _pread(self.stat)
        file = sum(_field(stat, name) for name in self.names.file)
        busy = sum(_field(stat, name) for name in self.names.busy)
        return MemoryState(limit, usage, max(0, file - busy), _field(stat, self.names.anon), self.source)

    def close(self) -> None:
        for fd in (*self.limits, self.usage, self.stat):
            os.close(fd)


def _host_state(meminfo: bytes) -> MemoryState:
    total, available = _field(meminfo, b"MemTotal:") * 1024, _field(meminfo, b"MemAvailable:") * 1024
    file = _field(meminfo, b"Active(file):") + _field(meminfo, b"Inactive(file):")
    busy = _field(meminfo, b"Dirty:") + _field(meminfo, b"Writeback:")
    file_bytes = max(0, file - busy) * 1024
    anon_bytes = _field(meminfo, b"AnonPages:") * 1024
    return MemoryState(total, total - available + file_bytes, file_bytes, anon_bytes, "host")


def _pread(fd: int) -> bytes:
    """The whole file, with a newline in front so that each line has one before it."""
    return b"\n" + os.pread(fd, _FILE_BYTES, 0)


def _field(text: bytes, name: bytes) -> int:
    """The number after the name of a line; 0 where the kernel has no such line."""
    at = text.find(b"\n" + name + b" ")
    if at < 0:
        return 0
    at += len(name) + 2
    return int(text[at : text.index(b"\n", at)].split()[0])


def _number(text: bytes) -> int | None:
    return None if text.startswith(b"max") else int(text)


def _open(path: Path) -> int:
    return os.open(path, os.O_RDONLY | os.O_CLOEXEC)


def _name(directory: Path, mount: Path) -> str:
    return f"/{directory.relative_to(mount)}".replace("/.", "/")


def _cgroups(pid: int | Literal["self"], root: Path) -> Iterator[tuple[Literal["v1", "v2"], Path, Path]]:
    """For each hierarchy with a place for memory: version, mount point, directory of the process."""
    try:
        lines = (root / f"proc/{pid}/cgroup").read_text().splitlines()
    except FileNotFoundError:
        raise ProcessLookupError(errno.ESRCH, f"process {pid} has ended", f"{root}/proc/{pid}") from None
    mounts = list(_cgroup_mounts(root))
    for line in lines:
        _, controllers, path = line.split(":", 2)
        version: Literal["v1", "v2"] = "v1" if controllers else "v2"
        if controllers and "memory" not in controllers.split(","):
            continue
        places = [
            (mount, _below(mount, mounted_root, path))
            for mounted_version, mounted_root, mount in mounts
            if mounted_version == version
        ]
        for mount, directory in places:
            if directory is not None:
                yield version, mount, directory
                break
        else:
            if places:
                yield version, places[0][0], places[0][0]


def _cgroup_mounts(root: Path) -> Iterator[tuple[str, str, Path]]:
    """Version, root within the hierarchy and mount point of each cgroup mount with a place for memory."""
    for line in (root / "proc/self/mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        kind, _, options = after.split(" ", 2)
        if kind == "cgroup2" or (kind == "cgroup" and "memory" in options.split(",")):
            mounted_root, mount = before.split(" ")[3:5]
            version = "v2" if kind == "cgroup2" else "v1"
            yield version, mounted_root, root / _unescape(mount).lstrip("/")


def _below(mount: Path, mounted_root: str, path: str) -> Path | None:
    """The directory of cgroup ``path`` under a mount that shows the hierarchy from ``mounted_root`` on."""
    # A process outside the reader's cgroup name space has a path such as /../other, which is not shown.
    cgroup = PurePosixPath(path)
    if ".." in cgroup.parts or not cgroup.is_relative_to(mounted_root):
        return None
    directory = mount / cgroup.relative_to(mounted_root)
    return directory if directory.is_dir() else None


def _unescape(text: str) -> str:
    r"""mountinfo writes space, tab, newline and backslash as \040, \011, \012 and \134."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)

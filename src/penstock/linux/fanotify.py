"""Hear when a file is opened, by anyone: the trigger to look closer, without polling for it.

Two ways, tried in this order:

- ``fd``: the event carries a descriptor of the file. Needs CAP_SYS_ADMIN.
- ``fid``: the event carries the file's handle, matched with the handles taken when the watch was made.
  Unprivileged since Linux 5.13, but then the kernel reports only the watcher's own pid and 0 for all others.
  The file system must support handles; fanotify refuses others with EOPNOTSUPP, ENODEV or EXDEV.

Opens of the watching process itself are reported too, those made to read the file ahead included.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

from penstock.errors import UnsupportedError
from penstock.linux.libc import function

_FAN_CLOEXEC, _FAN_NONBLOCK, _FAN_REPORT_FID = 0x1, 0x2, 0x200
_FAN_MARK_ADD = 0x1
_FAN_OPEN, _FAN_Q_OVERFLOW = 0x20, 0x4000
_FAN_EVENT_INFO_TYPE_FID = 1
_FAN_NOFD = -1
_AT_FDCWD = -100
_AT_SYMLINK_FOLLOW, _AT_HANDLE_FID = 0x400, 0x200
_MAX_HANDLE_BYTES = 128
_READ_BYTES = 1 << 16

_EVENT = struct.Struct("=IBBHQii")  # struct fanotify_event_metadata
_INFO = struct.Struct("=BBHQIi")  # struct fanotify_event_info_fid: header, fsid, handle_bytes, handle_type

_init = function("fanotify_init", [ctypes.c_uint, ctypes.c_uint])
_mark = function("fanotify_mark", [ctypes.c_int, ctypes.c_uint, ctypes.c_uint64, ctypes.c_int, ctypes.c_char_p])
_name_to_handle_at = function(
    "name_to_handle_at",
    [ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p, ctypes.POINTER(ctypes.c_int), ctypes.c_int],
)


@dataclass(frozen=True, slots=True)
class OpenEvent:
    """A watched file was opened.

    Attributes:
        path: the path that was given to the watch. None says that the queue overflowed and events were lost.
        pid: the process that opened it, or None where the kernel does not tell.
    """

    path: Path | None
    pid: int | None


@dataclass(frozen=True, slots=True)
class Probe:
    """The method that works here, or None and the reason."""

    method: Literal["fd", "fid"] | None
    reason: str


def probe() -> Probe:
    """Make a notification group of each kind, without a mark."""
    try:
        fd, method = _group()
    except UnsupportedError as error:
        return Probe(None, str(error))
    os.close(fd)
    privileged = "CAP_SYS_ADMIN" if method == "fd" else "unprivileged, pids of others are not told"
    return Probe(method, privileged)


class OpenWatch:
    """Events for opens of these files, until closed.

    Args:
        paths: existing regular files; links are followed, so each name of a file counts as the file.

    Raises:
        UnsupportedError: the kernel, the container or the file system refuses the watch.
        FileNotFoundError: a path does not exist.
        PermissionError: a file may not be read.
        IsADirectoryError: a path is a directory, whose opens say nothing about its files.
    """

    def __init__(self, paths: Iterable[str | os.PathLike[str]]) -> None:
        self._paths: dict[tuple[int, ...] | tuple[int, int, bytes], Path] = {}
        self._fd, self.method = _group()
        try:
            for path in paths:
                self._add(Path(path))
        except BaseException:
            self.close()
            raise

    def fileno(self) -> int:
        """For select and selectors: readable when there are events."""
        return self._fd

    def read(self) -> list[OpenEvent]:
        """The events that are waiting, oldest first; returns at once, with none if there are none.

        Equal events in a row may come as one.
        """
        try:
            data = os.read(self._fd, _READ_BYTES)
        except BlockingIOError:
            return []
        return list(self._parse(data))

    def close(self) -> None:
        """End the watch; a second time does nothing."""
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _add(self, path: Path) -> None:
        facts = path.stat()
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "only files can be watched for opens", str(path))
        with _unsupported(f"{path}: fanotify ({self.method}) refuses to watch it"):
            _mark(self._fd, _FAN_MARK_ADD, _FAN_OPEN, _AT_FDCWD, os.fsencode(path))
            if self.method == "fd":
                self._paths[facts.st_dev, facts.st_ino] = path
            else:
                self._paths[_handle(path)] = path

    def _parse(self, data: bytes) -> Iterator[OpenEvent]:
        at = 0
        while at < len(data):
            length, _, _, metadata, mask, fd, pid = _EVENT.unpack_from(data, at)
            if mask & _FAN_Q_OVERFLOW:
                yield OpenEvent(None, None)
            elif fd != _FAN_NOFD:
                try:
                    facts = os.fstat(fd)
                finally:
                    os.close(fd)
                yield OpenEvent(self._paths.get((facts.st_dev, facts.st_ino)), pid or None)
            else:
                yield OpenEvent(self._path_of(data[at + metadata : at + length]), pid or None)
            at += length

    def _path_of(self, information: bytes) -> Path | None:
        kind, _, _, fsid, handle_bytes, handle_type = _INFO.unpack_from(information)
        if kind != _FAN_EVENT_INFO_TYPE_FID:  # the only one that was asked for
            return None
        handle = information[_INFO.size : _INFO.size + handle_bytes]
        return self._paths.get((fsid, handle_type, handle))


class _FileHandle(ctypes.Structure):
    """struct file_handle, with room for the longest."""

    _fields_ = [
        ("handle_bytes", ctypes.c_uint),
        ("handle_type", ctypes.c_int),
        ("f_handle", ctypes.c_ubyte * _MAX_HANDLE_BYTES),
    ]


def _group() -> tuple[int, Literal["fd", "fid"]]:
    flags = _FAN_CLOEXEC | _FAN_NONBLOCK
    reading = os.O_RDONLY | os.O_CLOEXEC | os.O_LARGEFILE
    try:
        return _init(flags, reading), "fd"
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOSYS):
            raise
    with _unsupported("fanotify is not available; Linux 5.13 has it for everyone, unless a container filters it"):
        return _init(flags | _FAN_REPORT_FID, 0), "fid"


def _handle(path: Path) -> tuple[int, int, bytes]:
    """File system id, handle type and handle, as a ``fid`` event carries them."""
    handle, mount = _FileHandle(handle_bytes=_MAX_HANDLE_BYTES), ctypes.c_int()
    arguments = _AT_FDCWD, os.fsencode(path), ctypes.byref(handle), ctypes.byref(mount)
    try:
        _name_to_handle_at(*arguments, _AT_SYMLINK_FOLLOW)
    except OSError as error:
        if error.errno != errno.EOPNOTSUPP:
            raise
        # Handles that identify a file but cannot open it, all that fanotify wants (Linux 6.5, overlayfs).
        handle.handle_bytes = _MAX_HANDLE_BYTES
        _name_to_handle_at(*arguments, _AT_SYMLINK_FOLLOW | _AT_HANDLE_FID)
    return os.statvfs(path).f_fsid, handle.handle_type, bytes(handle.f_handle[: handle.handle_bytes])


@contextmanager
def _unsupported(message: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.EACCES):
            raise
        raise UnsupportedError(f"{message} ({error.strerror})") from error

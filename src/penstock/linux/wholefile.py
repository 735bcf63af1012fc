"""Files that get their name when they are whole (open(2), O_TMPFILE; linkat(2); flock(2)).

Until then they have none, so who is killed leaves nothing. Two cases need a name beside the final one for a moment: to
take the place of a file that is there, and all along where the file system has no files without a name (NFS, some
overlays). Such a file is locked while its writer lives; the next writer of the same name removes what nobody has
locked.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
from pathlib import Path
from typing import Self

_NONE_WITHOUT_NAME = (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL, errno.ENOENT)
_HEX_BYTES = 8


def open_unnamed(directory: Path, mode: int = 0o600) -> int:
    """A file in a directory that never gets a name: gone when nobody has it open any more.

    Raises:
        OSError: whatever the file system says.
    """
    fd = _without_name(directory, mode)
    if fd is None:
        path = _beside(directory / "unnamed")
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        path.unlink()
    return fd


class WholeFile:
    """A file to be written through its descriptor; `commit` gives it its name.

    Args:
        path: where it is to be.
        mode: permissions, less the umask.

    Attributes:
        fd: open for reading and writing.

    Raises:
        OSError: whatever the file system says.
    """

    def __init__(self, path: Path, mode: int = 0o600) -> None:
        self._path = path
        self._partial: Path | None = None
        remove_abandoned(path)
        fd = _without_name(path.parent, mode)
        if fd is None:
            fd, self._partial = _named(path, mode)
        else:
            _lock(fd)
        self.fd = fd

    def write(self, data: bytes | memoryview, offset: int = 0) -> None:
        """Write all of it, items of one byte, at an offset in bytes."""
        rest = memoryview(data)
        while rest:
            done = os.pwrite(self.fd, rest, offset)
            rest, offset = rest[done:], offset + done

    def commit(self, *, replacing: bool = True, is_durable: bool = True) -> None:
        """Give it its name.

        Args:
            replacing: a file that has the name goes.
            is_durable: contents and name are on the device when this returns.

        Raises:
            FileExistsError: the name is taken, and nothing is to be replaced.
            OSError: whatever the file system says; what had the name still has it.
        """
        if is_durable:
            os.fsync(self.fd)
        if self._partial is None and not self._link(self._path, may_be_there=replacing):
            self._partial = _beside(self._path)
            self._link(self._partial)
        if self._partial is not None:
            if replacing:
                os.rename(self._partial, self._path)
            else:
                os.link(self._partial, self._path)  # which, unlike a rename, leaves one that has come meanwhile
                self._partial.unlink()
            self._partial = None
        if is_durable:
            directory = os.open(self._path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(directory)
            finally:
                os.close(directory)

    def _link(self, path: Path, *, may_be_there: bool = False) -> bool:
        try:
            # Any src_dir_fd has Python call linkat, which follows the link if it is told to; link does not.
            os.link(f"/proc/self/fd/{self.fd}", path, src_dir_fd=self.fd, follow_symlinks=True)
        except FileExistsError:
            if not may_be_there:
                raise
            return False
        return True

    def close(self) -> None:
        """Without `commit` before, nothing is left of it; a second time does nothing."""
        if self.fd < 0:
            return
        fd, self.fd = self.fd, -1
        if self._partial is not None:
            with contextlib.suppress(FileNotFoundError):
                self._partial.unlink()
        os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def remove_abandoned(path: Path) -> None:
    """Remove what writers of a name have left that were killed; what cannot be looked at stays."""
    pattern = re.compile(rf"\.{re.escape(path.name)}\.[0-9a-f]{{{2 * _HEX_BYTES}}}")
    with contextlib.suppress(OSError), os.scandir(path.parent) as entries:
        for entry in entries:
            if not pattern.fullmatch(entry.name):
                continue
            with contextlib.suppress(OSError):
                fd = os.open(entry.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    os.unlink(entry.path)
                finally:
                    os.close(fd)


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.urandom(_HEX_BYTES).hex()}")  # containers share pids


def _without_name(directory: Path, mode: int) -> int | None:
    """None where the file system has no such files."""
    try:
        return os.open(directory, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, mode)
    except OSError as error:
        if error.errno not in _NONE_WITHOUT_NAME:
            raise
        return None


def _named(path: Path, mode: int) -> tuple[int, Path]:
    while True:
        partial = _beside(path)
        fd = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        if _lock(fd) and os.fstat(fd).st_nlink:
            return fd, partial
        os.close(fd)  # another writer took it for abandoned before it was locked, and removes it


def _lock(fd: int) -> bool:
    """Whether nobody else has it; a file system without locks has nobody who could remove it either."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True

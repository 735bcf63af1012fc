"""Whose rights a run has: the benchmark's own, or those of an ordinary user without any capability."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from bench.errors import BenchError
from penstock.linux.libc import function

_CLONE_NEWNS = 0x0002_0000
_MS_REC, _MS_PRIVATE, _MS_BIND = 0x4000, 1 << 18, 0x1000

_unshare = function("unshare", [ctypes.c_int])
_mount = function("mount", [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_char_p])


class Account:
    """An ordinary user, to be entered by a child before it executes its program.

    A developer's Python and model often lie below a home directory that is closed to others. Rather than to open
    it, the child gets a mount namespace of its own in which the closed directory shows only what is needed.

    Args:
        needed: directories that the user must be able to read.

    Raises:
        BenchError: something needed is itself closed to the user.
    """

    def __init__(self, uid: int, needed: Iterable[Path]) -> None:
        self.uid = uid
        self.gid = uid
        self.closed: dict[Path, list[Path]] = {}
        for path in dict.fromkeys(path.resolve() for path in needed):
            if not _may(path, uid, self.gid, 0o5):
                raise BenchError(
                    f"user {uid} may not read {path} ({path.stat().st_mode & 0o777:03o}); chmod o+rx it, "
                    "or choose a --dir that the user can read"
                )
            parents = [parent for parent in reversed(path.parents) if not _may(parent, uid, self.gid, 0o1)]
            if parents:
                self.closed.setdefault(parents[0], []).append(path)

    def enter(self) -> None:
        """Become the user; for the child, between fork and exec."""
        if self.closed:
            self._open_view()
        os.setgroups([])
        os.setgid(self.gid)
        os.setuid(self.uid)  # from 0 to another: all capabilities are gone

    def _open_view(self) -> None:
        _unshare(_CLONE_NEWNS)
        _mount(None, b"/", None, _MS_REC | _MS_PRIVATE, None)
        # Opened in the new namespace: a bind from a mount of the old one is EINVAL.
        sources = {path: os.open(path, os.O_PATH | os.O_CLOEXEC) for paths in self.closed.values() for path in paths}
        for directory, paths in self.closed.items():
            _mount(b"tmpfs", os.fsencode(directory), b"tmpfs", 0, b"mode=755")
            for path in paths:
                path.mkdir(parents=True, exist_ok=True)
                source = f"/proc/self/fd/{sources[path]}".encode()
                _mount(source, os.fsencode(path), None, _MS_BIND | _MS_REC, None)


def _may(path: Path, uid: int, gid: int, bits: int) -> bool:
    """Whether the mode gives a user all of the bits (4 read, 1 search); access lists are not looked at."""
    status = path.stat()
    shift = 6 if status.st_uid == uid else 3 if status.st_gid == gid else 0
    return status.st_mode >> shift & bits == bits


def check_files(paths: Sequence[Path], uid: int) -> None:
    """See that a user may read files.

    Raises:
        BenchError: one of them is closed; the message names it.
    """
    for path in paths:
        if not _may(path, uid, uid, 0o4):
            raise BenchError(f"user {uid} may not read {path}; chmod o+r it ({os.strerror(errno.EACCES)})")

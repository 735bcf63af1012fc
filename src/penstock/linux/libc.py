"""The C library as the kernel bindings use it: prototypes with errno turned into OSError."""

from __future__ import annotations

import ctypes
import os

TYPE_CHECKING = False  # typing's own takes 8 ms to import, and a program may wait for this module
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

_LIBC = ctypes.CDLL(None, use_errno=True)


def _raise_errno(result: int, function: Any, _arguments: tuple[Any, ...]) -> int:
    if result == -1:
        raise failed(function.__name__)
    return result


def function(name: str, argtypes: Sequence[Any], restype: Any = ctypes.c_int) -> Any:
    """A libc function that raises OSError where it returns -1.

    The interpreter lock is released during the call.
    """
    entry = getattr(_LIBC, name)
    entry.argtypes = list(argtypes)
    entry.restype = restype
    entry.errcheck = _raise_errno
    return entry


_SYSCALL = _LIBC["syscall"]
_SYSCALL.restype = ctypes.c_long


def syscall(number: int, name: str, *arguments: int | ctypes._Pointer[Any] | None) -> int:
    """A system call that libc has no wrapper for; integers are passed as longs.

    Raises:
        OSError: the call failed; ENOSYS where the kernel does not have it.
    """
    words = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    result: int = _SYSCALL(ctypes.c_long(number), *words)
    if result == -1:
        raise failed(name)
    return result


def bare_syscall(argtypes: Sequence[Any]) -> Any:
    """`syscall` for one that is called often, in 1.3 us instead of 3.0: its number comes first, and who calls looks at
    the result: see `failed`."""
    entry = _LIBC["syscall"]  # each time another object, with types of its own
    entry.argtypes = [ctypes.c_long, *argtypes]
    entry.restype = ctypes.c_long
    return entry


def failed(name: str) -> OSError:
    """What to raise where a system call has just returned -1."""
    number = ctypes.get_errno()
    return OSError(number, f"{name}: {os.strerror(number)}")

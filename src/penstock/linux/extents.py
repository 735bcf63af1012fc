"""Where a file's bytes lie on its device (FIEMAP).

Facts:

- A file system may not know it (tmpfs, NFS: EOPNOTSUPP), or not tell (overlayfs asks the file system below).
- Preallocated space is UNWRITTEN until it is: it reads as zeros without the device being asked.
- Space that the file system has not chosen yet is DELALLOC; FIEMAP_FLAG_SYNC has it choose first.

Source: Documentation/filesystems/fiemap.rst.
"""

from __future__ import annotations

import enum
import fcntl
import struct
from dataclasses import dataclass

_FS_IOC_FIEMAP = 0xC020660B  # _IOWR('f', 11, struct fiemap)
_HEADER = struct.Struct("<QQLLLL")  # start, length, flags, mapped_extents, extent_count, reserved
_EXTENT = struct.Struct("<QQQ16xL12x")  # logical, physical, length, flags
_FLAG_SYNC = 1
_EXTENTS = 256  # a call


class ExtentFlag(enum.IntFlag):
    """Of FIEMAP_EXTENT_*, what matters to someone who wants to read or write there."""

    LAST = 0x1
    UNKNOWN = 0x2
    DELALLOC = 0x4
    ENCODED = 0x8  # compressed or encrypted
    NOT_ALIGNED = 0x100
    INLINE = 0x200
    UNWRITTEN = 0x800
    SHARED = 0x2000  # with a reflink: written elsewhere


@dataclass(frozen=True, slots=True)
class Extent:
    """A run of a file's bytes that lie side by side on its device."""

    start: int  # in the file, bytes
    stop: int
    physical: int  # on the device, bytes
    flags: ExtentFlag


def extents(fd: int, start: int, stop: int) -> list[Extent]:
    """The extents of ``[start, stop)`` of a file, in file order; what lies in none is a hole.

    An extent is given as the file system tells it, and may begin before start and end after stop.

    Raises:
        OSError: EOPNOTSUPP where the file system cannot tell.
    """
    found: list[Extent] = []
    while start < stop:
        request = bytearray(_HEADER.size + _EXTENTS * _EXTENT.size)
        _HEADER.pack_into(request, 0, start, stop - start, _FLAG_SYNC, 0, _EXTENTS, 0)
        fcntl.ioctl(fd, _FS_IOC_FIEMAP, request)
        count = _HEADER.unpack_from(request)[3]
        if not count:
            break
        for number in range(count):
            logical, physical, length, flags = _EXTENT.unpack_from(request, _HEADER.size + number * _EXTENT.size)
            found.append(Extent(logical, logical + length, physical, ExtentFlag(flags)))
        if found[-1].flags & ExtentFlag.LAST:
            break
        start = found[-1].stop
    return found


def runs(parts: list[Extent]) -> list[Extent]:
    """Extents with those joined that follow each other on the device as they do in the file."""
    joined: list[Extent] = []
    for part in parts:
        last = joined[-1] if joined else None
        if last is not None and last.stop == part.start and last.physical + last.stop - last.start == part.physical:
            joined[-1] = Extent(last.start, part.stop, last.physical, last.flags | part.flags)
        else:
            joined.append(part)
    return joined

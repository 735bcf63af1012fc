"""Space of our own on a device: all of it there from the start, in as few pieces as the file system gives.

Layout: one header of 1 MiB, of which the first block is used, then the space that is handed out.

====== ===== =====================================================
offset bytes
====== ===== =====================================================
0      16    magic, ``PENSTOCK REGION\\n``
16     4     version of this layout
20     4     length of the owner's name
24     8     size as it was made, header included
32     16    identifier, random
48     256   the owner's name, UTF-8
4064   32    BLAKE2b of the bytes before
====== ===== =====================================================

Numbers are little-endian. A file that is larger than it was made has grown: its size is the region's. So growing
writes no header, which a power cut could leave torn, or on the device before the size that it speaks of.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import stat
import struct
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Self

from penstock.errors import RegionError
from penstock.linux.extents import Extent, ExtentFlag, extents, runs
from penstock.linux.wholefile import WholeFile, open_unnamed
from penstock.storage.allocator import Allocator
from penstock.storage.base import BLOCK_BYTES
from penstock.storage.buffers import huge_buffer
from penstock.storage.signatures import signature
from penstock.units import MiB, format_size

DATA_START = 1 * MiB
_MAGIC = b"PENSTOCK REGION\n"
_VERSION = 1
_HEADER = struct.Struct("<16sIIQ16s256s")
_DIGEST_BYTES = 32
_LONGEST_OWNER_BYTES = 256
_BLKGETSIZE64 = 0x80081272
_ELSEWHERE = ExtentFlag.UNKNOWN | ExtentFlag.DELALLOC | ExtentFlag.ENCODED | ExtentFlag.INLINE | ExtentFlag.SHARED


@dataclass(frozen=True, slots=True)
class RegionHeader:
    """What a region says of itself."""

    owner: str
    size_bytes: int  # header included; of a file that has grown, what it has now
    identifier: bytes  # 16 random bytes: another region at the same place has another


class Region:
    """Space in a file or on a block device, handed out in aligned ranges. Made by `create` or `open`.

    It is locked while it is open: nobody else can open it. Ranges are what an engine's requests count in: bytes from
    the start of the file or device. Which ranges are taken is not stored; that is the owner's to know.

    Attributes:
        path: of the file or device; of the directory, where the file has no name.
        fd: open for direct reading and writing, or through the page cache where the file system has no O_DIRECT.
        is_direct: which of the two.
        header: see `RegionHeader`.
        pieces: where it lies on the device, in file order; None where the file system cannot tell.
        allocator: of the space behind the header.
    """

    def __init__(self, path: Path, fd: int, is_direct: bool, header: RegionHeader, pieces: list[Extent] | None) -> None:
        self.path = path
        self.fd = fd
        self.is_direct = is_direct
        self.header = header
        self.pieces = pieces
        self.allocator = Allocator(DATA_START, header.size_bytes)

    @classmethod
    def create(
        cls,
        path: str | os.PathLike[str],
        size_bytes: int,
        *,
        owner: str,
        overwrite: bool = False,
        destroying: str = "",
    ) -> Self:
        """Make a region and open it.

        A file is preallocated without a name and gets one when it is whole, so that a full file system shows now and
        leaves nothing. A block device is taken as large as it is, if size_bytes is 0.

        Args:
            size_bytes: of the space to be handed out; the header comes on top.
            owner: who may open it, such as ``penstock kv``.
            overwrite: an existing file, or a device's contents, may go.
            destroying: and what a device carries is this, as the error without it says.

        Raises:
            RegionError: the device carries something, or is in use.
            FileExistsError: the file is there, and overwrite is not given.
            OSError: ENOSPC, or whatever the file system says.
        """
        path = Path(path)
        _check_owner(owner)
        if _is_block_device(path):
            return cls._create_on_device(path, size_bytes, owner, overwrite, destroying)
        total_bytes = _total_bytes(size_bytes, path)
        if path.exists():
            if not overwrite:
                raise FileExistsError(errno.EEXIST, "is there already; open it, or have it overwritten", str(path))
            _refuse_in_use(path)
        with WholeFile(path) as file:
            _preallocate(file.fd, owner, total_bytes, path)
            file.commit(replacing=overwrite)
        return cls.open(path, owner=owner)

    @classmethod
    def create_unnamed(cls, directory: str | os.PathLike[str], size_bytes: int, *, owner: str) -> Self:
        """A region in a file without a name: gone when it is closed, or the process ends, however that ends.

        Args:
            directory: on the file system that has it.
            size_bytes: of the space to be handed out.
            owner: as for `create`.

        Raises:
            OSError: ENOSPC, or whatever the file system says.
        """
        path = Path(directory)
        _check_owner(owner)
        fd = open_unnamed(path)
        try:
            _preallocate(fd, owner, _total_bytes(size_bytes, path), path)
            return cls._open(f"/proc/self/fd/{fd}", path, owner)
        finally:
            os.close(fd)

    @classmethod
    def _create_on_device(cls, path: Path, size_bytes: int, owner: str, overwrite: bool, destroying: str) -> Self:
        try:
            fd = os.open(path, os.O_RDWR | os.O_EXCL | os.O_CLOEXEC)
        except OSError as error:
            if error.errno == errno.EBUSY:
                raise RegionError(f"{path}: in use: mounted, or part of another device") from error
            raise
        try:
            device_bytes = _size_bytes(fd)
            total_bytes = DATA_START + size_bytes if size_bytes else device_bytes // BLOCK_BYTES * BLOCK_BYTES
            if total_bytes > device_bytes or total_bytes < DATA_START + BLOCK_BYTES:
                found = f"the device has {format_size(device_bytes)}"
                raise OSError(errno.ENOSPC, f"{format_size(total_bytes)} are wanted, {found}", str(path))
            carried = _carried(fd, device_bytes)
            if carried and not (overwrite and destroying == carried):
                raise RegionError(
                    f"{path}: carries {carried}; to destroy that, say so twice: overwrite=True, destroying={carried!r}"
                )
            os.pwrite(fd, _packed(RegionHeader(owner, total_bytes, os.urandom(16))), 0)
            os.fsync(fd)
        finally:
            os.close(fd)
        return cls.open(path, owner=owner)

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, owner: str) -> Self:
        """Open a region that is there.

        Raises:
            RegionError: it is none, damaged, another's, smaller than it was made, or in use.
            OSError: it cannot be opened.
        """
        path = Path(path)
        return cls._open(path, path, owner)

    @classmethod
    def _open(cls, place: str | os.PathLike[str], path: Path, owner: str) -> Self:
        """Open a region that is there under a place, called by a path in messages."""
        flags = os.O_RDWR | os.O_CLOEXEC | (os.O_EXCL if _is_block_device(path) else 0)
        is_direct = True
        try:
            fd = os.open(place, flags | os.O_DIRECT)
        except OSError as error:
            if error.errno == errno.EBUSY:
                raise RegionError(f"{path}: in use: mounted, or opened by another process") from error
            if error.errno != errno.EINVAL:
                raise
            is_direct = False
            fd = os.open(place, flags)
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise RegionError(f"{path}: in use by another process") from error
            block = huge_buffer(BLOCK_BYTES)
            got = os.preadv(fd, [block], 0)
            header = _unpacked(bytes(block[:got]), path)
            if header.owner != owner:
                raise RegionError(f"{path}: belongs to {header.owner!r}, not to {owner!r}")
            there_bytes = _size_bytes(fd)
            if there_bytes < header.size_bytes:
                raise RegionError(
                    f"{path}: ends at byte {there_bytes}, and was made with {header.size_bytes}; "
                    "it has been truncated, make it anew"
                )
            if not _is_block_device(path):
                header = replace(header, size_bytes=there_bytes // BLOCK_BYTES * BLOCK_BYTES)
            return cls(path, fd, is_direct, header, _pieces(fd, header.size_bytes, path))
        except BaseException:
            os.close(fd)
            raise

    @property
    def size_bytes(self) -> int:
        """The space behind the header."""
        return self.header.size_bytes - DATA_START

    def grow(self, size_bytes: int) -> None:
        """Make the space behind the header larger, up to so many bytes; what is handed out stays where it is.

        Raises:
            RegionError: it lies on a device, which is as large as it is.
            OSError: ENOSPC, or whatever the file system says; then it is as it was.
        """
        total_bytes = -(-(DATA_START + size_bytes) // BLOCK_BYTES) * BLOCK_BYTES
        before_bytes = self.header.size_bytes
        if total_bytes <= before_bytes:
            return
        if stat.S_ISBLK(os.fstat(self.fd).st_mode):
            raise RegionError(
                f"{self.path}: {format_size(size_bytes)} are wanted, the region has {format_size(self.size_bytes)}; "
                "one on a device cannot grow"
            )
        try:
            os.posix_fallocate(self.fd, before_bytes, total_bytes - before_bytes)
            pieces = _pieces(self.fd, total_bytes, self.path)
        except BaseException as error:
            os.ftruncate(self.fd, before_bytes)
            if not isinstance(error, OSError):
                raise
            more = format_size(total_bytes - before_bytes)
            raise OSError(error.errno, f"{more} more cannot be set aside: {error.strerror}", str(self.path)) from error
        self.header = replace(self.header, size_bytes=total_bytes)
        self.pieces = pieces
        self.allocator.extend(total_bytes)

    def close(self) -> None:
        """Unlock and close it; a second time does nothing."""
        if self.fd >= 0:
            fd, self.fd = self.fd, -1
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _check_owner(owner: str) -> None:
    if len(owner.encode()) > _LONGEST_OWNER_BYTES or not owner:
        raise ValueError(f"owner: 1 to {_LONGEST_OWNER_BYTES} bytes, not {owner!r}")


def _total_bytes(size_bytes: int, path: Path) -> int:
    """With the header, in whole blocks."""
    if size_bytes < BLOCK_BYTES:
        raise ValueError(f"{path}: a region has {BLOCK_BYTES} bytes at least, not {size_bytes}")
    return -(-(DATA_START + size_bytes) // BLOCK_BYTES) * BLOCK_BYTES


def _preallocate(fd: int, owner: str, total_bytes: int, path: Path) -> None:
    """All of a new region's space, and its header."""
    try:
        os.posix_fallocate(fd, 0, total_bytes)
        os.pwrite(fd, _packed(RegionHeader(owner, total_bytes, os.urandom(16))), 0)
    except OSError as error:
        size = format_size(total_bytes)
        raise OSError(error.errno, f"{size} cannot be set aside: {error.strerror}", str(path)) from error


def _refuse_in_use(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise RegionError(f"{path}: in use by another process") from error
    finally:
        os.close(fd)


def _is_block_device(path: Path) -> bool:
    try:
        return stat.S_ISBLK(path.stat().st_mode)
    except FileNotFoundError:
        return False


def _size_bytes(fd: int) -> int:
    status = os.fstat(fd)
    if not stat.S_ISBLK(status.st_mode):
        return status.st_size
    answer = bytearray(8)
    fcntl.ioctl(fd, _BLKGETSIZE64, answer)
    return int.from_bytes(answer, "little")


def _carried(fd: int, size_bytes: int) -> str:
    try:
        header = _unpacked(os.pread(fd, BLOCK_BYTES, 0), Path())
    except RegionError:
        return signature(fd, size_bytes)
    return f"a region of {header.owner}"


def _pieces(fd: int, size_bytes: int, path: Path) -> list[Extent] | None:
    """Where the region lies, joined; None where that cannot be told (and on a device, where it needs no telling)."""
    if stat.S_ISBLK(os.fstat(fd).st_mode):
        return [Extent(0, size_bytes, 0, ExtentFlag(0))]
    try:
        found = extents(fd, 0, size_bytes)
    except OSError as error:
        if error.errno in (errno.EOPNOTSUPP, errno.ENOTTY, errno.EINVAL):
            return None
        raise
    at = 0
    for extent in found:
        if extent.start > at:
            break
        if extent.flags & _ELSEWHERE:
            kind = (extent.flags & _ELSEWHERE).name
            raise RegionError(f"{path}: byte {extent.start} is not where it can be written in place ({kind})")
        at = extent.stop
    if at < size_bytes:
        raise RegionError(f"{path}: a hole begins at byte {at}; make the region anew, do not copy it sparsely")
    return runs(found)


def _packed(header: RegionHeader) -> bytes:
    owner = header.owner.encode()
    text = _HEADER.pack(_MAGIC, _VERSION, len(owner), header.size_bytes, header.identifier, owner)
    text = text.ljust(BLOCK_BYTES - _DIGEST_BYTES, b"\0")
    return text + hashlib.blake2b(text, digest_size=_DIGEST_BYTES).digest()


def _unpacked(block: bytes, path: Path) -> RegionHeader:
    if len(block) < BLOCK_BYTES or not block.startswith(_MAGIC):
        raise RegionError(f"{path}: is no region of penstock: it does not begin with its magic number")
    text, digest = block[:-_DIGEST_BYTES], block[-_DIGEST_BYTES:]
    _, version, owner_bytes, size_bytes, identifier, owner = _HEADER.unpack_from(text)
    if version != _VERSION:
        raise RegionError(f"{path}: is a region of version {version}, and this penstock knows {_VERSION}")
    if hashlib.blake2b(text, digest_size=_DIGEST_BYTES).digest() != digest:
        raise RegionError(f"{path}: its header is damaged (bytes 0–{BLOCK_BYTES} do not match their checksum)")
    return RegionHeader(owner[:owner_bytes].decode(), size_bytes, identifier)

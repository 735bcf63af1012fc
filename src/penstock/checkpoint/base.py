"""What a checkpoint consists of, whatever its format: files, and tensors that lie in them."""

from __future__ import annotations

import fcntl
import gc
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import gcd, prod
from typing import TypeAlias

from penstock.errors import CheckpointError

# Bits of one element, by the names that safetensors uses.
DTYPE_BITS: Mapping[str, int] = {
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "BOOL": 8, "U8": 8, "I8": 8,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "U16": 16, "I16": 16, "F16": 16, "BF16": 16,
    "U32": 32, "I32": 32, "F32": 32,
    "U64": 64, "I64": 64, "F64": 64, "C64": 64,
}  # fmt: skip

Shape: TypeAlias = tuple[int, ...]
Block: TypeAlias = tuple[int, int]  # so many elements in so many bytes
BLOCKS: Mapping[str, Block] = {name: (8 // gcd(bits, 8), bits // gcd(bits, 8)) for name, bits in DTYPE_BITS.items()}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor's elements lie: in row-major order, little-endian, without gaps."""

    name: str
    dtype: str  # of DTYPE_BITS, or a quantised type of GGUF such as Q4_K
    shape: Shape
    path: str
    start: int  # in the file, bytes
    stop: int
    block: Block

    @property
    def size_bytes(self) -> int:
        """Of its elements."""
        return self.stop - self.start

    @property
    def elements(self) -> int:
        """How many there are: 1 of a scalar."""
        return prod(self.shape)

    @property
    def is_quantised(self) -> bool:
        """Whether its elements mean nothing without those beside them."""
        return self.dtype not in DTYPE_BITS


@dataclass(frozen=True, slots=True)
class FileIdentity:
    """A file as it was when it was opened, to see whether it is still that."""

    path: str
    size_bytes: int
    device: int
    inode: int
    changed_ns: int  # of its contents, as the file system counts

    def check(self, fd: int) -> None:
        """Compare with the file behind a descriptor.

        Raises:
            CheckpointError: it is another one by now, or was changed.
        """
        now = identity(self.path, os.fstat(fd))
        if now != self:
            if now.size_bytes != self.size_bytes:
                what = f"had {self.size_bytes} bytes when its header was read, and has {now.size_bytes} now"
            elif (now.device, now.inode) != (self.device, self.inode):
                what = "was replaced by another file after its header was read"
            else:
                what = "was written to after its header was read"
            raise CheckpointError(f"{self.path}: {what}; load it again once it is whole")


@dataclass(frozen=True, slots=True)
class Header:
    """One file's header.

    Attributes:
        file: to be compared when the tensors are read.
        tensors: in file order.
        metadata: strings of the writer's own; of GGUF its values as text, of arrays how long they are.
        data_start: where the first tensor's bytes begin.
    """

    file: FileIdentity
    tensors: tuple[TensorInfo, ...]
    metadata: Mapping[str, str]
    data_start: int


def identity(path: str, status: os.stat_result) -> FileIdentity:
    """A file as `os.fstat` sees it."""
    return FileIdentity(path, status.st_size, status.st_dev, status.st_ino, status.st_mtime_ns)


def open_regular(path: str | os.PathLike[str], flags: int = os.O_RDONLY) -> int:
    """A descriptor of a regular file. Never waits, as opening a FIFO would.

    Raises:
        CheckpointError: it is something else, is not there or may not be read.
        OSError: EINVAL where O_DIRECT is among the flags and refused.
    """
    try:
        fd = os.open(path, flags | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        if isinstance(error, FileNotFoundError | PermissionError | IsADirectoryError | NotADirectoryError):
            raise CheckpointError(f"{os.fspath(path)}: cannot be opened: {error.strerror}") from error
        raise
    mode = os.fstat(fd).st_mode
    if not stat.S_ISREG(mode):
        os.close(fd)
        kind = {stat.S_IFDIR: "a directory", stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket"}
        what = kind.get(stat.S_IFMT(mode), "a device")
        raise CheckpointError(f"{os.fspath(path)}: is {what}, not a file")
    fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) & ~os.O_NONBLOCK)
    return fd


@contextmanager
def collection_paused() -> Iterator[None]:
    """Without the collector of cycles: there are none in what is made here, and it would look through all of torch.

    Of 20,000 tensors the headers then take 80 ms instead of 240, and loading them 100 ms less.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()

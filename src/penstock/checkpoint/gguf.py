"""The headers of GGUF files, every length in them checked against the file before it is believed.

The gguf package reads them as well, but trusts them: an array that claims 2**60 elements keeps it busy until memory is
full. What types there are, and how large their blocks, is taken from that package, so that new ones come with it.

Format: magic, version, number of tensors, number of key-value pairs; the pairs; the tensors' names, dimensions
(innermost first), types and offsets; padding to the alignment; the tensors' bytes, each at a multiple of the alignment.
Numbers are little-endian. Source: docs/gguf.md of the ggml project.
"""

from __future__ import annotations

import os
import struct
from math import prod

from penstock.checkpoint.base import Block, FileIdentity, Header, TensorInfo, identity, open_regular
from penstock.errors import CheckpointError, UnsupportedError

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_ALIGNMENT_KEY = "general.alignment"
_DEFAULT_ALIGNMENT = 32
_LONGEST_NAME_BYTES = 1 << 16
_MOST_DIMENSIONS = 8  # ggml has 4
_DEEPEST = 4  # arrays in arrays
_STEP_BYTES = 1 << 20
_STRING, _ARRAY = 8, 9
# Bytes and struct codes of the scalar kinds of values.
_SCALARS = {
    0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d",
}  # fmt: skip
_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")


def read_header(path: str | os.PathLike[str]) -> Header:
    """Parse the header of a file; reads no more than that.

    Raises:
        CheckpointError: the file breaks a rule of the format; names the file and the offset.
        UnsupportedError: the gguf package is not installed, or does not know a type.
        OSError: it cannot be read.
    """
    name = os.fspath(path)
    fd = open_regular(name)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)  # else the page cache gets what follows the header as well
        return _parse(_Cursor(fd, identity(name, os.fstat(fd))))
    finally:
        os.close(fd)


class _Cursor:
    """Reads a file from its start, as far as is asked for."""

    def __init__(self, fd: int, file: FileIdentity) -> None:
        self.file = file
        self.at = 0
        self._fd = fd
        self._first = 0  # where the bytes at hand begin in the file
        self._data = b""

    def wrong(self, what: str, at: int | None = None) -> CheckpointError:
        return CheckpointError(f"{self.file.path}: byte {self.at if at is None else at}: {what}")

    def require(self, size_bytes: int, what: str) -> None:
        """Raises CheckpointError where the file has fewer bytes left."""
        left = self.file.size_bytes - self.at
        if size_bytes > left:
            raise self.wrong(f"{what} takes {size_bytes} bytes, and {left} are left: the file is truncated or damaged")

    def take(self, size_bytes: int, what: str) -> bytes:
        self.require(size_bytes, what)
        if self.at + size_bytes > self._first + len(self._data):
            self._first, self._data = self.at, os.pread(self._fd, max(_STEP_BYTES, size_bytes), self.at)
            if len(self._data) < size_bytes:
                raise self.wrong(f"the file ends within {what}", self.at + len(self._data))
        start = self.at - self._first
        self.at += size_bytes
        return self._data[start : start + size_bytes]

    def u32(self, what: str) -> int:
        value: int = _U32.unpack(self.take(4, what))[0]
        return value

    def u64(self, what: str) -> int:
        value: int = _U64.unpack(self.take(8, what))[0]
        return value

    def string(self, what: str, longest_bytes: int | None = None) -> str:
        at = self.at
        length = self.u64(f"the length of {what}")
        if longest_bytes is not None and length > longest_bytes:
            raise self.wrong(f"{what} is said to have {length} bytes", at)
        text = self.take(length, what)
        try:
            return text.decode()
        except UnicodeDecodeError as error:
            raise self.wrong(f"{what} is not UTF-8", at + 8 + error.start) from error

    def skip(self, size_bytes: int, what: str) -> None:
        self.require(size_bytes, what)
        self.at += size_bytes


def _parse(cursor: _Cursor) -> Header:
    if cursor.take(4, "the magic number") != MAGIC:
        raise cursor.wrong("does not begin with GGUF: this is no GGUF file", 0)
    version = cursor.u32("the version")
    if version not in _VERSIONS:
        what = "it is big-endian" if version & 0xFFFF == 0 and version else f"version {version} is none of 2 and 3"
        raise cursor.wrong(what, 4)
    tensor_count, pair_count = cursor.u64("the number of tensors"), cursor.u64("the number of pairs")
    cursor.require(pair_count * 13, f"{pair_count} key-value pairs")
    metadata: dict[str, str] = {}
    for _ in range(pair_count):
        at = cursor.at
        key = cursor.string("a key", _LONGEST_NAME_BYTES)
        value = _value(cursor, cursor.u32(f"the kind of {key!r}"), key)
        if key in metadata:
            raise cursor.wrong(f"{key!r} is there twice", at)
        metadata[key] = value
    cursor.require(tensor_count * 24, f"{tensor_count} tensors")
    entries = [_entry(cursor) for _ in range(tensor_count)]
    alignment = _alignment(cursor, metadata)
    data_start = -(-cursor.at // alignment) * alignment
    tensors = sorted(
        (_tensor(cursor, entry, data_start, alignment) for entry in entries),
        key=lambda tensor: (tensor.start, tensor.stop),
    )
    names: set[str] = set()
    stop = data_start
    for tensor in tensors:
        if tensor.name in names:
            raise cursor.wrong(f"tensor {tensor.name!r} is there twice", tensor.start)
        names.add(tensor.name)
        if tensor.start < stop:
            raise cursor.wrong(
                f"tensor {tensor.name!r} overlaps the one before it, which ends at byte {stop}", tensor.start
            )
        stop = tensor.stop
    return Header(cursor.file, tuple(tensors), metadata, data_start)


def _value(cursor: _Cursor, kind: int, key: str, depth: int = 0) -> str:
    """A value as text; of an array only how many elements it has."""
    if kind in _SCALARS:
        code = _SCALARS[kind]
        return str(struct.unpack(code, cursor.take(struct.calcsize(code), f"the value of {key!r}"))[0])
    if kind == _STRING:
        return cursor.string(f"the value of {key!r}")
    if kind != _ARRAY or depth >= _DEEPEST:
        raise cursor.wrong(f"the value of {key!r} is of kind {kind}, which is none", cursor.at - 4)
    element, count = cursor.u32(f"the elements' kind of {key!r}"), cursor.u64(f"the length of {key!r}")
    if element in _SCALARS:
        cursor.skip(count * struct.calcsize(_SCALARS[element]), f"the array {key!r}")
    else:
        cursor.require(count * (8 if element == _STRING else 12), f"the array {key!r}")
        for _ in range(count):
            if element == _STRING:
                cursor.skip(cursor.u64(f"a length in {key!r}"), f"a string in {key!r}")
            else:
                _value(cursor, element, key, depth + 1)
    return f"{count} elements"


def _entry(cursor: _Cursor) -> tuple[int, str, tuple[int, ...], int, int]:
    """Where it stands, and name, shape, type and offset of a tensor."""
    at = cursor.at
    name = cursor.string("a tensor's name", _LONGEST_NAME_BYTES)
    dimensions = cursor.u32(f"the number of dimensions of {name!r}")
    if dimensions > _MOST_DIMENSIONS:
        raise cursor.wrong(f"tensor {name!r} is said to have {dimensions} dimensions", cursor.at - 4)
    shape = tuple(cursor.u64(f"a dimension of {name!r}") for _ in range(dimensions))
    return at, name, shape[::-1], cursor.u32(f"the type of {name!r}"), cursor.u64(f"the offset of {name!r}")


def _alignment(cursor: _Cursor, metadata: dict[str, str]) -> int:
    text = metadata.get(_ALIGNMENT_KEY, str(_DEFAULT_ALIGNMENT))
    alignment = int(text) if text.isascii() and text.isdecimal() else 0
    if not 0 < alignment <= 1 << 30 or alignment & (alignment - 1):
        raise cursor.wrong(f"{_ALIGNMENT_KEY} is {text}, not a power of two")
    return alignment


def _tensor(
    cursor: _Cursor, entry: tuple[int, str, tuple[int, ...], int, int], data_start: int, alignment: int
) -> TensorInfo:
    at, name, shape, kind, offset = entry
    dtype, block = _type(cursor, kind, name)
    elements, size_bytes = block
    row = shape[-1] if shape else 1
    if row % elements:
        raise cursor.wrong(f"tensor {name!r} of {dtype}: {row} elements in a row are no blocks of {elements}", at)
    if offset % alignment:
        raise cursor.wrong(f"tensor {name!r}: its offset {offset} is no multiple of the alignment, {alignment}", at)
    start = data_start + offset
    stop = start + prod(shape) // elements * size_bytes
    if stop > cursor.file.size_bytes:
        size = cursor.file.size_bytes
        raise cursor.wrong(f"tensor {name!r} ends at byte {stop}, beyond the file: it is truncated or damaged", size)
    return TensorInfo(name, dtype, shape, cursor.file.path, start, stop, block)


def _type(cursor: _Cursor, kind: int, name: str) -> tuple[str, Block]:
    try:
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
    except ImportError as error:
        raise UnsupportedError(f"{cursor.file.path}: GGUF files take the package gguf; install it") from error
    try:
        found = GGMLQuantizationType(kind)
        elements, size_bytes = GGML_QUANT_SIZES[found]
    except (ValueError, KeyError) as error:
        raise UnsupportedError(
            f"{cursor.file.path}: tensor {name!r} is of type {kind}, which the installed gguf package does not know"
        ) from error
    return found.name, (int(elements), int(size_bytes))

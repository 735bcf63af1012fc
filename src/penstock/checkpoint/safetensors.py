"""The headers of safetensors files: every rule of the format is checked before anything is allocated for the tensors.

Format: 8 bytes, the header's length N, little-endian; N bytes of JSON, padded with blanks; the tensors' bytes, each
byte of the rest of the file belonging to exactly one tensor. Source: the format section of the safetensors project's
README, and what its parser refuses.
"""

from __future__ import annotations

import json
import os
import stat
import struct
from math import prod
from typing import Any

from penstock.checkpoint.base import BLOCKS, DTYPE_BITS, FileIdentity, Header, TensorInfo, identity, open_regular
from penstock.errors import CheckpointError

_LENGTH = struct.Struct("<Q")
LARGEST_HEADER_BYTES = 100_000_000  # as safetensors' own parser
METADATA = "__metadata__"


def read_header(path: str | os.PathLike[str]) -> Header:
    """Parse the header of a file; reads no more than that.

    Raises:
        CheckpointError: the file breaks a rule of the format; names the file and the offset.
        OSError: it cannot be read.
    """
    name = os.fspath(path)
    fd = open_regular(name)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)  # else the page cache gets what follows the header as well
        status = os.fstat(fd)
        assert stat.S_ISREG(status.st_mode)
        first = os.pread(fd, _LENGTH.size, 0)
        if len(first) < _LENGTH.size:
            raise CheckpointError(
                f"{name}: has {status.st_size} bytes, and the length of the header alone takes {_LENGTH.size}: "
                "it is truncated, or no safetensors file"
            )
        [length] = _LENGTH.unpack(first)
        if length > min(LARGEST_HEADER_BYTES, status.st_size - _LENGTH.size):
            raise CheckpointError(
                f"{name}: byte 0: the header is said to have {length} bytes, "
                + (
                    f"and {status.st_size - _LENGTH.size} follow: the file is truncated, or no safetensors file"
                    if length <= LARGEST_HEADER_BYTES
                    else f"more than the {LARGEST_HEADER_BYTES} that the format allows: this is no safetensors file"
                )
            )
        text = b""
        while len(text) < length:
            part = os.pread(fd, length - len(text), _LENGTH.size + len(text))
            if not part:
                raise CheckpointError(f"{name}: byte {_LENGTH.size + len(text)}: the file ends within its header")
            text += part
        return parse_header(text, identity(name, status))
    finally:
        os.close(fd)


def parse_header(text: bytes, file: FileIdentity) -> Header:
    """The JSON of a header, and whether it describes the file that it was read from.

    Raises:
        CheckpointError: it breaks a rule of the format.
    """
    data_start = _LENGTH.size + len(text)
    table = _table(text, file.path)
    metadata = table.pop(METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{file.path}: header: {METADATA} must map strings to strings")
    tensors = sorted(
        (_tensor(name, value, file, data_start) for name, value in table.items()),
        key=lambda tensor: (tensor.start, tensor.stop),
    )
    at = data_start
    for tensor in tensors:
        if tensor.start != at:
            how = "overlaps the tensor before it, which ends" if tensor.start < at else "leaves a hole after what ends"
            raise CheckpointError(f"{file.path}: byte {tensor.start}: tensor {tensor.name!r} {how} at byte {at}")
        at = tensor.stop
    if at != file.size_bytes:
        how = "the file is truncated" if at > file.size_bytes else "what follows belongs to no tensor"
        raise CheckpointError(
            f"{file.path}: byte {min(at, file.size_bytes)}: the tensors end at byte {at}, "
            f"the file at {file.size_bytes}: {how}"
        )
    return Header(file, tuple(tensors), metadata, data_start)


def _table(text: bytes, path: str) -> dict[str, Any]:
    if not text.startswith(b"{"):
        raise CheckpointError(f"{path}: byte {_LENGTH.size}: the header does not begin with '{{'")
    has_escapes = b"\\u" in text  # only so can half of a surrogate pair come in

    def without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in found if names.count(name) > 1)
            raise CheckpointError(f"{path}: header: {twice!r} is there twice")
        if has_escapes:
            for key, value in pairs:
                if not (_is_text(key) and (not isinstance(value, str) or _is_text(value))):
                    raise CheckpointError(f"{path}: header: {_short(key)}: half of a surrogate pair is no character")
        return found

    def refuse(constant: str) -> None:
        raise CheckpointError(f"{path}: header: {constant} is no JSON")

    try:
        table = json.loads(text.decode(), object_pairs_hook=without_duplicates, parse_constant=refuse)
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: byte {_LENGTH.size + error.start}: the header is not UTF-8") from error
    except json.JSONDecodeError as error:
        at = _LENGTH.size + len(error.doc[: error.pos].encode())
        raise CheckpointError(f"{path}: byte {at}: the header is not JSON: {error.msg}") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, or thousands of brackets
        raise CheckpointError(f"{path}: the header is not JSON that can be read: {error}") from error
    assert isinstance(table, dict)
    return table


def _tensor(name: str, value: object, file: FileIdentity, data_start: int) -> TensorInfo:
    def wrong(what: str) -> CheckpointError:
        return CheckpointError(f"{file.path}: header: tensor {name!r}: {what}")

    if not isinstance(value, dict):
        raise wrong("is described by an object with dtype, shape and data_offsets")
    try:
        dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    except KeyError as error:
        missing = {"dtype", "shape", "data_offsets"} - value.keys()
        raise wrong(f"has no {', '.join(sorted(missing))}") from error
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise wrong(f"dtype {dtype!r} is none of {', '.join(DTYPE_BITS)}")
    if not _are_counts(shape):
        raise wrong(f"shape {_short(shape)} is no list of whole numbers from 0")
    if not _are_counts(offsets) or len(offsets) != 2:
        raise wrong(f"data_offsets {_short(offsets)} are not two whole numbers from 0")
    start, stop = offsets
    if stop < start:
        raise wrong(f"data_offsets {_short(offsets)} decrease")
    if data_start + stop > file.size_bytes:
        raise CheckpointError(
            f"{file.path}: byte {file.size_bytes}: tensor {name!r} ends at byte {data_start + stop}, "
            "beyond the file: it is truncated"
        )
    bits = prod(shape) * DTYPE_BITS[dtype]
    if bits != 8 * (stop - start):
        bytes_ = f"{bits // 8} bytes" if bits % 8 == 0 else f"{bits} bits, which are no whole bytes"
        raise wrong(
            f"shape {_short(shape)} of {dtype} takes {bytes_}, and data_offsets {_short(offsets)} hold {stop - start}"
        )
    return TensorInfo(name, dtype, tuple(shape), file.path, data_start + start, data_start + stop, BLOCKS[dtype])


def _are_counts(values: object) -> bool:
    if not isinstance(values, list):
        return False
    for value in values:  # noqa: SIM110 — all() takes twice the time, and there are tens of thousands
        if type(value) is not int or not 0 <= value < 1 << 64:
            return False
    return True


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}…"

"""A finished context in a file: it outlives its process, and is read back whole or not at all.

====== ===== =====================================================
offset bytes
====== ===== =====================================================
0      16    magic, ``PENSTOCK SESSION``
16     4     version of this layout
20     4     0
24     8     offset of the table
32     8     length of the table, bytes
40     32    BLAKE2b of the table
4096         parts, each at a multiple of 4096
       ...   the table: JSON, UTF-8
====== ===== =====================================================

Numbers are little-endian. The table has what the session is bound to (``facts``), and of each part its name, offset,
length, what its owner says of it (``about``) and a checksum of every 4 MiB. The file is written without a name and gets
one when it is whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import xxhash
from numpy.typing import NDArray

from penstock.errors import SessionError
from penstock.linux.wholefile import WholeFile
from penstock.units import MiB, format_size

SUFFIX = ".penstock-session"
CHUNK_BYTES = 4 * MiB
MAGIC = b"PENSTOCK SESSION"
_VERSION = 1
_HEADER = struct.Struct("<16sIIQQ32s")
_ALIGNMENT_BYTES = 4096
_LONGEST_TABLE_BYTES = 256 * MiB
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")


@dataclass(frozen=True, slots=True)
class Part:
    """One array of a session.

    Attributes:
        offset: in the file, bytes.
        about: what its owner says of it.
        checksums: XXH3 of every chunk, 64 bits.
    """

    name: str
    offset: int
    size_bytes: int
    about: Mapping[str, Any]
    checksums: tuple[int, ...]


def session_path(directory: Path, name: str) -> Path:
    """Where the session of a name lies.

    Raises:
        ValueError: it is no name: letters, digits, dots, dashes and underscores, and no dot first.
    """
    if not _NAME.fullmatch(name):
        raise ValueError(f"session {name!r}: a name has letters, digits, '.', '-' and '_', 200 at most")
    return directory / (name + SUFFIX)


class SessionWriter:
    """Writes a session; `commit` gives it its name, in place of one that has it.

    Args:
        path: where it is to be.
        facts: what it is bound to, as JSON has it.

    Raises:
        OSError: whatever the file system says.
    """

    def __init__(self, path: Path, facts: Mapping[str, Any]) -> None:
        self._facts = facts
        self._parts: list[Part] = []
        self._at = _ALIGNMENT_BYTES
        self._file = WholeFile(path)

    def add(self, name: str, data: NDArray[np.uint8], about: Mapping[str, Any]) -> None:
        """Write one part, [bytes]."""
        checksums = []
        for start in range(0, len(data), CHUNK_BYTES):
            chunk = data[start : start + CHUNK_BYTES]
            checksums.append(xxhash.xxh3_64_intdigest(chunk.data))
            self._file.write(chunk.data, self._at + start)
        self._parts.append(Part(name, self._at, len(data), dict(about), tuple(checksums)))
        self._at += -(-len(data) // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES

    def commit(self) -> None:
        """Have it on the device, and then under its name."""
        parts = [
            {
                "name": part.name,
                "offset": part.offset,
                "bytes": part.size_bytes,
                "about": dict(part.about),
                "checksums": [f"{value:016x}" for value in part.checksums],
            }
            for part in self._parts
        ]
        table = json.dumps({"facts": self._facts, "parts": parts}).encode()
        self._file.write(table, self._at)
        digest = hashlib.blake2b(table, digest_size=32).digest()
        self._file.write(_HEADER.pack(MAGIC, _VERSION, 0, self._at, len(table), digest))
        self._file.commit()
        os.posix_fadvise(self._file.fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        """Without `commit` before, nothing is left of it; a second time does nothing."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class SessionReader:
    """Reads a session.

    Raises:
        SessionError: it is none, damaged, or of another version.
        OSError: it cannot be opened or read.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            self.size_bytes = os.fstat(self._fd).st_size
            table = self._table()
            try:
                self.facts: dict[str, Any] = table["facts"]
                self.parts = {part["name"]: _part(part) for part in table["parts"]}
            except (KeyError, TypeError, ValueError) as error:
                raise self._damaged(0, f"its table has no {error}") from error
            for part in self.parts.values():
                if not _ALIGNMENT_BYTES <= part.offset <= part.offset + part.size_bytes <= self.size_bytes:
                    raise self._damaged(part.offset, f"{part.name} does not lie in the file")
        except BaseException:
            os.close(self._fd)
            raise

    def _damaged(self, offset: int, what: str) -> SessionError:
        return SessionError(f"{self._path}: damaged at offset {offset}: {what}; delete it, and save it anew")

    def _table(self) -> Any:
        header = os.pread(self._fd, _HEADER.size, 0)
        if len(header) < _HEADER.size or not header.startswith(MAGIC):
            raise SessionError(f"{self._path}: is no session of penstock: it does not begin with its magic number")
        _, version, _, offset, length, digest = _HEADER.unpack(header)
        if version != _VERSION:
            raise SessionError(f"{self._path}: is of version {version}, and this penstock reads {_VERSION}")
        if not _ALIGNMENT_BYTES <= offset <= offset + length <= self.size_bytes or length > _LONGEST_TABLE_BYTES:
            raise self._damaged(24, f"a table of {length} bytes at {offset}, in a file of {self.size_bytes}")
        text = os.pread(self._fd, length, offset)
        if hashlib.blake2b(text, digest_size=32).digest() != digest:
            raise self._damaged(offset, "its table is not what was written")
        return json.loads(text)

    def chunks(self, name: str) -> Iterator[NDArray[np.uint8]]:
        """A part, [bytes] each, verified.

        Raises:
            SessionError: it is not what was written.
        """
        part = self.parts[name]
        if len(part.checksums) != -(-part.size_bytes // CHUNK_BYTES):
            raise self._damaged(part.offset, f"{name} has {len(part.checksums)} checksums")
        for number, expected in enumerate(part.checksums):
            start = number * CHUNK_BYTES
            length = min(CHUNK_BYTES, part.size_bytes - start)
            chunk = np.frombuffer(os.pread(self._fd, length, part.offset + start), np.uint8)
            if len(chunk) != length:
                raise self._damaged(part.offset + start + len(chunk), "the file ends")
            if (found := xxhash.xxh3_64_intdigest(chunk.data)) != expected:
                what = f"the checksum of {name} is {found:016x} there, and was {expected:016x}"
                raise self._damaged(part.offset + start, what)
            yield chunk
            os.posix_fadvise(self._fd, part.offset + start, length, os.POSIX_FADV_DONTNEED)

    def read(self, name: str) -> NDArray[np.uint8]:
        """A part as a whole, [bytes], verified."""
        whole = np.empty(self.parts[name].size_bytes, np.uint8)
        at = 0
        for chunk in self.chunks(name):
            whole[at : at + len(chunk)] = chunk
            at += len(chunk)
        return whole

    def require(self, facts: Mapping[str, Any]) -> None:
        """Complain unless it is bound to the same.

        Raises:
            SessionError: it is another's.
        """
        for key, wanted in facts.items():
            found = self.facts.get(key)
            if found != wanted:
                raise SessionError(f"{self._path}: its {key} is {found}, and {wanted} is asked for; it is another's")

    def describe(self) -> str:
        """In a line."""
        facts = ", ".join(f"{key} {value}" for key, value in self.facts.items())
        return f"{self._path.name}: {format_size(self.size_bytes)}, {facts}"

    def close(self) -> None:
        """A second time does nothing."""
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _part(entry: Any) -> Part:
    checksums = tuple(int(value, 16) for value in entry["checksums"])
    return Part(str(entry["name"]), int(entry["offset"]), int(entry["bytes"]), entry["about"], checksums)

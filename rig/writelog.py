"""The log of a disk's writes, as QEMU's blklogwrites keeps it, and disks as a power cut leaves them.

A drive has a write cache: what was written and not flushed is lost or not, each sector for itself. A killed emulator
alone loses nothing, as the host keeps what it has written. So a disk is put together again from the log: all that was
written before the last flush, and of what came after it, a part chosen at random.

Format: that of dm-log-writes (Documentation/admin-guide/device-mapper/log-writes.rst).
"""

from __future__ import annotations

import os
import random
import shutil
import struct
from dataclasses import dataclass
from pathlib import Path

_SECTOR_BYTES = 512
_SUPER = struct.Struct("<QQQI")
_ENTRY = struct.Struct("<QQQQ")
_MAGIC = 0x6A736677736872
_FLUSH, _FUA, _DISCARD = 1, 2, 4


@dataclass(frozen=True, slots=True)
class Entry:
    """One thing that the disk was told.

    Attributes:
        offset: on the disk, bytes.
        length: bytes; 0 for a flush alone.
        at: where the data lies in the log.
        flags: as in the format.
    """

    offset: int
    length: int
    at: int
    flags: int

    @property
    def is_flush(self) -> bool:
        """All before it is on the medium."""
        return bool(self.flags & _FLUSH)


def read_log(path: Path) -> list[Entry]:
    """All whole entries of a log, also of one whose writer was killed."""
    entries: list[Entry] = []
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(_SUPER.size)
        if len(head) < _SUPER.size or _SUPER.unpack(head)[0] != _MAGIC:
            return entries
        at = _SECTOR_BYTES
        while at + _SECTOR_BYTES <= size:
            file.seek(at)
            sector, sectors, flags, _ = _ENTRY.unpack(file.read(_ENTRY.size))
            length = 0 if flags & _DISCARD else sectors * _SECTOR_BYTES
            if not (sectors or flags) or flags > 15 or at + _SECTOR_BYTES + length > size:
                break
            entries.append(Entry(sector * _SECTOR_BYTES, length, at + _SECTOR_BYTES, flags))
            at += _SECTOR_BYTES + length
    return entries


def disk_after_cut(
    before: Path, log: Path, entries: list[Entry], count: int, chance: random.Random, path: Path
) -> int:  # fmt: skip
    """Write the disk as it may be after a power cut; returns how many writes were lost, whole or in part.

    Args:
        before: the disk when the log began.
        log: the entries' data.
        entries: of the log.
        count: of them, those that were told before the cut.
        chance: decides what of the unflushed is lost.
        path: of the new disk.
    """
    shutil.copyfile(before, path)
    safe = max((number for number, entry in enumerate(entries[:count]) if entry.is_flush), default=-1)
    lost = 0
    with path.open("r+b", buffering=0) as disk, log.open("rb") as data:
        for number, entry in enumerate(entries[:count]):
            keep = entry.length
            if number >= safe and not entry.flags & _FUA and (chance.random() < 0.5):
                # Nothing of it, or only its first sectors.
                keep = chance.randrange(0, entry.length // _SECTOR_BYTES + 1) * _SECTOR_BYTES * chance.randrange(2)
                lost += keep < entry.length
            os.pwrite(disk.fileno(), os.pread(data.fileno(), keep, entry.at), entry.offset)
    return lost

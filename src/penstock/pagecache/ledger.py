"""What is known of the model's pages: who has read what, and what was prefetched.

One ledger is shared by the runtime, the loader's threads and the evictor. It is bookkeeping only: the truth is
the kernel's, and where the two differ the program still reads the right bytes, only later.
"""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass, field

from penstock.linux.pagecache import FileResidency
from penstock.pagecache.base import ModelFile
from penstock.pagecache.intervals import IntervalSet


@dataclass(slots=True)
class FileRecord:
    """One file's pages, in bytes."""

    file: ModelFile
    fd: int
    residency: FileResidency
    present: IntervalSet = field(default_factory=IntervalSet)  # cached, or being read in
    waiting: IntervalSet = field(default_factory=IntervalSet)  # prefetched and not yet accessed
    accessed: IntervalSet = field(default_factory=IntervalSet)  # ever, by anyone
    failed: str = ""  # why nothing more is prefetched from it


@dataclass(frozen=True, slots=True)
class LedgerTotals:
    """Sums over all files, in bytes."""

    accessed_bytes: int
    prefetched_bytes: int
    waiting_bytes: int  # prefetched and not yet accessed
    evicted_bytes: int


class Ledger:
    """The records of all files; every method may be called from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._records: dict[ModelFile, FileRecord] = {}
        self._prefetched_bytes = 0
        self._waiting_bytes = 0
        self._accessed_bytes = 0
        self._evicted_bytes = 0

    def record(self, file: ModelFile) -> FileRecord:
        """A file's record, made at the first call, which opens it.

        Raises:
            OSError: the file cannot be opened, or is another one by now.
        """
        with self._lock:
            found = self._records.get(file)
            if found is None:
                fd = os.open(file.path, os.O_RDONLY | os.O_CLOEXEC)
                try:
                    status = os.fstat(fd)
                    if (status.st_dev, status.st_ino) != (file.device, file.inode):
                        raise FileNotFoundError(2, "replaced by another file while the program ran", file.path)
                    found = self._records[file] = FileRecord(file, fd, FileResidency(fd))
                except BaseException:
                    os.close(fd)
                    raise
            return found

    def records(self) -> list[FileRecord]:
        """All records so far."""
        with self._lock:
            return list(self._records.values())

    def access(self, record: FileRecord, start: int, stop: int) -> int:
        """Note that a worker has read a range; returns how many bytes of it nobody had prefetched or cached."""
        with self._lock:
            missed = record.present.add(start, stop)
            self._waiting_bytes -= record.waiting.remove(start, stop)
            self._accessed_bytes += record.accessed.add(start, stop)
            return missed

    def found_cached(self, record: FileRecord) -> None:
        """All of a file is in the page cache, from before."""
        with self._lock:
            record.present.add(0, record.file.size_bytes)

    def claim(self, record: FileRecord, start: int, stop: int) -> list[tuple[int, int]]:
        """Parts of a range that are not cached yet; they count as present and waiting from now on."""
        with self._lock:
            missing = record.present.missing(start, stop)
            for low, high in missing:
                record.present.add(low, high)
                self._waiting_bytes += record.waiting.add(low, high)
            return missing

    def unread(self, record: FileRecord) -> list[tuple[int, int]]:
        """Parts of a file that are cached, or being read in, whoever asked for them, and not accessed by anyone."""
        with self._lock:
            return [part for start, stop in record.present for part in record.accessed.missing(start, stop)]

    def is_accessed(self, record: FileRecord, start: int, stop: int) -> bool:
        """Whether the program has read all of a range."""
        with self._lock:
            return record.accessed.covers(start, stop)

    def is_present(self, record: FileRecord, start: int, stop: int) -> bool:
        """Whether all of a range is cached, or being read in."""
        with self._lock:
            return record.present.covers(start, stop)

    def settle(self, record: FileRecord, start: int, stop: int, read_bytes: int) -> None:
        """A claimed range is done: read_bytes of it had to be read, the rest was cached already."""
        with self._lock:
            self._prefetched_bytes += read_bytes
            if read_bytes == 0:
                self._waiting_bytes -= record.waiting.remove(start, stop)

    def abandon(self, record: FileRecord, start: int, stop: int) -> None:
        """A claimed range could not be read."""
        with self._lock:
            record.present.remove(start, stop)
            self._waiting_bytes -= record.waiting.remove(start, stop)

    def evicted(self, record: FileRecord, start: int, stop: int, freed_bytes: int) -> None:
        """A range was dropped from the cache."""
        with self._lock:
            record.present.remove(start, stop)
            self._waiting_bytes -= record.waiting.remove(start, stop)
            self._evicted_bytes += freed_bytes

    def present_bytes(self) -> int:
        """Bytes of all files that should be cached, by what is known of reads, prefetches and evictions."""
        with self._lock:
            return sum(record.present.total for record in self._records.values())

    def resident_bytes(self) -> int:
        """Cached bytes of all files: asked from the kernel, or what should be there where asking is not exact."""
        return sum(
            r.residency.resident_bytes(0, r.file.size_bytes) if r.residency.exact else r.present.total
            for r in self.records()
        )

    def totals(self) -> LedgerTotals:
        """The sums at this moment."""
        with self._lock:
            return LedgerTotals(self._accessed_bytes, self._prefetched_bytes, self._waiting_bytes, self._evicted_bytes)

    def close(self) -> None:
        """Close all files."""
        with self._lock:
            for record in self._records.values():
                os.close(record.fd)
            self._records.clear()

"""Empties the page cache behind the readers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from penstock.linux.pagecache import drop, page_out
from penstock.linux.window import PAGE_BYTES
from penstock.pagecache.base import ModelFile
from penstock.pagecache.intervals import IntervalSet
from penstock.pagecache.ledger import Ledger
from penstock.units import MiB

# Whole 2 MiB folios, so that none has to be split, and enough of them at once to make a call worth it.
_ALIGN_BYTES = 2 * MiB
_BATCH_BYTES = 32 * MiB


@dataclass(frozen=True, slots=True)
class MappedPart:
    """Where a process maps part of a file."""

    pid: int
    pidfd: int
    address: int
    start: int  # bytes of the file, half-open
    stop: int


class Evictor:
    """Drops ranges of files: mapped pages by process_madvise, the others by fadvise.

    Args:
        ledger: told what is gone.
        mapped_parts: where the observed processes map a file now.
    """

    def __init__(self, ledger: Ledger, mapped_parts: Callable[[ModelFile], Sequence[MappedPart]]) -> None:
        self._ledger = ledger
        self._mapped_parts = mapped_parts
        self._pending: dict[ModelFile, IntervalSet] = {}
        self._new_bytes: dict[ModelFile, int] = {}  # of them, since the last batch
        self._may_page_out = True
        self.warning = ""

    def evict(self, file: ModelFile, start: int, stop: int, *, at_once: bool = False) -> None:
        """Drop a range now, or once enough lies beside it.

        Raises:
            OSError: the file is gone.
        """
        pending = self._pending.setdefault(file, IntervalSet())
        added = pending.add(start // PAGE_BYTES * PAGE_BYTES, stop)  # addresses are paged out in whole pages
        new_bytes = self._new_bytes.get(file, 0) + added
        self._new_bytes[file] = new_bytes % _BATCH_BYTES
        if new_bytes < _BATCH_BYTES and not at_once:  # not pending.total: pieces too small to drop may be many
            return
        for low, high in list(pending):
            first, last = (low, high) if at_once else _inner(low, high)
            if last > first:
                self._drop(file, first, last)
                pending.remove(first, last)

    def flush(self) -> None:
        """Drop what is still waiting for a larger batch."""
        for file in list(self._pending):
            with contextlib.suppress(OSError):
                self.evict(file, 0, 0, at_once=True)

    def _drop(self, file: ModelFile, start: int, stop: int) -> None:
        record = self._ledger.record(file)
        before = record.residency.resident_bytes(start, stop)
        if before:
            self._page_out(file, start, stop)
            drop(record.fd, start, stop)
        freed = before - record.residency.resident_bytes(start, stop)
        if 2 * freed >= before:  # else most of it is still mapped by someone: it stays, and stays known
            self._ledger.evicted(record, start, stop, freed)

    def _page_out(self, file: ModelFile, start: int, stop: int) -> None:
        for part in self._mapped_parts(file) if self._may_page_out else ():
            low, high = max(start, part.start), min(stop, part.stop)
            if low >= high:
                continue
            address = part.address + low - part.start
            try:
                page_out(part.pidfd, [(address, address + high - low)])
            except PermissionError:
                self._may_page_out = False
                self.warning = (
                    "pages that the program still maps cannot be evicted without CAP_SYS_NICE; the prefetch stays "
                    "within the free memory instead"
                )
                return
            except OSError:
                continue  # the process ended or unmapped the range meanwhile


def _inner(start: int, stop: int) -> tuple[int, int]:
    return -(-start // _ALIGN_BYTES) * _ALIGN_BYTES, stop // _ALIGN_BYTES * _ALIGN_BYTES

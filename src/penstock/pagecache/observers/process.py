"""Observing without root: /proc of the program and its children.

mmap readers are seen through the page tables (which pages of a mapping they have touched), read() readers
through their descriptors' positions. A pread() reader moves no position; its bytes are counted by
/proc/PID/io, and with a template a count is a position in it. Without a template, what became resident in a
file that it holds open is taken as read, and what was counted beyond that as read of what was prefetched, in
file order. So is, at the end, what became resident in a known file of which nothing was seen: a program may
open, read and close a small one between two looks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

from penstock.errors import ObserverError
from penstock.linux import process
from penstock.linux.pagecache import FileResidency, ResidencyMethod, mincore
from penstock.linux.window import PAGE_BYTES
from penstock.pagecache.base import ModelFile, Range
from penstock.pagecache.evictor import MappedPart
from penstock.pagecache.files import ModelFiles
from penstock.pagecache.intervals import IntervalSet
from penstock.pagecache.ledger import FileRecord, Ledger
from penstock.pagecache.observers.base import Observed, Observer, ProcessTree
from penstock.units import MiB

_UNEXPLAINED_BYTES = 1 * MiB  # of /proc/PID/io, before anybody looks for pread()
_LARGEST_UNSEEN_BYTES = 512 * MiB  # no storage gives more between two looks


class ProcessObserver(Observer):
    """Sees children of the same user, through /proc alone.

    Args:
        files: the model's files; grows as the program opens more.
        ledger: what is cached because of the prefetcher, which is not the program's doing.
        groups: a template's, to turn byte counts into positions.
        only_known: the files are all there is to watch (``--model``).
    """

    name = "process"

    def __init__(
        self,
        files: ModelFiles,
        ledger: Ledger,
        groups: Sequence[Sequence[Range]] = (),
        *,
        only_known: bool = False,
    ) -> None:
        self._files = files
        self._only_known = only_known
        self._ledger = ledger
        self._groups = [list(group) for group in groups]
        self._tree: ProcessTree | None = None
        self._pid = 0
        self._cached_before: dict[ModelFile, IntervalSet] = {}
        self._seen: set[ModelFile] = set()
        self._counted: dict[int, int] = {}  # rchar at the last look, by pid
        self._explained: dict[int, int] = {}  # bytes seen since then by other means
        self._owed: dict[int, int] = {}  # bytes reported beyond what was counted: the kernel's read-ahead, by pid
        self._cursors: dict[int, tuple[int, int, int]] = {}  # pid -> group, range, bytes into it

    def start(self, pid: int) -> None:
        try:
            process.read_maps(pid)
        except (OSError, ProcessLookupError) as error:
            raise ObserverError(f"/proc/{pid} cannot be read: {error}") from error
        self._tree = ProcessTree(pid, self._files, only_known=self._only_known)
        self._pid = pid
        for file in () if self._groups else self._files:
            if file.size_bytes > _LARGEST_UNSEEN_BYTES:
                continue
            with contextlib.suppress(OSError):
                record = self._ledger.record(file)
                self._cached_before[file] = _cached(record)
        import penstock.linux.pagemap  # noqa: F401 — 0.1 s; later there is something to see

    def poll(self) -> Sequence[Observed]:
        found = self._poll()
        self._seen.update(part.file for part in found)
        return found

    def last_poll(self) -> Sequence[Observed]:
        found = list(self.poll())
        for file, before in self._cached_before.items():
            if file in self._seen:
                continue
            with contextlib.suppress(OSError):
                record = self._ledger.record(file)
                for low, high in record.present.missing(0, file.size_bytes):
                    for start, stop in _resident(record.residency, record.fd, low, high):
                        found += [Observed(self._pid, file, a, b) for a, b in before.missing(start, stop)]
        return found

    def _poll(self) -> list[Observed]:
        tree = self._tree
        if tree is None:
            return []
        refreshed = tree.refresh()
        found = tree.touched()
        if refreshed or any(tree.open_unmapped().values()):
            moved = tree.moved_positions()
            for part in moved:
                self._explained[part.pid] = self._explained.get(part.pid, 0) + part.stop - part.start
            found += moved
        if refreshed:
            found += self._unexplained(tree)
        return found

    def _unexplained(self, tree: ProcessTree) -> list[Observed]:
        found = []
        for pid, files in tree.open_unmapped().items():
            try:
                count = process.io_counters(pid).read_chars
            except (OSError, ProcessLookupError):
                continue
            before = self._counted.setdefault(pid, count)
            extra = count - before - self._explained.get(pid, 0)
            if extra < _UNEXPLAINED_BYTES:
                continue
            self._counted[pid] = count
            self._explained[pid] = 0
            found += self._advance(pid, extra, files) if self._groups else self._grown(pid, extra, files)
        return found

    def _advance(self, pid: int, count: int, files: Sequence[ModelFile]) -> list[Observed]:
        """Follow the template by a number of bytes."""
        group, step, done = self._cursors.get(pid) or (self._free_group(), 0, 0)
        found = []
        by_name = {file.name: file for file in files}
        while count > 0 and step < len(self._groups[group]):
            part = self._groups[group][step]
            taken = min(count, part.stop - part.start - done)
            file = by_name.get(part.name)
            if file is not None and taken:
                found.append(Observed(pid, file, part.start + done, part.start + done + taken))
            count -= taken
            done += taken
            if done >= part.stop - part.start:
                step, done = step + 1, 0
        self._cursors[pid] = (group, step, done)
        return found

    def _free_group(self) -> int:
        taken = {cursor[0] for cursor in self._cursors.values()}
        return next((n for n in range(len(self._groups)) if n not in taken), 0)

    def _grown(self, pid: int, count: int, files: Sequence[ModelFile]) -> list[Observed]:
        """What of the open files is resident and not yet accounted for; if that is too little, of all that is cached.

        Of that too: what the loader claimed and then found to be read in, perhaps by this process, counts as cached.
        """
        found, cached = [], []
        for file in dict.fromkeys(files):
            try:
                record = self._ledger.record(file)
            except OSError:
                continue
            for low, high in record.present.missing(0, file.size_bytes):
                found += [Observed(pid, file, a, b) for a, b in _resident(record.residency, record.fd, low, high)]
            cached += [(file, low, high) for low, high in self._ledger.unread(record)]
        left = count - self._owed.get(pid, 0) - sum(part.stop - part.start for part in found)
        for file, low, high in cached:
            if left <= 0:
                break
            stop = min(high, low + left)
            found.append(Observed(pid, file, low, stop))
            left -= stop - low
        self._owed[pid] = max(0, -left)
        return found

    def mapped_parts(self, file: ModelFile) -> Sequence[MappedPart]:
        return self._tree.mapped_parts(file) if self._tree else ()

    def stop(self) -> None:
        if self._tree is not None:
            self._tree.close()
            self._tree = None

    @property
    def warnings(self) -> Sequence[str]:
        if self._tree is not None and self._tree.cannot_inspect:
            return (f"some processes are not observed: {self._tree.cannot_inspect}",)
        return ()


def _cached(record: FileRecord) -> IntervalSet:
    """What is cached of a file. Where only sampling is possible: all or nothing, by a few pages near its start."""
    size_bytes = record.file.size_bytes
    if record.residency.exact:
        return IntervalSet(_resident(record.residency, record.fd, 0, size_bytes))
    sampled = record.residency.resident_bytes(0, min(4 * MiB, size_bytes // 2))
    return IntervalSet([(0, size_bytes)] if sampled else [])


def _resident(residency: FileResidency, fd: int, start: int, stop: int) -> list[tuple[int, int]]:
    """Resident ranges of a file, to the page where that can be asked, else to the MiB."""
    if residency.exact and not residency.resident_bytes(start, stop):
        return []
    if residency.method in (ResidencyMethod.CACHESTAT, ResidencyMethod.MINCORE):
        first = start // PAGE_BYTES
        pages = mincore(fd, start, stop)
        step = PAGE_BYTES
    else:
        import numpy as np

        step = MiB
        first = start // step
        pages = np.array([residency.is_resident(a, min(a + step, stop)) for a in range(start, stop, step)], bool)
    ranges: list[tuple[int, int]] = []
    for index in pages.nonzero()[0].tolist():
        low = (first + index) * step
        if ranges and ranges[-1][1] == low:
            ranges[-1] = (ranges[-1][0], min(low + step, stop))
        else:
            ranges.append((low, min(low + step, stop)))
    return ranges

"""What every observer does, and the process tree that all of them watch."""

from __future__ import annotations

import os
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from penstock.linux import process
from penstock.linux.process import Mapping, OpenFile
from penstock.linux.window import PAGE_BYTES
from penstock.pagecache.base import ModelFile
from penstock.pagecache.evictor import MappedPart
from penstock.pagecache.files import ModelFiles, looks_like_weights
from penstock.pagecache.intervals import IntervalSet
from penstock.units import KiB

if TYPE_CHECKING:  # it imports numpy: 0.1 s, in which a small model may be read
    from penstock.linux.pagemap import Pagemap

_SMALLEST_MAPPING_BYTES = 256 * KiB
_REFRESH_S = 0.01  # a small shard may be mapped for no longer
_MOST_SCANS = 8
_REFRESH_SHARE = 0.04  # of a CPU, at most, goes into looking through /proc: its locks are the program's, too


@dataclass(frozen=True, slots=True)
class Observed:
    """Bytes ``[start, stop)`` of a file that a process has read or touched since the last poll."""

    pid: int
    file: ModelFile
    start: int
    stop: int


class Observer(ABC):
    """Tells what a process tree reads of the model's files. The contract: `testing.observer`.

    An observer never slows a reader down on purpose and never blocks it. It may be late by a poll, and it may
    report up to 2 MiB (what one page-table entry maps) more than was touched; it reports nothing that was not.
    """

    name: str  # as in --observer
    keeps_events = False  # whether what happens between two polls is there at the next, however long that takes

    @abstractmethod
    def start(self, pid: int) -> None:
        """Begin with a process that has not run its first instruction yet.

        Raises:
            ObserverError: it cannot work here; says why.
        """

    @abstractmethod
    def poll(self) -> Sequence[Observed]:
        """What was read since the last call, in order, neighbouring bytes merged."""

    def last_poll(self) -> Sequence[Observed]:
        """What was read since the last call, as far as it can still be told once the program has ended."""
        return self.poll()

    def all_is_seen(self) -> None:  # noqa: B027 — one that costs readers nothing has nothing to do
        """All of the known model files has been read: from now on only that more is read, and when, is of interest.

        An observer that costs readers something may look less closely then. It may be said again at any time.
        """

    @abstractmethod
    def mapped_parts(self, file: ModelFile) -> Sequence[MappedPart]:
        """Where the processes map a file, as far as known."""

    @abstractmethod
    def stop(self) -> None:
        """Take everything back that start did."""

    @property
    def warnings(self) -> Sequence[str]:
        """What was lost or could not be seen."""
        return ()


@dataclass(slots=True)
class _Process:
    pid: int
    pidfd: int
    pagemap: Pagemap | None
    mappings: dict[tuple[int, int, int], _Mapped] = field(default_factory=dict)
    files: dict[int, tuple[OpenFile, ModelFile]] = field(default_factory=dict)
    positions: dict[tuple[int, ModelFile], int] = field(default_factory=dict)


@dataclass(slots=True)
class _Mapped:
    mapping: Mapping
    file: ModelFile
    touched: IntervalSet = field(default_factory=IntervalSet)  # bytes of the file

    @property
    def start(self) -> int:
        return self.mapping.offset_bytes

    @property
    def stop(self) -> int:
        return min(self.file.size_bytes, self.start + self.mapping.stop - self.mapping.start)


class ProcessTree:
    """The processes of a tree with the model files that they map or have open, from /proc.

    Args:
        pid: the tree's root.
        files: known model files; files newly found are added.
        only_known: add none; the known ones are all there is to see.
    """

    def __init__(self, pid: int, files: ModelFiles, *, only_known: bool = False) -> None:
        self._root = pid
        self._only_known = only_known
        self._files = files
        self._processes: dict[int, _Process] = {}
        self._ignored: set[tuple[int, int]] = set()
        self._next_refresh_s = 0.0
        self.cannot_inspect = ""  # why a process could not be looked into

    def refresh(self, *, force: bool = False) -> bool:
        """Look through /proc again if it is time; returns whether it was."""
        now = time.monotonic()
        if now < self._next_refresh_s and not force:
            return False
        began_s = time.thread_time()
        try:
            pids = process.descendants(self._root)
        except ProcessLookupError:
            pids = []
        for pid in set(self._processes) - set(pids):
            self._forget(pid)
        for pid in pids:
            try:
                self._look_into(pid)
            except ProcessLookupError:
                self._forget(pid)
            except PermissionError as error:
                self.cannot_inspect = str(error)
        # By the clock it may have taken any time, as it waited for a CPU, or the machine was stopped; to be blind for
        # 25 times that long was to miss a whole model.
        took_s = time.thread_time() - began_s
        self._next_refresh_s = now + max(_REFRESH_S, took_s / _REFRESH_SHARE)
        return True

    def _look_into(self, pid: int) -> None:
        known = self._processes.get(pid)
        if known is None:
            try:
                pidfd = os.pidfd_open(pid)
            except OSError as error:
                raise ProcessLookupError(error.errno, error.strerror) from error
            known = self._processes[pid] = _Process(pid, pidfd, None)
        mappings = {}
        for mapping in process.read_maps(pid, minimum_bytes=_SMALLEST_MAPPING_BYTES):
            if mapping.executable or mapping.deleted:
                continue
            file = self._model_file(mapping.device, mapping.inode, mapping.path)
            if file is not None:
                key = (mapping.start, mapping.offset_bytes, mapping.inode)
                mapped = known.mappings.get(key)
                if mapped is None or mapped.mapping.stop != mapping.stop:
                    mapped = _Mapped(mapping, file)
                mappings[key] = mapped
        known.mappings = mappings
        if mappings and known.pagemap is None:
            from penstock.linux.pagemap import Pagemap

            known.pagemap = Pagemap(pid)
        known.files = {}
        for opened in process.open_files(pid):
            file = self._model_file(opened.device, opened.inode, opened.path, opened.size_bytes)
            if file is not None:
                known.files[opened.descriptor] = (opened, file)

    def _model_file(self, device: int, inode: int, path: str, size_bytes: int | None = None) -> ModelFile | None:
        if (device, inode) in self._ignored:
            return None
        file = self._files.get(device, inode)
        if file is not None or self._only_known:
            return file
        try:
            size_bytes = os.stat(path).st_size if size_bytes is None else size_bytes
            if looks_like_weights(path, size_bytes):
                return self._files.add(path, device, inode)
        except OSError:
            pass  # deleted, or in another mount namespace: not ours to prefetch
        self._ignored.add((device, inode))
        return None

    def touched(self) -> list[Observed]:
        """Pages newly present in the mappings of model files, in file order within each mapping."""
        found = []
        for known in list(self._processes.values()):
            for key, mapped in list(known.mappings.items()):
                try:
                    touched = self._touched_in(known, mapped)
                except ProcessLookupError:  # it ended, or its memory was replaced by exec
                    if known.pagemap is not None:
                        known.pagemap.close()
                    known.pagemap, known.mappings = None, {}
                    break
                if touched and not _is_still_mapped(known.pid, mapped.mapping):
                    # The next shard is where the last one was, and its pages are none of the last one's.
                    del known.mappings[key]
                    self._next_refresh_s = 0.0
                    continue
                found += touched
        return found

    def _touched_in(self, known: _Process, mapped: _Mapped) -> list[Observed]:
        found = []
        assert known.pagemap is not None
        shift = mapped.mapping.start - mapped.start
        gaps = mapped.touched.missing(mapped.start, mapped.stop)
        if len(gaps) > _MOST_SCANS:  # one scan over all of them costs less
            gaps = [(gaps[0][0], gaps[-1][1])]
        for low, high in gaps:
            last_page = -(-(high + shift) // PAGE_BYTES) * PAGE_BYTES  # of a file that ends within it
            for first, last in known.pagemap.present_ranges(low + shift, last_page).tolist():
                for start, stop in mapped.touched.missing(first - shift, min(last - shift, mapped.stop)):
                    found.append(Observed(known.pid, mapped.file, start, stop))
                mapped.touched.add(first - shift, min(last - shift, mapped.stop))
        return found

    def moved_positions(self) -> list[Observed]:
        """What read() has passed in files whose descriptors' positions moved."""
        found = []
        for known in list(self._processes.values()):
            for opened, file in list(known.files.values()):
                try:
                    position = process.file_position(known.pid, opened.descriptor)
                except (OSError, ProcessLookupError):
                    continue
                before = known.positions.get((opened.descriptor, file), 0)
                known.positions[opened.descriptor, file] = position
                if position > before:
                    found.append(Observed(known.pid, file, before, min(position, file.size_bytes)))
        return found

    def has_mappings(self) -> bool:
        """Whether any process maps a model file."""
        return any(known.mappings for known in self._processes.values())

    def open_unmapped(self) -> dict[int, list[ModelFile]]:
        """Model files that each process has open and does not map."""
        return {
            pid: [file for _, file in known.files.values()] for pid, known in self._processes.items() if known.files
        }

    def pids(self) -> list[int]:
        """The processes looked into."""
        return list(self._processes)

    def mapped_parts(self, file: ModelFile) -> list[MappedPart]:
        """Where the processes map a file."""
        return [
            MappedPart(known.pid, known.pidfd, mapped.mapping.start, mapped.start, mapped.stop)
            for known in self._processes.values()
            for mapped in known.mappings.values()
            if mapped.file == file and _is_still_mapped(known.pid, mapped.mapping)
        ]

    def _forget(self, pid: int) -> None:
        known = self._processes.pop(pid, None)
        if known is not None:
            os.close(known.pidfd)
            if known.pagemap is not None:
                known.pagemap.close()

    def close(self) -> None:
        """Close all descriptors."""
        for pid in list(self._processes):
            self._forget(pid)


def _is_still_mapped(pid: int, mapping: Mapping) -> bool:
    try:
        return process.is_still_mapped(pid, mapping)
    except (ProcessLookupError, PermissionError):
        return False

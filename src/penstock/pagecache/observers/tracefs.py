"""Observing as root: the kernel's page-cache tracepoints, and the page tables for what they leave out.

Reads are seen, each with its thread, file and range, in order. One that begins with pages that are cached, and waits
for the next because they are just being read in, tells no event for those it begins with: a few, as read-ahead is
young then. Page faults are seen too, except those that map a whole 2 MiB folio at once (see `penstock.linux.tracefs`),
which the page tables show.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from penstock.errors import ObserverError, UnsupportedError
from penstock.linux.ringbuffer import Events, decode_pages
from penstock.linux.tracefs import READ, Instance, follow
from penstock.pagecache.base import ModelFile
from penstock.pagecache.evictor import MappedPart
from penstock.pagecache.files import ModelFiles
from penstock.pagecache.intervals import IntervalSet
from penstock.pagecache.observers.base import Observed, Observer, ProcessTree
from penstock.pagecache.observers.stretches import Stretch, stretches
from penstock.units import KiB, MiB

_SMALLEST_FILE_BYTES = 256 * KiB
_LONGEST_READ_BYTES = 32 * MiB  # one event tells of a whole read(2); its pages come in steps of this at most
_NOTHING = IntervalSet()


class TracefsObserver(Observer):
    """Sees every process of the tree, whoever owns it.

    Args:
        files: the model's files; grows as the program opens more.
        instance: one that follows the program already (it must be made before the program starts); made by
            `start` otherwise.
        only_known: the files are all there is to watch (``--model``), so the kernel may filter on them.
        keep_instance: leave the instance to `penstock.linux.janitor` at the end.
    """

    name = "tracefs"
    keeps_events = True

    def __init__(
        self,
        files: ModelFiles,
        instance: Instance | None = None,
        *,
        only_known: bool = False,
        keep_instance: bool = False,
    ) -> None:
        self._files = files
        self._instance = instance
        self._only_known = only_known
        self._keep_instance = keep_instance
        self._tree: ProcessTree | None = None
        self._process_of_thread: dict[int, int] = {}
        self._pages_before: dict[tuple[int, ModelFile], IntervalSet] = {}  # seen in page tables at the last poll
        self._given_up: set[tuple[int, int]] = set()  # device and inode of files that were looked for in vain
        self._pid = 0
        self._all_is_seen = False
        self._by_positions = False  # reads are seen as descriptors' positions move, not by their events

    def start(self, pid: int) -> None:
        self._pid = pid
        try:
            if self._instance is None:
                self._instance = follow(pid)
            if self._only_known:
                self._instance.watch((file.device, file.inode) for file in self._files)
        except (OSError, UnsupportedError) as error:
            self.stop()
            raise ObserverError(f"tracefs: {error}") from error
        self._tree = ProcessTree(pid, self._files, only_known=self._only_known)

    def all_is_seen(self) -> None:
        if self._only_known and not self._all_is_seen and self._tree is not None:  # else an event may be of a new file
            self._all_is_seen = True
            self._tree.moved_positions()  # from here on

    def poll(self) -> Sequence[Observed]:
        if self._instance is None or self._tree is None:
            return ()
        events = decode_pages(self._instance.read_pages(), self._instance.formats)
        if self._tree.refresh():
            self._process_of_thread.update({pid: pid for pid in self._tree.pids()})  # for when they are gone
        files, number = self._files_of(events)
        chosen = number >= 0
        start = events["start"][chosen]
        stop = np.minimum(events["stop"][chosen], start + _LONGEST_READ_BYTES)
        maps = events["kind"][chosen] != self._instance.events.index(READ)
        found = stretches(events["thread"][chosen], number[chosen], start, stop, maps)
        observed = self._joined(files, found, self._tree.touched())
        if self._all_is_seen:
            observed += self._read_again(by_events=not maps.all())
        return observed

    def _read_again(self, *, by_events: bool) -> Sequence[Observed]:
        """What was read where all was read before: by positions, once they are seen to move where events tell of reads.

        An event costs its reader 0.3 µs, and comes for every 64 KiB to 1 MiB, by the size of the cached folios: 1 to
        5 % of a copy from the page cache. With pread() no position moves, and the events stay.
        """
        assert self._instance is not None
        assert self._tree is not None
        moved = self._tree.moved_positions()
        if self._by_positions:
            return moved
        if by_events and moved:
            self._instance.stop_recording(READ)
            self._by_positions = True
        return ()

    def _joined(
        self, files: Sequence[ModelFile], found: Sequence[Stretch], touched: Sequence[Observed]
    ) -> list[Observed]:
        """What was read, as the events order it and the page tables complete it.

        An event names 64 KiB of what the kernel has mapped, the folio up to 2 MiB: told one by one they are a hundred
        thousand pieces of a model, and to go through those costs more CPU time than to read a model that is cached.
        """
        pages: dict[tuple[int, ModelFile], IntervalSet] = {}
        for part in touched:
            pages.setdefault((part.pid, part.file), IntervalSet()).add(part.start, part.stop)
        untold = {key: IntervalSet(parts) for key, parts in pages.items()}
        result = []
        for stretch in found:
            pid, file = self._process(stretch.thread), files[stretch.file]
            key = pid, file
            parts = IntervalSet()
            if key in untold:
                parts = IntervalSet(untold[key].overlap(stretch.start, stretch.stop))
                untold[key].remove(stretch.start, stretch.stop)
            told = (pages.get(key, _NOTHING), self._pages_before.get(key, _NOTHING))
            for start, stop in stretch.pieces:
                if start < file.size_bytes and not any(known.covers(start, stop) for known in told):
                    parts.add(start, min(stop, file.size_bytes))
            result += [Observed(pid, file, start, stop) for start, stop in parts]
        for (pid, file), parts in untold.items():
            result += [Observed(pid, file, start, stop) for start, stop in parts]
        self._pages_before = pages
        return result

    def _files_of(self, events: Events) -> tuple[list[ModelFile], NDArray[np.int64]]:
        """The model files among the events, and each event's index in them or -1.

        A program reads thousands of small files while it starts: none of them is worth looking for in /proc.
        """
        assert self._tree is not None
        keys, inverse = np.unique(events["inode"], return_inverse=True)
        reach = np.zeros(len(keys), np.int64)
        np.maximum.at(reach, inverse, events["stop"])
        devices = np.zeros(len(keys), np.int64)
        devices[inverse] = events["device"]  # two devices with one inode number: told apart below
        pairs = list(zip(devices.tolist(), keys.tolist(), strict=True))
        unknown = [
            pair
            for pair, stop in zip(pairs, reach.tolist(), strict=True)
            if stop >= _SMALLEST_FILE_BYTES and pair not in self._given_up and self._files.get(*pair) is None
        ]
        if unknown and not self._only_known:
            self._tree.refresh(force=True)
        self._given_up.update(unknown)  # the process tree may still find them later, by their paths
        files: list[ModelFile] = []
        number = np.full(len(keys), -1, np.int64)
        for index, pair in enumerate(pairs):
            file = self._files.get(*pair)
            if file is not None:
                number[index] = len(files)
                files.append(file)
        result = number[inverse]
        result[events["device"] != devices[inverse]] = -1
        return files, result

    def _process(self, thread: int) -> int:
        pid = self._process_of_thread.get(thread)
        if pid is None:
            pid = self._process_of_thread[thread] = self._thread_group(thread)
        return pid

    def _thread_group(self, thread: int) -> int:
        try:
            with open(f"/proc/{thread}/status", "rb") as file:
                for line in file:
                    if line.startswith(b"Tgid:"):
                        return int(line.split()[1])
        except OSError:
            pass
        return self._pid  # the thread is gone already

    def mapped_parts(self, file: ModelFile) -> Sequence[MappedPart]:
        return self._tree.mapped_parts(file) if self._tree else ()

    def stop(self) -> None:
        if self._tree is not None:
            self._tree.close()
            self._tree = None
        if self._instance is not None:
            if self._keep_instance:
                self._instance.detach()
            else:
                self._instance.close()

    @property
    def warnings(self) -> Sequence[str]:
        if self._instance is not None and self._instance.missed_pages:
            return (f"{self._instance.missed_pages} pages of trace events came faster than they were read",)
        return ()

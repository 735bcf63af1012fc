"""Observing as root: the kernel's page-cache tracepoints, and the page tables for what they leave out.

Reads are seen in full, each with its thread, file and range, in order. Page faults are seen too, except those
that map a whole 2 MiB folio at once (see `penstock.linux.tracefs`), which the page tables show.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from penstock.errors import ObserverError, UnsupportedError
from penstock.linux.ringbuffer import Events, decode_pages
from penstock.linux.tracefs import ADD, Instance, follow
from penstock.pagecache.base import ModelFile
from penstock.pagecache.evictor import MappedPart
from penstock.pagecache.files import ModelFiles
from penstock.pagecache.observers.base import Observed, Observer, ProcessTree
from penstock.units import MiB

_LONGEST_READ_BYTES = 32 * MiB  # one event tells of a whole read(2); its pages come in steps of this at most


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
        self._pid = 0

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
        self._tree = ProcessTree(pid, self._files)

    @property
    def _misses_only(self) -> bool:
        return self._instance is not None and self._instance.events == (ADD,)

    def poll(self) -> Sequence[Observed]:
        if self._instance is None or self._tree is None:
            return ()
        events = decode_pages(self._instance.read_pages(), self._instance.formats)
        found = self._observed(events) if len(events) else []
        self._tree.refresh()
        found += self._tree.touched()
        if self._misses_only:
            found += self._tree.moved_positions()
        return found

    def _observed(self, events: Events) -> list[Observed]:
        assert self._tree is not None
        found: list[Observed] = []
        # A stable sort by file and thread keeps each reader's own order; readers interleave at the poll anyway.
        order = np.lexsort((events["thread"], events["inode"], events["device"]))
        events = events[order]
        key_change = np.ones(len(events), bool)
        key_change[1:] = (
            (events["thread"][1:] != events["thread"][:-1])
            | (events["inode"][1:] != events["inode"][:-1])
            | (events["device"][1:] != events["device"][:-1])
        )
        start = events["start"]
        stop = np.minimum(events["stop"], start + _LONGEST_READ_BYTES)
        run_change = key_change.copy()
        run_change[1:] |= (start[1:] > stop[:-1]) | (start[1:] < start[:-1])
        firsts = np.flatnonzero(run_change)
        stops = np.maximum.reduceat(stop, firsts)
        times = events["time_ns"][firsts]
        for index in np.argsort(times, kind="stable").tolist():
            event = events[firsts[index]]
            file = self._file(int(event["device"]), int(event["inode"]))
            if file is not None and int(event["start"]) < file.size_bytes:
                found.append(
                    Observed(
                        self._process(int(event["thread"])),
                        file,
                        int(event["start"]),
                        min(int(stops[index]), file.size_bytes),
                    )
                )
        return found

    def _file(self, device: int, inode: int) -> ModelFile | None:
        assert self._tree is not None
        if self._tree.is_ignored(device, inode):
            return None
        file = self._files.get(device, inode)
        if file is None and not self._only_known:
            self._tree.refresh(force=True)
            file = self._files.get(device, inode)
        if file is None:
            self._tree.ignore(device, inode)
        return file

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
        warnings = []
        if self._instance is not None and self._instance.missed_pages:
            warnings.append(f"{self._instance.missed_pages} pages of trace events came faster than they were read")
        if self._misses_only:
            warnings.append("this kernel traces page-cache misses only; reads that hit are seen less exactly")
        return warnings

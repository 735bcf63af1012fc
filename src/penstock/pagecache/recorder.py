"""Who reads, and what each of them has read so far: the workers and the template in the making."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime

from penstock.pagecache.base import ModelFile, Range
from penstock.pagecache.template import FileIdentity, GroupRecorder, Template


class Recorder:
    """Gives each reading process a worker number and records what it reads.

    A launcher's rank (LOCAL_RANK and the like) is the number. Without one, and with a template, a process gets the
    number of the group that its first read fits best, so that workers keep their groups however they are
    scheduled; otherwise numbers go by first reads.

    Args:
        groups: the template's, or ().
        rank_of: a process's rank, None where it has none.
    """

    def __init__(
        self, groups: Sequence[Sequence[Range]] = (), rank_of: Callable[[int], int | None] = lambda _: None
    ) -> None:
        self._groups = groups
        self._rank_of = rank_of
        self._workers: dict[int, int] = {}
        self._recorders: dict[int, GroupRecorder] = {}
        self._files: dict[str, ModelFile] = {}

    @property
    def pids(self) -> dict[int, int]:
        """Worker number of each process that has read."""
        return dict(self._workers)

    def record(self, pid: int, file: ModelFile, start: int, stop: int) -> int:
        """Note a read; returns the worker's number."""
        worker = self._workers.get(pid)
        if worker is None:
            worker = self._workers[pid] = self._number(pid, file, start)
        self._files.setdefault(file.name, file)
        self._recorders.setdefault(worker, GroupRecorder()).record(file.name, start, stop)
        return worker

    def _number(self, pid: int, file: ModelFile, start: int) -> int:
        taken = set(self._workers.values())
        rank = self._rank_of(pid)
        if rank is not None and rank not in taken and (not self._groups or rank < len(self._groups)):
            return rank
        free = [number for number in range(len(self._groups)) if number not in taken]
        if free:
            return min(free, key=lambda number: _distance(self._groups[number], file.name, start))
        return max(taken, default=-1) + 1

    def template(self, service: str, roots: Iterable[str], fingerprint: Callable[[ModelFile], str]) -> Template | None:
        """What was read, as a template; None if nothing was.

        Raises:
            OSError: a file cannot be read to be fingerprinted.
        """
        sizes = {name: file.size_bytes for name, file in self._files.items()}
        groups = tuple(self._recorders[worker].ranges(sizes) for worker in sorted(self._recorders))
        if not groups:
            return None
        names = dict.fromkeys(part.name for group in groups for part in group)
        files = tuple(
            FileIdentity(name, self._files[name].size_bytes, fingerprint(self._files[name])) for name in names
        )
        recorded_at = datetime.now(UTC).isoformat(timespec="seconds")
        return Template(service, files, groups, tuple(roots), recorded_at)


def _distance(group: Sequence[Range], name: str, start: int) -> int:
    """How many bytes of a group come before one; large if it has none such."""
    before = 0
    for part in group:
        if part.name == name and part.start <= start < part.stop:
            return before + start - part.start
        before += part.stop - part.start
    return 1 << 62

"""MAIO: the model-loading policy.

Source: "Accelerating Model Loading in LLM Inference by Programmable Page Cache", FAST '26: I/O templates,
interruptible prefetching, XPU affinity (the loader binds to the node of the worker that a range is for) and
burn-after-reading. Beyond the paper: prefetching begins before the first access; the first run prefetches too
(in file order, while it records); a template that does not fit what is read is left and recorded anew; and a
page is burnt only when every worker that will read it has passed it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Sequence

from penstock.pagecache.base import Access, Context, Evict, ModelFile, Policy, Prefetch, Range
from penstock.pagecache.intervals import IntervalSet
from penstock.pagecache.policies.ahead import ReadAhead
from penstock.units import MiB

_GUESS_SHARE = 0.25  # of the budget, for a model that the command names, before anything is known of how it is read
_SMALLEST_GUESS_BYTES = 1024 * MiB  # and all that is guessed of a model that lies there in two formats
_PIECE_BYTES = 64 * MiB  # several workers' reads are interleaved in pieces of this size
_BACKWARDS_BYTES = 32 * MiB  # backwards by less is a thread pool's disorder
_LATE_POLLS = 3  # so many polls later a page may still be reported: its mapping has to be found first
_FORWARDS_BYTES = 256 * MiB  # and forwards: a reader that leaves some out, or one of a pool's threads
# So much read elsewhere, or of what the template does not name: the worker has gone there. Less is a glance, or the
# other half of a folio of 2 MiB at the edge of what is read: a page-table entry maps it whole.
_SETTLED_BYTES = 24 * MiB
_LEFT_OUT_BYTES = 8 * MiB  # smaller holes are what was mapped between two polls
_REPLAN_S = 0.05  # between two looks at the whole plan, which is thousands of ranges for several workers
_JUMPS = 3  # this many such moves: the template is another program's
_UNKNOWN_BYTES = 64 * MiB  # or this much, and a quarter of the template, that it does not name


class _Group:
    """One worker's recorded reads, with the position of each byte in their order."""

    def __init__(self, ranges: Sequence[Range]) -> None:
        self._by_name: dict[str, list[tuple[int, int, int]]] = {}  # (start, stop, position), by start
        listed: dict[str, IntervalSet] = {}
        position = 0
        for part in ranges:
            for start, stop in listed.setdefault(part.name, IntervalSet()).missing(part.start, part.stop):
                self._by_name.setdefault(part.name, []).append((start, stop, position))
                position += stop - start
            listed[part.name].add(part.start, part.stop)
        for parts in self._by_name.values():
            parts.sort()
        self.total_bytes = position
        self.position = 0  # how far the worker has come
        self._before: deque[int] = deque(maxlen=_LATE_POLLS)  # positions when the last polls began
        self._left_out_bytes = 0  # read further on, since it was last where it is thought to be
        self._elsewhere = 0  # where it has last been seen otherwise
        self._elsewhere_bytes = 0  # and how much it has read there

    def locate(self, name: str, start: int, stop: int) -> tuple[int, int] | None:
        """First byte of a range that the template has, and its position in the order; None if it has none."""
        parts = self._by_name.get(name, [])
        index = bisect_right(parts, start, key=lambda part: part[0]) - 1
        if index < 0 or start >= parts[index][1]:
            index += 1
        if index == len(parts) or parts[index][0] >= stop:
            return None
        first = max(start, parts[index][0])
        return first, parts[index][2] + first - parts[index][0]

    def begin_poll(self) -> None:
        """What is reported from now on was read since the worker was where it is now."""
        self._before.append(self.position)

    def move(self, start: int, stop: int, miss: bool) -> bool:
        """Follow the worker to positions ``[start, stop)``; True if it went on elsewhere than expected.

        A glance elsewhere (a header, the first page of a tensor) does not move it, nor does reading again what
        is cached; reading on elsewhere does.
        """
        if min(self.position, *self._before) - _BACKWARDS_BYTES <= start <= self.position + _FORWARDS_BYTES:
            if start > self.position + _BACKWARDS_BYTES:
                self._left_out_bytes += stop - start
                if self._left_out_bytes < _SETTLED_BYTES:
                    return False
            if stop > self.position:
                self.position = stop
                self._left_out_bytes = 0
            return False
        if not miss:
            return False
        if self._elsewhere - _BACKWARDS_BYTES <= start <= self._elsewhere + _BACKWARDS_BYTES:
            self._elsewhere_bytes += stop - start
        else:
            self._elsewhere_bytes = stop - start
        self._elsewhere = stop
        if self._elsewhere_bytes < _SETTLED_BYTES:
            return False
        self.position = stop
        self._elsewhere_bytes = 0
        return True

    def ahead(self, name: str, start: int, stop: int) -> list[tuple[int, int]]:
        """The parts of a range that the worker has not come to yet."""
        parts = self._by_name.get(name, [])
        index = max(0, bisect_right(parts, start, key=lambda part: part[0]) - 1)
        ahead = []
        for low, high, position in parts[index:]:
            if low >= stop:
                break
            to_come = max(low, start, low + self.position - position)
            if to_come < min(high, stop):
                ahead.append((to_come, min(high, stop)))
        return ahead


class Maio(Policy):
    """Replays a template ahead of the readers, interruptibly, and burns what all have read.

    Without a template it prefetches in file order: a little of a model that the command names at once, as it will be
    read in all likelihood, and the rest ahead of whoever reads.
    """

    def start(self, context: Context) -> None:
        self._files = {file.name: file for file in context.files}
        self._keep_bytes = context.keep_bytes
        self._groups = [_Group(group) for group in context.groups]
        self._plan = self._merge(context.groups)
        self._ahead = ReadAhead(context.files, max(64 * MiB, context.budget_bytes // 2))
        # A small model is read before a guess is of use, and what it had read would hide what a short program reads.
        is_small = sum(file.size_bytes for file in context.files) < _SMALLEST_GUESS_BYTES
        self._guess_bytes = 0 if is_small else int(context.budget_bytes * _GUESS_SHARE)
        if not self._ahead.has_one_format:
            self._guess_bytes = min(self._guess_bytes, _SMALLEST_GUESS_BYTES)
        self._jumps = 0
        self._next_replan_s = 0.0
        self._polled_s = -1.0
        self._unknown_bytes = 0
        self._unknown_bytes_of: dict[int, int] = {}  # by worker, since it last read what its template names
        self._unknown_share_bytes = sum(group.total_bytes for group in self._groups) // 4
        self.mismatch = ""
        self._passed: dict[int, deque[tuple[ModelFile, int, int, int]]] = {}  # by worker: within the keep distance
        self._behind: dict[tuple[int, ModelFile], IntervalSet] = {}  # by worker: beyond it, not burnt yet
        self._read_bytes: dict[int, int] = {}  # by worker
        self._read: dict[tuple[int, str], IntervalSet] = {}  # by worker and file

    def prefetch(self, access: Access | None) -> Sequence[Prefetch]:
        if access is None:
            return self._remaining() if self._groups else self._ahead.beginning(self._guess_bytes)
        self._note(access)
        if access.time_s != self._polled_s:
            self._polled_s = access.time_s
            for group in self._groups:
                group.begin_poll()
        if not self._groups or self.mismatch:
            return self._ahead.prefetch(access)
        return self._follow(access)

    def _follow(self, access: Access) -> Sequence[Prefetch]:
        group = self._groups[access.worker] if access.worker < len(self._groups) else None
        located = group.locate(access.file.name, access.start, access.stop) if group else None
        if group is None or located is None:
            return self._follow_unknown(access) if access.miss else ()
        self._unknown_bytes_of[access.worker] = 0
        first, position = located
        if group.move(position, position + access.stop - first, access.miss):
            self._jumps += 1
            if self._jumps >= _JUMPS:
                return self._leave_template(access, "it reads in another order than its template says")
        if not access.miss or access.time_s < self._next_replan_s:
            return ()
        self._next_replan_s = access.time_s + _REPLAN_S
        return self._remaining()

    def _follow_unknown(self, access: Access) -> Sequence[Prefetch]:
        """The reader goes where its template does not; the others, and it later, may do what theirs say."""
        size_bytes = access.stop - access.start
        self._unknown_bytes += size_bytes
        if self._unknown_bytes > _UNKNOWN_BYTES + self._unknown_share_bytes:
            return self._leave_template(access, "it reads what its template does not name")
        unknown = self._unknown_bytes_of[access.worker] = self._unknown_bytes_of.get(access.worker, 0) + size_bytes
        if unknown < _SETTLED_BYTES:
            return ()
        # Its own way on only: where readers went like this before, they have been.
        ahead = [r for r in self._ahead.prefetch(access) if (r.worker, r.file) == (access.worker, access.file)]
        return [*ahead, *self._remaining()] if ahead else ()

    def _leave_template(self, access: Access, why: str) -> Sequence[Prefetch]:
        self.mismatch = why
        nothing = Prefetch(access.file, access.stop, access.stop)  # an empty answer would leave the template queued
        return self._ahead.prefetch(access) or self._ahead.wanted() or [nothing]

    def _remaining(self) -> list[Prefetch]:
        """The plan from where each worker is, and then what it has left out and may come back to."""
        positions = [group.position for group in self._groups]
        ahead = [request for worker, stop, request in self._plan if stop > positions[worker]]
        left_out = [
            Prefetch(request.file, low, high, worker)
            for worker, stop, request in self._plan
            if stop <= positions[worker]
            for low, high in self._read_by(worker, request.file).missing(request.start, request.stop)
            if high - low >= _LEFT_OUT_BYTES
        ]
        return ahead + left_out

    def _read_by(self, worker: int, file: ModelFile) -> IntervalSet:
        return self._read.setdefault((worker, file.name), IntervalSet())

    def _merge(self, groups: Sequence[Sequence[Range]]) -> list[tuple[int, int, Prefetch]]:
        """All workers' reads in one order: by how far through its group each worker will be."""
        pieces = []
        for worker, group in enumerate(groups):
            total = max(1, sum(part.stop - part.start for part in group))
            position = 0
            for part in group:
                file = self._files.get(part.name)
                for start in range(part.start, part.stop, _PIECE_BYTES):
                    stop = min(start + _PIECE_BYTES, part.stop)
                    if file is not None:
                        request = Prefetch(file, start, stop, worker)
                        pieces.append((position / total, worker, position + stop - start, request))
                    position += stop - start
        pieces.sort(key=lambda piece: piece[:2])
        return [(worker, stop, request) for _, worker, stop, request in pieces]

    def _note(self, access: Access) -> None:
        read = self._read_bytes.get(access.worker, 0) + access.stop - access.start
        self._read_bytes[access.worker] = read
        passed = self._passed.setdefault(access.worker, deque())
        passed.append((access.file, access.start, access.stop, read))
        self._read_by(access.worker, access.file).add(access.start, access.stop)
        # Now and not in evict, which nobody calls while memory is ample: a program may read for days.
        while passed and read - passed[0][3] >= self._keep_bytes:
            file, start, stop, _ = passed.popleft()
            self._behind.setdefault((access.worker, file), IntervalSet()).add(start, stop)

    def evict(self, access: Access | None) -> Sequence[Evict]:
        if access is not None:  # asked again with None every few milliseconds: once for all that was read by then
            return ()
        burnt = []
        for (worker, file), behind in self._behind.items():
            for start, stop in list(behind):
                for low, high in self._unneeded(worker, file, start, stop):
                    behind.remove(low, high)
                    burnt.append(Evict(file, low, high))
        return burnt

    def _unneeded(self, worker: int, file: ModelFile, start: int, stop: int) -> list[tuple[int, int]]:
        """Parts of a range that no other worker has yet to come to; the others are looked at again later."""
        free = IntervalSet([(start, stop)])
        if not self.mismatch:
            for other, group in enumerate(self._groups):
                if other != worker:
                    for low, high in group.ahead(file.name, start, stop):
                        free.remove(low, high)
        return list(free)

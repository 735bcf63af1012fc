"""Sets of half-open integer ranges."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator


class IntervalSet:
    """Disjoint half-open ranges ``[start, stop)``, sorted; touching ranges are one.

    All operations cost the logarithm of the ranges held plus the ranges they change.
    """

    def __init__(self, ranges: Iterable[tuple[int, int]] = ()) -> None:
        self._starts: list[int] = []
        self._stops: list[int] = []
        self.total = 0  # bytes covered
        for start, stop in ranges:
            self.add(start, stop)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter(zip(self._starts, self._stops, strict=True))

    def __len__(self) -> int:
        return len(self._starts)

    def __repr__(self) -> str:
        return f"IntervalSet({list(self)})"

    def add(self, start: int, stop: int) -> int:
        """Add a range; returns how many bytes were not covered before."""
        if stop <= start:
            return 0
        first = bisect_left(self._stops, start)
        last = bisect_right(self._starts, stop)
        covered = 0
        new_start, new_stop = start, stop
        if first < last:
            covered = sum(self._stops[first:last]) - sum(self._starts[first:last])
            new_start = min(start, self._starts[first])
            new_stop = max(stop, self._stops[last - 1])
        self._starts[first:last] = [new_start]
        self._stops[first:last] = [new_stop]
        added = new_stop - new_start - covered
        self.total += added
        return added

    def remove(self, start: int, stop: int) -> int:
        """Remove a range; returns how many bytes had been covered."""
        first, last = self._touching(start, stop)
        if first >= last:
            return 0
        pieces = []
        if self._starts[first] < start:
            pieces.append((self._starts[first], start))
        if self._stops[last - 1] > stop:
            pieces.append((stop, self._stops[last - 1]))
        before = sum(self._stops[first:last]) - sum(self._starts[first:last])
        self._starts[first:last] = [piece[0] for piece in pieces]
        self._stops[first:last] = [piece[1] for piece in pieces]
        removed = before - sum(piece[1] - piece[0] for piece in pieces)
        self.total -= removed
        return removed

    def overlap(self, start: int, stop: int) -> list[tuple[int, int]]:
        """The parts of a range that are covered."""
        first, last = self._touching(start, stop)
        return [(max(start, self._starts[i]), min(stop, self._stops[i])) for i in range(first, last)]

    def missing(self, start: int, stop: int) -> list[tuple[int, int]]:
        """The parts of a range that are not covered."""
        gaps, position = [], start
        for low, high in self.overlap(start, stop):
            if low > position:
                gaps.append((position, low))
            position = high
        if position < stop:
            gaps.append((position, stop))
        return gaps

    def covered_bytes(self, start: int, stop: int) -> int:
        """How much of a range is covered."""
        first, last = self._touching(start, stop)
        if first >= last:
            return 0
        held = sum(self._stops[first:last]) - sum(self._starts[first:last])
        return held - max(0, start - self._starts[first]) - max(0, self._stops[last - 1] - stop)

    def covers(self, start: int, stop: int) -> bool:
        """Whether the whole range is covered."""
        index = bisect_right(self._starts, start) - 1
        return stop <= start or (index >= 0 and self._stops[index] >= stop)

    def _touching(self, start: int, stop: int) -> tuple[int, int]:
        """Indexes of the ranges that share at least one value with ``[start, stop)``."""
        if stop <= start:
            return 0, 0
        return bisect_right(self._stops, start), bisect_left(self._starts, stop)

"""Which parts of a region are taken: first fit, in whole blocks."""

from __future__ import annotations

import bisect
import errno

from penstock.storage.base import BLOCK_BYTES
from penstock.units import format_size


class Allocator:
    """Hands out ranges ``[start, stop)`` of a space, aligned and never overlapping. Not safe to use from two threads.

    Args:
        start: of the space, bytes; a multiple of the block size.
        stop: of the space, bytes.
    """

    def __init__(self, start: int, stop: int) -> None:
        if start % BLOCK_BYTES or start > stop:
            raise ValueError(f"[{start}, {stop}) does not begin at a block of {BLOCK_BYTES} bytes")
        self._start = start
        self._stop = stop // BLOCK_BYTES * BLOCK_BYTES
        self._free = [(self._start, self._stop)] if self._start < self._stop else []  # ascending, never touching
        self._taken: dict[int, int] = {}  # start → stop

    @property
    def free_bytes(self) -> int:
        """What is left, in pieces of any size."""
        return sum(stop - start for start, stop in self._free)

    @property
    def largest_bytes(self) -> int:
        """The largest piece that is left."""
        return max((stop - start for start, stop in self._free), default=0)

    def allocate(self, size_bytes: int, alignment_bytes: int = BLOCK_BYTES) -> tuple[int, int]:
        """Take a range of at least that size, rounded up to whole blocks.

        Args:
            size_bytes: at least 1.
            alignment_bytes: of its start; a multiple of the block size.

        Raises:
            OSError: ENOSPC, no piece is large enough.
        """
        if size_bytes < 1 or alignment_bytes < 1 or alignment_bytes % BLOCK_BYTES:
            raise ValueError(f"{size_bytes} bytes aligned to {alignment_bytes} cannot be allocated")
        size_bytes = -(-size_bytes // BLOCK_BYTES) * BLOCK_BYTES
        for number, (low, high) in enumerate(self._free):
            start = -(-low // alignment_bytes) * alignment_bytes
            if start + size_bytes <= high:
                stop = start + size_bytes
                self._free[number : number + 1] = [part for part in ((low, start), (stop, high)) if part[0] < part[1]]
                self._taken[start] = stop
                return start, stop
        raise OSError(
            errno.ENOSPC,
            f"no {format_size(size_bytes)} in one piece are left: {format_size(self.free_bytes)} are free, "
            f"{format_size(self.largest_bytes)} of them in one piece",
        )

    def extend(self, stop: int) -> None:
        """The space has become larger.

        Raises:
            ValueError: it has become smaller.
        """
        stop = stop // BLOCK_BYTES * BLOCK_BYTES
        if stop < self._stop:
            raise ValueError(f"a space that ends at {self._stop} cannot be cut at {stop}")
        if stop > self._stop:
            start, self._stop = self._stop, stop
            self._taken[start] = stop
            self.free(start)

    def free(self, start: int) -> None:
        """Give back a range that was allocated, named by its start.

        Raises:
            ValueError: none was allocated there.
        """
        if start not in self._taken:
            raise ValueError(f"nothing is allocated at {start}")
        stop = self._taken.pop(start)
        number = bisect.bisect_left(self._free, (start, stop))
        if number < len(self._free) and self._free[number][0] == stop:
            stop = self._free.pop(number)[1]
        if number and self._free[number - 1][1] == start:
            number -= 1
            start = self._free.pop(number)[0]
        self._free.insert(number, (start, stop))

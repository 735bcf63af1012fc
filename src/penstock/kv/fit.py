"""How large chunks are and how many are read at once, from what reading, copying and computing take.

A chunk is read, verified and copied on. Each costs a fixed time beside the time of its bytes, so it must not be small;
while one is copied the next must be there, so it must not be large. And while the caller computes, or cached tensors
are copied, nothing that was read is taken away: the device works on only as long as there is memory to read
into, so as many chunks are under way as it can read in the longest such pause. Where it runs dry all the same, as a
disk does that reports what it has read in bursts, they become more until it does not.
"""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass

_FIXED_SHARE = 0.02  # of a chunk's time that may be spent on what is not its bytes
_FORGET = 0.97  # what a measurement counts for, when the next has come
_DRY_SHARE = 0.02  # of the time that the device may have too little to do while there is work
_DEEPER, _SHALLOWER = 1.5, 0.99  # of the depth, each time that is looked at
_SHORTEST_S = 1e-6  # that is believed
_FEWEST = 3  # chunks: one copied, one read, one about to be


@dataclass(frozen=True, slots=True)
class Fitted:
    """What a pipeline is to do.

    Attributes:
        chunk_bytes: of a read; whole blocks are made of it, one at least.
        depth: reads under way, and read but not copied yet.
        read_bytes_per_s: of the device while it had work; 0 before it was measured.
        copy_bytes_per_s: of one thread that verifies and copies; 0 before.
        fixed_s: that each chunk costs beside.
        pause_s: for which nothing was taken away, the longest of late.
    """

    chunk_bytes: int
    depth: int
    read_bytes_per_s: float
    copy_bytes_per_s: float
    fixed_s: float
    pause_s: float


class Fit:
    """Measures, and says what follows. May be used from several threads.

    Args:
        smallest_bytes: of a chunk.
        largest_bytes: of a chunk: what a buffer holds.
        most: chunks that there are buffers for.
    """

    def __init__(self, smallest_bytes: int, largest_bytes: int, most: int) -> None:
        self._smallest_bytes = smallest_bytes
        self._largest_bytes = max(smallest_bytes, largest_bytes)
        self._most = most
        self._lock = threading.Lock()
        self._read_bytes = self._read_s = 0.0
        # Sums for a straight line through (bytes, seconds) of copies.
        self._n = self._x = self._y = self._xx = self._xy = 0.0
        self._pause_s = 0.0
        self._landing_s = self._landings = 0.0
        self._starved_s = self._watched_s = 0.0
        self._deeper = 1.0

    def read(self, size_bytes: int, busy_s: float) -> None:
        """The device has read so much while it had work for so long."""
        with self._lock:
            self._read_bytes = self._read_bytes * _FORGET + size_bytes
            self._read_s = self._read_s * _FORGET + busy_s

    def copied(self, size_bytes: int, taken_s: float) -> None:
        """A thread has verified and copied a chunk."""
        with self._lock:
            for name, value in (("_n", 1.0), ("_x", size_bytes), ("_y", taken_s)):
                setattr(self, name, getattr(self, name) * _FORGET + value)
            self._xx = self._xx * _FORGET + float(size_bytes) ** 2
            self._xy = self._xy * _FORGET + size_bytes * taken_s

    def landed(self, chunks: int, taken_s: float) -> None:
        """So many chunks that have landed were passed on in so long."""
        with self._lock:
            self._landing_s = self._landing_s * _FORGET + taken_s
            self._landings = self._landings * _FORGET + chunks

    def watched(self, watched_s: float, starved_s: float) -> None:
        """For so long there was something to read, and for so long of it the device was not asked for enough."""
        with self._lock:
            self._watched_s += watched_s
            self._starved_s += starved_s

    def paused(self, pause_s: float) -> None:
        """So long no buffer has come back while there was more to read."""
        with self._lock:
            self._pause_s = max(pause_s, self._pause_s * _FORGET)

    def fitted(self) -> Fitted:
        """What to do next."""
        with self._lock:
            per_byte_s, fixed_s = self._line()
            fixed_s += self._landing_s / self._landings if self._landings else 0.0
            if self._watched_s:
                is_dry = self._starved_s > _DRY_SHARE * self._watched_s
                self._deeper = (
                    min(self._deeper * _DEEPER, self._most) if is_dry else max(1.0, self._deeper * _SHALLOWER)
                )
                self._watched_s = self._starved_s = 0.0
            rate = self._read_bytes / self._read_s if self._read_s > _SHORTEST_S else 0.0
            # A chunk whose fixed time is a small share of the slower of reading and copying it.
            slower_s = max(per_byte_s, 1 / rate if rate else 0.0)
            wanted = fixed_s / (_FIXED_SHARE * slower_s) if slower_s else self._largest_bytes
            wanted = 2.0 ** math.ceil(math.log2(max(1.0, wanted)))
            chunk_bytes = int(min(max(wanted, self._smallest_bytes), self._largest_bytes))
            paused = min(rate * self._pause_s / chunk_bytes, float(self._most))
            depth = _FEWEST + math.ceil(paused) if rate else self._most
            depth = math.ceil(depth * self._deeper)
            return Fitted(
                chunk_bytes=chunk_bytes,
                depth=max(1, min(depth, self._most)),
                read_bytes_per_s=rate,
                copy_bytes_per_s=1 / per_byte_s if per_byte_s else 0.0,
                fixed_s=fixed_s,
                pause_s=self._pause_s,
            )

    def _line(self) -> tuple[float, float]:
        """Seconds a byte, and seconds beside: least squares where sizes differ, else all of it by the byte."""
        if not self._x:
            return 0.0, 0.0
        spread = self._n * self._xx - self._x**2
        if spread > 1e-6 * self._x**2:
            slope = (self._n * self._xy - self._x * self._y) / spread
            fixed = (self._y - slope * self._x) / self._n
            if slope > 0 and fixed >= 0:
                return slope, fixed
        return self._y / self._x, 0.0

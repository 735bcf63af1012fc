"""A run's timeline: its points, as the report stores them, and the residency in them."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from penstock.pagecache.ledger import Ledger

_COUNTING_SHARE = 0.02  # of a CPU, at most, goes into counting cached pages


@dataclass(frozen=True, slots=True)
class Sample:
    """The sums at one moment of a run; bytes since its start."""

    t_s: float  # since the program's start
    device_read_bytes: int
    accessed_bytes: int  # of the model, each byte once
    resident_bytes: int  # page cache of the model's files


class ResidencyMeter:
    """How much of the model is cached.

    The kernel counts page by page, 20 ms for 1.6 million small ones, under 1 ms in large folios. So it is asked
    no more often than that is worth, and in between the last count is carried on by what was read and evicted since.

    Attributes:
        peak_bytes: the largest count.
    """

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._next_count_s = 0.0
        self._unknown_bytes = 0  # counted, and not present in the ledger: cached before the run
        self.peak_bytes = 0

    def read(self, now_s: float, clock: Callable[[], float] = time.thread_time) -> int:
        """Bytes cached now. The clock is one of what counting costs."""
        if now_s < self._next_count_s:
            whole_bytes = sum(record.file.size_bytes for record in self._ledger.records())
            return max(0, min(whole_bytes, self._ledger.present_bytes() + self._unknown_bytes))
        began_s = clock()
        counted = self._ledger.resident_bytes()
        self._next_count_s = now_s + (clock() - began_s) / _COUNTING_SHARE
        self._unknown_bytes = counted - self._ledger.present_bytes()
        self.peak_bytes = max(self.peak_bytes, counted)
        return counted

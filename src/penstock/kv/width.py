"""How many threads copy from memory side by side.

Two may copy more than one, as where a copy transposes rows. Where all go over one link, they wait for each other: 0.52
to 0.62 s a step where one took 0.40 to 0.46 (4.5 GB, all in memory, a target that takes one copy at a time). So both
are tried, now and then.
"""

from __future__ import annotations

_TRIED_COPIES = 8
_KNOWN_COPIES = 2048  # between two trials
_MORE = 1.1  # that more threads have to copy, to be worth their waiting for each other
_FORGET = 0.95


class Width:
    """Measures, and says how many may. To be used under a lock.

    Args:
        most: threads there are.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._bytes = dict.fromkeys((1, most), 0.0)
        self._seconds = dict.fromkeys((1, most), 0.0)
        self._best = 1
        self._copies = 0

    @property
    def threads(self) -> int:
        """That may copy at the moment."""
        is_trial = _TRIED_COPIES <= self._copies < 2 * _TRIED_COPIES
        return self._best if not is_trial else self._most if self._best == 1 else 1

    def copied(self, threads: int, size_bytes: int, taken_s: float) -> None:
        """One of so many has copied so much in so long."""
        if threads in self._bytes:
            self._bytes[threads] = self._bytes[threads] * _FORGET + size_bytes
            self._seconds[threads] = self._seconds[threads] * _FORGET + taken_s
        self._copies = (self._copies + 1) % _KNOWN_COPIES
        if self._copies == 2 * _TRIED_COPIES and all(self._seconds.values()):
            one, all_of_them = (width * self._bytes[width] / self._seconds[width] for width in (1, self._most))
            self._best = self._most if all_of_them > _MORE * one else 1

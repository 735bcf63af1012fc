"""How many threads copy from memory side by side.

Two may copy more than one, as where a copy transposes rows. Where all go over one link, they wait for each other: 0.52
to 0.62 s a step where one took 0.40 to 0.46 (4.5 GB, all in memory, a target that takes one copy at a time). So both
are tried, now and then.
"""

from __future__ import annotations

_TRIED_COPIES = 8
_FIRST_KNOWN_COPIES, _MOST_KNOWN_COPIES = 32, 2048  # between two trials: twice as many each time
_MORE = 1.25  # that all of them have to copy, to be worth their waiting for each other
_FORGET = 0.9


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
        self._known_copies = _FIRST_KNOWN_COPIES
        self._until_trial = _TRIED_COPIES  # copies
        self._left_of_trial = 0

    @property
    def threads(self) -> int:
        """That may copy at the moment."""
        if not self._left_of_trial:
            return self._best
        return self._most if self._best == 1 else 1

    def copied(self, threads: int, size_bytes: int, taken_s: float) -> None:
        """One of so many has copied so much in so long."""
        if threads in self._bytes:
            self._bytes[threads] = self._bytes[threads] * _FORGET + size_bytes
            self._seconds[threads] = self._seconds[threads] * _FORGET + taken_s
        if self._left_of_trial:
            self._left_of_trial -= 1
            if not self._left_of_trial:
                self._decide()
            return
        self._until_trial -= 1
        if not self._until_trial:
            self._left_of_trial = _TRIED_COPIES

    def _decide(self) -> None:
        self._until_trial = self._known_copies
        self._known_copies = min(2 * self._known_copies, _MOST_KNOWN_COPIES)
        if all(self._seconds.values()):
            one, together = (width * self._bytes[width] / self._seconds[width] for width in (1, self._most))
            self._best = self._most if together > _MORE * one else 1

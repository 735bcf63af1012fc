"""Giving way to other processes on the CPU."""

from __future__ import annotations

import os


class GiveWay:
    """From now until `end`, this thread runs only where nobody else wants the CPU (SCHED_IDLE).

    A CPU that runs only such threads counts as free when the scheduler places a new one, so that others are not even
    moved together: beside a program that starts with two threads on two CPUs, a third busy one of the same rank took
    50 of its first 100 ms. A lower rank cannot be left again without CAP_SYS_NICE, so without it nothing is done.

    Source: sched(7).
    """

    def __init__(self) -> None:
        self._policy: int | None = None
        policy = os.sched_getscheduler(0)
        if policy != os.SCHED_OTHER or not _may_rise():
            return
        try:
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
            self._policy = policy
        except OSError:  # a sandbox forbids it
            pass

    def end(self) -> None:
        """Be as before; a second time does nothing."""
        if self._policy is not None:
            policy, self._policy = self._policy, None
            os.sched_setscheduler(0, policy, os.sched_param(0))


def _may_rise() -> bool:
    """Whether the kernel lets us take a higher rank. Tried by one step of niceness: a capability may not count here."""
    nice = os.getpriority(os.PRIO_PROCESS, 0)
    if nice <= -20:
        return False
    try:
        os.setpriority(os.PRIO_PROCESS, 0, nice - 1)
    except OSError:
        return False
    os.setpriority(os.PRIO_PROCESS, 0, nice)
    return True

"""How much page cache the model may take now, and how fast the device may be read."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass

from penstock.linux import process
from penstock.linux.blockdevice import BlockDevice
from penstock.linux.memory import MemoryReader
from penstock.units import GiB, KiB, MiB

THRESHOLD = 0.8  # of the limit may be in use; the paper's
_KEEP_BYTES = 1 * GiB  # behind a reader, with ample memory; the paper's
_KEEP_SHARE = 0.1  # of the budget, with less. Chosen: a prototype ran well with 0.07 to 0.15.
_BUSY_SHARE = 0.25  # of what the device reads may be for others before we read less at once
_BUSY_BYTES_PER_S = 50e6
_BUSY_INTERVAL_S = 0.25
_ELSEWHERE_BYTES = 64 * KiB  # between two looks
_ELSEWHERE_S = 0.15  # and for so long afterwards: imports alternate between reading and computing


@dataclass(frozen=True, slots=True)
class Budget:
    """Bytes of page cache for the model."""

    bytes: int
    source: str  # which limit it comes from
    charged_bytes: int | None = None  # page cache charged to the cgroup whose limit it is; None where all of it counts

    @property
    def keep_bytes(self) -> int:
        """How far behind a reader pages stay when they are burnt."""
        return min(_KEEP_BYTES, int(self.bytes * _KEEP_SHARE))


class Headroom:
    """Reads the budget: what is free or reclaimable below 80% of the tightest limit.

    Args:
        pid: the process whose cgroup counts.
        limit_bytes: ``--memory``: never more than this.
    """

    def __init__(self, pid: int, limit_bytes: int | None = None) -> None:
        self._reader = MemoryReader(pid)
        self._limit_bytes = limit_bytes
        self._last = Budget(0, "unknown")

    def read(self) -> Budget:
        """The budget now; the last one if the process has just ended."""
        try:
            state = self._reader.read()
        except (OSError, ProcessLookupError):
            return self._last
        budget = max(0, state.headroom_bytes - int((1 - THRESHOLD) * state.limit_bytes))
        source, charged = state.source, None if state.source == "host" else state.file_bytes
        if self._limit_bytes is not None and self._limit_bytes < budget:
            budget, source, charged = self._limit_bytes, "--memory", None
        self._last = Budget(budget, source, charged)
        return self._last

    def close(self) -> None:
        """Close its files."""
        self._reader.close()


class OwnReads:
    """Tells when the program waits for files of its own, such as libraries that it imports.

    Each such read is small and waits behind all that the loader has in flight: 8 ms behind 16 MiB at 2 GB/s. Seen:
    transformers imported in 2.0 s alone, in 3.7 to 6.4 s beside eight loading threads, 0.1 to 0.4 GB of it cold.
    """

    def __init__(self) -> None:
        self._device_bytes = 0
        self._accessed_bytes = 0
        self._until_s = 0.0

    def are_likely(self, pids: Iterable[int], accessed_bytes: int) -> bool:
        """Whether the program has just read from a device without reading the model.

        Args:
            pids: its processes.
            accessed_bytes: of the model, so far.
        """
        device_bytes = _read_by(pids)
        grown = device_bytes - self._device_bytes
        elsewhere = accessed_bytes == self._accessed_bytes
        self._device_bytes, self._accessed_bytes = device_bytes, accessed_bytes
        now = time.monotonic()
        if elsewhere and grown >= _ELSEWHERE_BYTES:
            self._until_s = now + _ELSEWHERE_S
        return now < self._until_s


class DeviceMonitor:
    """Watches the devices under the model's files, and how much of their work is for others."""

    def __init__(self) -> None:
        self._devices: dict[int, BlockDevice] = {}
        self._began_bytes: dict[int, int] = {}
        self._last = (time.monotonic(), 0, 0)
        self._busy = False

    def watch(self, device: int) -> None:
        """Count this device too, from now on."""
        if device not in self._devices:
            found = self._devices[device] = BlockDevice(device)
            self._began_bytes[device] = found.read_bytes()

    def read_bytes(self) -> int:
        """Bytes read from all watched devices since they are watched."""
        return sum(device.read_bytes() - self._began_bytes[number] for number, device in self._devices.items())

    def others_are_busy(self, pids: Iterable[int]) -> bool:
        """Whether others read more than a quarter of what the devices did in the last quarter of a second.

        A shorter interval would tell little: reads are charged to a process when they are submitted, and counted
        by the device when they are done.

        Args:
            pids: the processes of the program, whose reads are not others'.
        """
        if not any(device.exists for device in self._devices.values()):
            return False
        if time.monotonic() - self._last[0] < _BUSY_INTERVAL_S:
            return self._busy
        self._busy = self._look(pids)
        return self._busy

    def _look(self, pids: Iterable[int]) -> bool:
        now, total, ours = time.monotonic(), self.read_bytes(), _read_by([os.getpid(), *pids])
        before_s, total_before, ours_before = self._last
        self._last = (now, total, ours)
        read, own = total - total_before, max(0, ours - ours_before)
        if read < _BUSY_BYTES_PER_S * (now - before_s):
            return False
        return read - own > _BUSY_SHARE * read + 16 * MiB

    def close(self) -> None:
        """Close its files."""
        for device in self._devices.values():
            device.close()


def _read_by(pids: Iterable[int]) -> int:
    total = 0
    for pid in set(pids):
        with contextlib.suppress(OSError, ProcessLookupError):
            total += process.io_counters(pid).device_read_bytes
    return total

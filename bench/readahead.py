"""The read-ahead of the disk under a directory."""

from __future__ import annotations

import atexit
import os
from pathlib import Path

from bench.errors import BenchError


def block_device(directory: Path) -> Path:
    """The sysfs directory of the whole disk that holds a directory.

    Raises:
        BenchError: the file system is not on a block device of its own (overlay, tmpfs, network).
    """
    number = directory.stat().st_dev
    device = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}")
    if not device.exists():
        raise BenchError(f"{directory} is on no block device; give --dir on a disk's file system")
    device = device.resolve()
    return device if (device / "queue").is_dir() else device.parent  # a partition has no queue


class ReadAhead:
    """Sets read_ahead_kb and puts back what was there."""

    def __init__(self, directory: Path) -> None:
        self.path = block_device(directory) / "queue" / "read_ahead_kb"
        self.machine_kib = self._read()
        atexit.register(self.restore)

    def _read(self) -> int:
        return int(self.path.read_text())

    def set(self, kib: int | None) -> None:
        """Set it; None is the machine's own. Written only where it changes, which takes root."""
        wanted = self.machine_kib if kib is None else kib
        if self._read() != wanted:
            self.path.write_text(str(wanted))

    def may_set(self) -> bool:
        """Whether this process may change it."""
        return os.access(self.path, os.W_OK)

    def restore(self) -> None:
        """Put back what was there at first."""
        self.set(None)

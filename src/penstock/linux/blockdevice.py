"""What the block device under a file has done, from sysfs; readable by anyone."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

_SECTOR_BYTES = 512  # of the statistics, whatever the device's own is


class BlockDevice:
    """Counters of one block device.

    Args:
        device: as st_dev names it. File systems without a device of their own (overlay, NFS, tmpfs, btrfs)
            have none: `exists` is False and the counters stay 0.
    """

    def __init__(self, device: int, root: Path = Path("/")) -> None:
        self.path = root / f"sys/dev/block/{os.major(device)}:{os.minor(device)}"
        self._fd: int | None = None
        with contextlib.suppress(OSError):
            self._fd = os.open(self.path / "stat", os.O_RDONLY | os.O_CLOEXEC)

    @property
    def exists(self) -> bool:
        """Whether there is such a device."""
        return self._fd is not None

    def read_bytes(self) -> int:
        """Bytes read from it since boot (Documentation/block/stat.rst, field 3)."""
        if self._fd is None:
            return 0
        return int(os.pread(self._fd, 512, 0).split()[2]) * _SECTOR_BYTES

    def setting(self, name: str) -> str | None:
        """A value from its queue directory, such as ``read_ahead_kb``; a partition's is its disk's."""
        for directory in (self.path / "queue", self.path.resolve().parent / "queue"):
            with contextlib.suppress(OSError):
                return (directory / name).read_text(encoding="ascii").strip()
        return None

    def close(self) -> None:
        """Close the statistics file."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

"""The NVMe drives of the rig, found by their serial numbers."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Drive:
    """What the rig says of a drive, and where it is."""

    serial: str
    lba_bytes: int
    transfer_bytes: int  # of one command

    @property
    def block_device(self) -> Path:
        """Of its one namespace."""
        for path in Path("/sys/class/nvme").iterdir():
            if (path / "serial").read_text().strip() == self.serial:
                (name,) = (each.name for each in path.glob("nvme*n*") if "c" not in each.name)
                return Path("/dev") / name
        raise AssertionError(f"the rig has promised a drive {self.serial}")

    @property
    def character_device(self) -> Path:
        """Of the same namespace."""
        return self.block_device.with_name(self.block_device.name.replace("nvme", "ng"))

    @property
    def size_bytes(self) -> int:
        """Of the namespace, as the kernel counts."""
        return int((Path("/sys/class/block") / self.block_device.name / "size").read_text()) * 512

    def __str__(self) -> str:
        return f"lba{self.lba_bytes}-mdts{self.transfer_bytes >> 10}K"


def drives() -> list[Drive]:
    """All that the rig has; elsewhere one, for tests that are skipped there."""
    facts = json.loads(os.environ.get("PENSTOCK_RIG", "{}")).get("drives", [])
    return [Drive(**each) for each in facts] or [Drive("none", 512, 4096)]

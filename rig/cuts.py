"""Many power cuts: machines killed at random moments, and what their disks had then, read back here."""

from __future__ import annotations

import random
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from penstock.units import MiB
from rig.errors import RigError
from rig.image import make_disk
from rig.machine import Boot, Machine
from rig.powercut import check
from rig.writelog import disk_after_cut, read_log

_DISK_BYTES = 64 * MiB
_MEMORY_MIB = 512
_FIRST_S = 120  # until the first generation is told
_LONGEST_S = 1.5  # from then to the cut
_EARLIER = 4  # cuts at random earlier moments of the same log


@dataclass(slots=True)
class CutResult:
    """What one machine's cuts came to.

    Attributes:
        disks: that were looked at.
        generations: of the session: told before the machine was killed, found on its disk.
        lost: writes that the cuts took, whole or in part.
        torn: blocks that a checksum gave away.
    """

    kernel: str
    disks: int = 0
    generations: tuple[int, int] = (0, 0)
    lost: int = 0
    torn: int = 0
    wrong: list[str] = field(default_factory=list)


def cut_power(machine: Machine, directory: Path, seed: int) -> CutResult:
    """Boot, let it write, kill it at a moment that the seed decides, and look at what its disk may have been then.

    Raises:
        RigError: it did not come to write anything.
    """
    chance = random.Random(seed)  # noqa: S311 (no secret)
    directory.mkdir()
    before, disk, log = directory / "before", directory / "disk", directory / "log"
    make_disk(before, _DISK_BYTES)
    shutil.copyfile(before, disk)
    machine = Machine(
        machine.kernel, machine.image, machine.over, nodes=1, disk=disk, log=log, memory_mib=_MEMORY_MIB
    )  # fmt: skip
    shared = directory / "boot" / "shared"
    told = shared / "told"
    boot = Boot(machine, ["python", "-m", "rig.powercut", "/run/disk/tmp", str(told)], directory / "boot")
    try:
        deadline = time.monotonic() + _FIRST_S
        while "session" not in (told.read_text() if told.exists() else ""):
            if time.monotonic() > deadline or not boot.is_running:
                raise RigError(f"nothing was written:\n{boot.tail()}")
            time.sleep(0.01)
        time.sleep(chance.uniform(0, _LONGEST_S))
    finally:
        boot.kill()
    acknowledged = dict(_told(told))
    entries = read_log(log)
    result = CutResult(machine.kernel.release)
    after = directory / "after"
    for count in [len(entries), *(chance.randrange(1, len(entries)) for _ in range(_EARLIER))]:
        result.lost += disk_after_cut(before, log, entries, count, chance, after)
        with mounted(after, directory / "mount") as place:
            found = check(place / "tmp", acknowledged if count == len(entries) else {})
        result.disks += 1
        result.torn += found.torn
        result.wrong += [f"seed {seed}, {count} of {len(entries)} writes: {text}" for text in found.wrong]
        if count == len(entries):
            result.generations = (acknowledged.get("session", 0), found.session)
    shutil.rmtree(directory)
    return result


def _told(path: Path) -> Iterator[tuple[str, int]]:
    for line in path.read_text().splitlines(keepends=True):
        if line.endswith("\n"):
            kind, generation = line.split()
            yield kind, int(generation)


@contextmanager
def mounted(disk: Path, place: Path) -> Iterator[Path]:
    """The file system in an image, as this machine's kernel recovers it."""
    place.mkdir(exist_ok=True)
    done = subprocess.run(["mount", "-o", "loop", str(disk), str(place)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RigError(f"the disk cannot be mounted: {done.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)

"""penstock.linux.extents, compared with what was written."""

from __future__ import annotations

import errno
import itertools
import os
from pathlib import Path

import pytest

from penstock.linux.extents import Extent, ExtentFlag, extents, runs
from penstock.units import KiB, MiB


def of(path: Path, start: int, stop: int) -> list[Extent]:
    with path.open("rb") as file:
        try:
            return extents(file.fileno(), start, stop)
        except OSError as error:
            if error.errno in (errno.EOPNOTSUPP, errno.ENOTTY):
                pytest.skip(f"{path} is on a file system that does not tell where files lie")
            raise


def covered(parts: list[Extent], start: int, stop: int) -> int:
    return sum(max(0, min(part.stop, stop) - max(part.start, start)) for part in parts)


def test_all_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(os.urandom(1 * MiB))
    parts = of(path, 0, 1 * MiB)
    assert covered(parts, 0, 1 * MiB) == 1 * MiB
    assert parts[-1].flags & ExtentFlag.LAST
    assert not any(part.flags & ExtentFlag.DELALLOC for part in parts)
    assert all(before.stop <= after.start for before, after in itertools.pairwise(parts))


def test_a_file_with_holes_in_more_extents_than_one_call_tells(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with path.open("wb") as file:
        for number in range(300):
            os.pwrite(file.fileno(), b"x" * 4096, number * 64 * KiB)
        file.flush()
        os.fsync(file.fileno())
    parts = of(path, 0, 300 * 64 * KiB)
    for number in range(300):
        start = number * 64 * KiB
        assert covered(parts, start, start + 4096) == 4096
    if len(parts) >= 300:  # a file system with blocks as large as the holes has none
        assert covered(parts, 8 * KiB, 64 * KiB) == 0
    assert covered(of(path, 640 * KiB, 641 * KiB), 640 * KiB, 641 * KiB) == 1 * KiB


def test_preallocated_and_empty(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with path.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, 1 * MiB)
    assert covered(of(path, 0, 1 * MiB), 0, 1 * MiB) == 1 * MiB
    (tmp_path / "empty").touch()
    assert of(tmp_path / "empty", 0, 4096) == []


def test_what_follows_on_the_device_too_is_one_run() -> None:
    none, last = ExtentFlag(0), ExtentFlag.LAST
    first, second, third = Extent(0, 10, 100, none), Extent(10, 30, 110, none), Extent(30, 40, 500, last)
    assert runs([first, second, third]) == [Extent(0, 30, 100, none), third]
    assert runs([]) == []
    assert runs([Extent(0, 10, 100, none), Extent(20, 30, 110, none)]) == [
        Extent(0, 10, 100, none),
        Extent(20, 30, 110, none),
    ]

"""Disk space that is used before it is measured with."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from bench.errors import BenchError
from bench.space import require_space, use_space

from penstock.linux.extents import ExtentFlag, extents
from penstock.units import MiB


def test_a_file_is_as_new_and_keeps_its_space(tmp_path: Path) -> None:
    path = tmp_path / "file"
    head, size_bytes = os.urandom(MiB), 9 * MiB + 100
    path.write_bytes(head + os.urandom(size_bytes - len(head)))
    use_space(path, len(head))
    with path.open("rb") as file:
        found = list(extents(file.fileno(), 0, size_bytes))
        data = file.read()
    assert len(data) == size_bytes
    assert data[:MiB] == head
    assert not any(data[MiB : 9 * MiB])
    unwritten = [part for part in found if part.flags & ExtentFlag.UNWRITTEN]
    assert sum(part.stop - part.start for part in unwritten) == 8 * MiB


def test_a_file_that_has_nothing_there_gets_space(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with path.open("wb") as file:
        file.truncate(8 * MiB)
    use_space(path)
    assert path.stat().st_blocks * 512 >= 8 * MiB


def test_a_file_that_ends_before_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"short")
    use_space(path, MiB)
    assert path.read_bytes() == b"short"


def test_a_disk_without_room_is_refused_in_words(tmp_path: Path) -> None:
    require_space(tmp_path, MiB)
    with pytest.raises(BenchError, match=rf"{tmp_path}: .* are free, and this takes .*; give --dir"):
        require_space(tmp_path, 2 * shutil.disk_usage(tmp_path).total)

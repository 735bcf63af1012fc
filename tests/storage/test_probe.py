"""The bandwidth probe on real files. How fast the disk is, is none of a test's business."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from penstock.linux.pagecache import FileResidency, drop
from penstock.storage.probe import measure_read_bandwidth
from penstock.units import MiB


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model.bin"
    with path.open("wb") as file:
        for _ in range(9):
            file.write(os.urandom(MiB))
        os.fsync(file.fileno())
    return path


def takes_direct_reads(path: Path) -> bool:
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_DIRECT))
    except OSError:
        return False
    return True


def test_measures_without_filling_the_page_cache(model: Path) -> None:
    if not takes_direct_reads(model):
        pytest.skip(f"the file system of {model} has no O_DIRECT")
    with model.open("rb") as file:
        drop(file.fileno())
        measured = measure_read_bandwidth(model, 0.05, smallest_file_bytes=8 * MiB)
        assert measured is not None
        assert measured > 0
        assert FileResidency(file.fileno()).resident_bytes(0, 9 * MiB) == 0
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("penstock")]


def test_reads_at_least_once_even_without_time(model: Path) -> None:
    if not takes_direct_reads(model):
        pytest.skip(f"the file system of {model} has no O_DIRECT")
    assert measure_read_bandwidth(model, 0.0, threads=2, smallest_file_bytes=MiB)


def test_a_small_file_says_nothing(model: Path, tmp_path: Path) -> None:
    assert measure_read_bandwidth(model) is None
    empty = tmp_path / "empty"
    empty.touch()
    assert measure_read_bandwidth(empty, smallest_file_bytes=0) is None


def test_a_file_system_without_direct_reads_says_nothing() -> None:
    path = Path("/proc/self/status")
    assert not takes_direct_reads(path)
    assert measure_read_bandwidth(path) is None


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        measure_read_bandwidth(tmp_path / "none")

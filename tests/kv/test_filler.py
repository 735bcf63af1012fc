"""penstock.kv.filler on real files."""

from __future__ import annotations

import os
import pathlib
import threading
from collections.abc import Iterator

import pytest

from penstock.kv.filler import Filler
from penstock.linux.pagecache import FileResidency, drop
from penstock.testing.residency import About
from penstock.units import KiB, MiB

WAIT_S = 30


@pytest.fixture
def fd(tmp_path: pathlib.Path) -> Iterator[int]:
    """A file of 32 MiB of which nothing is cached, read without read-ahead."""
    path = tmp_path / "file"
    path.write_bytes(bytes(32 * MiB))
    with path.open("rb") as file:
        os.fsync(file.fileno())
        drop(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        if FileResidency(file.fileno()).resident_bytes(0, 32 * MiB) > 1 * MiB:
            pytest.skip("the file system keeps what is dropped")
        yield file.fileno()


def fill(fd: int, start: int, stop: int, steady_stop: int, *, is_wanted: bool = True) -> tuple[int, bool]:
    """What was filled, and whether a thread did it."""
    filler = Filler(fd)
    done = threading.Event()
    by: list[int] = []

    def then() -> None:
        by.append(threading.get_ident())
        done.set()

    filler.fill(start, stop, steady_stop, lambda: is_wanted, then)
    assert done.wait(WAIT_S)
    filler.close()
    filler.close()
    assert len(by) == 1
    return filler.filled, by != [threading.get_ident()]


def test_what_is_missing_is_filled(fd: int) -> None:
    assert fill(fd, 5 * MiB, 13 * MiB, 32 * MiB) == (1, True)
    residency = FileResidency(fd)
    assert residency.resident_bytes(4 * MiB, 14 * MiB) == About(10 * MiB)  # whole folios
    assert residency.resident_bytes(0, 4 * MiB) == 0
    assert fill(fd, 5 * MiB, 13 * MiB, 32 * MiB) == (0, False)


def test_what_may_be_written_to_is_left(fd: int) -> None:
    assert fill(fd, 0, 8 * MiB, 8 * MiB - 4 * KiB) == (1, True)
    residency = FileResidency(fd)
    assert residency.resident_bytes(0, 6 * MiB) == About(6 * MiB)
    assert residency.resident_bytes(6 * MiB, 8 * MiB) == 0
    assert fill(fd, 10 * MiB, 11 * MiB, 11 * MiB) == (0, False)  # no whole folio


def test_a_little_that_is_missing_is_left(fd: int) -> None:
    os.preadv(fd, [bytearray(6 * MiB)], 0)
    assert fill(fd, 0, 8 * MiB, 32 * MiB) == (0, False)
    assert fill(fd, 4 * MiB, 12 * MiB, 32 * MiB) == (1, True)


def test_what_nobody_wants_is_not_filled(fd: int) -> None:
    assert fill(fd, 0, 8 * MiB, 32 * MiB, is_wanted=False) == (1, True)
    assert FileResidency(fd).resident_bytes(0, 8 * MiB) == 0


def test_what_cannot_be_filled_is_handed_on(fd: int) -> None:
    assert fill(fd, 40 * MiB, 48 * MiB, 64 * MiB) == (1, True)  # behind the end of the file

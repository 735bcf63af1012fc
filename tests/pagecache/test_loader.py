"""penstock.pagecache.loader on real files: what it reads in, what it skips, and when it waits."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from penstock.linux import numa
from penstock.linux.pagecache import drop, mincore
from penstock.linux.window import FileWindow
from penstock.pagecache.base import ModelFile, Prefetch
from penstock.pagecache.ledger import Ledger
from penstock.pagecache.loader import Loader
from penstock.testing.residency import About
from penstock.units import MiB

SIZE_BYTES = 40 * MiB
PAGE = os.sysconf("SC_PAGE_SIZE")
DEADLINE_S = 30.0


def make_file(path: Path, size_bytes: int = SIZE_BYTES) -> ModelFile:
    with path.open("w+b") as file:
        for start in range(0, size_bytes, MiB):
            file.write(os.urandom(min(MiB, size_bytes - start)))
        file.flush()
        os.fsync(file.fileno())
        drop(file.fileno())
        if mincore(file.fileno(), 0, size_bytes).any():
            pytest.skip(f"{path} is on a file system that keeps every page in memory")
    status = path.stat()
    return ModelFile(path.name, str(path), status.st_size, status.st_dev, status.st_ino)


@pytest.fixture
def file(tmp_path: Path) -> ModelFile:
    return make_file(tmp_path / "model-1.safetensors")


@pytest.fixture
def loader(ledger: Ledger) -> Iterator[Loader]:
    loader = Loader(ledger, threads=2)
    yield loader
    loader.close()


def resident(file: ModelFile, start: int, stop: int) -> int:
    with open(file.path, "rb") as opened:
        return int(mincore(opened.fileno(), start, stop).sum()) * PAGE


def wait_until(condition: Callable[[], bool], otherwise: str) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, otherwise
        time.sleep(0.005)


def test_what_is_asked_for_is_read_in(loader: Loader, ledger: Ledger, file: ModelFile) -> None:
    loader.submit([Prefetch(file, 3 * MiB + 5, 21 * MiB), Prefetch(file, 30 * MiB, SIZE_BYTES)])
    assert loader.wait_idle(DEADLINE_S)
    assert resident(file, 3 * MiB, 21 * MiB) == About(18 * MiB)
    assert resident(file, 30 * MiB, SIZE_BYTES) == About(10 * MiB)
    assert ledger.totals().prefetched_bytes == 28 * MiB
    assert ledger.totals().waiting_bytes == 28 * MiB
    assert loader.idle
    assert loader.statistics().warnings == ()


def test_what_is_cached_is_not_read_again(loader: Loader, ledger: Ledger, file: ModelFile) -> None:
    with open(file.path, "rb") as opened:
        opened.read(16 * MiB)
    loader.submit([Prefetch(file, 0, 16 * MiB)])
    assert loader.wait_idle(DEADLINE_S)
    assert ledger.totals().prefetched_bytes == 0
    assert ledger.totals().waiting_bytes == 0
    assert ledger.record(file).present.covers(0, 16 * MiB)


def test_nothing_is_read_twice(loader: Loader, ledger: Ledger, file: ModelFile) -> None:
    loader.submit([Prefetch(file, 0, 8 * MiB), Prefetch(file, 4 * MiB, 12 * MiB), Prefetch(file, 0, 8 * MiB)])
    assert loader.wait_idle(DEADLINE_S)
    assert ledger.totals().prefetched_bytes == 12 * MiB


def test_a_part_that_was_claimed_in_the_middle(loader: Loader, ledger: Ledger, file: ModelFile) -> None:
    ledger.access(ledger.record(file), 2 * MiB, 3 * MiB)  # two holes in one chunk
    loader.submit([Prefetch(file, 0, 8 * MiB)])
    assert loader.wait_idle(DEADLINE_S)
    assert ledger.totals().prefetched_bytes == 7 * MiB
    assert ledger.record(file).present.covers(0, 8 * MiB)


def test_the_end_of_a_file_that_ends_within_a_page(loader: Loader, ledger: Ledger, tmp_path: Path) -> None:
    file = make_file(tmp_path / "odd.gguf", 9 * MiB + 100)
    loader.submit([Prefetch(file, 0, file.size_bytes)])
    assert loader.wait_idle(DEADLINE_S)
    assert resident(file, 0, file.size_bytes) == About(9 * MiB + PAGE)
    assert ledger.totals().prefetched_bytes == file.size_bytes


def test_no_more_than_is_allowed_waits_for_a_reader(loader: Loader, ledger: Ledger, file: ModelFile) -> None:
    loader.set_limits(16 * MiB)
    loader.submit([Prefetch(file, 0, SIZE_BYTES)])
    wait_until(lambda: ledger.totals().prefetched_bytes == 16 * MiB, "the allowance is not used")
    assert not loader.wait_idle(0.05)
    assert ledger.totals().waiting_bytes == 16 * MiB
    ledger.access(ledger.record(file), 0, 8 * MiB)
    loader.nudge()
    wait_until(lambda: ledger.totals().prefetched_bytes == 24 * MiB, "the reader's progress is not noticed")
    assert ledger.totals().waiting_bytes == 16 * MiB
    assert not loader.wait_idle(0.05)
    loader.set_limits(SIZE_BYTES)
    assert loader.wait_idle(DEADLINE_S)
    assert ledger.record(file).present.covers(0, SIZE_BYTES)
    assert resident(file, 0, SIZE_BYTES) == About(SIZE_BYTES)


def test_a_new_queue_replaces_the_old_one(loader: Loader, ledger: Ledger, file: ModelFile, tmp_path: Path) -> None:
    other = make_file(tmp_path / "model-2.safetensors", 8 * MiB)
    loader.set_limits(0)  # hold everything back
    loader.submit([Prefetch(file, 0, SIZE_BYTES)])
    loader.submit([Prefetch(other, 0, 8 * MiB)])
    loader.set_limits(SIZE_BYTES)
    assert loader.wait_idle(DEADLINE_S)
    assert loader.statistics().interruptions == 1
    assert resident(other, 0, 8 * MiB) == About(8 * MiB)
    assert resident(file, 0, SIZE_BYTES) == 0
    assert ledger.totals().prefetched_bytes == 8 * MiB


def test_an_empty_queue_is_idle(loader: Loader) -> None:
    assert loader.wait_idle(DEADLINE_S)
    loader.submit(())
    assert loader.idle


def test_a_file_shorter_than_it_was(loader: Loader, ledger: Ledger, file: ModelFile, tmp_path: Path) -> None:
    other = make_file(tmp_path / "model-2.safetensors", 8 * MiB)
    os.truncate(file.path, 4 * MiB)
    loader.submit([Prefetch(file, 8 * MiB, SIZE_BYTES), Prefetch(other, 0, 8 * MiB)])
    assert loader.wait_idle(DEADLINE_S)
    for warning in loader.statistics().warnings:  # one for each chunk that was under way
        assert warning.startswith(f"{file.path}: ends at byte {4 * MiB} while bytes ")
        assert "nothing more of it is prefetched" in warning
    assert 1 <= len(loader.statistics().warnings) <= 2
    assert ledger.record(file).failed
    assert resident(other, 0, 8 * MiB) == About(8 * MiB)
    loader.submit([Prefetch(file, 0, 4 * MiB)])
    assert loader.wait_idle(DEADLINE_S)
    assert ledger.totals().prefetched_bytes == 8 * MiB


def test_a_file_that_is_gone(loader: Loader, ledger: Ledger, file: ModelFile) -> None:
    gone = ModelFile("gone", f"{file.path}.gone", 8 * MiB, file.device, 1)
    loader.submit([Prefetch(gone, 0, MiB), Prefetch(gone, MiB, 8 * MiB), Prefetch(file, 0, 8 * MiB)])
    assert loader.wait_idle(DEADLINE_S)
    [warning] = loader.statistics().warnings
    assert warning == f"{gone.path}: not prefetched: No such file or directory"
    assert ledger.totals().prefetched_bytes == 8 * MiB


def test_where_a_file_system_cannot_be_populated(
    ledger: Ledger, file: ModelFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(window: FileWindow) -> None:
        raise OSError(errno.EINVAL, "no MADV_POPULATE_READ here")

    monkeypatch.setattr(FileWindow, "populate", refuse)
    loader = Loader(ledger)
    try:
        loader.submit([Prefetch(file, 0, SIZE_BYTES)])
        assert loader.wait_idle(DEADLINE_S)
        assert loader.statistics().method == "pread"
        assert loader.statistics().warnings == ()
        assert resident(file, 0, SIZE_BYTES) == About(SIZE_BYTES)
    finally:
        loader.close()


def test_a_disk_that_fails(ledger: Ledger, file: ModelFile, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(window: FileWindow) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(FileWindow, "populate", fail)
    loader = Loader(ledger)
    try:
        loader.submit([Prefetch(file, 0, SIZE_BYTES)])
        assert loader.wait_idle(DEADLINE_S)
        assert "could not be read: Input/output error" in loader.statistics().warnings[0]
        assert len(loader.statistics().warnings) <= 5  # what was under way
        assert ledger.totals().waiting_bytes == 0
        assert not ledger.record(file).present
    finally:
        loader.close()


def test_pages_are_read_by_threads_on_the_workers_node(
    ledger: Ledger, file: ModelFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    bound: list[int] = []
    monkeypatch.setattr(numa, "bind_thread", bound.append)  # this machine may have one node only
    monkeypatch.setattr(FileWindow, "move_to", lambda *_: None)
    loader = Loader(ledger, {0: 0, 1: 1}.get, threads=1)
    try:
        loader.submit([Prefetch(file, start * MiB, (start + 8) * MiB, start // 8 % 2) for start in (0, 8, 24)])
        assert loader.wait_idle(DEADLINE_S)
        loader.submit([Prefetch(file, 32 * MiB, SIZE_BYTES)])  # nobody's in particular
        assert loader.wait_idle(DEADLINE_S)
    finally:
        loader.close()
    assert bound == [0, 1]


def test_its_threads_end_with_it(ledger: Ledger, file: ModelFile) -> None:
    before = set(threading.enumerate())
    loader = Loader(ledger)
    loader.submit([Prefetch(file, 0, SIZE_BYTES)])
    loader.close()
    assert set(threading.enumerate()) <= before
    loader.submit([Prefetch(file, 0, SIZE_BYTES)])  # nobody is there to read it
    assert not loader.wait_idle(0.01)


def test_what_is_known_to_be_cached_takes_no_threads(ledger: Ledger, file: ModelFile) -> None:
    ledger.found_cached(ledger.record(file))
    loader = Loader(ledger)
    before = set(threading.enumerate())
    loader.submit([Prefetch(file, 0, SIZE_BYTES), Prefetch(file, 8 * MiB, 12 * MiB)])
    assert loader.idle
    assert set(threading.enumerate()) == before
    ledger.evicted(ledger.record(file), 0, MiB, MiB)
    loader.submit([Prefetch(file, 0, SIZE_BYTES)])
    assert loader.wait_idle(DEADLINE_S)
    loader.close()
    assert resident(file, 0, MiB) == MiB


def test_the_first_thread_does_not_wait_for_the_others(
    ledger: Ledger, file: ModelFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = threading.Thread.start
    waited: list[threading.Thread] = []

    def slow(thread: threading.Thread) -> None:
        if thread.name == "penstock-loader-1":
            wait_until(lambda: resident(file, 0, 8 * MiB) == 8 * MiB, "nothing is read before all threads are there")
            waited.append(thread)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", slow)
    loader = Loader(ledger, threads=2)
    loader.submit([Prefetch(file, 0, SIZE_BYTES)])
    assert loader.wait_idle(DEADLINE_S)
    loader.close()
    assert waited


def test_a_thread_that_cannot_be_started(ledger: Ledger, file: ModelFile, monkeypatch: pytest.MonkeyPatch) -> None:
    start = threading.Thread.start
    started: list[threading.Thread] = []

    def refused(thread: threading.Thread) -> None:
        if thread.name.startswith("penstock-loader-"):
            if started:
                raise RuntimeError("can't start new thread")
            started.append(thread)
        start(thread)

    loader = Loader(ledger, threads=2)
    monkeypatch.setattr(threading.Thread, "start", refused)
    loader.submit([Prefetch(file, 0, SIZE_BYTES)])  # by the one that there is
    assert loader.wait_idle(DEADLINE_S)
    loader.close()
    assert resident(file, 0, SIZE_BYTES) == SIZE_BYTES
    assert not started[0].is_alive()
    ledger.abandon(ledger.record(file), 0, SIZE_BYTES)
    without_any = Loader(ledger, threads=2)
    with pytest.raises(RuntimeError, match="can't start"):
        without_any.submit([Prefetch(file, 0, SIZE_BYTES)])
    without_any.close()

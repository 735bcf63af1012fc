"""penstock.pagecache.toucher: touches what was read in, where a touch is dear."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest
from tests.contents import contents

from penstock.linux.window import FileWindow
from penstock.pagecache import toucher as toucher_module
from penstock.pagecache.base import ModelFile
from penstock.pagecache.ledger import Ledger
from penstock.pagecache.toucher import Toucher
from penstock.units import MiB

SIZE_BYTES = 8 * MiB
DEADLINE_S = 30.0


@pytest.fixture
def file(tmp_path: Path) -> ModelFile:
    path = tmp_path / "model.gguf"
    path.write_bytes(contents(SIZE_BYTES))
    status = path.stat()
    return ModelFile(path.name, str(path), status.st_size, status.st_dev, status.st_ino)


@pytest.fixture
def touched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Thread and length of each touch; the real ones go on."""
    calls: list[tuple[str, int]] = []
    touch = FileWindow.touch

    def note(window: FileWindow, sink: int, start: int = 0, stop: int | None = None) -> None:
        length = (window._length if stop is None else stop) - start
        touch(window, sink, start, stop)
        calls.append((threading.current_thread().name, length))

    monkeypatch.setattr(FileWindow, "touch", note)
    return calls


def offer(toucher: Toucher, ledger: Ledger, file: ModelFile, start: int, stop: int) -> None:
    record = ledger.record(file)
    with FileWindow(record.fd, start, stop) as window:
        window.populate()
        toucher.offer(window, record, start, stop)


def wait_for(touched: list[tuple[str, int]], length: int) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not any(touch == length for _, touch in touched):
        assert time.monotonic() < deadline, f"{length} bytes were not touched: {touched}"
        time.sleep(0.005)


def test_cheap_pages_are_only_sampled(
    ledger: Ledger, file: ModelFile, touched: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(toucher_module, "_SLOW_S", 1.0)
    before = set(threading.enumerate())
    toucher = Toucher(ledger)
    offer(toucher, ledger, file, 0, 4 * MiB)
    assert set(threading.enumerate()) == before
    toucher.close()
    assert [length for _, length in touched] == [64 * os.sysconf("SC_PAGE_SIZE")]


def test_dear_pages_are_touched_by_a_thread_of_its_own(
    ledger: Ledger, file: ModelFile, touched: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(toucher_module, "_SLOW_S", 0.0)
    before = set(threading.enumerate())
    toucher = Toucher(ledger)
    offer(toucher, ledger, file, 0, 4 * MiB)
    wait_for(touched, 4 * MiB)
    assert [name for name, length in touched if length == 4 * MiB] == ["penstock-toucher-0"]
    toucher.close()
    assert set(threading.enumerate()) == before


def test_without_a_thread_nothing_is_touched(
    ledger: Ledger, file: ModelFile, touched: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(toucher_module, "_SLOW_S", 0.0)
    toucher = Toucher(ledger)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refused)
        offer(toucher, ledger, file, 0, 3 * MiB)  # by a thread that reads, and has to go on
    offer(toucher, ledger, file, 3 * MiB, 5 * MiB)
    wait_for(touched, 3 * MiB)  # once there may be one
    toucher.close()


def test_what_the_program_has_read_is_touched_too(
    ledger: Ledger, file: ModelFile, touched: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(toucher_module, "_SLOW_S", 0.0)
    ledger.access(ledger.record(file), 0, SIZE_BYTES)
    toucher = Toucher(ledger)
    offer(toucher, ledger, file, 0, 3 * MiB)
    wait_for(touched, 3 * MiB)
    toucher.close()


def test_a_file_truncated_meanwhile_does_no_harm(
    ledger: Ledger, file: ModelFile, touched: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(toucher_module, "_SLOW_S", 0.0)
    toucher = Toucher(ledger)
    record = ledger.record(file)
    with FileWindow(record.fd, 0, 2 * MiB) as window:
        window.populate()
        os.truncate(file.path, MiB)
        toucher.offer(window, record, 0, 2 * MiB)
    offer(toucher, ledger, file, 0, MiB)
    wait_for(touched, MiB)  # it is still at work
    toucher.close()

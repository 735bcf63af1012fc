"""penstock.storage.threads: the contract, and what is its own."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import pytest

from penstock.storage.base import READ, batch
from penstock.storage.threads import ThreadEngine
from penstock.testing.engine import EngineTests
from penstock.units import KiB


class TestThreadEngine(EngineTests):
    def make_engine(self) -> ThreadEngine:
        return ThreadEngine(4)


def test_threads_come_with_the_first_request_and_no_more_than_are_of_use(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(64 * KiB))
    before = threading.active_count()
    with open(path, "rb") as file, ThreadEngine(16) as engine:
        assert threading.active_count() == before
        number, memory = engine.add_file(file.fileno()), bytearray(64 * KiB)
        buffer = engine.add_buffer(memory)
        engine.submit(batch(READ, file=number, offset=[0, 4096], length=4096, buffer=buffer, buffer_offset=[0, 4096]))
        assert threading.active_count() <= before + 2
        engine.wait(2)
    assert threading.active_count() == before


def test_without_threads() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        ThreadEngine(0)


@pytest.mark.parametrize("error", [OSError(errno.EIO, "torn"), MemoryError(), SystemExit(3)])
def test_whatever_befalls_a_thread_the_request_comes_back_and_the_engine_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(8 * KiB))

    def fail(fd: int, buffers: list[memoryview], offset: int) -> int:
        raise error

    monkeypatch.setattr(threading, "excepthook", lambda _: None)  # what ends a thread here is meant to
    with open(path, "rb") as file, ThreadEngine(2) as engine:
        number, buffer = engine.add_file(file.fileno()), engine.add_buffer(bytearray(8 * KiB))
        request = batch(READ, file=[number], offset=[0], length=[4096], buffer=[buffer], buffer_offset=[0])
        with monkeypatch.context() as patch:
            patch.setattr(os, "preadv", fail)
            for _ in range(5):  # more than there are threads
                engine.submit(request)
                assert engine.wait(1)["result"].tolist() == [-errno.EIO]
        engine.submit(request)
        assert engine.wait(1)["result"].tolist() == [4096]
    for thread in threading.enumerate():
        if thread.name.startswith("penstock-engine"):
            thread.join(30)

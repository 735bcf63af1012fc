"""penstock.checkpoint.feeding: what is submitted, when, and how it ends."""

from __future__ import annotations

import contextlib
import mmap
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from penstock.checkpoint import feeding
from penstock.checkpoint.feeding import Feeder
from penstock.storage.base import READ, Engine, Requests, batch
from penstock.storage.threads import ThreadEngine
from penstock.testing.faults import FaultyEngine
from penstock.units import KiB, MiB

SIZE_BYTES = 8 * MiB
READ_BYTES = 64 * KiB


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feeding, "_WORTH_BYTES", 1 * MiB)
    monkeypatch.setattr(feeding, "_PIECE_BYTES", 512 * KiB)
    monkeypatch.setattr(feeding, "_FIRST_BYTES", np.array([128, 256]) * KiB)


@pytest.fixture
def file(tmp_path: Path) -> Iterator[tuple[int, bytes]]:
    contents = np.random.default_rng(1).bytes(SIZE_BYTES)
    path = tmp_path / "file"
    path.write_bytes(contents)
    fd = os.open(path, os.O_RDONLY)
    yield fd, contents
    os.close(fd)


def fresh() -> NDArray[np.uint8]:
    return np.frombuffer(mmap.mmap(-1, SIZE_BYTES), np.uint8)


def prepare(engine: Engine, fd: int, memory: NDArray[np.uint8]) -> tuple[Requests, dict[int, NDArray[np.uint8]]]:
    """Reads of the whole file, the first half into one buffer and the second into another."""
    half = SIZE_BYTES // 2
    parts = [memory[:half], memory[half:]]
    buffers = [engine.add_buffer(part, pin=False) for part in parts]
    offsets = np.arange(0, SIZE_BYTES, READ_BYTES)
    requests = batch(
        READ,
        file=engine.add_file(fd),
        offset=offsets,
        length=READ_BYTES,
        buffer=np.where(offsets < half, *buffers),
        buffer_offset=offsets % half,
    )
    return requests, dict(zip(buffers, parts, strict=True))


@contextlib.contextmanager
def feeding_from(file: tuple[int, bytes]) -> Iterator[tuple[Feeder, Engine, int]]:
    """A feeder of the whole file, its engine, and how many reads that takes; all of it is to be read by the end."""
    fd, contents = file
    memory = fresh()
    with ThreadEngine() as engine:
        requests, places = prepare(engine, fd, memory)
        with Feeder(engine, requests, places) as feeder:
            yield feeder, engine, len(requests)
    assert memory.tobytes() == contents


def take_all(feeder: Feeder, count: int) -> list[int]:
    tokens: list[int] = []
    while len(tokens) < count:
        tokens += feeder.wait()["token"].tolist()
    return tokens


def test_everything_is_read_once(file: tuple[int, bytes]) -> None:
    with feeding_from(file) as (feeder, _, count):
        feeder.start()
        assert sorted(take_all(feeder, count)) == list(range(count))


def test_little_is_submitted_at_once(file: tuple[int, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feeding, "_WORTH_BYTES", 2 * SIZE_BYTES)
    with feeding_from(file) as (feeder, engine, count):
        feeder.start()
        assert engine.in_flight == count
        take_all(feeder, count)


def test_without_threads_it_is_submitted_at_once(file: tuple[int, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    fd, contents = file
    memory = fresh()
    with ThreadEngine() as engine:
        requests, places = prepare(engine, fd, memory)
        engine.submit(requests[:1])  # so that the engine has a thread
        engine.wait(1)
        start = threading.Thread.start

        def refuse(thread: threading.Thread) -> None:
            if thread.name.startswith("penstock-feeder"):
                raise RuntimeError("can't start new thread")
            start(thread)

        monkeypatch.setattr(threading.Thread, "start", refuse)
        with Feeder(engine, requests, places) as feeder:
            feeder.start()
            take_all(feeder, len(requests))
    assert memory.tobytes() == contents


@pytest.mark.parametrize("error", [OSError(5, "no"), MemoryError("none"), KeyboardInterrupt()])
def test_what_a_thread_raises_comes_out_of_wait(file: tuple[int, bytes], error: BaseException) -> None:
    def fail(number: int) -> int:
        if number == 40:
            raise error
        return 0

    fd, _ = file
    memory = fresh()
    with FaultyEngine(ThreadEngine(), fail) as engine:
        requests, places = prepare(engine, fd, memory)
        with Feeder(engine, requests, places) as feeder:
            feeder.start()
            with pytest.raises(type(error)):
                take_all(feeder, len(requests))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("penstock-feeder")]


def test_it_can_be_closed_at_any_time(file: tuple[int, bytes]) -> None:
    fd, _ = file
    for _ in range(20):
        memory = fresh()
        with ThreadEngine() as engine:
            requests, places = prepare(engine, fd, memory)
            feeder = Feeder(engine, requests, places)
            feeder.start()
            feeder.close()
            feeder.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("penstock-feeder")]

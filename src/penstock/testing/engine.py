"""The contract of an engine, as a class of tests to derive from.

::

    class TestMine(EngineTests):
        def make_engine(self):
            return Mine()

Contents are compared with what plain `read` and `write` say, never with what an engine says.

What is read and written is a file, or for engines that have none a stretch of something that ends where it ends: then
`set_up`, `open` and `read_back` are to be written anew, and the attributes say what holds of it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from penstock.linux.process import memory_bytes
from penstock.storage.base import BLOCK_BYTES, READ, WRITE, Completions, Engine, Requests, batch
from penstock.storage.buffers import huge_buffer
from penstock.units import KiB, MiB

SIZE_BYTES = 4 * MiB + 5  # ends within a block
_PATIENCE_S = 60.0


def _drain(engine: Engine) -> Completions:
    """All that is in flight."""
    parts = []
    deadline = time.monotonic() + _PATIENCE_S
    while engine.in_flight:
        assert time.monotonic() < deadline, f"{engine.in_flight} requests do not come back"
        parts.append(engine.wait(engine.in_flight, 1.0))
    return np.concatenate(parts)


class EngineTests:
    """Derive from it, and say how an engine is made.

    Attributes:
        start_bytes: where the file's first byte is in what an engine counts, a multiple of whatever has to be aligned.
        size_bytes: of the file from there on.
        ways: flags to open it with beside O_RDONLY or O_RDWR.
    """

    start_bytes: int = 0
    size_bytes: int = SIZE_BYTES
    ways: tuple[int, ...] = (0, os.O_DIRECT)

    def make_engine(self) -> Engine:
        """A new engine."""
        raise NotImplementedError

    def limit_transfers(self, engine: Engine, size_bytes: int) -> None:
        """Have the kernel move no more than that at once, as if it had cut each transfer short."""
        engine._largest_transfer_bytes = size_bytes  # type: ignore[attr-defined]

    def set_up(self, directory: Path) -> tuple[Path, bytes]:
        """A file with known contents, on the disk and not in the page cache."""
        contents = self.make_contents()
        path = directory / "file"
        with path.open("wb") as file:
            file.write(contents)
            file.flush()
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return path, contents

    def make_contents(self) -> bytes:
        """What the file is to hold; always the same."""
        return random.Random(self.size_bytes).randbytes(self.size_bytes)  # noqa: S311 (no secret)

    def open(self, path: Path, flags: int) -> int:
        """What an engine is given of the file."""
        return os.open(path, flags | os.O_CLOEXEC)

    def read_back(self, path: Path) -> bytes:
        """What the file holds, by other means than an engine's."""
        return path.read_bytes()

    @contextlib.contextmanager
    def engine_on(
        self, path: Path, flags: int, buffer_bytes: int = 0
    ) -> Iterator[tuple[Engine, NDArray[np.uint8], int, int]]:
        """An engine that knows the file, opened so, and a buffer: (engine, memory, number of file, of buffer).

        The buffer has a block more than the file, unless its size is given.
        """
        import pytest

        try:
            fd = self.open(path, flags)
        except OSError as error:
            if flags & os.O_DIRECT and error.errno == errno.EINVAL:
                pytest.skip(f"{path} is on a file system without O_DIRECT")
            raise
        try:
            memory = np.frombuffer(huge_buffer(buffer_bytes or self.size_bytes + BLOCK_BYTES), np.uint8)
            with self.make_engine() as engine:
                yield engine, memory, engine.add_file(fd), engine.add_buffer(memory)
        finally:
            os.close(fd)

    def batch(self, operation: int, *, offset: ArrayLike, **fields: ArrayLike) -> Requests:
        """Requests, their offsets from the file's first byte."""
        return batch(operation, offset=np.asarray(offset, np.int64) + self.start_bytes, **fields)

    def everything(self, file: int, buffer: int, chunk_bytes: int, operation: int = READ) -> Requests:
        """The whole file in chunks, in no order; the last one reaches beyond its end."""
        offset = np.random.default_rng(chunk_bytes).permutation(np.arange(0, self.size_bytes, chunk_bytes))
        length = np.minimum(chunk_bytes, -(-(self.size_bytes - offset) // BLOCK_BYTES) * BLOCK_BYTES)
        return self.batch(operation, file=file, offset=offset, length=length, buffer=buffer, buffer_offset=offset)

    def check_read(self, done: Completions, memory: NDArray[np.uint8], contents: bytes) -> None:
        """Each whole, but for what lies beyond the end."""
        wanted = np.minimum(done["length"], self.start_bytes + len(contents) - done["offset"])
        assert done["result"].tolist() == wanted.tolist()
        assert memory[: len(contents)].tobytes() == contents

    def test_reads(self, tmp_path: Path) -> None:
        path, contents = self.set_up(tmp_path)
        for way in self.ways:
            for chunk_bytes in (BLOCK_BYTES, 24 * KiB, 1 * MiB, 8 * MiB):
                with self.engine_on(path, os.O_RDONLY | way) as (engine, memory, file, buffer):
                    requests = self.everything(file, buffer, chunk_bytes)
                    engine.submit(requests)
                    done = _drain(engine)
                    self.check_read(done, memory, contents)
                    assert sorted(done["token"].tolist()) == list(range(len(requests)))
                    statistics = engine.statistics()
                    assert (statistics.requests, statistics.failed) == (len(requests), 0)
                    assert (statistics.bytes_read, statistics.bytes_written) == (self.size_bytes, 0)
                    assert statistics.engine == engine.name

    def test_writes(self, tmp_path: Path) -> None:
        size_bytes = self.size_bytes // (64 * KiB) * (64 * KiB)
        for way in self.ways:
            path, _ = self.set_up(tmp_path)
            with self.engine_on(path, os.O_RDWR | way) as (engine, memory, file, buffer):
                memory[:] = np.random.default_rng(1).integers(0, 256, len(memory), np.uint8)
                offset = np.random.default_rng(2).permutation(np.arange(0, size_bytes, 64 * KiB))
                # To the mirror image of where it lies in memory.
                back = size_bytes - 64 * KiB - offset
                engine.submit(
                    self.batch(WRITE, file=file, offset=back, length=64 * KiB, buffer=buffer, buffer_offset=offset)
                )
                assert (_drain(engine)["result"] == 64 * KiB).all()
                assert engine.statistics().bytes_written == size_bytes
                expected = memory[:size_bytes].reshape(-1, 64 * KiB)[::-1].tobytes()
            assert self.read_back(path)[:size_bytes] == expected

    def test_nothing_beside_the_target_is_touched(self, tmp_path: Path) -> None:
        path, contents = self.set_up(tmp_path)
        for way in self.ways:
            with self.engine_on(path, os.O_RDONLY | way) as (engine, memory, file, buffer):
                memory[:] = 0xA5
                offset = np.arange(0, 1 * MiB, 16 * KiB)
                engine.submit(
                    self.batch(
                        READ, file=file, offset=offset, length=4 * KiB, buffer=buffer, buffer_offset=offset + 4 * KiB
                    )
                )
                assert (_drain(engine)["result"] == 4 * KiB).all()
                expected = bytearray(b"\xa5" * len(memory))
                for at in offset.tolist():
                    expected[at + 4 * KiB : at + 8 * KiB] = contents[at : at + 4 * KiB]
                assert memory.tobytes() == bytes(expected)

    def test_any_bytes_of_a_file_that_is_read_through_the_cache(self, tmp_path: Path) -> None:
        path, contents = self.set_up(tmp_path)
        with self.engine_on(path, os.O_RDONLY) as (engine, memory, file, buffer):
            engine.submit(self.batch(READ, file=file, offset=[13], length=[99_999], buffer=buffer, buffer_offset=[7]))
            assert engine.wait(1)["result"].tolist() == [99_999]
            assert memory[7 : 7 + 99_999].tobytes() == contents[13 : 13 + 99_999]

    def test_the_end_of_a_file(self, tmp_path: Path) -> None:
        path, contents = self.set_up(tmp_path)
        last = self.size_bytes // BLOCK_BYTES * BLOCK_BYTES
        tail = self.size_bytes - last
        for way in self.ways:
            with self.engine_on(path, os.O_RDONLY | way) as (engine, memory, file, buffer):
                offset = [last, last - BLOCK_BYTES, last + BLOCK_BYTES, last + 100 * BLOCK_BYTES]
                engine.submit(
                    self.batch(
                        READ,
                        file=file,
                        offset=offset,
                        length=4 * BLOCK_BYTES,
                        buffer=buffer,
                        buffer_offset=np.arange(4) * 4 * BLOCK_BYTES,
                    )
                )
                done = _drain(engine)
                results = done["result"][np.argsort(done["token"])].tolist()
                assert results == [tail, BLOCK_BYTES + tail, 0, 0]
                assert memory[:tail].tobytes() == contents[last:]

    def test_transfers_cut_short_go_on(self, tmp_path: Path) -> None:
        path, contents = self.set_up(tmp_path)
        for flags, limit in ((os.O_RDONLY, 7777), (os.O_RDONLY | os.O_DIRECT, 3 * BLOCK_BYTES)):
            with self.engine_on(path, flags) as (engine, memory, file, buffer):
                self.limit_transfers(engine, limit)
                engine.submit(self.everything(file, buffer, 256 * KiB))
                self.check_read(_drain(engine), memory, contents)
                assert engine.statistics().continued > 100
        with self.engine_on(path, os.O_RDWR) as (engine, memory, file, buffer):
            self.limit_transfers(engine, 7777)
            memory[: 256 * KiB] = 7
            engine.submit(
                self.batch(WRITE, file=file, offset=[0], length=[256 * KiB], buffer=buffer, buffer_offset=[0])
            )
            assert engine.wait(1)["result"].tolist() == [256 * KiB]
        assert self.read_back(path) == b"\x07" * (256 * KiB) + contents[256 * KiB :]

    def test_transfers_that_fail(self, tmp_path: Path) -> None:
        path, contents = self.set_up(tmp_path)
        with self.engine_on(path, os.O_WRONLY) as (engine, memory, file, buffer):
            reading = self.open(path, os.O_RDONLY)
            try:
                good = engine.add_file(reading)
                files = [file, good, file, good]
                engine.submit(
                    self.batch(
                        READ, file=files, offset=0, length=4 * KiB, buffer=buffer, buffer_offset=np.arange(4) * 4 * KiB
                    )
                )
                done = _drain(engine)
                results = done["result"][np.argsort(done["token"])].tolist()
                assert results == [-errno.EBADF, 4 * KiB, -errno.EBADF, 4 * KiB]
                assert memory[4 * KiB : 8 * KiB].tobytes() == contents[: 4 * KiB]
                assert engine.statistics().failed == 2
            finally:
                os.close(reading)

    def test_what_is_not_aligned_for_direct_reads(self, tmp_path: Path) -> None:
        path, _ = self.set_up(tmp_path)
        with self.engine_on(path, os.O_RDONLY | os.O_DIRECT) as (engine, _, file, buffer):
            engine.submit(
                self.batch(
                    READ, file=file, offset=[1, 0], length=[4 * KiB, 4095], buffer=buffer, buffer_offset=[0, 8 * KiB]
                )
            )
            assert _drain(engine)["result"].tolist() == [-errno.EINVAL, -errno.EINVAL]

    def test_a_wrong_request_is_refused_with_its_batch(self, tmp_path: Path) -> None:
        import pytest

        path, _ = self.set_up(tmp_path)
        with self.engine_on(path, os.O_RDONLY, 64 * KiB) as (engine, memory, file, buffer):
            read_only = engine.add_buffer(bytes(8 * KiB))
            fields: dict[str, Any] = {
                "file": file,
                "offset": 0,
                "length": 4 * KiB,
                "buffer": buffer,
                "buffer_offset": 0,
            }
            wrong: list[tuple[dict[str, Any], str]] = [
                ({"file": 77}, "file"),
                ({"file": -1}, "file"),
                ({"buffer": 77}, "buffer"),
                ({"buffer_offset": 61 * KiB}, "inside"),
                ({"buffer_offset": -1}, "inside"),
                ({"length": 0}, "no bytes"),
                ({"length": 65 * KiB}, "inside"),
                ({"offset": -4096}, "negative"),
                ({"buffer": read_only}, "read-only"),
            ]
            memory[:] = 9
            for change, word in wrong:
                requests = np.concatenate(
                    [batch(READ, **{k: [v] for k, v in (fields | c).items()}) for c in ({}, change)]
                )
                with pytest.raises(ValueError, match=rf"request 1 of 2 .*{word}"):
                    engine.submit(requests)
            requests = batch(7, **{name: [value] for name, value in fields.items()})
            with pytest.raises(ValueError, match="neither READ nor WRITE"):
                engine.submit(requests)
            with pytest.raises(ValueError, match="REQUEST_DTYPE"):
                engine.submit(np.zeros(3))  # type: ignore[arg-type]
            engine.submit(batch(READ, file=[], offset=[], length=[], buffer=[], buffer_offset=[]))
            assert engine.in_flight == 0
            assert (memory == 9).all()

    def test_more_requests_than_the_kernel_takes(self, tmp_path: Path) -> None:
        path, contents = self.set_up(tmp_path)
        with self.engine_on(path, os.O_RDONLY | os.O_DIRECT) as (engine, memory, file, buffer):
            requests = np.concatenate([self.everything(file, buffer, BLOCK_BYTES)] * 5)
            requests["token"] = np.arange(len(requests), dtype=np.uint64) + np.uint64(1 << 63)
            engine.submit(requests)
            engine.submit(requests[:0])
            assert engine.in_flight == len(requests)
            done = _drain(engine)
            self.check_read(done, memory, contents)
            assert np.array_equal(np.sort(done["token"]), requests["token"])

    def test_waiting(self, tmp_path: Path) -> None:
        path, contents = self.set_up(tmp_path)
        with self.engine_on(path, os.O_RDONLY | os.O_DIRECT) as (engine, memory, file, buffer):
            assert len(engine.wait(0)) == 0
            assert len(engine.wait(3)) == 0  # nothing is in flight
            requests = self.everything(file, buffer, 64 * KiB)
            parts = []
            engine.submit(requests)
            parts.append(engine.wait(0))
            parts.append(engine.wait(5))
            assert len(parts[0]) + len(parts[1]) >= 5
            parts.append(engine.wait(len(requests), 0.0))
            parts.append(engine.wait(len(requests), _PATIENCE_S))
            done = np.concatenate(parts)
            assert len(done) == len(requests)
            self.check_read(done, memory, contents)
            assert engine.in_flight == 0

    def test_cancelling(self, tmp_path: Path) -> None:
        path, contents = self.set_up(tmp_path)
        with self.engine_on(path, os.O_RDONLY | os.O_DIRECT) as (engine, memory, file, buffer):
            engine.cancel()  # nothing to do
            requests = np.concatenate([self.everything(file, buffer, 16 * KiB)] * 8)
            requests["token"] = np.arange(len(requests))
            engine.submit(requests)
            engine.cancel()
            done = _drain(engine)
            assert np.array_equal(np.sort(done["token"]), requests["token"])
            is_cancelled = done["result"] == -errno.ECANCELED
            assert is_cancelled.any()
            assert engine.statistics().failed == np.count_nonzero(is_cancelled)
            for part in done[~is_cancelled]:
                start = int(part["offset"]) - self.start_bytes
                stop = start + int(part["result"])
                assert memory[start:stop].tobytes() == contents[start:stop]
            engine.submit(self.everything(file, buffer, 1 * MiB))  # it goes on
            self.check_read(_drain(engine), memory, contents)

    def test_several_threads(self, tmp_path: Path) -> None:
        path, contents = self.set_up(tmp_path)
        with self.engine_on(path, os.O_RDONLY | os.O_DIRECT) as (engine, memory, file, buffer):
            requests = self.everything(file, buffer, BLOCK_BYTES)
            found: list[Completions] = []
            errors: list[BaseException] = []

            def work(number: int) -> None:
                try:
                    mine = requests[number::4]
                    for at in range(0, len(mine), 10):
                        engine.submit(mine[at : at + 10])
                        found.append(engine.wait(5))
                except BaseException as error:  # noqa: BLE001 (told below)
                    errors.append(error)

            threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(_PATIENCE_S)
                assert not thread.is_alive(), "it hangs"
            assert not errors
            done = np.concatenate([*found, *([_drain(engine)] if engine.in_flight else [])])
            assert sorted(done["token"].tolist()) == list(range(len(requests)))
            self.check_read(done, memory, contents)

    def test_signals_do_not_disturb(self, tmp_path: Path) -> None:
        path, contents = self.set_up(tmp_path)
        came: list[int] = []
        before = signal.signal(signal.SIGALRM, lambda number, _: came.append(number))
        signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
        try:
            for _ in range(20):
                with self.engine_on(path, os.O_RDONLY | os.O_DIRECT) as (engine, memory, file, buffer):
                    engine.submit(self.everything(file, buffer, 64 * KiB))
                    self.check_read(_drain(engine), memory, contents)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            time.sleep(0.2)  # another thread may still have one to hand on, and it would find no handler
            signal.signal(signal.SIGALRM, before)
        assert came

    def test_closing_with_requests_in_flight(self, tmp_path: Path) -> None:
        import pytest

        path, _ = self.set_up(tmp_path)
        with self.engine_on(path, os.O_RDONLY | os.O_DIRECT) as (engine, memory, file, buffer):
            requests = np.concatenate([self.everything(file, buffer, 64 * KiB)] * 4)
            engine.submit(requests)
            engine.close()
            memory[:] = 0x5A
            engine.close()
            with pytest.raises(RuntimeError, match="closed"):
                engine.submit(requests)
            with pytest.raises(RuntimeError, match="closed"):
                engine.add_buffer(memory)
            time.sleep(0.05)  # whatever might still come
            assert (memory == 0x5A).all()

    def test_a_reset_leaves_nothing_in_flight(self, tmp_path: Path) -> None:
        path, contents = self.set_up(tmp_path)
        with self.engine_on(path, os.O_RDONLY | os.O_DIRECT) as (engine, memory, file, buffer):
            for _ in range(3):
                engine.submit(np.concatenate([self.everything(file, buffer, 16 * KiB)] * 4))
                engine.reset()
                memory[:] = 0x5A
                assert engine.in_flight == 0
                assert len(engine.wait(5)) == 0
                time.sleep(0.02)  # whatever might still come
                assert (memory == 0x5A).all()
            engine.remove_buffer(buffer)
            buffer = engine.add_buffer(memory)
            engine.submit(self.everything(file, buffer, 64 * KiB))
            self.check_read(_drain(engine), memory, contents)
        engine.reset()  # of a closed one: nothing
        assert len(engine.wait(1)) == 0

    def test_the_thread_that_submits_may_end(self, tmp_path: Path) -> None:
        path, contents = self.set_up(tmp_path)
        with self.engine_on(path, os.O_RDONLY) as (engine, memory, file, buffer):  # what is not cached has to wait
            requests = self.everything(file, buffer, 64 * KiB)
            thread = threading.Thread(target=lambda: engine.submit(requests))
            thread.start()
            thread.join(_PATIENCE_S)
            self.check_read(_drain(engine), memory, contents)

    def test_a_closed_engine_is_left_in_peace(self, tmp_path: Path) -> None:
        path, _ = self.set_up(tmp_path)
        with self.engine_on(path, os.O_RDONLY) as (engine, _, _, _):
            pass
        engine.cancel()
        assert len(engine.wait(1, 0)) == 0
        engine.close()

    def test_a_reset_wakes_who_waits(self, tmp_path: Path) -> None:
        path, _ = self.set_up(tmp_path)
        with self.engine_on(path, os.O_RDONLY | os.O_DIRECT) as (engine, _, file, buffer):
            engine.submit(np.concatenate([self.everything(file, buffer, 4 * KiB)] * 4))
            waiter = threading.Thread(target=lambda: engine.wait(1 << 30))
            waiter.start()
            engine.reset()
            waiter.join(_PATIENCE_S)
            assert not waiter.is_alive(), "it waits for what was forgotten"

    def test_files_and_buffers_come_and_go(self, tmp_path: Path) -> None:
        import pytest

        path, contents = self.set_up(tmp_path)
        with self.engine_on(path, os.O_RDONLY | os.O_DIRECT) as (engine, memory, file, buffer):
            engine.submit(self.everything(file, buffer, 1 * MiB))
            with pytest.raises(ValueError, match="in flight"):
                engine.remove_buffer(buffer)
            with pytest.raises(ValueError, match="in flight"):
                engine.remove_file(file)
            self.check_read(_drain(engine), memory, contents)
            engine.remove_buffer(buffer)
            engine.remove_file(file)
            for remove in (engine.remove_buffer, engine.remove_file):
                for number in (0, 99, -1):
                    with pytest.raises(ValueError, match="there is no"):
                        remove(number)
            fd = self.open(path, os.O_RDONLY)
            try:
                for _ in range(300):  # more than any table holds at once
                    numbers = engine.add_file(fd), engine.add_buffer(memory)
                    assert numbers == (file, buffer)
                    engine.remove_file(numbers[0])
                    engine.remove_buffer(numbers[1])
                blocks = len(contents) // BLOCK_BYTES
                offset = np.arange(300) % blocks * BLOCK_BYTES
                several = [engine.add_buffer(memory[at : at + BLOCK_BYTES]) for at in offset.tolist()]
                memory[:] = 0
                number = engine.add_file(fd)
                engine.submit(
                    self.batch(READ, file=number, offset=offset, length=BLOCK_BYTES, buffer=several, buffer_offset=0)
                )
                assert (_drain(engine)["result"] == BLOCK_BYTES).all()
                read_bytes = min(300, blocks) * BLOCK_BYTES
                assert memory[:read_bytes].tobytes() == contents[:read_bytes]
            finally:
                os.close(fd)

    def test_nothing_is_left(self, tmp_path: Path) -> None:
        path, _ = self.set_up(tmp_path)
        descriptors, threads = os.listdir("/proc/self/fd"), threading.active_count()
        locked = _locked_bytes()
        for _ in range(3):
            with self.engine_on(path, os.O_RDONLY | os.O_DIRECT) as (engine, _, file, buffer):
                engine.submit(self.everything(file, buffer, 64 * KiB))
                engine.wait(3)
        assert os.listdir("/proc/self/fd") == descriptors
        assert threading.active_count() == threads
        deadline = time.monotonic() + _PATIENCE_S
        while _locked_bytes() > locked:  # the kernel lets go of a ring's memory a little later
            assert time.monotonic() < deadline, "memory stays pinned"
            time.sleep(0.01)


def _locked_bytes() -> int:
    """Memory that is locked or pinned for this process."""
    sizes = memory_bytes(os.getpid())
    return sizes["VmLck"] + sizes["VmPin"]

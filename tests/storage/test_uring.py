"""penstock.storage.uring: the contract, with and without registered buffers, and a small ring."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from penstock.linux import uring
from penstock.linux.uring import CQE_DTYPE, Cqes
from penstock.storage.base import BLOCK_BYTES, READ, batch
from penstock.storage.buffers import huge_buffer
from penstock.storage.uring import UringEngine
from penstock.testing.engine import EngineTests
from penstock.units import KiB, MiB

pytestmark = pytest.mark.skipif(bool(uring.probe()), reason=f"needs io_uring: {uring.probe()}")


class TestUringEngine(EngineTests):
    def make_engine(self) -> UringEngine:
        return UringEngine()


class TestWithASmallRing(EngineTests):
    def make_engine(self) -> UringEngine:
        return UringEngine(4)


class TestWithoutRegisteredBuffers(EngineTests):
    def make_engine(self) -> UringEngine:
        return UringEngine(64, register_buffers=False)


class _Unsteady(UringEngine):
    """Its kernel is out of memory, interrupted, or slow to take entries, every now and then."""

    def __init__(self) -> None:
        super().__init__(32)
        self._calls = self._completions = 0
        enter, pop = self._ring.enter, self._ring.pop

        def unsteady_enter(submit: int, wait: int, timeout_s: float | None = None) -> int:
            self._calls += 1
            if self._calls % 3 == 0:
                raise OSError([errno.EAGAIN, errno.EINTR, errno.EBUSY][self._calls // 3 % 3], "not now")
            return enter(min(submit, 5), wait, timeout_s)

        def unsteady_pop() -> Cqes:
            taken = pop()
            for index in range(len(taken)):
                self._completions += 1
                if self._completions % 4 == 0 and taken["result"][index] > 0:
                    taken["result"][index] = [-errno.EAGAIN, -errno.EINTR][self._completions // 4 % 2]
            return taken

        self._ring.enter = unsteady_enter  # type: ignore[method-assign]
        self._ring.pop = unsteady_pop  # type: ignore[method-assign]


class TestWithAnUnsteadyKernel(EngineTests):
    def make_engine(self) -> UringEngine:
        return _Unsteady()


@pytest.fixture
def file(tmp_path: Path) -> Iterator[int]:
    path = tmp_path / "file"
    path.write_bytes(os.urandom(1 * MiB))
    fd = os.open(path, os.O_RDONLY)
    yield fd
    os.close(fd)


def read_of(engine: UringEngine, fd: int, memory: object) -> list[int]:
    request = batch(
        READ, file=[engine.add_file(fd)], offset=[0], length=[64 * KiB], buffer=[engine.add_buffer(memory)],
        buffer_offset=[0],
    )  # fmt: skip
    engine.submit(request)
    done: list[int] = engine.wait(1)["result"].tolist()
    return done


def test_buffers_are_registered_if_they_can_be(file: int) -> None:
    with UringEngine() as engine:
        assert read_of(engine, file, huge_buffer(2 * MiB)) == [64 * KiB]
        assert engine.registered_bytes == 2 * MiB
    with UringEngine(register_buffers=False) as engine:
        assert read_of(engine, file, huge_buffer(2 * MiB)) == [64 * KiB]
        assert engine.registered_bytes == 0


def test_over_the_limit_of_locked_memory_they_are_used_unregistered(
    tmp_path: Path, as_ordinary_user: list[str]
) -> None:
    code = (
        "import resource, sys\n"
        "resource.setrlimit(resource.RLIMIT_MEMLOCK, (65536, 65536))\n"
        "from penstock.storage.base import READ, batch\n"
        "from penstock.storage.uring import UringEngine\n"
        "memory = bytearray(1 << 20)\n"
        "with open(sys.argv[1], 'rb') as file, UringEngine() as engine:\n"
        "    number, buffer = engine.add_file(file.fileno()), engine.add_buffer(memory)\n"
        "    engine.submit(batch(READ, file=[number], offset=[0], length=[5], buffer=[buffer], buffer_offset=[0]))\n"
        "    print(engine.wait(1)['result'].tolist(), bytes(memory[:5]), engine.registered_bytes)\n"
    )
    path = tmp_path / "file"
    path.write_bytes(b"hello")
    os.chmod(path, 0o644)
    command = [*as_ordinary_user, sys.executable, "-c", code, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "[5] b'hello' 0\n"


def test_with_few_descriptors_files_are_used_unregistered(file: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (200, hard))
    try:
        with UringEngine() as engine:
            assert not engine._has_file_table
            assert read_of(engine, file, bytearray(64 * KiB)) == [64 * KiB]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_memory_that_cannot_be_pinned(file: int) -> None:
    import mmap

    with (
        open(f"/proc/self/fd/{file}", "rb") as source,
        mmap.mmap(source.fileno(), 0, access=mmap.ACCESS_COPY) as memory,
    ):
        with UringEngine() as engine:
            number, buffer = engine.add_file(file), engine.add_buffer(memory)
            engine.submit(
                batch(READ, file=[number], offset=[BLOCK_BYTES], length=[5], buffer=[buffer], buffer_offset=[0])
            )
            assert engine.wait(1)["result"].tolist() == [5]
            expected = memory[BLOCK_BYTES : BLOCK_BYTES + 5]
            assert memory[:5] == expected
        del engine


def test_the_ring_goes_round(file: int) -> None:
    with UringEngine(8) as engine:
        memory = np.zeros(8 * BLOCK_BYTES, np.uint8)
        number, buffer = engine.add_file(file), engine.add_buffer(memory)
        for count in [1, 3, 8, 5, 7, 2, 8, 6] * 50:
            offset = np.arange(count) * BLOCK_BYTES
            engine.submit(
                batch(READ, file=number, offset=offset, length=BLOCK_BYTES, buffer=buffer, buffer_offset=offset)
            )
            assert (engine.wait(count)["result"] == BLOCK_BYTES).all()


def test_completions_taken_in_two_parts() -> None:
    with uring.Ring(4, 8) as ring:
        for _ in range(5):
            nothing = np.zeros(3, uring.SQE_DTYPE)  # opcode 0: NOP
            nothing["user_data"] = [1, 2, 3]
            assert ring.push(nothing) == 3
            assert ring.enter(3, 3) == 3
            taken = ring.pop()
            assert taken.dtype == CQE_DTYPE
            assert taken["user_data"].tolist() == [1, 2, 3]
        assert ring.push(np.zeros(9, uring.SQE_DTYPE)) == 4
        assert ring.unsubmitted == 4
        assert ring.enter(0, 1, timeout_s=0.01) == 0  # nothing comes

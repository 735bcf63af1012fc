"""penstock.storage.pool: bounded, aligned, and every block with one holder."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from penstock.storage import pool as pool_module
from penstock.storage.base import READ, batch
from penstock.storage.pool import Block, BufferPool
from penstock.storage.threads import ThreadEngine
from penstock.units import KiB, MiB


def address(block: Block) -> int:
    return int(np.frombuffer(block.memory, np.uint8).ctypes.data)


def test_blocks_are_aligned_and_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "LARGEST_BUFFER_BYTES", 1 * MiB)  # so that there are several slabs
    with BufferPool(3 * MiB + 100 * KiB, 256 * KiB) as pool:
        assert [len(slab) for slab in pool.slabs] == [1 * MiB] * 3
        blocks = [pool.acquire_nowait() for _ in range(12)]
        assert pool.acquire_nowait() is None
        assert all(block is not None for block in blocks)
        addresses = sorted(address(block) for block in blocks if block is not None)
        assert all(at % 4096 == 0 for at in addresses)
        assert min(np.diff(addresses)) >= 256 * KiB
        for block in blocks:
            assert block is not None
            assert len(block.memory) == 256 * KiB
            assert address(block) == int(np.frombuffer(pool.slabs[block.slab], np.uint8).ctypes.data) + block.offset
            pool.release(block)
        statistics = pool.statistics()
        assert (statistics.blocks, statistics.free, statistics.waits) == (12, 12, 0)


def test_waiting_for_a_block() -> None:
    with BufferPool(8 * KiB, 4 * KiB) as pool:
        first, second = pool.acquire(), pool.acquire()
        with pytest.raises(TimeoutError, match=r"none of 2 blocks was released within 0\.01 s"):
            pool.acquire(0.01)
        got: list[Block] = []
        thread = threading.Thread(target=lambda: got.append(pool.acquire()))
        thread.start()
        deadline = time.monotonic() + 30
        while pool.statistics().waits < 2:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        pool.release(first)
        thread.join(30)
        assert got == [first]
        with pytest.raises(ValueError, match="was not taken"):
            pool.release(Block(0, 1 << 20, second.memory))


def test_closing_wakes_who_waits() -> None:
    pool = BufferPool(4 * KiB, 4 * KiB)
    pool.acquire()
    errors: list[BaseException] = []

    def wait() -> None:
        try:
            pool.acquire()
        except RuntimeError as error:
            errors.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    deadline = time.monotonic() + 30
    while not pool.statistics().waits:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    pool.close()
    pool.close()
    thread.join(30)
    assert [str(error) for error in errors] == ["the pool is closed"]


def test_slabs_are_pinned_and_unpinned() -> None:
    calls: list[tuple[str, int]] = []

    def pin(slab: memoryview) -> object:
        calls.append(("pin", len(slab)))
        return lambda: calls.append(("unpin", len(slab)))

    with BufferPool(64 * KiB, 4 * KiB, pin=pin):  # type: ignore[arg-type]
        assert calls == [("pin", 64 * KiB)]
    assert calls == [("pin", 64 * KiB), ("unpin", 64 * KiB)]


def test_an_engine_reads_into_blocks(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(os.urandom(64 * KiB))
    with BufferPool(64 * KiB, 4 * KiB) as pool, ThreadEngine() as engine, path.open("rb") as file:
        numbers, number = pool.add_to(engine), engine.add_file(file.fileno())
        block = pool.acquire()
        engine.submit(
            batch(
                READ,
                file=[number],
                offset=[8 * KiB],
                length=[4 * KiB],
                buffer=[numbers[block.slab]],
                buffer_offset=[block.offset],
            )
        )
        assert engine.wait(1)["result"].tolist() == [4 * KiB]
        assert bytes(block.memory) == path.read_bytes()[8 * KiB : 12 * KiB]


@pytest.mark.parametrize(("budget", "block"), [(4095, 4096), (1 << 20, 5000), (1 << 20, 0), (4 << 30, 2 << 30)])
def test_nonsense(budget: int, block: int) -> None:
    with pytest.raises(ValueError, match=r"holds no block|a multiple of"):
        BufferPool(budget, block)

"""penstock.kv.store and what it stands on, against rows kept in memory."""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from penstock.errors import KVError
from penstock.kv import delivery, pipeline
from penstock.kv.delivery import Target
from penstock.kv.kept import KeptBlocks
from penstock.kv.residency import KVTensor, Path
from penstock.kv.store import KVStore, RowsTarget
from penstock.linux import pagecache
from penstock.storage.base import Engine
from penstock.storage.threads import ThreadEngine
from penstock.testing.faults import FaultyEngine
from penstock.units import KiB, MiB

KEYS, VALUES, OTHERS = KVTensor(0, "keys"), KVTensor(0, "values"), KVTensor(1, "keys")
MakeStore = Callable[..., KVStore]


WAYS = [
    pytest.param(Path.DIRECT, False, id="direct"),
    pytest.param(Path.CACHED, False, id="page-cache"),
    pytest.param(Path.CACHED, True, id="memory"),
]


def rows_of(tokens: int, row_bytes: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (tokens, row_bytes), np.uint8)


@pytest.mark.parametrize("row_bytes", [1, 100, 4096, 5000, 64 * KiB, 100 * KiB])
@pytest.mark.parametrize(("path", "is_kept"), WAYS)
def test_rows_come_back(make_store: MakeStore, engine: Engine, row_bytes: int, path: Path, is_kept: bool) -> None:
    store = make_store(engine, is_kept=is_kept)
    store.add(KEYS, row_bytes)
    store.move(KEYS, path)
    rows = rows_of(min(200_000, 20 * MiB // row_bytes), row_bytes)
    store.append(KEYS, rows[:7])
    assert np.array_equal(store.read(KEYS), rows[:7])
    for start in range(7, 27):
        store.append(KEYS, rows[start : start + 1])
    store.append(KEYS, rows[27:])
    for _ in range(2):
        assert np.array_equal(store.read(KEYS), rows)
    assert np.array_equal(store.read(KEYS, tokens=19), rows[:19])
    figures = store.statistics()
    assert figures.tokens == {KEYS: len(rows)}
    assert bool(figures.pipeline.cached_bytes) == (path is Path.CACHED)
    assert figures.pipeline.written_bytes == figures.stored_bytes


def take_back(store: KVStore, start: int = 0) -> None:
    """What the kernel does when memory is short, to all that lies behind an offset."""
    if store._kept is not None:
        store._kept._memory.drop(start, store._kept._memory.size_bytes)


class Mirror:
    """What a store must hold: the same, in memory."""

    def __init__(self, store: KVStore) -> None:
        self.store = store
        self.rows: dict[KVTensor, NDArray[np.uint8]] = {}

    def add(self, name: KVTensor, row_bytes: int) -> None:
        self.store.add(name, row_bytes)
        self.rows[name] = np.zeros((0, row_bytes), np.uint8)

    def append(self, name: KVTensor, rows: NDArray[np.uint8]) -> None:
        self.store.append(name, rows)
        self.rows[name] = np.concatenate((self.rows[name], rows))

    def check(self) -> None:
        targets = {name: np.zeros_like(rows) for name, rows in self.rows.items()}
        fetches = [self.store.fetch(name, RowsTarget(target)) for name, target in targets.items()]
        for fetch in fetches:
            fetch.wait()
        for name, target in targets.items():
            assert np.array_equal(target, self.rows[name]), str(name)


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["append", "append", "truncate", "move", "check", "take back"]),
        st.integers(0, 2),
        st.integers(0, 1 << 16),
    ),
    max_size=12,
)


@pytest.mark.parametrize("is_kept", [False, True])
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=STEPS)
def test_whatever_is_done(
    make_store: MakeStore, engine: Engine, is_kept: bool, steps: list[tuple[str, int, int]]
) -> None:
    store = make_store(engine, size_bytes=40 * MiB, is_kept=is_kept)
    kept = Mirror(store)
    names = [KEYS, VALUES, OTHERS]
    for name, row_bytes in zip(names, (64, 3000, 70 * KiB), strict=True):
        kept.add(name, row_bytes)
    for number, (what, which, amount) in enumerate(steps):
        name = names[which]
        row_bytes = kept.rows[name].shape[1]
        match what:
            case "append":
                kept.append(name, rows_of(amount * 32 // row_bytes, row_bytes, number))
            case "truncate":
                tokens = amount % (len(kept.rows[name]) + 1)
                store.truncate(name, tokens)
                kept.rows[name] = kept.rows[name][:tokens]
            case "move":
                store.move(name, list(Path)[amount % 2])
            case "take back":
                take_back(store, amount * 512)
            case _:
                kept.check()
    kept.check()
    for name in names:
        store.remove(name)
    assert store.region.allocator.free_bytes == 40 * MiB
    store.close()


def test_a_tensor_that_moves_is_not_written_again(make_store: MakeStore, engine: Engine) -> None:
    store = make_store(engine)
    store.add(KEYS, 4096)
    rows = rows_of(2048, 4096)
    store.append(KEYS, rows)
    store.settle()
    written = store.statistics().pipeline.written_bytes

    def cached_bytes() -> int:
        return pagecache.FileResidency(store.region.fd).resident_bytes(0, store.region.header.size_bytes)

    if not store.region.is_direct:
        pytest.skip("the file system has no direct reads")
    assert cached_bytes() <= 4 * KiB
    for path, least, most in [(Path.CACHED, 7 * MiB, 8 * MiB), (Path.DIRECT, 0, 4 * KiB)] * 2:
        store.move(KEYS, path)
        for _ in range(3):  # a folio that is read for the first time may start a read-ahead: the next ones drop that
            assert np.array_equal(store.read(KEYS), rows)
        assert least <= cached_bytes() <= most + 2 * MiB
    assert store.statistics().pipeline.written_bytes == written


def test_what_is_kept_is_not_read_again(make_store: MakeStore, engine: Engine) -> None:
    store = make_store(engine, is_kept=True)
    store.add(KEYS, 4096)
    rows = rows_of(2048 + 19, 4096)
    store.append(KEYS, rows[:2048])

    def read_bytes() -> int:
        before = store.statistics().pipeline.direct_bytes
        tokens = store.tensors[KEYS].tokens
        assert np.array_equal(store.read(KEYS), rows[:tokens])
        return store.statistics().pipeline.direct_bytes - before

    assert [read_bytes(), read_bytes()] == [8 * MiB, 8 * MiB]
    store.move(KEYS, Path.CACHED)
    assert [read_bytes(), read_bytes(), read_bytes()] == [8 * MiB, 0, 0]
    store.append(KEYS, rows[2048:2050])  # into the tail
    assert read_bytes() == 0
    for row in range(2050, 2067):  # a block is full on the way
        store.append(KEYS, rows[row : row + 1])
        assert read_bytes() == 0
    (run,) = store.tensors[KEYS].runs(40, 41, 64 * KiB)
    assert store._kept is not None
    store._kept._memory.drop(run.offset + 8 * KiB, run.offset + 12 * KiB)
    assert read_bytes() == 64 * KiB  # the block
    assert store.statistics().pipeline.taken_back_bytes == 64 * KiB
    assert [read_bytes(), read_bytes()] == [64 * KiB, 0]  # memory is short where some was taken: not at once
    store.truncate(KEYS, 16)
    store.append(KEYS, rows[16:64])
    assert [read_bytes(), read_bytes()] == [192 * KiB, 0]
    store.move(KEYS, Path.DIRECT)
    assert [read_bytes(), read_bytes()] == [256 * KiB, 256 * KiB]


def test_a_part_is_kept(make_store: MakeStore, engine: Engine) -> None:
    store = make_store(engine, is_kept=True)
    store.add(KEYS, 4096)
    rows = rows_of(2048, 4096)
    store.append(KEYS, rows)

    def read_bytes() -> int:
        before = store.statistics().pipeline.direct_bytes
        assert np.array_equal(store.read(KEYS), rows)
        return store.statistics().pipeline.direct_bytes - before

    store.move(KEYS, Path.DIRECT, part_bytes=3 * MiB + 4096)
    assert [read_bytes(), read_bytes()] == [8 * MiB, 5 * MiB]
    store.move(KEYS, Path.DIRECT, part_bytes=1 * MiB)
    assert [read_bytes(), read_bytes()] == [7 * MiB, 7 * MiB]
    store.move(KEYS, Path.DIRECT, part_bytes=2 * MiB)
    assert [read_bytes(), read_bytes()] == [7 * MiB, 6 * MiB]
    store.move(KEYS, Path.CACHED)
    assert [read_bytes(), read_bytes()] == [6 * MiB, 0]
    store.move(KEYS, Path.DIRECT, part_bytes=8 * MiB)
    assert read_bytes() == 0
    store.move(KEYS, Path.DIRECT)
    assert read_bytes() == 8 * MiB


def test_without_such_memory_no_part_is_kept(make_store: MakeStore, engine: Engine) -> None:
    store = make_store(engine)
    store.add(KEYS, 4096)
    store.append(KEYS, rows_of(2048, 4096))
    store.move(KEYS, Path.DIRECT, part_bytes=4 * MiB)
    for _ in range(2):
        store.read(KEYS)
    assert store.statistics().pipeline.direct_bytes == 16 * MiB


class TakenBack(Target):
    """Takes rows, while the kernel takes the memory that they are copied from."""

    def __init__(self, store: KVStore, rows: NDArray[np.uint8], times: int) -> None:
        self.store = store
        self.rows = rows
        self.times = times

    def write(self, first: int, rows: NDArray[np.uint8]) -> None:
        middle = len(rows) // 2
        self.rows[first : first + middle] = rows[:middle]
        if self.times:
            self.times -= 1
            take_back(self.store)
        self.rows[first + middle : first + len(rows)] = rows[middle:]


@pytest.mark.parametrize("times", [0, 1, 3])
def test_taken_back_while_it_is_copied(make_store: MakeStore, engine: Engine, times: int) -> None:
    store = make_store(engine, is_kept=True)
    store.add(KEYS, 4096)
    rows = rows_of(4096, 4096)
    store.append(KEYS, rows)
    store.move(KEYS, Path.CACHED)
    assert np.array_equal(store.read(KEYS), rows)
    target = TakenBack(store, np.zeros_like(rows), times)
    store.fetch(KEYS, target).wait()
    assert np.array_equal(target.rows, rows)
    assert bool(store.statistics().pipeline.taken_back_bytes) == bool(times)
    assert np.array_equal(store.read(KEYS), rows)


class Counting(Target):
    """Notes how many rows come at once."""

    def __init__(self) -> None:
        self.counts: list[int] = []

    def write(self, first: int, rows: NDArray[np.uint8]) -> None:
        self.counts.append(len(rows))


@pytest.mark.parametrize(
    ("blocks", "expected"),
    [(1, [16]), (16, [256]), (23, [368]), (25, [208, 192]), (32, [256, 256]), (50, [272, 272, 256])],
)
def test_copies_from_memory_are_of_about_one_size(
    make_store: MakeStore, engine: Engine, monkeypatch: pytest.MonkeyPatch, blocks: int, expected: list[int]
) -> None:
    monkeypatch.setattr(pipeline, "_KEPT_CHUNK_BYTES", 1 * MiB)
    store = make_store(engine, is_kept=True)
    store.add(KEYS, 4096)
    store.append(KEYS, rows_of(16 * blocks, 4096))
    store.move(KEYS, Path.CACHED)
    store.read(KEYS)
    target = Counting()
    store.fetch(KEYS, target).wait()
    assert sorted(target.counts, reverse=True) == expected


def test_once_some_was_taken_no_more_is_copied_in_vain(make_store: MakeStore, engine: Engine) -> None:
    store = make_store(engine, is_kept=True)
    store.add(KEYS, 4096)
    store.append(KEYS, rows_of(256, 4096))
    store.move(KEYS, Path.CACHED)
    store.read(KEYS)
    copied = []
    for block in (3, 5):
        assert store._kept is not None
        (run,) = store.tensors[KEYS].runs(block, block + 1, 64 * KiB)
        store._kept._memory.drop(run.offset, run.offset + 64 * KiB)
        target = Counting()
        store.fetch(KEYS, target).wait()
        copied.append(sum(target.counts))
        store.read(KEYS)
    assert copied == [2 * 256, 256]


class Waiting(Target):
    """Takes rows when it may."""

    def __init__(self, rows: NDArray[np.uint8]) -> None:
        self.rows = rows
        self.may = threading.Event()

    def write(self, first: int, rows: NDArray[np.uint8]) -> None:
        assert self.may.wait(10)
        self.rows[first : first + len(rows)] = rows


def test_appended_to_while_it_is_copied(make_store: MakeStore, engine: Engine) -> None:
    store = make_store(engine)
    store.add(KEYS, 4096)
    rows = rows_of(1024, 4096)
    block_rows = store.tensors[KEYS].shape.rows
    tokens = 2 * block_rows + 3  # three rows are in no block
    assert tokens + block_rows <= len(rows)
    store.append(KEYS, rows[:tokens])
    target = Waiting(np.zeros_like(rows[:tokens]))
    fetch = store.fetch(KEYS, target)
    store.append(KEYS, rows[tokens : tokens + block_rows])  # that block is full now, and the next has as many rows
    target.may.set()
    fetch.wait()
    assert np.array_equal(target.rows, rows[:tokens])
    assert np.array_equal(store.read(KEYS), rows[: tokens + block_rows])


def test_moved_while_it_is_copied(make_store: MakeStore, engine: Engine) -> None:
    store = make_store(engine, is_kept=True)
    store.add(KEYS, 4096)
    rows = rows_of(4096, 4096)
    store.append(KEYS, rows)
    for path in [Path.CACHED, Path.DIRECT] * 20:
        found = np.zeros_like(rows)
        fetch = store.fetch(KEYS, RowsTarget(found))
        store.move(KEYS, path)
        fetch.wait()
        assert np.array_equal(found, rows)


def test_dropped_while_it_is_put(make_store: MakeStore, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    store = make_store(engine, is_kept=True)
    store.add(KEYS, 4096)
    rows = rows_of(64, 4096)
    store.append(KEYS, rows)
    store.move(KEYS, Path.CACHED)
    kept = store._kept
    assert kept is not None
    put = kept._memory.put

    def put_and_drop(start: int, data: NDArray[np.uint8], within: tuple[int, int]) -> None:
        put(start, data, within)
        store.move(KEYS, Path.DIRECT)  # it leaves memory, and is to be there again, before the first copy is over
        store.move(KEYS, Path.CACHED)

    monkeypatch.setattr(kept._memory, "put", put_and_drop)
    assert np.array_equal(store.read(KEYS), rows)
    assert not kept.count()
    monkeypatch.undo()
    for _ in range(2):
        assert np.array_equal(store.read(KEYS), rows)
    assert kept.count() == 4


def test_what_lies_behind_all_memory_is_not_kept(make_store: MakeStore, engine: Engine) -> None:
    store = make_store(engine, is_kept=True)
    store._kept = store._pipeline._kept = store._pipeline._delivery._kept = KeptBlocks(2 * MiB)
    store.add(KEYS, 4096)
    rows = rows_of(1024, 4096)
    store.append(KEYS, rows)
    store.move(KEYS, Path.CACHED)
    for _ in range(3):
        assert np.array_equal(store.read(KEYS), rows)
    assert store.statistics().pipeline.cached_bytes


def test_memory_is_staged_for_a_device(make_store: MakeStore, engine: Engine) -> None:
    store = make_store(engine, is_kept=True)
    pinned: list[memoryview] = []

    def pin(memory: memoryview) -> Callable[[], None]:
        pinned.append(memory)
        return lambda: pinned.remove(memory)

    store._pipeline.pin("device", pin)
    store.add(KEYS, 4096)
    rows = rows_of(2048, 4096)
    store.append(KEYS, rows)
    store.move(KEYS, Path.CACHED)
    assert np.array_equal(store.read(KEYS), rows)
    low = np.frombuffer(pinned[0], np.uint8).ctypes.data
    high = low + len(pinned[0])
    found = np.zeros_like(rows)

    class Device(Target):
        def write(self, first: int, rows: NDArray[np.uint8]) -> None:
            assert low <= rows.ctypes.data < high
            found[first : first + len(rows)] = rows

    store.fetch(KEYS, Device()).wait()
    assert np.array_equal(found, rows)
    take_back(store)
    assert np.array_equal(store.read(KEYS), rows)
    store.close()
    assert not pinned


def test_a_cached_tensor_that_grows_stays_cached(make_store: MakeStore, engine: Engine) -> None:
    store = make_store(engine)
    rows = rows_of(20 * MiB // 4096 + 3 * 16, 4096)
    store.add(KEYS, 4096, reserve_tokens=len(rows))
    store.append(KEYS, rows[: -3 * 16])
    store.move(KEYS, Path.CACHED)
    for _ in range(3):
        assert np.array_equal(store.read(KEYS), rows[: -3 * 16])
    filled = store.statistics().pipeline.filled
    assert filled == 2  # chunks of 16 MiB
    ((start, _),) = store.tensors[KEYS].blocks.extents
    residency = pagecache.FileResidency(store.region.fd)
    for tokens in range(len(rows) - 2 * 16, len(rows) + 1, 16):  # blocks of 64 KiB
        store.append(KEYS, rows[tokens - 16 : tokens])
        store.settle()
        assert residency.resident_bytes(start, start + 20 * MiB) >= 16 * MiB  # of all there was but the last folio
        assert np.array_equal(store.read(KEYS), rows[:tokens])
    assert store.statistics().pipeline.filled == filled


def test_no_space_is_left(make_store: MakeStore, engine: Engine) -> None:
    store = make_store(engine, size_bytes=1 * MiB)
    store.add(KEYS, 4096)
    rows = rows_of(300, 4096)
    store.append(KEYS, rows[:200])
    with pytest.raises(OSError, match="in one piece are left") as caught:
        store.append(KEYS, rows[200:])
    assert caught.value.errno == errno.ENOSPC
    assert np.array_equal(store.read(KEYS), rows[:200])
    with pytest.raises(OSError, match="in one piece are left"):
        store.add(VALUES, 4096, reserve_tokens=512)
    store.truncate(KEYS, 0)
    store.append(KEYS, rows[100:300])
    assert np.array_equal(store.read(KEYS), rows[100:])


@pytest.mark.parametrize(("path", "is_kept"), WAYS)
@pytest.mark.parametrize("damage", ["flip", "swap", "zero"])
def test_damage_is_seen(make_store: MakeStore, engine: Engine, path: Path, is_kept: bool, damage: str) -> None:
    store = make_store(engine, is_kept=is_kept)
    store.add(KEYS, 4096)
    store.add(VALUES, 4096)
    rows = rows_of(640, 4096)
    store.append(KEYS, rows)
    store.append(VALUES, rows)
    store.move(KEYS, path)
    store.settle()
    run = next(store.tensors[KEYS].runs(3, 5, 1 * MiB))
    block_bytes = store.tensors[KEYS].shape.block_bytes
    with open(store.region.path, "r+b", buffering=0) as file:
        before = os.pread(file.fileno(), 2 * block_bytes, run.offset)
        after = {
            "flip": before[:100] + bytes([before[100] ^ 4]) + before[101:],
            "swap": before[block_bytes:] + before[:block_bytes],
            "zero": bytes(2 * block_bytes),
        }[damage]
        os.pwrite(file.fileno(), after, run.offset)
        os.fsync(file.fileno())
    with pytest.raises(
        KVError, match=rf"keys, block [34], at offset ({run.offset}|{run.offset + block_bytes}): its checksum"
    ):
        store.read(KEYS)
    assert np.array_equal(store.read(VALUES), rows)  # the others still answer
    with open(store.region.path, "r+b", buffering=0) as file:
        os.pwrite(file.fileno(), before, run.offset)
        os.fsync(file.fileno())
    assert np.array_equal(store.read(KEYS), rows)


def test_a_region_cut_off(make_store: MakeStore, engine: Engine) -> None:
    store = make_store(engine)
    store.add(KEYS, 4096)
    store.append(KEYS, rows_of(2048, 4096))
    store.settle()
    os.truncate(store.region.path, 4 * MiB)
    with pytest.raises(KVError, match="then it ends"):
        store.read(KEYS)


@pytest.mark.parametrize("always", [False, True])
def test_reads_that_fail(make_store: MakeStore, always: bool) -> None:
    failing = threading.Event()
    failed = []

    def error(number: int) -> int:
        if not failing.is_set() or (failed and not always):
            return 0
        failed.append(number)
        return errno.EIO

    with FaultyEngine(ThreadEngine(), error) as engine:
        store = make_store(engine)
        store.add(KEYS, 4096)
        rows = rows_of(2048, 4096)
        store.append(KEYS, rows)
        store.settle()
        failing.set()
        if always:
            with pytest.raises(KVError, match=r"reading layer 0 keys.*Input/output error"):
                store.read(KEYS)
            failing.clear()
        assert np.array_equal(store.read(KEYS), rows)
        assert store.statistics().pipeline.tried_again >= 1
        free = store.statistics().pool
        assert free.free == free.blocks
        store.close()


@pytest.mark.parametrize("kind", ["error", "damage", "end"])
def test_page_cache_reads_that_fail(
    make_store: MakeStore, engine: Engine, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    store = make_store(engine)
    store.add(KEYS, 4096)
    rows = rows_of(4096, 4096)  # one chunk of the page cache's, and many buffers
    store.append(KEYS, rows)
    store.move(KEYS, Path.CACHED)
    store.settle()
    read = delivery._read
    block_bytes = store.tensors[KEYS].shape.block_bytes
    bad_offset = next(store.tensors[KEYS].runs(40, 41, block_bytes)).offset

    def reads(fd: int, memory: NDArray[np.uint8], offset: int) -> int:
        got = read(fd, memory, offset)
        if offset == bad_offset:
            if kind == "error":
                raise OSError(errno.EIO, "Input/output error")
            if kind == "end":
                return got // 2
            memory[100] ^= 4
        return got

    monkeypatch.setattr(delivery, "_read", reads)
    assert np.array_equal(store.read(KEYS), rows)  # the device has them
    figures = store.statistics()
    assert figures.pipeline.tried_again > 1  # as many as there are buffers' worth
    assert figures.pool.free == figures.pool.blocks


@pytest.mark.parametrize("always", [False, True])
def test_writes_that_fail(make_store: MakeStore, always: bool) -> None:
    failed: list[int] = []

    def error(number: int) -> int:
        if failed and not always:
            return 0
        failed.append(number)
        return errno.EIO

    with FaultyEngine(ThreadEngine(), error) as engine:
        store = make_store(engine)
        store.add(KEYS, 4096)
        store.add(VALUES, 4096)
        rows = rows_of(100, 4096)
        store.append(VALUES, rows[:10])
        if always:
            with contextlib.suppress(KVError):  # it may be known already, or not yet
                store.append(KEYS, rows)
            with pytest.raises(KVError, match=r"writing layer 0 keys.*Input/output error"):
                store.read(KEYS)
            with pytest.raises(KVError, match="writing layer 0 keys"):
                store.append(KEYS, rows)
        else:
            store.append(KEYS, rows)
            assert np.array_equal(store.read(KEYS), rows)
        assert np.array_equal(store.read(VALUES), rows[:10])
        store.close()


class Recording(Target):
    """Takes rows, and notes where they began."""

    def __init__(self, rows: NDArray[np.uint8]) -> None:
        self.rows = rows
        self.firsts: list[int] = []

    def write(self, first: int, rows: NDArray[np.uint8]) -> None:
        self.firsts.append(first)
        self.rows[first : first + len(rows)] = rows


def test_rows_in_no_block_come_once_whatever_becomes_of_the_blocks(make_store: MakeStore) -> None:
    failing = threading.Event()
    failed: list[int] = []

    def error(number: int) -> int:
        if not failing.is_set() or failed:
            return 0
        failed.append(number)
        return errno.EIO

    with FaultyEngine(ThreadEngine(), error) as engine:
        store = make_store(engine)
        tensor = store.add(KEYS, 4096)
        rows = rows_of(2048 + 5, 4096)
        store.append(KEYS, rows)
        store.settle()
        assert tensor.tail_rows == 5
        failing.set()
        target = Recording(np.zeros_like(rows))
        fetch = store.fetch(KEYS, target)
        store.append(KEYS, rows_of(tensor.shape.rows, 4096)[::-1])  # into the same tail, and over its beginning
        fetch.wait()
        assert failed
        assert target.firsts.count(2048) == 1
        assert np.array_equal(target.rows, rows)
        store.close()


class Failing(Target):
    """A target that takes the first rows only."""

    def write(self, first: int, rows: NDArray[np.uint8]) -> None:
        if first:
            raise MemoryError("no room for more")


def test_a_target_that_fails(make_store: MakeStore, engine: Engine) -> None:
    store = make_store(engine)
    store.add(KEYS, 4096)
    rows = rows_of(2048, 4096)
    store.append(KEYS, rows)
    with pytest.raises(MemoryError, match="no room for more"):
        store.fetch(KEYS, Failing()).wait()
    assert np.array_equal(store.read(KEYS), rows)


class Slow(Target):
    """A target that waits to be let on, and counts."""

    def __init__(self) -> None:
        self.may = threading.Event()
        self.writes = 0

    def write(self, first: int, rows: NDArray[np.uint8]) -> None:
        self.may.wait()
        self.writes += 1


@pytest.mark.parametrize("path", list(Path))
def test_a_fetch_that_is_cancelled(make_store: MakeStore, engine: Engine, path: Path) -> None:
    store = make_store(engine)
    store.add(KEYS, 4096)
    rows = rows_of(4096, 4096)
    store.append(KEYS, rows)
    store.move(KEYS, path)
    target = Slow()
    fetch = store.fetch(KEYS, target)
    threading.Timer(0.05, target.may.set).start()
    fetch.cancel()
    writes = target.writes
    assert writes < store.tensors[KEYS].whole_blocks
    assert np.array_equal(store.read(KEYS), rows)
    assert target.writes == writes


def test_closed_in_the_middle(make_store: MakeStore, engine: Engine) -> None:
    store = make_store(engine)
    store.add(KEYS, 4096)
    store.append(KEYS, rows_of(4096, 4096))
    store.fetch(KEYS, RowsTarget(np.zeros((4096, 4096), np.uint8)))
    before = threading.active_count()
    store.close()
    store.close()
    assert threading.active_count() <= before - 3
    with pytest.raises(RuntimeError, match="closed"):
        store.read(KEYS)


def test_what_cannot_be_asked_for(make_store: MakeStore) -> None:
    with ThreadEngine() as engine:
        store = make_store(engine)
        store.add(KEYS, 4096)
        store.append(KEYS, rows_of(5, 4096))
        with pytest.raises(ValueError, match="is there already"):
            store.add(KEYS, 1)
        with pytest.raises(ValueError, match="do not fit into buffers"):
            store.add(VALUES, 1 * MiB)
        with pytest.raises(ValueError, match=r"\[rows, 4096\]"):
            store.append(KEYS, rows_of(5, 100))
        with pytest.raises(ValueError, match="6 rows of 5"):
            store.read(KEYS, tokens=6)
        with pytest.raises(ValueError, match="cannot be kept"):
            store.truncate(KEYS, 6)
        store.close()

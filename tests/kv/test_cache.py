"""penstock.kv.cache: where tensors are as memory comes and goes, and where it keeps them."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from penstock.errors import RegionError
from penstock.kv import cache as module
from penstock.kv.cache import KVCache
from penstock.kv.kept import KeptBlocks
from penstock.kv.residency import KVTensor, Reading
from penstock.kv.residency import Path as Residence
from penstock.linux.memory import MemoryState
from penstock.units import GiB, KiB, MiB

TENSORS = [KVTensor(layer, kind) for layer in range(4) for kind in ("keys", "values")]
ROW_BYTES = 64 * KiB


def rows_of(tensor: KVTensor, tokens: int) -> NDArray[np.uint8]:
    seed = 2 * tensor.layer + (tensor.kind == "values")
    return np.random.default_rng(seed).integers(0, 256, (tokens, ROW_BYTES), np.uint8)


def fill(cache: KVCache, tokens: int = 64) -> None:
    """4 MiB a tensor."""
    for tensor in TENSORS:
        cache.add(tensor, ROW_BYTES)
        cache.append(tensor, rows_of(tensor, tokens))


def check(cache: KVCache, tokens: int = 64) -> None:
    for tensor in TENSORS:
        assert np.array_equal(cache.read(tensor), rows_of(tensor, tokens))


def cached(cache: KVCache) -> set[KVTensor]:
    return {name for name, decision in cache.plan.decisions.items() if decision.path is Residence.CACHED}


@pytest.mark.parametrize(("memory", "number"), [(0, 0), (4 * MiB, 1), (17 * MiB, 4), (64 * MiB, 8)])
def test_as_many_are_cached_as_memory_holds(tmp_path: Path, memory: int, number: int) -> None:
    with KVCache(tmp_path, memory=memory) as cache:
        fill(cache)
        check(cache)
        assert cached(cache) == set()
        moved = cache.step()
        assert {decision.tensor for decision in moved} == cached(cache)
        assert len(cached(cache)) == number
        check(cache)
        assert cache.step() == []
        check(cache)
        figures = cache.statistics()
        assert figures.steps == 2
        assert figures.plan.cached_bytes == min(memory, 32 * MiB)
        assert bool(figures.store.pipeline.cached_bytes) == bool(number)


def test_what_is_left_of_memory_holds_a_part_of_one_more(tmp_path: Path) -> None:
    with KVCache(tmp_path, memory=18 * MiB) as cache:
        fill(cache)
        cache.step()
        check(cache)
        before_bytes = cache.statistics().store.pipeline.direct_bytes
        check(cache)
        assert cache.statistics().store.pipeline.direct_bytes - before_bytes == 14 * MiB
        (part,) = (decision for decision in cache.plan.decisions.values() if 0 < decision.cached_bytes < 4 * MiB)
        assert part.path is Residence.DIRECT
        assert str(part).endswith("left after those before it in the ranking; its first blocks take 2.0 MiB of that")


def test_memory_that_comes_and_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    headroom = [32 * MiB]
    monkeypatch.setattr(KVCache, "_reading", lambda self: Reading(headroom[0]))
    with KVCache(tmp_path) as cache:
        fill(cache)
        numbers = []
        for offered in [32, 32, 8, 8, 32, 32, 32, 0, 16, 16, 16, 16]:
            headroom[0] = offered * MiB
            cache.step()
            numbers.append(len(cached(cache)))
            check(cache)
        assert numbers == [8, 8, 2, 2, 2, 2, 8, 0, 0, 0, 4, 4]
        assert cache.statistics().moved >= 6 + 6 + 8 + 4


def test_a_number_is_kept_to_as_long_as_there_is_that_much(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with KVCache(tmp_path, memory=1 << 60) as cache:
        reading = cache._reading()
        state = cache._reader.read()
        assert 0 <= reading.headroom_bytes <= state.headroom_bytes + GiB


@pytest.mark.parametrize("is_kept", [True, False])
def test_cached_tensors_are_somewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_kept: bool) -> None:
    def refuse(_: int) -> KeptBlocks:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    if not is_kept:
        monkeypatch.setattr("penstock.kv.cache.KeptBlocks", refuse)
    with KVCache(tmp_path) as cache:
        fill(cache)
        cache.step()
        for _ in range(3):
            check(cache)
        figures = cache.statistics()
        assert figures.not_kept.endswith("the page cache serves") != is_kept
        assert figures.store.pipeline.cached_bytes
        read_bytes = figures.store.pipeline.direct_bytes
        assert bool(read_bytes) == is_kept  # what was kept was read once
        check(cache)
        assert cache.statistics().store.pipeline.direct_bytes == read_bytes


LOCKED = """
import ctypes, os, resource, sys
import numpy as np
from penstock.kv.cache import KVCache
from penstock.kv.residency import KVTensor
from penstock.linux.process import memory_bytes

resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
tensors = [KVTensor(layer, "keys") for layer in range(2)]
rows = np.random.default_rng(0).integers(0, 256, (128, 65536), np.uint8)
with KVCache(sys.argv[1]) as cache:  # it grows: addresses for as much as the file system has
    for tensor in tensors:
        cache.add(tensor, 65536)
        cache.append(tensor, rows)
    cache.step()
    assert np.array_equal(cache.read(tensors[0]), rows)
    if ctypes.CDLL(None).mlockall(3):
        sys.exit(77)
    for _ in range(3):
        for tensor in tensors:
            assert np.array_equal(cache.read(tensor), rows)
    cache.truncate(tensors[0], 100)
    cache.append(tensors[0], rows[:28])
    assert np.array_equal(cache.read(tensors[0]), np.concatenate((rows[:100], rows[:28])))
    assert "lock" in cache.statistics().not_kept
    cache.remove(tensors[1])
print(memory_bytes(os.getpid())["VmHWM"])
"""


def test_a_process_that_locks_its_memory_later(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LOCKED, str(tmp_path)], capture_output=True, text=True, check=False, timeout=120
    )
    if done.returncode == 77:
        pytest.skip("needs to lock memory")
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < GiB  # not the addresses that nothing was put at


def test_a_directory_is_left_empty(tmp_path: Path) -> None:
    with KVCache(tmp_path, size_bytes=8 * MiB) as cache:
        cache.add(TENSORS[0], ROW_BYTES)
        cache.append(TENSORS[0], rows_of(TENSORS[0], 40))
        assert list(tmp_path.iterdir()) == []
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "kv"
    with KVCache(path, size_bytes=8 * MiB):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        with pytest.raises(FileExistsError, match="is there already"):
            KVCache(path)
    assert not path.exists()


def test_it_grows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_FIRST_BYTES", 2 * MiB)
    with KVCache(tmp_path) as cache:
        fill(cache)
        check(cache)
        cache.add(KVTensor(9, "keys"), ROW_BYTES, reserve_tokens=1000)
        figures = cache.statistics().store
        assert figures.stored_bytes + figures.free_bytes >= 32 * MiB


def test_no_space_is_left(tmp_path: Path) -> None:
    with KVCache(tmp_path, size_bytes=4 * MiB, memory=0) as cache:
        cache.add(TENSORS[0], ROW_BYTES)
        cache.append(TENSORS[0], rows_of(TENSORS[0], 60))
        with pytest.raises(OSError, match="in one piece are left") as caught:
            cache.append(TENSORS[0], rows_of(TENSORS[0], 60))
        assert caught.value.errno == errno.ENOSPC
        assert np.array_equal(cache.read(TENSORS[0]), rows_of(TENSORS[0], 60))
    with pytest.raises(OSError, match="cannot be set aside") as caught:
        KVCache(tmp_path, size_bytes=1 << 50)
    assert caught.value.errno in (errno.ENOSPC, errno.EFBIG)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.root
def test_a_device(loop_device: Path) -> None:
    for _ in range(2):  # what a cache has left there is no obstacle to the next
        with KVCache(loop_device, memory=0) as cache:
            cache.add(TENSORS[0], ROW_BYTES)
            cache.append(TENSORS[0], rows_of(TENSORS[0], 64))
            assert np.array_equal(cache.read(TENSORS[0]), rows_of(TENSORS[0], 64))
            assert cache.statistics().is_direct
            with pytest.raises(RegionError, match="in use"):
                KVCache(loop_device)
            with pytest.raises(RegionError, match="cannot grow"):
                cache.append(TENSORS[0], rows_of(TENSORS[0], 1000))
    loop_device.write_bytes(b"something else")
    with pytest.raises(RegionError, match="say so twice"):
        KVCache(loop_device)


def test_several_share_memory_and_buffers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with KVCache(tmp_path, memory=4 * MiB) as given, KVCache(tmp_path) as one, KVCache(tmp_path) as other:
        for cache in (given, one, other):
            fill(cache)
        given.step()
        assert [cache._share(36 * MiB) for cache in (one, other)] == [16 * MiB, 16 * MiB]
        figures = [cache.statistics().store.pool for cache in (given, one, other)]
        assert figures[0] == figures[1] == figures[2]
        for cache in (given, one, other):
            check(cache)
        other.close()
        assert one._share(36 * MiB) == 32 * MiB
        check(one)


def test_nothing_is_left_open(tmp_path: Path) -> None:
    before = sorted(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with KVCache(tmp_path) as cache:
            fill(cache)
            cache.step()
            check(cache)
            cache.close()
    assert sorted(os.listdir("/proc/self/fd")) == before


def test_buffers_take_a_quarter_of_what_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def in_memory(headroom_bytes: int) -> None:
        state = MemoryState(headroom_bytes, 0, 0, 0, "cgroup v2 /small")
        monkeypatch.setattr(module.MemoryReader, "read", lambda self: state)

    for headroom_bytes, expected_bytes in [(16 * MiB, 8 * MiB), (64 * MiB, 16 * MiB), (4 * GiB, 96 * MiB)]:
        in_memory(headroom_bytes)
        with KVCache(tmp_path, size_bytes=40 * MiB) as cache:
            assert cache.statistics().store.pool.budget_bytes == expected_bytes
            fill(cache)
            check(cache)
    in_memory(15 * MiB)
    with pytest.raises(MemoryError, match=r"takes 16.0 MiB at least, and 15.0 MiB can be had \(cgroup v2 /small\)"):
        KVCache(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("memory", [-1, -(1 << 40)])
def test_memory_is_no_debt(tmp_path: Path, memory: int) -> None:
    with pytest.raises(ValueError, match="give 0 or more"):
        KVCache(tmp_path, memory=memory)

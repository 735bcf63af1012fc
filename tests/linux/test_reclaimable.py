"""Memory that the kernel takes back, against the real kernel: what is said to be there is what was put there."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from penstock.linux.reclaimable import PAGE_BYTES, ReclaimableMemory
from penstock.units import KiB, MiB

PART_BYTES = 64 * KiB


def bytes_of(size_bytes: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, size_bytes, np.uint8)


def put(memory: ReclaimableMemory, start: int, data: NDArray[np.uint8]) -> range:
    """Returns where each part begins."""
    memory.put(start, data, (0, memory.size_bytes))
    return range(start, start + len(data), PART_BYTES)


def is_there(memory: ReclaimableMemory, parts: range) -> bool:
    return memory.is_there(parts.start, parts.stop)


def seems_to_be_there(memory: ReclaimableMemory, parts: range) -> bool:
    return memory.seems_to_be_there(parts.start, parts.stop, PART_BYTES)


def which_are_there(memory: ReclaimableMemory, parts: range) -> list[bool]:
    return [memory.is_there(start, start + PART_BYTES) for start in parts]


@pytest.mark.parametrize("start", [0, 4 * KiB, 2 * MiB - 64 * KiB])
@pytest.mark.parametrize("within", [(0, 8 * MiB), (0, 0), (1 * MiB, 3 * MiB)])
def test_what_is_put_is_there(start: int, within: tuple[int, int]) -> None:
    memory = ReclaimableMemory(8 * MiB)
    data = bytes_of(3 * MiB)
    memory.put(start, data, within)
    assert memory.is_there(start, start + len(data))
    assert memory.seems_to_be_there(start, start + len(data), PART_BYTES)
    assert np.array_equal(memory.view(start, start + len(data)), data)


@pytest.mark.parametrize("page", [0, 1, 15])
def test_a_page_that_is_gone_is_missed(page: int) -> None:
    memory = ReclaimableMemory(8 * MiB)
    kept = put(memory, 1 * MiB, bytes_of(1 * MiB))
    at = kept[3] + page * PAGE_BYTES
    memory.drop(at, at + PAGE_BYTES)
    assert not is_there(memory, kept)
    assert which_are_there(memory, kept) == [number != 3 for number in range(len(kept))]
    assert seems_to_be_there(memory, kept) == (page != 0)
    assert is_there(memory, put(memory, 1 * MiB, bytes_of(1 * MiB)))


def test_a_page_that_is_gone_and_was_read_is_missed() -> None:
    memory = ReclaimableMemory(8 * MiB)
    for start in (0, 3 * MiB):  # of a huge page, and of one that something else lies in
        kept = put(memory, start, bytes_of(2 * MiB))
        memory.drop(start + 1 * MiB, start + 2 * MiB)
        assert not memory.view(start + 1 * MiB, start + 2 * MiB).any()
        assert which_are_there(memory, kept) == [True] * 16 + [False] * 16


def test_what_lies_beside_others_that_are_put_again_is_missed() -> None:
    memory = ReclaimableMemory(8 * MiB)
    data = bytes_of(4 * MiB)
    put(memory, 0, data)
    memory.drop(0, 2 * MiB)  # a whole huge page
    again = put(memory, 1 * MiB, data[1 * MiB : 2 * MiB])  # which brings one of zeros
    assert is_there(memory, again)
    assert not any(which_are_there(memory, range(0, 1 * MiB, PART_BYTES)))
    assert not memory.is_there(512 * KiB, 3 * MiB)


def test_what_lies_behind_the_end_is_left_alone() -> None:
    memory = ReclaimableMemory(2 * MiB)
    kept = put(memory, 0, bytes_of(2 * MiB))
    memory.drop(2 * MiB, 1 << 40)
    assert is_there(memory, kept)
    memory.drop(1 * MiB, 1 << 40)
    assert which_are_there(memory, kept) == [True] * 16 + [False] * 16


def test_pages_that_begin_with_zeros() -> None:
    memory = ReclaimableMemory(8 * MiB)
    data = np.zeros(4 * PART_BYTES, np.uint8)
    data[PART_BYTES + 5 * PAGE_BYTES + 4095] = 1  # one byte of one page
    data[2 * PART_BYTES :] = bytes_of(2 * PART_BYTES)
    data[3 * PART_BYTES : 3 * PART_BYTES + 9] = 0
    kept = put(memory, 0, data)
    assert is_there(memory, kept)
    for start, missed in [
        (0, False),  # zeros are right even when they are gone
        (PART_BYTES + 4 * PAGE_BYTES, False),
        (PART_BYTES + 5 * PAGE_BYTES, True),
        (3 * PART_BYTES, True),
        (2 * PART_BYTES + PAGE_BYTES, True),
    ]:
        kept = put(memory, 0, data)
        memory.drop(start, start + PAGE_BYTES)
        assert is_there(memory, kept) != missed
        assert np.array_equal(memory.view(0, len(data)), data) != missed


def test_several_put_side_by_side() -> None:
    memory = ReclaimableMemory(32 * MiB)
    data = bytes_of(30 * MiB)
    kept: dict[int, range] = {}

    def work(first: int) -> None:
        for start in range(first * 192 * KiB, len(data), 4 * 192 * KiB):  # huge pages are several threads'
            kept[start] = put(memory, start, data[start : start + 192 * KiB])

    threads = [threading.Thread(target=work, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert memory._being_put == []
    assert all(is_there(memory, parts) for parts in kept.values())
    assert np.array_equal(memory.view(0, len(data)), data)


SQUEEZED = """
import json, sys
from pathlib import Path
import numpy as np
from penstock.linux.memory import read_memory
from penstock.linux.reclaimable import ReclaimableMemory

size_bytes, part_bytes = 256 << 20, 1 << 20
memory = ReclaimableMemory(size_bytes)
data = np.random.default_rng(0).integers(0, 256, 4 << 20, np.uint8)
parts = range(0, size_bytes, part_bytes)
for start in range(0, size_bytes, len(data)):
    memory.put(start, data, (0, size_bytes))
before = read_memory()
told = {"all": memory.is_there(0, size_bytes), "reclaimable": before.file_bytes, "headroom": before.headroom_bytes}
if sys.argv[1] == "limit":
    Path(sys.argv[2]).write_text(str(160 << 20))
else:
    other = np.ones(192 << 20, np.uint8)
found = [memory.is_there(part, part + part_bytes) for part in parts]
wrong = 0
for part in parts:
    copy = memory.view(part, part + part_bytes).copy()
    at = part % len(data)
    if memory.is_there(part, part + part_bytes) and not np.array_equal(copy, data[at : at + part_bytes]):
        wrong += 1
told |= {"found": sum(found), "parts": len(parts), "wrong": wrong}
print(json.dumps(told))
"""


@pytest.mark.root
@pytest.mark.parametrize("how", ["limit", "others"])
def test_the_kernel_takes_it_back(make_memory_cgroup: Callable[[int], Path], how: str) -> None:
    cgroup = make_memory_cgroup(384 * MiB)
    limit = next(path for name in ("memory.limit_in_bytes", "memory.max") if (path := cgroup / name).exists())
    done = subprocess.run(
        [sys.executable, "-c", SQUEEZED, how, str(limit)],
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: (cgroup / "cgroup.procs").write_text("0"),
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["all"]
    assert told["reclaimable"] >= 256 * MiB  # what a budget counts as memory there is
    assert told["headroom"] >= 256 * MiB
    assert 0 < told["found"] < told["parts"]
    assert not told["wrong"]


@pytest.mark.parametrize(
    "before",
    [
        "import ctypes; assert not ctypes.CDLL(None).mlockall(2)",
        "import resource; resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))",
    ],
    ids=["locked", "addresses"],
)
def test_where_there_is_no_such_memory(before: str) -> None:
    code = f"""
from penstock.linux.reclaimable import ReclaimableMemory
{before}
try:
    ReclaimableMemory(1 << 40 if "resource" in globals() else 1 << 20)
except OSError as error:
    print("no", error.strerror)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if done.stderr.strip().endswith("AssertionError"):
        pytest.skip("needs to lock memory")
    assert done.stdout.startswith("no "), done.stderr

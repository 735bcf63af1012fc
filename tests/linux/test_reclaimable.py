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

from penstock.linux.reclaimable import PAGE_BYTES, Kept, ReclaimableMemory
from penstock.units import KiB, MiB

PART_BYTES = 64 * KiB


def bytes_of(size_bytes: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, size_bytes, np.uint8)


def put(memory: ReclaimableMemory, start: int, data: NDArray[np.uint8]) -> list[Kept]:
    return memory.put(start, data, PART_BYTES, (0, memory.size_bytes))


@pytest.mark.parametrize("start", [0, 4 * KiB, 2 * MiB - 64 * KiB])
@pytest.mark.parametrize("within", [(0, 8 * MiB), (0, 0), (1 * MiB, 3 * MiB)])
def test_what_is_put_is_there(start: int, within: tuple[int, int]) -> None:
    memory = ReclaimableMemory(8 * MiB)
    data = bytes_of(3 * MiB)
    kept = memory.put(start, data, PART_BYTES, within)
    assert [(part.start, part.stop) for part in kept] == [
        (start + at, start + at + PART_BYTES) for at in range(0, len(data), PART_BYTES)
    ]
    assert memory.are_there(kept)
    assert memory.seem_to_be_there(kept)
    assert np.array_equal(memory.view(start, start + len(data)), data)


@pytest.mark.parametrize("page", [0, 1, 15])
def test_a_page_that_is_gone_is_missed(page: int) -> None:
    memory = ReclaimableMemory(8 * MiB)
    kept = put(memory, 1 * MiB, bytes_of(1 * MiB))
    at = kept[3].start + page * PAGE_BYTES
    memory.drop(at, at + PAGE_BYTES)
    assert not memory.are_there(kept)
    assert [memory.are_there([part]) for part in kept] == [number != 3 for number in range(len(kept))]
    assert memory.seem_to_be_there(kept) == (page != 0)
    assert memory.are_there(put(memory, 1 * MiB, bytes_of(1 * MiB)))


def test_what_lies_behind_the_end_is_left_alone() -> None:
    memory = ReclaimableMemory(2 * MiB)
    kept = put(memory, 0, bytes_of(2 * MiB))
    memory.drop(2 * MiB, 1 << 40)
    assert memory.are_there(kept)
    memory.drop(1 * MiB, 1 << 40)
    assert [memory.are_there([part]) for part in kept] == [True] * 16 + [False] * 16


def test_pages_that_begin_with_zeros() -> None:
    memory = ReclaimableMemory(8 * MiB)
    data = np.zeros(4 * PART_BYTES, np.uint8)
    data[PART_BYTES + 5 * PAGE_BYTES + 4095] = 1  # one byte of one page
    data[2 * PART_BYTES :] = bytes_of(2 * PART_BYTES)
    data[3 * PART_BYTES : 3 * PART_BYTES + 9] = 0
    kept = put(memory, 0, data)
    assert memory.are_there(kept)
    for start, missed in [
        (0, False),  # zeros are right even when they are gone
        (PART_BYTES + 4 * PAGE_BYTES, False),
        (PART_BYTES + 5 * PAGE_BYTES, True),
        (3 * PART_BYTES, True),
        (2 * PART_BYTES + PAGE_BYTES, True),
    ]:
        kept = put(memory, 0, data)
        memory.drop(start, start + PAGE_BYTES)
        assert memory.are_there(kept) != missed
        assert np.array_equal(memory.view(0, len(data)), data) != missed


def test_several_put_side_by_side() -> None:
    memory = ReclaimableMemory(32 * MiB)
    data = bytes_of(30 * MiB)
    kept: dict[int, list[Kept]] = {}

    def work(first: int) -> None:
        for start in range(first * 192 * KiB, len(data), 4 * 192 * KiB):  # huge pages are several threads'
            kept[start] = put(memory, start, data[start : start + 192 * KiB])

    threads = [threading.Thread(target=work, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert memory._being_put == []
    assert all(map(memory.are_there, kept.values()))
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
kept = []
for start in range(0, size_bytes, len(data)):
    kept += memory.put(start, data, part_bytes, (0, size_bytes))
before = read_memory()
told = {"all": memory.are_there(kept), "reclaimable": before.file_bytes, "headroom": before.headroom_bytes}
if sys.argv[1] == "limit":
    Path(sys.argv[2]).write_text(str(160 << 20))
else:
    other = np.ones(192 << 20, np.uint8)
found = [memory.are_there([part]) for part in kept]
wrong = 0
for number, part in enumerate(kept):
    copy = memory.view(part.start, part.stop).copy()
    at = part.start % len(data)
    if memory.are_there([part]) and not np.array_equal(copy, data[at : at + part_bytes]):
        wrong += 1
told |= {"found": sum(found), "parts": len(kept), "wrong": wrong}
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

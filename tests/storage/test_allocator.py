"""penstock.storage.allocator: whatever is asked for, nothing overlaps and nothing is lost."""

from __future__ import annotations

import errno

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.storage.allocator import Allocator
from penstock.storage.base import BLOCK_BYTES

SPACE = 64 * BLOCK_BYTES
START = 3 * BLOCK_BYTES
SIZES = st.integers(1, 20 * BLOCK_BYTES)
ALIGNMENTS = st.sampled_from([1, 2, 8]).map(lambda blocks: blocks * BLOCK_BYTES)


@given(st.lists(st.one_of(st.tuples(SIZES, ALIGNMENTS), st.integers(0, 100)), max_size=60))
def test_what_is_taken_never_overlaps_and_all_comes_back(steps: list[tuple[int, int] | int]) -> None:
    allocator = Allocator(START, START + SPACE + 17)
    taken: list[tuple[int, int]] = []
    for step in steps:
        if isinstance(step, int):
            if taken:
                allocator.free(taken.pop(step % len(taken))[0])
        else:
            size_bytes, alignment_bytes = step
            if allocator.largest_bytes >= size_bytes + alignment_bytes:
                start, stop = allocator.allocate(size_bytes, alignment_bytes)
            else:  # it may fit, or not
                try:
                    start, stop = allocator.allocate(size_bytes, alignment_bytes)
                except OSError:
                    continue
            assert start % alignment_bytes == 0
            assert stop - start == -(-size_bytes // BLOCK_BYTES) * BLOCK_BYTES
            assert all(stop <= low or high <= start for low, high in taken)
            assert start >= START
            assert stop <= START + SPACE
            taken.append((start, stop))
        assert allocator.free_bytes == SPACE - sum(high - low for low, high in taken)
    for start, _ in taken:
        allocator.free(start)
    assert allocator.allocate(SPACE) == (START, START + SPACE)


def test_a_full_space_says_what_is_left() -> None:
    allocator = Allocator(0, 4 * BLOCK_BYTES)
    first = [allocator.allocate(1)[0] for _ in range(4)]
    allocator.free(first[0])
    allocator.free(first[2])
    with pytest.raises(OSError, match=r"no 8.0 KiB in one piece .* 8.0 KiB are free, 4.0 KiB of them") as caught:
        allocator.allocate(2 * BLOCK_BYTES)
    assert caught.value.errno == errno.ENOSPC


@pytest.mark.parametrize("wrong", [(0, BLOCK_BYTES), (-1, BLOCK_BYTES), (1, 100), (1, 0)])
def test_nonsense(wrong: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="cannot be allocated"):
        Allocator(0, SPACE).allocate(*wrong)
    with pytest.raises(ValueError, match="does not begin at a block"):
        Allocator(5, SPACE)
    with pytest.raises(ValueError, match="nothing is allocated"):
        Allocator(0, SPACE).free(0)

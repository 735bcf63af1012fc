"""penstock.kv.layout: blocks never overlap and never move."""

from __future__ import annotations

import errno
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.kv.layout import BlockMap, block_shape
from penstock.storage.allocator import Allocator
from penstock.storage.base import BLOCK_BYTES
from penstock.units import KiB, MiB

START = 1 * MiB


def space(blocks: int, block_bytes: int = 64 * KiB) -> Allocator:
    return Allocator(START, START + blocks * block_bytes)


def offsets(blocks: BlockMap, first: int, last: int, block_bytes: int = 64 * KiB) -> list[int]:
    """Where each block lies."""
    return [
        offset + (number - low) * block_bytes
        for low, high, offset in blocks.pieces(first, last)
        for number in range(low, high)
    ]


@given(st.integers(1, 1 << 24), st.integers(BLOCK_BYTES, 4 * MiB))
def test_blocks_hold_whole_rows_and_waste_little(row_bytes: int, wanted_bytes: int) -> None:
    shape = block_shape(row_bytes, wanted_bytes)
    assert shape.block_bytes % BLOCK_BYTES == 0
    assert 0 <= shape.block_bytes - shape.data_bytes < BLOCK_BYTES
    assert shape.rows == 1 or shape.data_bytes <= wanted_bytes < shape.data_bytes + row_bytes
    assert [shape.blocks(tokens) for tokens in (0, 1, shape.rows, shape.rows + 1)] == [0, 1, 1, 2]


def test_rows_without_bytes() -> None:
    with pytest.raises(ValueError, match="0 bytes"):
        block_shape(0)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 40)), max_size=30), st.sampled_from([4 * KiB, 64 * KiB]))
def test_maps_grow_beside_each_other(steps: list[tuple[int, int]], block_bytes: int) -> None:
    allocator = space(4000, block_bytes)
    maps = [BlockMap(allocator, block_bytes) for _ in range(4)]
    known: list[list[int]] = [[], [], [], []]
    for which, more in steps:
        grown = maps[which]
        grown.grow(len(known[which]) + more)
        found = offsets(grown, 0, len(known[which]) + more, block_bytes)
        assert found[: len(known[which])] == known[which]  # where they were
        known[which] = found
    taken = sorted(extent for each in maps for extent in each.extents)
    assert all(left[1] <= right[0] for left, right in itertools.pairwise(taken))
    for each, places in zip(maps, known, strict=True):
        assert len(set(places)) == len(places)
        assert all(any(low <= at and at + block_bytes <= high for low, high in each.extents) for at in places)
        assert len(each.extents) <= 2 + max(0, each.blocks).bit_length()
    for each in maps:
        each.free()
    assert allocator.free_bytes == 4000 * block_bytes


@given(st.integers(1, 100), st.data())
def test_a_part_of_the_blocks(blocks: int, data: st.DataObject) -> None:
    grown = BlockMap(space(1000), 64 * KiB)
    for count in sorted(data.draw(st.lists(st.integers(1, blocks), max_size=5))):
        grown.grow(count)
    grown.grow(blocks)
    first = data.draw(st.integers(0, blocks))
    last = data.draw(st.integers(first, blocks))
    assert offsets(grown, first, last) == offsets(grown, 0, blocks)[first:last]
    pieces = grown.pieces(first, last)
    assert [number for low, high, _ in pieces for number in range(low, high)] == list(range(first, last))
    assert not any(
        offset + (high - low) * 64 * KiB == behind for (low, high, offset), (_, _, behind) in itertools.pairwise(pieces)
    )


def test_a_reserve_is_one_extent() -> None:
    allocator = space(100)
    reserved = BlockMap(allocator, 64 * KiB, reserve_blocks=80)
    reserved.grow(80)
    assert reserved.extents == ((START, START + 80 * 64 * KiB),)
    with pytest.raises(OSError, match="in one piece") as caught:
        BlockMap(allocator, 64 * KiB, reserve_blocks=21)
    assert caught.value.errno == errno.ENOSPC


def test_a_full_region_leaves_what_is_there() -> None:
    allocator = space(100)
    grown, other = BlockMap(allocator, 64 * KiB), BlockMap(allocator, 64 * KiB)
    grown.grow(60)
    other.grow(30)
    before = offsets(grown, 0, 60)
    with pytest.raises(OSError, match=r"in one piece are left|are left") as caught:
        grown.grow(71)
    assert caught.value.errno == errno.ENOSPC
    assert grown.blocks == 60
    assert offsets(grown, 0, 60) == before
    grown.grow(70)  # what there is can be had
    assert allocator.free_bytes == 0


def test_a_scattered_region_is_used_up() -> None:
    allocator = space(40)
    pieces = [allocator.allocate(64 * KiB)[0] for _ in range(40)]
    for start in pieces[::2]:
        allocator.free(start)
    grown = BlockMap(allocator, 64 * KiB)
    grown.grow(20)
    assert sorted(offsets(grown, 0, 20)) == pieces[::2]


def test_blocks_that_are_not_there() -> None:
    grown = BlockMap(space(10), 64 * KiB)
    grown.grow(4)
    with pytest.raises(IndexError, match="blocks 3 to 5 of 4"):
        grown.pieces(3, 5)

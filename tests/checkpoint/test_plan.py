"""penstock.checkpoint.plan: every byte wanted is read once, and little else."""

from __future__ import annotations

import itertools
from math import prod

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.checkpoint.base import BLOCKS, DTYPE_BITS, TensorInfo
from penstock.checkpoint.plan import Runs, Slice, Span, chunks, copy_runs, holds_runs, last_reads, rounds, runs, spans
from penstock.errors import CheckpointError
from penstock.storage.base import BLOCK_BYTES


def tensor(name: str, start: int, stop: int, path: str = "file") -> TensorInfo:
    return TensorInfo(name, "U8", (stop - start,), path, start, stop, (1, 1))


PLACES = st.lists(
    st.tuples(st.sampled_from(["one", "two"]), st.integers(8, 100_000), st.integers(0, 30_000)), max_size=20
)


@given(PLACES, st.integers(0, 20_000))
def test_spans_hold_all_tensors_and_keep_apart(places: list[tuple[str, int, int]], gap_bytes: int) -> None:
    tensors = [tensor(str(n), start, start + size, path) for n, (path, start, size) in enumerate(places)]
    found = spans(tensors, gap_bytes)
    held = [part for span in found for part in span.tensors]
    assert sorted(held, key=lambda part: part.name) == sorted(
        (part for part in tensors if part.size_bytes), key=lambda part: part.name
    )
    paths = [span.path for span in found]
    assert list(dict.fromkeys(paths)) == list(dict.fromkeys(part.path for part in tensors if part.size_bytes))
    for span in found:
        assert span.start == min(part.start for part in span.tensors)
        assert span.stop == max(part.stop for part in span.tensors)
        assert [part.start for part in span.tensors] == sorted(part.start for part in span.tensors)
        reached = span.start
        for part in span.tensors:
            assert part.start <= reached + gap_bytes
            reached = max(reached, part.stop)
        assert span.block_start % BLOCK_BYTES == span.block_stop % BLOCK_BYTES == 0
        assert span.start - span.block_start < BLOCK_BYTES
        assert span.block_stop - span.stop < BLOCK_BYTES
    for before, after in itertools.pairwise(found):
        if before.path == after.path:
            assert after.start > before.stop + gap_bytes


@given(PLACES, st.integers(1, 100_000), st.integers(1, 200_000))
def test_rounds_take_no_more_than_they_may(
    places: list[tuple[str, int, int]], span_bytes: int, round_bytes: int
) -> None:
    tensors = [tensor(str(n), start, start + size, path) for n, (path, start, size) in enumerate(places)]
    found = spans(tensors, most_bytes=span_bytes)
    assert sum(len(span.tensors) for span in found) == sum(bool(part.size_bytes) for part in tensors)
    for span in found:
        assert len(span.tensors) == 1 or span.stop - span.start <= span_bytes
    taken = rounds(found, round_bytes)
    assert [span for group in taken for span in group] == found
    for group in taken:
        assert len(group) == 1 or sum(span.block_stop - span.block_start for span in group) <= round_bytes


@given(st.integers(0, 1 << 20), st.integers(1, 1 << 20), st.integers(1, 60))
def test_chunks_cover_everything_once(start: int, size: int, chunk_pages: int) -> None:
    chunk_bytes = chunk_pages * BLOCK_BYTES
    reads = chunks(start, start + size, chunk_bytes)
    assert reads[0, 0] == start
    assert reads[-1].sum() == start + size
    assert (reads[:, 1] > 0).all()
    assert (reads[:, 1] <= chunk_bytes).all()
    assert (reads[1:, 0] == reads[:-1].sum(axis=1)).all()
    assert (reads[1:, 0] % chunk_bytes == 0).all()


@given(st.lists(st.integers(1, 50_000), min_size=1, max_size=30), st.integers(0, 5000))
def test_a_tensor_is_whole_with_its_last_read(sizes: list[int], first: int) -> None:
    bounds = np.cumsum([first, *sizes]).tolist()
    members = tuple(tensor(str(n), low, high) for n, (low, high) in enumerate(itertools.pairwise(bounds)))
    span = Span("file", bounds[0], bounds[-1], members)
    reads = chunks(span.block_start, span.block_stop, 4 * BLOCK_BYTES)
    for part, last in zip(members, last_reads(span, reads), strict=True):
        assert reads[last].sum() >= part.stop
        assert reads[last, 0] < part.stop


@given(st.data())
def test_runs_are_the_bytes_of_the_slice(data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from(["U8", "I16", "F32", "C64"]))
    shape = tuple(data.draw(st.lists(st.integers(0, 5), min_size=1, max_size=4)))
    dimension = data.draw(st.integers(0, len(shape) - 1))
    start = data.draw(st.integers(0, shape[dimension]))
    stop = data.draw(st.integers(start, shape[dimension]))
    size = DTYPE_BITS[dtype] // 8
    contents = np.random.default_rng(1).integers(0, 256, (*shape, size), np.uint8)
    whole = TensorInfo("x", dtype, shape, "file", 1000, 1000 + prod(shape) * size, BLOCKS[dtype])
    part, where = runs(whole, Slice(dimension, start, stop))
    expected = np.take(contents, range(start, stop), axis=dimension)
    assert part.shape == expected.shape[:-1]
    flat = bytes(1000) + contents.tobytes()
    found = b"".join(
        flat[at : at + where.run_bytes]
        for at in range(where.start, where.start + where.count * where.stride_bytes, max(1, where.stride_bytes))
    )
    assert found[: expected.nbytes] == expected.tobytes()
    assert where.run_bytes * where.count == expected.nbytes
    if dimension == 0:
        assert where.count <= 1


@given(st.integers(0, 300), st.integers(0, 40), st.integers(0, 40), st.integers(0, 12), st.integers(1, 200), st.data())
def test_runs_are_copied_from_any_chunks(
    start: int, run_bytes: int, gap_bytes: int, count: int, chunk_bytes: int, data: st.DataObject
) -> None:
    where = Runs(start, run_bytes, run_bytes + gap_bytes, count)
    stop = start + count * where.stride_bytes + data.draw(st.integers(0, 50))
    contents = np.random.default_rng(start).integers(0, 256, stop + 1, np.uint8)
    target = np.zeros(run_bytes * count, np.uint8)
    reads = chunks(0, stop + 1, chunk_bytes)
    held = holds_runs(where, reads)
    for offset, length in data.draw(st.permutations(reads[held].tolist())):
        copy_runs(contents[offset : offset + length], offset, where, target)
    expected = b"".join(
        contents[start + number * where.stride_bytes :][:run_bytes].tobytes() for number in range(count)
    )
    assert target.tobytes() == expected
    for (offset, length), is_held in zip(reads.tolist(), held.tolist(), strict=True):
        touches = any(
            max(offset, start + number * where.stride_bytes)
            < min(offset + length, start + number * where.stride_bytes + run_bytes)
            for number in range(count)
        )
        assert is_held == touches


def test_slices_that_are_none() -> None:
    whole = TensorInfo("x", "F32", (4, 6), "file", 0, 96, (1, 4))
    for part in (Slice(2, 0, 1), Slice(-1, 0, 1), Slice(0, 3, 2), Slice(0, 0, 5), Slice(1, -1, 2)):
        with pytest.raises(CheckpointError, match="is not inside it"):
            runs(whole, part)
    packed = TensorInfo("x", "F4", (4, 6), "file", 0, 12, (2, 1))
    assert runs(packed, Slice(1, 2, 4))[1].run_bytes == 1
    with pytest.raises(CheckpointError, match="whole blocks of 2 elements"):
        runs(packed, Slice(1, 1, 3))

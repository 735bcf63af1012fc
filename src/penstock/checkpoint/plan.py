"""From tensors to reads: pure functions of where the tensors lie."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
from numpy.typing import NDArray

from penstock.checkpoint.base import TensorInfo
from penstock.errors import CheckpointError
from penstock.storage.base import BLOCK_BYTES

UNBOUNDED = 1 << 62  # bytes


@dataclass(frozen=True, slots=True)
class Span:
    """Bytes of one file to be read in one go, with what is wanted of them."""

    path: str
    start: int  # in the file, bytes: of the first tensor
    stop: int  # of the last
    tensors: tuple[TensorInfo, ...]  # in file order

    @property
    def block_start(self) -> int:
        """Where direct reads begin."""
        return self.start // BLOCK_BYTES * BLOCK_BYTES

    @property
    def block_stop(self) -> int:
        """Where direct reads end: maybe beyond the file."""
        return -(-self.stop // BLOCK_BYTES) * BLOCK_BYTES


def spans(tensors: Iterable[TensorInfo], gap_bytes: int = BLOCK_BYTES, most_bytes: int = UNBOUNDED) -> list[Span]:
    """The tensors in file order, grouped where what lies between them is not worth two reads.

    Files come in the order of their first tensors. Tensors without elements are in no span.

    Args:
        tensors: of any files; they may overlap, as slices of one tensor do.
        gap_bytes: of unwanted bytes at most, between neighbours; memory is allocated for them.
        most_bytes: of a span, unless it is a single tensor.
    """
    by_file: dict[str, list[TensorInfo]] = {}
    for tensor in tensors:
        if tensor.size_bytes:
            by_file.setdefault(tensor.path, []).append(tensor)
    found: list[Span] = []
    for path, members in by_file.items():
        members.sort(key=lambda tensor: (tensor.start, tensor.stop))
        group: list[TensorInfo] = []
        stop = 0
        for tensor in members:
            if group and (tensor.start > stop + gap_bytes or max(stop, tensor.stop) - group[0].start > most_bytes):
                found.append(Span(path, group[0].start, stop, tuple(group)))
                group = []
            stop = max(stop, tensor.stop) if group else tensor.stop
            group.append(tensor)
        found.append(Span(path, group[0].start, stop, tuple(group)))
    return found


def rounds(parts: Sequence[Span], most_bytes: int) -> list[list[Span]]:
    """The spans in their order, in groups that take no more than that together, unless it is a single one."""
    found: list[list[Span]] = []
    left_bytes = 0
    for span in parts:
        size_bytes = span.block_stop - span.block_start
        if not found or size_bytes > left_bytes:
            found.append([])
            left_bytes = most_bytes
        found[-1].append(span)
        left_bytes -= size_bytes
    return found


def chunks(start: int, stop: int, chunk_bytes: int) -> NDArray[np.int64]:
    """Reads that cover ``[start, stop)``: their offsets and lengths, [reads, 2].

    They begin at multiples of chunk_bytes in the file, but for the first.
    """
    bounds = np.arange(start // chunk_bytes + 1, -(-stop // chunk_bytes), dtype=np.int64) * chunk_bytes
    edges = np.concatenate(([start], bounds, [stop]))
    return np.stack((edges[:-1], np.diff(edges)), axis=1)


@dataclass(frozen=True, slots=True)
class Slice:
    """A part of a tensor along one dimension, as tensor parallelism wants it."""

    dimension: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Runs:
    """The bytes of a slice in the file: runs of one length, one distance apart."""

    start: int  # of the first run, in the file, bytes
    run_bytes: int
    stride_bytes: int  # from one run's start to the next one's
    count: int


def runs(tensor: TensorInfo, part: Slice) -> tuple[TensorInfo, Runs]:
    """The slice as a tensor of its own, and where its bytes lie.

    The tensor's offsets are those of the slice's first and last byte: its elements lie between them without gaps only
    if there is one run.

    Raises:
        CheckpointError: the slice is not inside the tensor, or does not consist of whole blocks.
    """
    dimension, start, stop = part.dimension, part.start, part.stop
    if not 0 <= dimension < len(tensor.shape) or not 0 <= start <= stop <= tensor.shape[dimension]:
        raise CheckpointError(
            f"{tensor.path}: tensor {tensor.name!r} has shape {list(tensor.shape)}: "
            f"[{start}:{stop}] of dimension {dimension} is not inside it"
        )
    shape = (*tensor.shape[:dimension], stop - start, *tensor.shape[dimension + 1 :])
    inner = prod(tensor.shape[dimension + 1 :])
    elements, size_bytes = tensor.block
    if start * inner % elements or stop * inner % elements or tensor.shape[dimension] * inner % elements:
        raise CheckpointError(
            f"{tensor.path}: tensor {tensor.name!r} of {tensor.dtype}: [{start}:{stop}] of dimension {dimension} "
            f"does not begin and end at whole blocks of {elements} elements"
        )
    stride_bytes = tensor.shape[dimension] * inner // elements * size_bytes
    run_bytes = (stop - start) * inner // elements * size_bytes
    count = prod(tensor.shape[:dimension])
    if run_bytes == stride_bytes:  # all of it
        run_bytes, stride_bytes, count = run_bytes * count, run_bytes * count, min(count, 1)
    first = tensor.start + start * inner // elements * size_bytes
    last = first + (count - 1) * stride_bytes + run_bytes if count and run_bytes else first
    part_info = TensorInfo(tensor.name, tensor.dtype, shape, tensor.path, first, last, tensor.block)
    return part_info, Runs(first, run_bytes, stride_bytes, count)


def holds_runs(where: Runs, reads: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which reads, given as offsets and lengths, hold a byte of the runs."""
    first, last = _touched(where, reads[:, 0], reads.sum(axis=1))
    return np.asarray(first < last)


def copy_runs(chunk: NDArray[np.uint8], chunk_start: int, where: Runs, target: NDArray[np.uint8]) -> None:
    """Copy what a part of the file holds of the runs to their places, side by side in target.

    Args:
        chunk: bytes of the file, from chunk_start on.
        target: of all runs; run_bytes × count.
    """
    chunk_stop = chunk_start + len(chunk)
    touched = _touched(where, np.array([chunk_start]), np.array([chunk_stop]))
    first, last = int(touched[0][0]), int(touched[1][0])
    size, stride = where.run_bytes, where.stride_bytes
    whole_first = first + (first < last and where.start + first * stride < chunk_start)
    whole_last = last - (first < last and where.start + (last - 1) * stride + size > chunk_stop)
    for index in {*range(first, min(whole_first, last)), *range(max(whole_last, first), last)}:  # cut by the edges
        begin = where.start + index * stride
        low, high = max(begin, chunk_start), min(begin + size, chunk_stop)
        target[index * size + low - begin : index * size + high - begin] = chunk[low - chunk_start : high - chunk_start]
    if whole_first < whole_last:
        count = whole_last - whole_first
        source = chunk[where.start + whole_first * stride - chunk_start :]
        rows = np.lib.stride_tricks.as_strided(source, (count, size), (stride, 1), writeable=False)
        target[whole_first * size : whole_last * size].reshape(count, size)[:] = rows


def _touched(
    where: Runs, start: NDArray[np.int64], stop: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The runs of which ``[start, stop)`` holds a byte: the first one's number, and the last one's + 1."""
    stride = max(1, where.stride_bytes)
    first = np.maximum(0, (start - where.start - where.run_bytes) // stride + 1)
    last = np.minimum(where.count if where.run_bytes else 0, -(-(stop - where.start) // stride))
    return first, last


def last_reads(span: Span, reads: NDArray[np.int64]) -> Sequence[int]:
    """For each tensor of a span, the number of the read that brings its last byte."""
    stops = np.array([tensor.stop for tensor in span.tensors], np.int64)
    found: list[int] = (np.searchsorted(reads[:, 0], stops, side="left") - 1).tolist()
    return found

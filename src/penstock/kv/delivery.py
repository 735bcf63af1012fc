"""From a run of blocks to a target: what is in the page cache is read, what is new is verified, rows are handed on.

Threads do this side by side, each with memory of its own to read into; a device that rows are copied to may know it.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from penstock.errors import KVError
from penstock.kv.kept import KeptBlocks, Look
from penstock.kv.tensor import Run, StoredTensor, checksum
from penstock.storage.buffers import huge_buffer


class Target(Protocol):
    """Where rows go. Called from several threads at once, for different rows, in any order.

    Rows that were taken back by the kernel while they were copied come once more.
    """

    def write(self, first: int, rows: NDArray[np.uint8]) -> None:
        """Take rows ``[first, first + len(rows))``, [rows, row_bytes]; they must be copied before it returns."""


@dataclass(frozen=True, slots=True)
class Cut:
    """A target that gets no more than the first so many rows: the last block may hold others."""

    target: Target
    tokens: int

    def write(self, first: int, rows: NDArray[np.uint8]) -> None:
        """See `Target.write`."""
        self.target.write(first, rows[: self.tokens - first])


class Delivery:
    """Verifies blocks of one region and hands their rows on.

    Args:
        name: of the region, for messages.
        cached_fd: reads through the page cache.
        piece_bytes: that each thread reads at a time; a block at least.
        threads: that deliver at once.
        kept: where blocks of tensors on the cached path stay; None: in the page cache.
    """

    def __init__(self, name: str, cached_fd: int, piece_bytes: int, threads: int, kept: KeptBlocks | None) -> None:
        self._name = name
        self._cached_fd = cached_fd
        self._kept = kept
        self._piece_bytes = piece_bytes
        self._threads = threads
        self._memory = memoryview(b"")
        self._scratch: list[NDArray[np.uint8]] = []  # of each thread
        if kept is None:
            self._have_scratch()
        self._pinned: dict[str, Callable[[], None]] = {}  # name of a device → undoes it

    def pin(self, name: str, pin: Callable[[memoryview], Callable[[], None]]) -> None:
        """Make what cached rows are copied from known to a device, once; `close` undoes it."""
        if name not in self._pinned:
            self._have_scratch()
            self._pinned[name] = pin(self._memory)

    def _have_scratch(self) -> None:
        if not self._scratch:
            self._memory = huge_buffer(self._threads * self._piece_bytes)
            self._scratch = np.split(np.frombuffer(self._memory, np.uint8), self._threads)

    def close(self) -> None:
        """Nobody delivers any more; a second time does nothing."""
        while self._pinned:
            self._pinned.popitem()[1]()

    def deliver(
        self,
        tensor: StoredTensor,
        run: Run,
        target: Target,
        landed: NDArray[np.uint8] | None,
        thread: int,
        is_wanted: Callable[[], bool],
        *,
        keeps: bool = True,
    ) -> KVError | None:
        """Verify and copy: what the device gave at once, what is in the page cache as much at a time as memory takes.

        Args:
            tensor: whose blocks these are.
            run: which ones.
            target: of their rows.
            landed: what the device gave; None: they are to be read through the page cache.
            thread: number of the one that calls.
            is_wanted: asked before each copy; the rest is left where it is not.
            keeps: what the device gave stays in memory, if the tensor is to be there.

        Returns:
            What is wrong with the blocks. What the target raises is raised.
        """
        block_bytes = tensor.shape.block_bytes
        if landed is not None:
            if not is_wanted():
                return None
            stored = landed[: (run.last - run.first) * block_bytes]
            trouble = self._hand_on(tensor, run, stored, target)
            if trouble is None and keeps and self._kept is not None:
                last = min(run.last, tensor.cached_blocks)
                if run.first < last:
                    part = Run(run.first, last, run.offset)
                    self._kept.put(tensor, part, stored[: (last - run.first) * block_bytes])
                    if tensor.cached_blocks < last:  # by now
                        self._kept.drop(tensor, tensor.cached_blocks)
            return trouble
        blocks, most = run.last - run.first, len(self._scratch[thread]) // block_bytes
        together = -(-blocks // -(-blocks // most))  # about as many in each piece
        for first in range(run.first, run.last, together):
            if not is_wanted():
                break
            start = (first - run.first) * block_bytes
            part = Run(first, min(first + together, run.last), run.offset + start)
            stored = self._scratch[thread][: (part.last - first) * block_bytes]
            try:
                got = _read(self._cached_fd, stored, part.offset)
            except OSError as error:
                return failure(self._name, "reading", tensor, run, -(error.errno or errno.EIO))
            if got != len(stored):
                return failure(self._name, "reading", tensor, run, start + got)
            trouble = self._hand_on(tensor, part, stored, target)
            if trouble is not None:
                return trouble
        return None

    def copy_kept(
        self, tensor: StoredTensor, run: Run, target: Target, thread: int, is_wanted: Callable[[], bool]
    ) -> Look | None:
        """Copy blocks that are kept in memory; see `deliver`.

        Returns:
            What says whether all of it was right; None if it is known not to be there any more.
        """
        assert self._kept is not None
        shape = tensor.shape
        look = self._kept.look(tensor, run)
        if look is None:
            return None
        most = max(1, len(self._scratch[thread]) // shape.block_bytes) if self._pinned else run.last - run.first
        for first in range(run.first, run.last, most):
            if not is_wanted():
                break
            stored = look.stored[(first - run.first) * shape.block_bytes :][: most * shape.block_bytes]
            if self._pinned:  # a device will read it by itself, some time
                staged = self._scratch[thread][: len(stored)]
                np.copyto(staged, stored)
                if not look.was_right():
                    return None
                stored = staged
            _decode(tensor, first, stored.reshape(-1, shape.block_bytes), target)
        return look

    def _hand_on(self, tensor: StoredTensor, run: Run, stored: NDArray[np.uint8], target: Target) -> KVError | None:
        """Rows of blocks that are in memory, once all of those have been verified."""
        shape = tensor.shape
        blocks = stored.reshape(-1, shape.block_bytes)
        for number, block in enumerate(blocks, run.first):
            found = checksum(block)
            if found != tensor.checksums[number]:
                offset = run.offset + (number - run.first) * shape.block_bytes
                return KVError(
                    f"{self._name}: {tensor.name}, block {number}, at offset {offset}: its checksum is "
                    f"{found:016x}, and it was stored with {tensor.checksums[number]:016x}, twice; the device has "
                    "lost it, and what it held has to be computed again"
                )
        _decode(tensor, run.first, blocks, target)
        return None


def _decode(tensor: StoredTensor, first: int, blocks: NDArray[np.uint8], target: Target) -> None:
    """Hand on the rows of blocks from a number on, [blocks, block_bytes]."""
    shape = tensor.shape
    at = first * shape.rows
    for piece in tensor.codec.decode_all(blocks, shape.data_bytes):
        rows = piece.reshape(-1, shape.row_bytes)
        target.write(at, rows)
        at += len(rows)


def failure(name: str, verb: str, tensor: StoredTensor, run: Run, result: int) -> KVError:
    """What to say of blocks that a device did not give or take, a second time.

    Args:
        name: of the region.
        verb: ``reading`` or ``writing``.
        tensor: whose blocks.
        run: which ones.
        result: bytes that were moved, or a negative errno.
    """
    size_bytes = (run.last - run.first) * tensor.shape.block_bytes
    what = os.strerror(-result) if result < 0 else f"{result} bytes of {size_bytes}, then it ends"
    error = KVError(
        f"{name}: {verb} {tensor.name}, blocks {run.first} to {run.last - 1}, at offset {run.offset}: "
        f"{what}, twice; what it held has to be computed again, elsewhere if the device is failing"
    )
    error.__cause__ = OSError(-result if result < 0 else errno.EIO, what)
    return error


def _read(fd: int, memory: NDArray[np.uint8], offset: int) -> int:
    """Bytes read; less than asked for where the file ends."""
    got = 0
    while got < len(memory):
        moved = os.preadv(fd, [memory[got:].data], offset + got)
        if not moved:
            break
        got += moved
    return got

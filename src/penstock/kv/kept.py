"""Blocks that stay in memory once they have been verified, for as long as the kernel leaves them there.

What is copied from there is copied once, and not verified again: nobody else can write to it. What the kernel has taken
back is read from the device again.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from penstock.kv.tensor import Run, StoredTensor
from penstock.linux.reclaimable import Kept, ReclaimableMemory


class KeptBlocks:
    """Memory for every place of a region, and which blocks are in it. Safe to use from several threads.

    Args:
        size_bytes: that the region has, or may grow to. Only what is kept takes memory.

    Attributes:
        refused: why nothing more is kept; "" if it is.

    Raises:
        OSError: there cannot be such memory; see `ReclaimableMemory`.
    """

    def __init__(self, size_bytes: int) -> None:
        self._memory = ReclaimableMemory(size_bytes)
        self._kept: dict[int, Kept] = {}  # by the offset of the block
        self._lock = threading.Lock()  # for changes of it
        self._drops = 0
        self.refused = ""

    def cut(self, tensor: StoredTensor, run: Run) -> Iterator[tuple[bool, Run]]:
        """A run in parts, of which all blocks have been kept, or none."""
        block_bytes = tensor.shape.block_bytes

        def offset(number: int) -> int:
            return run.offset + (number - run.first) * block_bytes

        for is_kept, group in groupby(range(run.first, run.last), lambda number: offset(number) in self._kept):
            numbers = list(group)
            yield is_kept, Run(numbers[0], numbers[-1] + 1, offset(numbers[0]))

    def put(self, tensor: StoredTensor, run: Run, stored: NDArray[np.uint8]) -> None:
        """Keep blocks that have been verified, [bytes], if they can be. No two threads put the same ones."""
        self.forget(tensor, run)
        if self.refused or run.offset + len(stored) > self._memory.size_bytes:  # the file system has grown since
            return
        drops = self._drops
        within = next(extent for extent in tensor.blocks.extents if extent[0] <= run.offset < extent[1])
        try:
            blocks = self._memory.put(run.offset, stored, tensor.shape.block_bytes, within)
        except OSError as error:
            self.refused = f"the kernel takes no memory back any more ({error.strerror}; does the process lock it?)"
            return
        with self._lock:
            if drops == self._drops:
                self._kept.update((block.start, block) for block in blocks)
            else:  # perhaps of these, while they were copied
                self._memory.drop(run.offset, run.offset + len(stored))

    def look(self, tensor: StoredTensor, run: Run) -> Look | None:
        """At blocks that are to be copied; None if one of them is known not to be there."""
        block_bytes = tensor.shape.block_bytes
        stop = run.offset + (run.last - run.first) * block_bytes
        try:
            kept = [self._kept[offset] for offset in range(run.offset, stop, block_bytes)]
        except KeyError:
            return None
        return Look(self, kept, self._memory.view(run.offset, stop)) if self._memory.seem_to_be_there(kept) else None

    def are_right(self, kept: list[Kept]) -> bool:
        """Blocks that lie side by side are still what was kept there."""
        return self._memory.are_there(kept) and all(self._kept.get(block.start) is block for block in kept)

    def forget_lost(self, tensor: StoredTensor, run: Run) -> None:
        """Know of blocks that have been taken back that they are not there."""
        for number in range(run.last - run.first):
            kept = self._kept.get(run.offset + number * tensor.shape.block_bytes)
            if kept is not None and not self._memory.are_there([kept]):
                self._kept.pop(kept.start, None)

    def forget(self, tensor: StoredTensor, run: Run) -> None:
        """Blocks are going to be something else."""
        for number in range(run.last - run.first):
            self._kept.pop(run.offset + number * tensor.shape.block_bytes, None)

    def drop(self, tensor: StoredTensor, first: int = 0) -> None:
        """Give back all memory that a tensor's blocks have, from a number on."""
        block_bytes = tensor.shape.block_bytes
        skipped_bytes = first * block_bytes
        with self._lock:
            self._drops += 1
            for extent_start, stop in tensor.blocks.extents:
                start = min(extent_start + skipped_bytes, stop)
                skipped_bytes -= start - extent_start
                for offset in range(start, stop, block_bytes):
                    self._kept.pop(offset, None)
                self._memory.drop(start, stop)


class Look:
    """Blocks in memory that may go while they are copied.

    Attributes:
        stored: the blocks, [bytes], as they are at the moment.
    """

    def __init__(self, blocks: KeptBlocks, kept: list[Kept], stored: NDArray[np.uint8]) -> None:
        self._blocks = blocks
        self._kept = kept
        self.stored = stored

    def was_right(self) -> bool:
        """What has been copied by now is what was kept."""
        return self._blocks.are_right(self._kept)

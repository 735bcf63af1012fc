"""Blocks that stay in memory once they have been verified, for as long as the kernel leaves them there.

What is copied from there is copied once, and not verified again: nobody else can write to it. What the kernel has taken
back is read from the device again.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from penstock.kv.residency import KVTensor
from penstock.kv.tensor import Run, StoredTensor
from penstock.linux.reclaimable import ReclaimableMemory

# Looks that see first whether blocks seem to be there, since some were found not to be. Each look takes a hundredth of
# the copy that it may save.
_WARY_LOOKS = 1000
_NOTHING: NDArray[np.int64] = np.zeros(0, np.int64)


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
        self._puts_of: dict[KVTensor, NDArray[np.int64]] = {}  # [blocks]: the one that has put it there; 0: none has
        self._lock = threading.Lock()  # for changes of these
        self._puts = self._drops = 0
        self._wary = 0  # looks
        self.refused = ""

    def count(self) -> int:
        """Blocks that are kept, as far as is known."""
        with self._lock:
            return sum(int(np.count_nonzero(puts)) for puts in self._puts_of.values())

    def holds(self, tensor: StoredTensor, number: int) -> bool:
        """A block has been kept; none has a number below 0."""
        return number >= 0 and bool(self._puts_in(tensor, Run(number, number + 1, 0)).all())

    def cut(self, tensor: StoredTensor, run: Run) -> Iterator[tuple[bool, Run]]:
        """A run in parts, of which all blocks have been kept, or none."""
        is_kept = self._puts_in(tensor, run) != 0
        if is_kept.all():
            yield True, run
            return
        edges = [0, *(np.flatnonzero(np.diff(is_kept)) + 1).tolist(), len(is_kept)]
        for low, high in itertools.pairwise(edges):
            offset = run.offset + low * tensor.shape.block_bytes
            yield bool(is_kept[low]), Run(run.first + low, run.first + high, offset)

    def put(self, tensor: StoredTensor, run: Run, stored: NDArray[np.uint8]) -> None:
        """Keep blocks that have been verified, [bytes], if they can be. No two threads put the same ones."""
        self.forget(tensor, run)
        stop = run.offset + len(stored)
        if self.refused or stop > self._memory.size_bytes:  # the file system has grown since
            return
        drops = self._drops
        within = next(extent for extent in tensor.blocks.extents if extent[0] <= run.offset < extent[1])
        try:
            self._memory.put(run.offset, stored, within)
        except OSError as error:
            self.refused = f"the kernel takes no memory back any more ({error.strerror}; does the process lock it?)"
            return
        with self._lock:
            if drops == self._drops:
                self._puts += 1
                self._set(tensor, run, self._puts)
            else:  # perhaps of these, while they were copied
                self._memory.drop(run.offset, stop)

    def look(self, tensor: StoredTensor, run: Run) -> Look | None:
        """At blocks that are to be copied; None if one of them is known not to be there."""
        puts = self._puts_in(tensor, run)
        block_bytes = tensor.shape.block_bytes
        stop = run.offset + len(puts) * block_bytes
        if not puts.all():
            return None
        if self._wary > 0:  # two threads may count it down at once
            self._wary -= 1
            if not self._memory.seems_to_be_there(run.offset, stop, block_bytes):
                self._wary = _WARY_LOOKS
                return None
        return Look(self, tensor, run, puts, self._memory.view(run.offset, stop))

    def is_right(self, look: Look) -> bool:
        """Blocks are still what was there when they were looked at."""
        start = look.run.offset
        if not self._memory.is_there(start, start + len(look.stored)):
            self._wary = _WARY_LOOKS
            return False
        return np.array_equal(self._puts_in(look.tensor, look.run), look.puts)

    def forget_lost(self, tensor: StoredTensor, run: Run) -> None:
        """Know of blocks that have been taken back that they are not there."""
        block_bytes = tensor.shape.block_bytes
        for number in range(run.first, run.last):
            start = run.offset + (number - run.first) * block_bytes
            if not self._memory.is_there(start, start + block_bytes):
                self.forget(tensor, Run(number, number + 1, start))

    def forget(self, tensor: StoredTensor, run: Run) -> None:
        """Blocks are going to be something else."""
        with self._lock:
            self._set(tensor, run, 0)

    def drop(self, tensor: StoredTensor, first: int = 0) -> None:
        """Give back all memory that a tensor's blocks have, from a number on."""
        skipped_bytes = first * tensor.shape.block_bytes
        with self._lock:
            self._drops += 1
            if tensor.name in self._puts_of:
                self._puts_of[tensor.name] = self._puts_of[tensor.name][:first]
            for extent_start, stop in tensor.blocks.extents:
                start = min(extent_start + skipped_bytes, stop)
                skipped_bytes -= start - extent_start
                self._memory.drop(start, stop)

    def _puts_in(self, tensor: StoredTensor, run: Run) -> NDArray[np.int64]:
        """Of each block of a run, [blocks], as it is now."""
        known = self._puts_of.get(tensor.name, _NOTHING)[run.first : run.last]
        puts = np.zeros(run.last - run.first, np.int64)
        puts[: len(known)] = known
        return puts

    def _set(self, tensor: StoredTensor, run: Run, put: int) -> None:
        puts = self._puts_of.get(tensor.name, _NOTHING)
        if len(puts) < run.last:
            if not put:
                puts[run.first :] = 0
                return
            puts = self._puts_of[tensor.name] = np.pad(puts, (0, max(run.last, 2 * len(puts)) - len(puts)))
        puts[run.first : run.last] = put


@dataclass(frozen=True, slots=True)
class Look:
    """Blocks in memory that may go while they are copied.

    Attributes:
        run: which ones, of which tensor.
        puts: that have put them there, [blocks].
        stored: they themselves, [bytes], as they are at the moment.
    """

    blocks: KeptBlocks
    tensor: StoredTensor
    run: Run
    puts: NDArray[np.int64]
    stored: NDArray[np.uint8]

    def was_right(self) -> bool:
        """What has been copied by now is what was kept."""
        return self.blocks.is_right(self)

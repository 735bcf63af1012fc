"""From a tensor's tokens to places on the device: blocks of whole rows, in extents that never move.

A row is what one token adds to one layer's keys or values, for all sequences of a batch. Rows are kept in blocks, the
unit of transfers and checksums; blocks of one tensor lie side by side in extents, so that a run of tokens is a few long
reads. A tensor grows by further extents, each as large as all before it together, up to 64 MiB: nothing is copied,
reads stay long, and little is set aside that others would need. Where the length is known beforehand there is one.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass

from penstock.kv.codec import RAW, Codec
from penstock.storage.allocator import Allocator
from penstock.storage.base import BLOCK_BYTES
from penstock.units import KiB, MiB

# Reads are made of several, and the rows behind them have as much memory as one. Steps took 0.57 s with this, 0.61 with
# 1 MiB, 0.68 with 256 KiB (64 tensors, memory for three quarters of them; medians of four).
WANTED_BLOCK_BYTES = 512 * KiB
_MOST_BYTES = 64 * MiB  # of an extent, unless more is needed at once
FOLIO_BYTES = 2 * MiB  # the page cache is filled in
_ALIGNED_BYTES = 16 * MiB  # extents that waste little by lying so
_FIRST_BLOCKS = 4  # of the first extent, where the length is not known


@dataclass(frozen=True, slots=True)
class BlockShape:
    """How rows are put into blocks.

    Attributes:
        row_bytes: of one token.
        rows: in a block.
        block_bytes: of a block on the device: whole device blocks.
    """

    row_bytes: int
    rows: int
    block_bytes: int

    @property
    def data_bytes(self) -> int:
        """Of a block's rows."""
        return self.row_bytes * self.rows

    def blocks(self, tokens: int) -> int:
        """That so many tokens take, the last one perhaps in part."""
        return -(-tokens // self.rows)


def block_shape(row_bytes: int, wanted_bytes: int = WANTED_BLOCK_BYTES, codec: Codec = RAW) -> BlockShape:
    """As many rows a block as come nearest to a size from below, but one at least.

    Raises:
        ValueError: rows have no bytes.
    """
    if row_bytes < 1:
        raise ValueError(f"a row of {row_bytes} bytes cannot be stored")
    rows = max(1, wanted_bytes // row_bytes)
    stored_bytes = codec.encoded_bytes(row_bytes * rows)
    return BlockShape(row_bytes, rows, -(-stored_bytes // BLOCK_BYTES) * BLOCK_BYTES)


class BlockMap:
    """Where the blocks of one tensor lie.

    Args:
        allocator: of the region they lie in.
        block_bytes: of each block.
        reserve_blocks: set aside at once, in one piece; 0 where the length is not known.

    Raises:
        OSError: ENOSPC, the reserve cannot be had in one piece.
    """

    def __init__(self, allocator: Allocator, block_bytes: int, reserve_blocks: int = 0) -> None:
        self._allocator = allocator
        self._block_bytes = block_bytes
        self._extents: tuple[tuple[int, int], ...] = ()
        if reserve_blocks:
            self._add(reserve_blocks)

    @property
    def blocks(self) -> int:
        """That there is room for."""
        return sum(stop - start for start, stop in self._extents) // self._block_bytes

    @property
    def extents(self) -> tuple[tuple[int, int], ...]:
        """Each as ``[start, stop)``, bytes in the region, in the order of the blocks. Another thread may add some."""
        return self._extents

    def grow(self, blocks: int) -> None:
        """Have room for that many blocks. What is there stays where it is.

        Raises:
            OSError: ENOSPC; then the map is as it was.
        """
        before = self._extents
        try:
            while self.blocks < blocks:
                self._add_some(blocks - self.blocks)
        except OSError:
            for start, _ in self._extents[len(before) :]:
                self._allocator.free(start)
            self._extents = before
            raise

    def _add_some(self, needed: int) -> None:
        """An extent as large as all before together, or the largest that there is in one piece."""
        wanted = max(needed, min(self.blocks, _MOST_BYTES // self._block_bytes), _FIRST_BLOCKS)
        while True:
            try:
                self._add(wanted)
            except OSError as error:
                most = self._allocator.largest_bytes // self._block_bytes
                if error.errno != errno.ENOSPC or not most or wanted <= most:
                    raise
                wanted = most
            else:
                return

    def _add(self, blocks: int) -> None:
        size_bytes = blocks * self._block_bytes
        alignment_bytes = FOLIO_BYTES if size_bytes >= _ALIGNED_BYTES else BLOCK_BYTES
        start, _ = self._allocator.allocate(size_bytes, alignment_bytes)
        self._extents = (*self._extents, (start, start + size_bytes))

    def pieces(self, first: int, last: int) -> list[tuple[int, int, int]]:
        """The blocks ``[first, last)`` in as few pieces as they lie side by side in.

        Returns:
            Of each: number of its first block, of the block after its last, bytes in the region where it begins.

        Raises:
            IndexError: there are not so many.
        """
        pieces: list[tuple[int, int, int]] = []
        low = 0
        for start, stop in self._extents:
            high = low + (stop - start) // self._block_bytes
            begin, end = max(first, low), min(last, high)
            if begin < end:
                offset = start + (begin - low) * self._block_bytes
                before = pieces[-1] if pieces else (begin, begin, -1)
                if offset == before[2] + (begin - before[0]) * self._block_bytes:
                    pieces[-1] = before[0], end, before[2]
                else:
                    pieces.append((begin, end, offset))
            low = high
        if not 0 <= first <= last <= low:
            raise IndexError(f"blocks {first} to {last} of {low}")
        return pieces

    def free(self) -> None:
        """Give everything back; the map is empty then."""
        for start, _ in self._extents:
            self._allocator.free(start)
        self._extents = ()

"""One tensor of a KV cache: what is known of its rows, wherever they are."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import xxhash
from numpy.typing import NDArray

from penstock.errors import KVError
from penstock.kv.codec import Codec
from penstock.kv.layout import BlockMap, BlockShape
from penstock.kv.residency import KVTensor, Path

ALL_BLOCKS = sys.maxsize


def checksum(stored: NDArray[np.uint8]) -> int:
    """Of a block as it is stored: XXH3, 64 bits."""
    return xxhash.xxh3_64_intdigest(stored.data)


@dataclass(frozen=True, slots=True)
class Run:
    """Blocks of one tensor that lie side by side on the device.

    Attributes:
        first: number of the first block.
        last: number of the block after the last.
        offset: of the first one in the region, bytes.
    """

    first: int
    last: int
    offset: int


class StoredTensor:
    """Whole blocks in a region, and the rows behind them in a tail of its own. Not safe to use from two threads,
    but for `checksums` and `error`.

    Args:
        name: whose rows these are.
        shape: of its blocks.
        blocks: where they lie.
        codec: what they pass through.

    Attributes:
        tokens: rows there are.
        cached_blocks: from the first one on, that stay in memory once they have been read, or in the page cache:
            `ALL_BLOCKS` of a tensor on the cached path.
        tail: rows that are in no block yet, [rows of a block, row_bytes]; the first `tail_rows` count. They stay as
            they are while it is appended to: once full, another takes its place.
        checksums: of each whole block.
        writing: whole blocks that are not on the device yet.
        error: why it is lost; None if it is not.
    """

    def __init__(self, name: KVTensor, shape: BlockShape, blocks: BlockMap, codec: Codec) -> None:
        self.name = name
        self.shape = shape
        self.blocks = blocks
        self.codec = codec
        self.tokens = 0
        self.cached_blocks = 0
        self.tail = np.zeros((shape.rows, shape.row_bytes), np.uint8)
        self.checksums: list[int] = []
        self.writing: set[int] = set()
        self.error: KVError | None = None

    @property
    def path(self) -> Path:
        """How blocks are read."""
        return Path.CACHED if self.cached_blocks == ALL_BLOCKS else Path.DIRECT

    @property
    def whole_blocks(self) -> int:
        """That are full, and stored or about to be."""
        return self.tokens // self.shape.rows

    @property
    def tail_rows(self) -> int:
        """Behind the whole blocks."""
        return self.tokens % self.shape.rows

    @property
    def stored_bytes(self) -> int:
        """Of the whole blocks."""
        return self.whole_blocks * self.shape.block_bytes

    def runs(self, first: int, last: int, most_bytes: int) -> Iterator[Run]:
        """The blocks ``[first, last)``, as many together as lie side by side and do not exceed a size."""
        most = max(1, most_bytes // self.shape.block_bytes)
        for low, high, offset in self.blocks.pieces(first, last):
            for start in range(low, high, most):
                yield Run(start, min(start + most, high), offset + (start - low) * self.shape.block_bytes)

    def check(self) -> None:
        """Complain if it is lost."""
        if self.error is not None:
            raise self.error

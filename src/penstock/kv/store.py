"""The tensors of a KV cache on one region: appended to, fetched, cut off, moved from one path to the other.

Every tensor has its place in the region whatever its path, and everything is written past the page cache. What is read
of a cached tensor stays in memory, or in the page cache where there is no such memory, from the first time on; moving
it to the direct path drops it. Nothing is rewritten either way.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from penstock.device.base import Device
from penstock.errors import KVError
from penstock.kv import layout
from penstock.kv.codec import RAW, Codec
from penstock.kv.delivery import Target
from penstock.kv.fetch import Fetch
from penstock.kv.kept import KeptBlocks
from penstock.kv.layout import FOLIO_BYTES, BlockMap, block_shape
from penstock.kv.pipeline import Pipeline, PipelineStatistics
from penstock.kv.residency import KVTensor, Path
from penstock.kv.tensor import ALL_BLOCKS, StoredTensor, checksum
from penstock.linux.pagecache import drop
from penstock.storage.base import Engine, EngineStatistics
from penstock.storage.pool import BufferPool, PoolStatistics
from penstock.storage.region import Region


@dataclass(frozen=True, slots=True)
class StoreStatistics:
    """How a store is doing."""

    tokens: Mapping[KVTensor, int]
    stored_bytes: int
    free_bytes: int  # of the region
    pipeline: PipelineStatistics
    engine: EngineStatistics
    pool: PoolStatistics


class KVStore:
    """Tensors on a region. To be used by one thread at a time; what goes on in the background is its own.

    Args:
        region: stays the caller's.
        engine: nobody else waits for its completions; stays the caller's.
        pool: stays the caller's. Blocks are made to fit into its buffers.
        kept: memory for the blocks of tensors on the cached path; None: they are in the page cache.
        codec: what blocks pass through.
        block_bytes: that blocks come near to; as `penstock.kv.layout` has it by default.
    """

    def __init__(
        self,
        region: Region,
        engine: Engine,
        pool: BufferPool,
        kept: KeptBlocks | None = None,
        *,
        codec: Codec = RAW,
        block_bytes: int | None = None,
    ) -> None:
        self.region = region
        self._block_bytes = layout.WANTED_BLOCK_BYTES if block_bytes is None else block_bytes
        self._pool = pool
        self._engine = engine
        self._kept = kept
        self._codec = codec
        self.tensors: dict[KVTensor, StoredTensor] = {}
        self._filled = 0  # what the pipeline had filled when that was looked at
        self._untidy = 0  # fetches to tidy up at
        self._cached_fd = os.open(f"/proc/self/fd/{region.fd}", os.O_RDONLY | os.O_CLOEXEC)
        try:
            # No read-ahead: what is read is what was asked for, and that is known beforehand.
            os.posix_fadvise(self._cached_fd, 0, 0, os.POSIX_FADV_RANDOM)
            self._pipeline = Pipeline(
                str(region.path),
                engine,
                pool,
                region.fd,
                self._cached_fd,
                kept,
                smallest_bytes=self._block_bytes,
            )
        except BaseException:
            os.close(self._cached_fd)
            raise

    def add(self, name: KVTensor, row_bytes: int, *, reserve_tokens: int = 0) -> StoredTensor:
        """A new tensor without rows.

        Args:
            name: which one.
            row_bytes: of one token.
            reserve_tokens: that it is going to have, set aside in one piece at once; 0 if that is not known.

        Raises:
            ValueError: it is there already, or a row does not fit into a buffer.
            OSError: ENOSPC, the region has no such piece.
        """
        if name in self.tensors:
            raise ValueError(f"{name} is there already")
        largest = self._pool.statistics().block_bytes
        shape = block_shape(row_bytes, min(self._block_bytes, largest), self._codec)
        if shape.block_bytes > largest:
            raise ValueError(f"{name}: blocks of {shape.block_bytes} bytes do not fit into buffers of {largest}")
        blocks = BlockMap(self.region.allocator, shape.block_bytes, shape.blocks(reserve_tokens))
        tensor = self.tensors[name] = StoredTensor(name, shape, blocks, self._codec)
        return tensor

    def pin(self, device: Device) -> None:
        """Have a device copy by itself from all memory that rows come from; `close` undoes it, but for the pool's."""
        self._pool.pin(device.name, device.pin)
        self._pipeline.pin(device.name, device.pin)

    def remove(self, name: KVTensor) -> None:
        """Forget a tensor, and free its space. Nothing may be being fetched of it."""
        tensor = self.tensors[name]
        with contextlib.suppress(KVError):
            self._pipeline.settle(tensor)
        self._forget_cached(tensor)
        tensor.blocks.free()
        del self.tensors[name]

    def append(self, name: KVTensor, rows: NDArray[np.uint8]) -> None:
        """Add rows, [rows, row_bytes], behind those that are there. Whole blocks are written in the background.

        Raises:
            OSError: ENOSPC; then the tensor is as it was.
            KVError: the tensor is lost: one of its blocks could not be written.
        """
        tensor = self.tensors[name]
        shape = tensor.shape
        if rows.ndim != 2 or rows.shape[1] != shape.row_bytes or rows.dtype != np.uint8:
            raise ValueError(f"{name}: rows are [rows, {shape.row_bytes}] of bytes, not {rows.shape} of {rows.dtype}")
        tensor.check()
        tensor.blocks.grow((tensor.tokens + len(rows)) // shape.rows)
        while len(rows):
            filled = tensor.tail_rows
            taken = min(shape.rows - filled, len(rows))
            if not filled and taken == shape.rows:
                taken = self._write(tensor, rows)
            else:
                tensor.tail[filled : filled + taken] = rows[:taken]
                if filled + taken == shape.rows:
                    self._write(tensor, tensor.tail, joins=True)
                    tensor.tail = np.empty_like(tensor.tail)  # a fetch may be copying the last one's rows
                else:
                    tensor.tokens += taken
            rows = rows[taken:]

    def _write(self, tensor: StoredTensor, rows: NDArray[np.uint8], *, joins: bool = False) -> int:
        """Begin to write whole blocks of rows, as many as go at once, behind those of a tensor.

        Args:
            tensor: whose rows.
            rows: [rows, row_bytes], of a block at least.
            joins: the block is to be in memory at once if the one before it is.

        Returns:
            How many rows these were.
        """
        shape, first = tensor.shape, tensor.whole_blocks
        run = next(tensor.runs(first, first + len(rows) // shape.rows, self._pool.statistics().block_bytes))
        if tensor.writing & set(range(run.first, run.last)):  # cut off while they were still being written
            self._pipeline.settle(tensor)
        if self._kept is not None:
            self._kept.forget(tensor, run)
        buffer = self._pipeline.buffer()
        memory = np.frombuffer(buffer.memory, np.uint8)
        for number in range(run.last - run.first):
            stored = memory[number * shape.block_bytes : (number + 1) * shape.block_bytes]
            block_rows = rows[number * shape.rows : (number + 1) * shape.rows]
            tensor.codec.encode(np.ascontiguousarray(block_rows).reshape(-1), stored)
            tensor.checksums.append(checksum(stored))
        if joins and self._kept is not None and first < tensor.cached_blocks and self._kept.holds(tensor, first - 1):
            self._kept.put(tensor, run, memory[: (run.last - run.first) * shape.block_bytes])
        self._pipeline.write(tensor, run, buffer)
        written = (run.last - run.first) * shape.rows
        tensor.tokens = run.last * shape.rows
        return written

    def fetch(self, name: KVTensor, target: Target, *, tokens: int | None = None) -> Fetch:
        """Begin to bring rows to a target: see `Pipeline.fetch`.

        Until it is done or cancelled, the tensor may be appended to and moved, and not be cut off or removed.
        """
        self._tidy()
        return self._pipeline.fetch(self.tensors[name], target, tokens=tokens)

    def read(self, name: KVTensor, *, tokens: int | None = None) -> NDArray[np.uint8]:
        """All rows, or the first so many: [tokens, row_bytes].

        Raises:
            KVError: some could not be read, or are not what was stored.
        """
        tensor = self.tensors[name]
        rows = np.empty((tensor.tokens if tokens is None else tokens, tensor.shape.row_bytes), np.uint8)
        self.fetch(name, RowsTarget(rows), tokens=tokens).wait()
        return rows

    def truncate(self, name: KVTensor, tokens: int) -> None:
        """Keep the first rows only. Nothing may be being fetched of it.

        Raises:
            ValueError: there are not so many.
            KVError: the block that is cut through could not be read; then the tensor is as it was.
        """
        tensor = self.tensors[name]
        if not 0 <= tokens <= tensor.tokens:
            raise ValueError(f"{name}: {tokens} rows of {tensor.tokens} cannot be kept")
        rows = tensor.shape.rows
        kept, left = divmod(tokens, rows)
        if kept < tensor.whole_blocks:
            if left:
                tail = self._read_block(tensor, kept)
                tensor.tail[:left] = tail[:left]
            self._pipeline.settle(tensor)
            del tensor.checksums[kept:]
        tensor.tokens = tokens

    def _read_block(self, tensor: StoredTensor, number: int) -> NDArray[np.uint8]:
        """Rows of one whole block."""
        found = np.empty((tensor.shape.rows, tensor.shape.row_bytes), np.uint8)
        self._pipeline.fetch(tensor, RowsTarget(found, number * tensor.shape.rows), blocks=(number, number + 1)).wait()
        return found

    def move(self, name: KVTensor, path: Path, *, part_bytes: int = 0) -> None:
        """Have a tensor read by another path from now on. A fetch that is under way goes on as it began.

        Args:
            name: which one.
            path: of its blocks.
            part_bytes: that stay in memory of one on the direct path, if there is such memory: its first whole blocks.
        """
        tensor = self.tensors[name]
        part_blocks = 0 if self._kept is None else part_bytes // tensor.shape.block_bytes
        before = tensor.cached_blocks
        tensor.cached_blocks = ALL_BLOCKS if path is Path.CACHED else part_blocks
        if tensor.cached_blocks < before:
            self._forget_cached(tensor, tensor.cached_blocks)

    def _tidy(self) -> None:
        """Drop what the page cache holds of the region beside the blocks of tensors on the page-cache path.

        Folios of 2 MiB that were filled by populating a mapping are marked to start a read-ahead when they are read for
        the first time, whatever the descriptor is advised. Behind the end of a cached tensor that is somebody
        else's, and 8 MiB of it for each of 27 tensors hit the memory limit.
        """
        if self._filled != self._pipeline.filled:
            self._filled = self._pipeline.filled
            self._untidy = 2 * len(self.tensors)  # until all have been read that are being filled
        if not self._untidy:
            return
        self._untidy -= 1
        cached = sorted(
            (run.offset, run.offset + (run.last - run.first) * tensor.shape.block_bytes)
            for tensor in self.tensors.values()
            if tensor.path is Path.CACHED
            for run in tensor.runs(0, tensor.whole_blocks, sys.maxsize)
        )
        at = 0
        for start, stop in [*cached, (self.region.header.size_bytes, 0)]:
            if at < start:
                drop(self._cached_fd, at, start)
            at = stop

    def _forget_cached(self, tensor: StoredTensor, first: int = 0) -> None:
        """Have blocks leave memory, from a number on."""
        if self._kept is not None:
            self._kept.drop(tensor, first)
            return
        for start, stop in tensor.blocks.extents:  # a folio that only a part of is dropped stays
            drop(self._cached_fd, start // FOLIO_BYTES * FOLIO_BYTES, -(-stop // FOLIO_BYTES) * FOLIO_BYTES)

    def settle(self) -> None:
        """Wait until every whole block is on the device.

        Raises:
            KVError: one could not be written.
        """
        for tensor in self.tensors.values():
            self._pipeline.settle(tensor)

    def statistics(self) -> StoreStatistics:
        """The figures at this moment."""
        return StoreStatistics(
            {name: tensor.tokens for name, tensor in self.tensors.items()},
            sum(tensor.stored_bytes for tensor in self.tensors.values()),
            self.region.allocator.free_bytes,
            self._pipeline.statistics(),
            self._engine.statistics(),
            self._pool.statistics(),
        )

    def close(self) -> None:
        """End what goes on in the background; what it holds is lost. A second time does nothing."""
        if self._cached_fd < 0:
            return
        self._pipeline.close()
        for tensor in self.tensors.values():
            self._forget_cached(tensor)
        fd, self._cached_fd = self._cached_fd, -1
        os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class RowsTarget:
    """Host memory, [rows, row_bytes], that takes the rows from a number on."""

    def __init__(self, rows: NDArray[np.uint8], first: int = 0) -> None:
        self._rows = rows
        self._first = first

    def write(self, first: int, rows: NDArray[np.uint8]) -> None:
        start = first - self._first
        self._rows[start : start + len(rows)] = rows

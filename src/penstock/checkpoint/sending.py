"""From files to a device: through a few pinned blocks, reading some while others are copied."""

from __future__ import annotations

import bisect
from collections import deque
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from penstock.checkpoint.base import TensorInfo
from penstock.checkpoint.plan import Span, chunks
from penstock.checkpoint.reading import READ_BYTES, Reader, SourceFile
from penstock.device.base import Device, Transfer
from penstock.storage.base import READ, Engine, batch
from penstock.storage.pool import Block, BufferPool
from penstock.units import MiB

POOL_BYTES = 128 * MiB  # pinned, of reads and copies together; chosen without measurement


@dataclass(slots=True)
class _Target:
    """A tensor on its way."""

    tensor: TensorInfo
    memory: Any = None  # on the device, from the first of its bytes on
    left_bytes: int = 0


@dataclass(frozen=True, slots=True)
class _Read:
    span: int
    start: int  # in the file, bytes
    length: int
    source: int  # the engine's file
    kind: int


class DeviceReader(Reader):
    """The reads of all spans in order; iterating yields tensors on the device as their copies have begun.

    What is computed with a tensor that was yielded waits for its copies by itself (`Device.publish`).
    """

    def __init__(
        self,
        engine: Engine,
        files: Mapping[str, SourceFile],
        counts: dict[int, int],
        parts: Sequence[Span],
        device: Device,
    ) -> None:
        super().__init__(engine, files, counts)
        self._spans = parts
        self._device = device
        self._copying: deque[tuple[Block, list[Transfer]]] = deque()
        self._targets = [[_Target(tensor, None, tensor.size_bytes) for tensor in span.tensors] for span in parts]
        self._stops = [self._reach(span) for span in parts]

    @staticmethod
    def _reach(span: Span) -> list[int]:
        """For each tensor, how far those up to it reach: ascending, also where they overlap."""
        stops = np.array([tensor.stop for tensor in span.tensors], np.int64)
        found: list[int] = np.maximum.accumulate(stops).tolist()
        return found

    def __iter__(self) -> Generator[tuple[TensorInfo, Any, int]]:
        """Each tensor with its memory on the device, and the bytes that have landed since the one before."""
        reads = self._reads()
        with BufferPool(POOL_BYTES, READ_BYTES, pin=self._device.pin) as pool:
            slabs = pool.add_to(self._engine)
            self._buffers += slabs
            blocks: dict[int, Block] = {}  # number of the read → where it goes
            begun = finished = landed_bytes = 0
            try:
                while finished < len(reads):
                    self._release(pool, wait=not blocks)
                    begun = self._begin(reads, begun, blocks, pool, slabs)
                    done = self._engine.wait(1)
                    numbers = done["token"].astype(np.int64).tolist()
                    chosen = [reads[number] for number in numbers]
                    kinds = np.array([read.kind for read in chosen], np.int64)
                    self._check(done, [self._spans[read.span].path for read in chosen], kinds)
                    finished += len(done)
                    for number, read, size in zip(numbers, chosen, done["result"].tolist(), strict=True):
                        landed_bytes += size
                        whole = self._send(read, blocks.pop(number), size)
                        if whole:
                            self._device.publish([target.memory for target in whole])
                        for target in whole:
                            yield target.tensor, target.memory, landed_bytes
                            target.memory, landed_bytes = None, 0
            finally:
                self.close()  # nothing is read into the blocks any more
                self._device.close()  # nor copied from them
                self._copying.clear()

    def _reads(self) -> list[_Read]:
        found = []
        for number, span in enumerate(self._spans):
            pieces = chunks(span.block_start, span.block_stop, READ_BYTES)
            sources, kinds = self._sources(self._files[span.path], pieces)
            for (start, length), source, kind in zip(pieces.tolist(), sources.tolist(), kinds.tolist(), strict=True):
                found.append(_Read(number, start, length, source, kind))
        return found

    def _begin(
        self, reads: Sequence[_Read], begun: int, blocks: dict[int, Block], pool: BufferPool, slabs: Sequence[int]
    ) -> int:
        """Submit as many reads as there are blocks; returns the number of the next one."""
        taken: list[Block] = []
        while begun + len(taken) < len(reads) and (block := pool.acquire_nowait()) is not None:
            blocks[begun + len(taken)] = block
            taken.append(block)
        chosen = reads[begun : begun + len(taken)]
        if taken:
            self._engine.submit(
                batch(
                    READ,
                    file=[read.source for read in chosen],
                    offset=[read.start for read in chosen],
                    length=[read.length for read in chosen],
                    buffer=[slabs[block.slab] for block in taken],
                    buffer_offset=[block.offset for block in taken],
                    token=np.arange(begun, begun + len(taken)),
                )
            )
        return begun + len(taken)

    def _send(self, read: _Read, block: Block, size_bytes: int) -> list[_Target]:
        """Begin to copy what a block holds of each tensor; returns the tensors of which that was the last."""
        stop = read.start + size_bytes
        targets, whole, transfers = self._targets[read.span], [], []
        index = bisect.bisect_right(self._stops[read.span], read.start)
        while index < len(targets) and targets[index].tensor.start < stop:
            target = targets[index]
            low, high = max(read.start, target.tensor.start), min(stop, target.tensor.stop)
            if low < high:
                if target.memory is None:
                    target.memory = self._device.allocate(target.tensor.size_bytes)
                source = block.memory[low - read.start : high - read.start]
                transfers.append(self._device.copy(target.memory, low - target.tensor.start, source))
                target.left_bytes -= high - low
                if not target.left_bytes:
                    whole.append(target)
            index += 1
        self._copying.append((block, transfers))
        return whole

    def _release(self, pool: BufferPool, *, wait: bool) -> None:
        """Give back the blocks that are copied; if wait, at least one."""
        while self._copying:
            block, transfers = self._copying[0]
            if wait:
                for transfer in transfers:
                    transfer.wait()
                wait = False
            if not all(transfer.is_done for transfer in transfers):
                return
            self._copying.popleft()
            pool.release(block)


def to_device(device: Device, memory: NDArray[np.uint8]) -> Any:
    """Bytes on the device, when they are in host memory already."""
    target = device.allocate(len(memory))
    if not len(memory):
        return target
    device.copy(target, 0, memory.data).wait()
    device.publish([target])
    return target

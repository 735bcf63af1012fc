"""Memory for transfers: one bounded amount, set aside at once and handed out in blocks."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from penstock.linux.uring import LARGEST_BUFFER_BYTES
from penstock.storage.base import BLOCK_BYTES, Engine
from penstock.storage.buffers import huge_buffer
from penstock.units import format_size


@dataclass(frozen=True, slots=True)
class Block:
    """Memory from a pool, until it is released."""

    slab: int  # index into BufferPool.slabs
    offset: int  # in the slab, bytes
    memory: memoryview


@dataclass(frozen=True, slots=True)
class PoolStatistics:
    """How a pool is doing."""

    budget_bytes: int
    block_bytes: int
    blocks: int
    free: int
    waits: int  # times that someone had to wait for a block


class BufferPool:
    """Blocks of one size, aligned to 4 KiB and more, in huge pages where there are any, touched before their first use.

    Engines and devices want to know memory before it is used, by whole slabs: `add_to` registers them with an engine,
    and pin is called for each of them.

    Args:
        budget_bytes: the pool never has more.
        block_bytes: of each block; a multiple of 4 KiB.
        pin: makes a slab known to a device, and returns what undoes it.

    Raises:
        ValueError: the budget is less than a block, or blocks are not aligned.
        MemoryError: there is not so much memory.
    """

    def __init__(
        self,
        budget_bytes: int,
        block_bytes: int,
        *,
        pin: Callable[[memoryview], Callable[[], None]] | None = None,
    ) -> None:
        if block_bytes < BLOCK_BYTES or block_bytes % BLOCK_BYTES or block_bytes > LARGEST_BUFFER_BYTES:
            raise ValueError(
                f"blocks of {block_bytes} bytes: it must be a multiple of {BLOCK_BYTES}, up to {LARGEST_BUFFER_BYTES}"
            )
        if budget_bytes < block_bytes:
            raise ValueError(
                f"a pool of {format_size(budget_bytes)} holds no block of {format_size(block_bytes)}; "
                "give it a larger budget"
            )
        self._budget_bytes = budget_bytes
        self._block_bytes = block_bytes
        count = budget_bytes // block_bytes
        per_slab = LARGEST_BUFFER_BYTES // block_bytes
        self.slabs = tuple(
            huge_buffer(min(per_slab, count - first) * block_bytes) for first in range(0, count, per_slab)
        )
        self._unpin = contextlib.ExitStack()
        with contextlib.ExitStack() as undo:
            for slab in self.slabs if pin is not None else ():
                undo.callback(pin(slab))  # type: ignore[misc]
            self._unpin = undo.pop_all()
        self._count = count
        self._pinned: set[str] = set()  # names of the devices that were made to know them later
        self._free = [
            Block(number, offset, slab[offset : offset + block_bytes])
            for number, slab in reversed(list(enumerate(self.slabs)))
            for offset in range(len(slab) - block_bytes, -1, -block_bytes)
        ]
        self._taken: set[tuple[int, int]] = set()
        self._waits = 0
        self._closed = False
        self._condition = threading.Condition()

    def add_to(self, engine: Engine) -> list[int]:
        """Make the slabs known to an engine; returns their numbers in its requests."""
        return [engine.add_buffer(slab) for slab in self.slabs]

    def pin(self, name: str, pin: Callable[[memoryview], Callable[[], None]]) -> None:
        """Make the slabs known to a device, unless one of that name knows them already; `close` undoes it."""
        with self._condition:
            if self._closed or name in self._pinned:
                return
            self._pinned.add(name)
            for slab in self.slabs:
                self._unpin.callback(pin(slab))

    def acquire(self, timeout_s: float | None = None) -> Block:
        """Take a block; waits until there is one.

        Raises:
            TimeoutError: there was none in that time.
            RuntimeError: the pool is closed.
        """
        with self._condition:
            self._waits += not self._free and not self._closed
            if not self._condition.wait_for(lambda: self._free or self._closed, timeout_s):
                raise TimeoutError(f"none of {self._count} blocks was released within {timeout_s} s")
            block = self._take()
            assert block is not None
            return block

    def acquire_nowait(self) -> Block | None:
        """Take a block, if there is one.

        Raises:
            RuntimeError: the pool is closed.
        """
        with self._condition:
            return self._take()

    def _take(self) -> Block | None:
        if self._closed:
            raise RuntimeError("the pool is closed")
        if not self._free:
            return None
        block = self._free.pop()
        self._taken.add((block.slab, block.offset))
        return block

    def release(self, block: Block) -> None:
        """Give a block back: nobody uses its memory any more.

        Raises:
            ValueError: it is not taken.
        """
        with self._condition:
            key = (block.slab, block.offset)
            if key not in self._taken:
                raise ValueError(f"block {key} of the pool is released, but was not taken")
            self._taken.remove(key)
            self._free.append(block)
            self._condition.notify()

    def statistics(self) -> PoolStatistics:
        """The figures at this moment."""
        with self._condition:
            return PoolStatistics(self._budget_bytes, self._block_bytes, self._count, len(self._free), self._waits)

    def close(self) -> None:
        """Unpin the memory and let it go, once those who took blocks have let go of theirs; wakes up who waits."""
        with self._condition:
            if self._closed:
                return
            self._closed = True
            self._condition.notify_all()
        self._unpin.close()
        self._free.clear()
        self.slabs = ()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

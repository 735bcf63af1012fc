"""A region's reads and writes, to the device and back: as many at once as it takes, from and into buffers of a pool.

Reads wait here for a buffer, and as many are under way as `penstock.kv.fit` says. Writes yield: they go to the device
when no read is waiting for it, or when somebody waits for them.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Protocol

import numpy as np

from penstock.kv.fetch import Chunk, Write
from penstock.kv.fit import Fit
from penstock.storage.base import READ, WRITE, Engine, batch
from penstock.storage.pool import Block, BufferPool

LOOK_AGAIN_S = 0.01  # for a buffer that another cache has given back
_REFIT_CHUNKS = 32
_WRITES_AT_ONCE = 8
_TOGETHER = 4  # reads that go to the engine at once, while the device has others: each call costs as much as a copy
_KEPT_FOR_WRITES = 2  # buffers that reads leave


class Owner(Protocol):
    """Hears of what the device has done, with the lock held."""

    def read_is_over(self, chunk: Chunk, result: int) -> None:
        """Bytes that a chunk's buffer has now, or a negative errno."""

    def write_is_over(self, write: Write, result: int) -> None:
        """Bytes that were written, or a negative errno; its buffer is still its own."""


class Transfers:
    """What is on its way, and what waits. But for `serve`, to be called with the lock held.

    Args:
        owner: hears of what is over.
        lock: the owner's.
        engine: nobody else waits for its completions; stays the caller's.
        pool: its buffers hold one block at least; stays the caller's.
        fd: of the region, past the page cache.
        smallest_bytes: of a chunk.

    Attributes:
        fitted: what chunks are to be like.
        starved_s: the device had little or nothing to do while reads were waiting for a buffer.
    """

    def __init__(
        self, owner: Owner, lock: threading.RLock, engine: Engine, pool: BufferPool, fd: int, *, smallest_bytes: int
    ) -> None:
        self._owner = owner
        self._lock = lock
        self._engine = engine
        self._pool = pool
        figures = pool.statistics()
        self._most_reads = max(1, figures.blocks - _KEPT_FOR_WRITES)
        self._fit = Fit(smallest_bytes, figures.block_bytes, self._most_reads)
        self.fitted = self._fit.fitted()
        self._file = engine.add_file(fd)
        self._buffers = pool.add_to(engine)
        self._begun = threading.Condition(lock)  # for the one that takes what the engine has done
        self._reads: deque[Chunk] = deque()  # waiting for a buffer
        self._writes: deque[Write] = deque()  # waiting for the device
        self._operations: dict[int, Chunk | Write] = {}  # in the engine, by token
        self._reading = self._writing = self._held = 0  # in the engine; buffers that reads have
        self._waiting = 0  # who waits for writes
        self._token = self._since_fit = 0
        self._is_short = False  # fewer reads in the engine than would be, were there buffers
        self._watched_since = self._busy_since = self._returned_at = 0.0
        self.starved_s = 0.0
        self._ending = False

    def read(self, chunks: Iterable[Chunk]) -> None:
        """Have chunks read after all others; `pump` begins."""
        self._reads.extend(chunks)

    def read_first(self, chunks: Iterable[Chunk]) -> None:
        """Have chunks read before all others; `pump` begins."""
        self._reads.extendleft(reversed(list(chunks)))

    def write(self, write: Write) -> None:
        """Have blocks written after all others; `pump` begins."""
        self._writes.append(write)

    def write_again(self, write: Write) -> None:
        """Have blocks written before all others; `pump` begins."""
        self._writes.appendleft(write)

    @contextmanager
    def awaited(self) -> Iterator[None]:
        """Somebody waits for a write, or for the buffer of one: they do not yield meanwhile."""
        self._waiting += 1
        try:
            yield
        finally:
            self._waiting -= 1

    @property
    def is_awaited(self) -> bool:
        """See `awaited`."""
        return bool(self._waiting)

    def buffer(self) -> Block | None:
        """One to write from; None if there is none now."""
        return self._pool.acquire_nowait()

    def drop(self, unwanted: Callable[[Chunk], bool]) -> list[Chunk]:
        """Those that wait for a buffer, and now will not be read."""
        dropped = [chunk for chunk in self._reads if unwanted(chunk)]
        for chunk in dropped:
            self._reads.remove(chunk)
        return dropped

    def give_back(self, done: Chunk | Write) -> None:
        """Its buffer, if it has one, is not needed any more."""
        if done.memory is None:
            return
        self._pool.release(done.memory)
        if isinstance(done, Write):
            return
        done.memory = None
        self._held -= 1
        now = time.monotonic()
        if self._reads and self._returned_at:
            self._fit.paused(now - self._returned_at)
        self._returned_at = now if self._reads else 0.0

    def copied(self, chunk: Chunk, taken_s: float) -> None:
        """A thread has verified and copied what a chunk had."""
        self._fit.copied(chunk.size_bytes, taken_s)
        self._since_fit += 1
        if self._since_fit >= _REFIT_CHUNKS:
            self._since_fit = 0
            self.fitted = self._fit.fitted()

    def pump_if_short(self) -> None:
        """Give the engine something unless it has enough: then the thread that takes what is done does that."""
        if not self._ending and self._reading < _TOGETHER:
            self.pump()

    def pump(self) -> None:
        """Give the engine what it may have."""
        begun: list[Chunk | Write] = []
        depth = min(self.fitted.depth, self._most_reads)
        if self._reading > _TOGETHER and depth - self._held < min(_TOGETHER, len(self._reads)):
            depth = 0  # the device has enough to do until there are more buffers
        while self._reads and self._held < depth and (memory := self._pool.acquire_nowait()) is not None:
            chunk = self._reads.popleft()
            chunk.memory = memory
            self._held += 1
            self._reading += 1
            begun.append(chunk)
        while self._writes and self._writing < _WRITES_AT_ONCE and (self._waiting or not self._reads):
            self._writing += 1
            begun.append(self._writes.popleft())
        now = time.monotonic()
        if begun and not self._operations:
            self._busy_since = now
        if self._watched_since:  # there was something to read
            watched_s = now - self._watched_since
            starved_s = watched_s if self._is_short else 0.0
            self._fit.watched(watched_s, starved_s)
            self.starved_s += starved_s
        self._watched_since = now if self._reads or self._reading else 0.0
        self._is_short = bool(self._reads) and self._reading < _TOGETHER
        if begun:
            self._submit(begun)
        if begun or self._reads:
            self._begun.notify()

    def _submit(self, begun: list[Chunk | Write]) -> None:
        first = self._token
        self._token += len(begun)
        memory = [operation.memory for operation in begun]
        requests = batch(
            READ,
            file=self._file,
            offset=[operation.run.offset for operation in begun],
            length=[operation.size_bytes for operation in begun],
            buffer=[self._buffers[block.slab] for block in memory if block is not None],
            buffer_offset=[block.offset for block in memory if block is not None],
            token=np.arange(first, self._token),
        )
        requests["operation"] = [READ if isinstance(operation, Chunk) else WRITE for operation in begun]
        self._operations.update(zip(range(first, self._token), begun, strict=True))
        self._engine.submit(requests)

    def serve(self) -> None:
        """What one thread does until the end: take what the engine has done."""
        while True:
            with self._lock:
                while not self._operations and not self._ending:
                    self._begun.wait(LOOK_AGAIN_S if self._reads else None)
                    self.pump()
                if not self._operations:
                    return
            done = self._engine.wait(1)
            began_s = time.perf_counter()
            with self._lock:
                now = time.monotonic()
                moved = 0
                for token, result in zip(done["token"].tolist(), done["result"].tolist(), strict=True):
                    operation = self._operations.pop(token)
                    moved += max(0, result)
                    if isinstance(operation, Chunk):
                        self._reading -= 1
                        self._owner.read_is_over(operation, result)
                    else:
                        self._writing -= 1
                        self._owner.write_is_over(operation, result)
                self._fit.read(moved, now - self._busy_since)
                self._busy_since = now
                if not self._ending:
                    self.pump()
                self._fit.landed(len(done), time.perf_counter() - began_s)

    def end(self) -> None:
        """Begin nothing more, and have `serve` return once the engine has nothing left."""
        self._ending = True
        for write in self._writes:
            self._pool.release(write.memory)
        self._writes.clear()
        self._begun.notify_all()

    def wake(self) -> None:
        """Have `serve` look anew."""
        self._begun.notify_all()

    def release(self) -> None:
        """Have the engine forget file and buffers, unless it is still at work on them; without the lock."""
        if not self._operations:
            for buffer in self._buffers:
                self._engine.remove_buffer(buffer)
            self._engine.remove_file(self._file)

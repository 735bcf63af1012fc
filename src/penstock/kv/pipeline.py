"""Rows on their way: storage reads, verification and copies of different chunks at the same time, writes in between.

Each fetch is cut into chunks. What is in memory is copied from there. The rest is read into buffers of the pool by
`penstock.kv.transfers`, verified, copied, and kept in memory if the tensor is to be there. Where there is no memory to
keep it in, `penstock.kv.filler` brings it into the page cache, from where it is read and verified each time. Fetches
are served in their order, but what has landed comes first: while the rows of a cached tensor are copied, the device
goes on with the next direct one.
"""

from __future__ import annotations

import math
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Self

from penstock.errors import KVError
from penstock.kv.copiers import Copiers
from penstock.kv.delivery import Cut, Delivery, Target, failure
from penstock.kv.fetch import Chunk, Fetch, Source, Write
from penstock.kv.filler import Filler
from penstock.kv.fit import Fitted
from penstock.kv.kept import KeptBlocks
from penstock.kv.tensor import Run, StoredTensor
from penstock.kv.transfers import LOOK_AGAIN_S, Transfers
from penstock.storage.base import Engine
from penstock.storage.exiting import before_exit
from penstock.storage.pool import Block, BufferPool
from penstock.units import MiB

_WORKERS = 2
_PIECE_BYTES = 8 * MiB  # of the page cache, read by a thread at once: steps took 11 % longer with 4 MiB, 20 % with 16
_PIECE_SHARE = 8  # but no more than this part of the pool, where memory is short
_CACHED_CHUNK_BYTES = 16 * MiB  # takes no buffer; larger ones make what has landed meanwhile wait
# From memory. Steps took 0.189 s with 32 MiB, 0.182 with 64 and 0.180 with 128, but what the kernel has taken some of
# is copied once more: after a limit was halved, steps took 1.2 times as long as they might have with 128, 1.0 with 64.
_KEPT_CHUNK_BYTES = 64 * MiB


@dataclass(frozen=True, slots=True)
class PipelineStatistics:
    """What a pipeline has done so far."""

    direct_bytes: int  # read past the page cache
    cached_bytes: int  # from memory, or through the page cache
    taken_back_bytes: int  # that were in memory, but the kernel has taken some of them
    written_bytes: int
    filled: int  # chunks that were not in the page cache, or not all of them
    tried_again: int  # chunks that failed or were damaged at first
    memory_threads: int  # that copy from memory side by side
    starved_s: float  # the device had little or nothing to do while chunks were waiting for a buffer
    fitted: Fitted


class Pipeline:
    """Fetches and writes of one region. Threads are started by the first of either.

    Args:
        name: of the region, for messages.
        engine: nobody else waits for its completions; stays the caller's.
        pool: its buffers hold one block at least; stays the caller's.
        direct_fd: for reads of direct tensors, and all writes.
        cached_fd: reads through the page cache.
        kept: where blocks of tensors on the cached path stay; None: in the page cache.
        smallest_bytes: of a chunk.
        workers: threads that verify and copy.
    """

    def __init__(
        self,
        name: str,
        engine: Engine,
        pool: BufferPool,
        direct_fd: int,
        cached_fd: int,
        kept: KeptBlocks | None,
        *,
        smallest_bytes: int,
        workers: int = _WORKERS,
    ) -> None:
        self._name = name
        figures = pool.statistics()
        self._filler = Filler(cached_fd)
        piece_bytes = min(_PIECE_BYTES, figures.blocks * figures.block_bytes // _PIECE_SHARE)
        self._delivery = Delivery(name, cached_fd, max(figures.block_bytes, piece_bytes), workers, kept)
        self._kept = kept
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)  # for callers: a fetch is over, a write, a buffer is free
        self._transfers = Transfers(self, self._lock, engine, pool, direct_fd, smallest_bytes=smallest_bytes)
        self._number = 0
        self._worker_count = workers
        self._copiers = Copiers(self, self._lock, self._delivery, workers)
        self._threads: list[threading.Thread] = []
        self._ending = False
        self._broken: BaseException | None = None
        self._forget_exit: Callable[[], None] = lambda: None
        self._direct_bytes = self._cached_bytes = self._written_bytes = self._tried_again = 0
        self._taken_back_bytes = 0

    # What callers do.

    def fetch(
        self,
        tensor: StoredTensor,
        target: Target,
        *,
        tokens: int | None = None,
        blocks: tuple[int, int] | None = None,
    ) -> Fetch:
        """Begin to bring rows to a target: all that there are, the first so many, or those of some whole blocks.

        Raises:
            KVError: the tensor is lost.
        """
        tensor.check()
        tokens = tensor.tokens if tokens is None else tokens
        if not 0 <= tokens <= tensor.tokens:
            raise ValueError(f"{tensor.name}: {tokens} rows of {tensor.tokens}")
        in_blocks = min(tensor.shape.blocks(tokens), tensor.whole_blocks)
        first, last = (0, in_blocks) if blocks is None else blocks
        with self._lock:
            self._check()
            self._wait_written(tensor)
            self._number += 1
            fetch = Fetch(self, self._number, tensor, Cut(target, tokens))
            chunks = list(self._cut(fetch, first, last))
            in_tail = tokens - in_blocks * tensor.shape.rows
            if in_tail > 0 and blocks is None and chunks:
                fetch.tail = tokens - in_tail, tensor.tail[:in_tail]
            fetch.left = len(chunks)
            if chunks:
                self._start()
            self._transfers.read(chunk for chunk in chunks if chunk.source is Source.DEVICE)
            for chunk in chunks:
                if chunk.source is Source.PAGE_CACHE:
                    self._fill(chunk, last)
                elif chunk.source is not Source.DEVICE:
                    self._copiers.hand_over(chunk)
            self._transfers.pump()
        if in_tail > 0 and blocks is None and not chunks:  # no work for other threads
            fetch.target.write(in_blocks * tensor.shape.rows, tensor.tail[:in_tail])
        return fetch

    def wait(self, fetch: Fetch) -> None:
        """See `Fetch.wait`."""
        with self._lock:
            self._changed.wait_for(lambda: not fetch.left or fetch.error is not None or self._broken is not None)
            if fetch.error is not None:
                self.cancel(fetch)
                raise fetch.error
            if fetch.left:
                self._check()
            if fetch.is_cancelled:
                raise RuntimeError(f"{self._name}: the fetch of {fetch.tensor.name} was cancelled")

    def cancel(self, fetch: Fetch) -> None:
        """See `Fetch.cancel`."""
        with self._lock:
            fetch.is_cancelled = True
            self._drop(lambda chunk: chunk.fetch is fetch)
            self._changed.wait_for(lambda: not fetch.left or self._broken is not None)

    def buffer(self) -> Block:
        """A buffer to write from; waits until there is one."""
        with self._lock:
            self._check()
            with self._transfers.awaited():
                while (block := self._transfers.buffer()) is None:
                    self._transfers.pump()
                    self._changed.wait(LOOK_AGAIN_S)
                    self._check()
            return block

    def write(self, tensor: StoredTensor, run: Run, memory: Block) -> None:
        """Have blocks written from a buffer of `buffer`, which is given back then."""
        with self._lock:
            self._check()
            tensor.writing.update(range(run.first, run.last))
            self._transfers.write(Write(tensor, run, memory))
            self._start()
            self._transfers.pump()

    def settle(self, tensor: StoredTensor) -> None:
        """Wait until all of a tensor's blocks are on the device.

        Raises:
            KVError: the tensor is lost.
        """
        with self._lock:
            self._wait_written(tensor)

    def pin(self, name: str, pin: Callable[[memoryview], Callable[[], None]]) -> None:
        """See `Delivery.pin`."""
        self._delivery.pin(name, pin)

    @property
    def filled(self) -> int:
        """See `PipelineStatistics`."""
        return self._filler.filled

    def statistics(self) -> PipelineStatistics:
        """The figures at this moment."""
        with self._lock:
            return PipelineStatistics(
                self._direct_bytes,
                self._cached_bytes,
                self._taken_back_bytes,
                self._written_bytes,
                self._filler.filled,
                self._tried_again,
                self._copiers.threads_at_once,
                self._transfers.starved_s,
                self._transfers.fitted,
            )

    def close(self) -> None:
        """End everything, write nothing that has not been begun; a second time does nothing."""
        with self._lock:
            if self._ending:
                return
            self._ending = True
            self._drop(lambda _: True)
            self._transfers.end()
            self._copiers.end()
            self._changed.notify_all()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join()
        self._forget_exit()
        self._filler.close()
        self._delivery.close()
        self._transfers.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # What follows needs the lock, but for the threads' own functions.

    def _check(self) -> None:
        if self._broken is not None:
            raise KVError(f"{self._name}: its pipeline has ended: {self._broken}") from self._broken
        if self._ending:
            raise RuntimeError(f"{self._name}: closed")

    def _start(self) -> None:
        if self._threads:
            return
        self._forget_exit = before_exit(self.close)
        jobs: list[tuple[str, Callable[[], None]]] = [("landing", self._transfers.serve)]
        jobs += [(f"copy-{number}", partial(self._copiers.work, number)) for number in range(self._worker_count)]
        for name, job in jobs:
            thread = threading.Thread(target=self._run, args=(job,), name=f"penstock-kv-{name}", daemon=True)
            thread.start()
            self._threads.append(thread)

    def _wait_written(self, tensor: StoredTensor) -> None:
        with self._transfers.awaited():
            while tensor.writing:  # even of one that is lost: its space may be somebody else's next
                self._check()
                self._transfers.pump()
                self._changed.wait()
        tensor.check()

    def _cut(self, fetch: Fetch, first: int, last: int) -> Iterator[Chunk]:
        """Blocks of a fetch, as large as they are read or copied at once."""
        tensor = fetch.tensor
        cached = max(first, min(last, tensor.cached_blocks))
        if self._kept is None:
            for run in tensor.runs(first, cached, _CACHED_CHUNK_BYTES):
                yield Chunk(fetch, run, Source.PAGE_CACHE)
        else:
            block_bytes = tensor.shape.block_bytes
            chunks = max(1, round((cached - first) * block_bytes / _KEPT_CHUNK_BYTES))  # no small one at the end
            for run in tensor.runs(first, cached, math.ceil((cached - first) / chunks) * block_bytes):
                yield from self._cut_kept(fetch, run, self._kept)
        yield from self._cut_to_read(fetch, cached, last)

    def _cut_kept(self, fetch: Fetch, run: Run, kept: KeptBlocks) -> Iterator[Chunk]:
        for is_kept, part in kept.cut(fetch.tensor, run):
            if is_kept:
                yield Chunk(fetch, part, Source.MEMORY)
            else:
                yield from self._cut_to_read(fetch, part.first, part.last)

    def _cut_to_read(self, fetch: Fetch, first: int, last: int, *, is_again: bool = False) -> Iterator[Chunk]:
        for run in fetch.tensor.runs(first, last, self._transfers.fitted.chunk_bytes):
            yield Chunk(fetch, run, is_again=is_again)

    def _fill(self, chunk: Chunk, last: int) -> None:
        """Hand a chunk over once it is in the page cache; what comes behind block ``last`` may be written to."""
        run, tensor = chunk.run, chunk.fetch.tensor
        steady = next(tensor.runs(run.first, last, sys.maxsize))
        steady_bytes = (steady.last - steady.first) * tensor.shape.block_bytes

        def then() -> None:
            with self._lock:
                if chunk.fetch.is_cancelled or self._ending:
                    self._forget(chunk)
                else:
                    self._copiers.hand_over(chunk)

        self._filler.fill(
            run.offset,
            run.offset + chunk.size_bytes,
            run.offset + steady_bytes,
            lambda: not chunk.fetch.is_cancelled and not self._ending,
            partial(self._run, then),
        )

    def _drop(self, unwanted: Callable[[Chunk], bool]) -> None:
        """Forget chunks that nobody works on; their fetches will never be whole."""
        for chunk in self._transfers.drop(unwanted) + self._copiers.drop(unwanted):
            self._forget(chunk)

    def _forget(self, chunk: Chunk) -> None:
        chunk.fetch.is_cancelled = True
        self._finish(chunk)

    def _finish(self, chunk: Chunk) -> None:
        chunk.fetch.left -= 1
        self._transfers.give_back(chunk)
        if not chunk.fetch.left or chunk.fetch.error is not None or self._transfers.is_awaited:
            self._changed.notify_all()

    def _run(self, job: Callable[[], None]) -> None:
        try:
            job()
        except BaseException as error:  # noqa: BLE001 — whatever it is, those who wait are to hear of it
            with self._lock:
                self._broken = self._broken or error
                self._transfers.wake()
                self._changed.notify_all()

    # What becomes of reads and writes: see `penstock.kv.transfers.Owner`.

    def read_is_over(self, chunk: Chunk, result: int) -> None:
        if chunk.fetch.is_cancelled or self._ending:
            self._forget(chunk)
        elif result != chunk.size_bytes:
            self.chunk_has_failed(chunk, failure(self._name, "reading", chunk.fetch.tensor, chunk.run, result))
        else:
            self._direct_bytes += result
            self._copiers.hand_over(chunk)

    def write_is_over(self, write: Write, result: int) -> None:
        if result == write.size_bytes:
            self._written_bytes += result
        elif not write.is_again and not self._ending:
            self._tried_again += 1
            write.is_again = True
            self._transfers.write_again(write)
            return
        else:
            write.tensor.error = write.tensor.error or failure(self._name, "writing", write.tensor, write.run, result)
        write.tensor.writing.difference_update(range(write.run.first, write.run.last))
        self._transfers.give_back(write)
        self._changed.notify_all()

    # What becomes of chunks: see `penstock.kv.copiers.Owner`.

    def chunk_was_copied(self, chunk: Chunk, taken_s: float) -> None:
        fetch = chunk.fetch
        if not fetch.is_cancelled and fetch.error is None:
            if chunk.source is not Source.DEVICE:
                self._cached_bytes += chunk.size_bytes
            if not chunk.is_in_memory:
                self._transfers.copied(chunk, taken_s)
        self._finish(chunk)
        if not chunk.is_in_memory:
            self._transfers.pump_if_short()

    def chunk_has_failed(self, chunk: Chunk, error: KVError) -> None:
        """Try once more, from the device; then the fetch has failed."""
        if chunk.is_again or chunk.fetch.is_cancelled or self._ending:
            chunk.fetch.error = chunk.fetch.error or error
            self._finish(chunk)
            return
        self._transfers.give_back(chunk)
        again = list(self._cut_to_read(chunk.fetch, chunk.run.first, chunk.run.last, is_again=True))
        self._tried_again += len(again)
        self._do_instead(chunk, again)

    def chunk_was_taken_back(self, chunk: Chunk) -> None:
        if chunk.fetch.is_cancelled or self._ending:
            self._finish(chunk)
            return
        assert self._kept is not None
        self._kept.forget_lost(chunk.fetch.tensor, chunk.run)
        instead = list(self._cut_kept(chunk.fetch, chunk.run, self._kept))
        for part in instead:
            if part.source is Source.DEVICE:
                part.was_taken = True
                self._taken_back_bytes += part.size_bytes
        self._do_instead(chunk, instead)

    def _do_instead(self, chunk: Chunk, instead: list[Chunk]) -> None:
        """Have a chunk in other pieces; those from the device before all others."""
        chunk.fetch.left += len(instead) - 1
        self._transfers.read_first(part for part in instead if part.source is Source.DEVICE)
        for part in instead:
            if part.source is Source.MEMORY:
                self._copiers.hand_over(part)
        self._transfers.pump()

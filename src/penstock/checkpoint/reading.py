"""From files to memory: direct reads into the memory that the tensors then have.

What is in the page cache is copied from it. Each span of a file is read into anonymous memory that mirrors it: a
byte's address is its offset in the file, modulo 2 MiB. So reads of whole blocks land where they belong, in whole huge
pages, and tensors are views of that memory.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import weakref
from collections.abc import Generator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from penstock.checkpoint.base import FileIdentity, TensorInfo, open_regular
from penstock.checkpoint.feeding import Feeder
from penstock.checkpoint.plan import Runs, Span, chunks, copy_runs, holds_runs, last_reads
from penstock.errors import CheckpointError
from penstock.linux.pagecache import FileResidency
from penstock.storage.base import BLOCK_BYTES, READ, REQUEST_DTYPE, Completions, Engine, Requests, batch, failure
from penstock.storage.buffers import HUGE_PAGE_BYTES
from penstock.storage.pool import Block, BufferPool
from penstock.units import MiB, format_size

READ_BYTES = 4 * MiB  # chosen without measurement
_GATHER_BYTES = 64 * MiB  # in flight for slices in pieces; chosen without measurement
_RETURNED_BYTES = 1 * MiB  # tensors from this size give their memory back one by one
_MADV_HUGEPAGE = 14
DIRECT, CACHED, BUFFERED = 0, 1, 2  # where the bytes of a read come from


class SourceFile:
    """A file with the descriptors that reading it takes."""

    def __init__(self, file: FileIdentity) -> None:
        self._identity = file
        self.size_bytes = file.size_bytes
        self.buffered = open_regular(file.path)
        self.direct = -1
        try:
            self.check()
            self.direct = open_regular(file.path, os.O_RDONLY | os.O_DIRECT)
            file.check(self.direct)  # opened by its path again: it may have been replaced
            with mmap.mmap(-1, BLOCK_BYTES) as block:  # some open it so, and then want another alignment
                os.preadv(self.direct, [block], 0)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                self.close()
                raise
            if self.direct >= 0:
                os.close(self.direct)
                self.direct = -1
        except CheckpointError:
            self.close()
            raise

    @property
    def best(self) -> int:
        """The descriptor for what is not in the page cache."""
        return self.direct if self.direct >= 0 else self.buffered

    def check(self) -> None:
        """Raises CheckpointError where it is not what its header said any more."""
        self._identity.check(self.buffered)

    def close(self) -> None:
        for fd in (self.buffered, self.direct):
            if fd >= 0:
                os.close(fd)
        self.buffered = self.direct = -1


class Arena:
    """Memory that mirrors a span's blocks."""

    def __init__(self, span: Span) -> None:
        self.start = span.block_start
        size_bytes = span.block_stop - span.block_start
        try:
            self._mapping = mmap.mmap(-1, size_bytes + HUGE_PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:
            raise MemoryError(
                f"{span.path}: no {format_size(size_bytes)} of memory for its tensors: {error.strerror}"
            ) from error
        if size_bytes >= HUGE_PAGE_BYTES:
            with contextlib.suppress(OSError):  # a kernel without huge pages
                self._mapping.madvise(_MADV_HUGEPAGE)
        address = ctypes.addressof(ctypes.c_char.from_buffer(self._mapping))
        skip_bytes = (self.start - address) % HUGE_PAGE_BYTES
        self.memory: NDArray[np.uint8] = np.frombuffer(self._mapping, np.uint8, size_bytes, skip_bytes)
        self._skip_bytes = skip_bytes

    def part(self, tensor: TensorInfo) -> NDArray[np.uint8]:
        """A tensor's bytes; its whole pages go back once nobody holds them."""
        start = self._skip_bytes + tensor.start - self.start
        stop = start + tensor.size_bytes
        # Not a slice of self.memory: what is derived from a slice holds the whole, as numpy shortens such chains.
        memory = np.frombuffer(self._mapping, np.uint8, stop - start, start)
        if stop - start >= _RETURNED_BYTES:
            first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
            last = stop // mmap.PAGESIZE * mmap.PAGESIZE
            weakref.finalize(memory, _return, self._mapping, first, last).atexit = False
        return memory


def _return(mapping: mmap.mmap, start: int, stop: int) -> None:
    if start < stop:
        mapping.madvise(mmap.MADV_DONTNEED, start, stop - start)


class Reader:
    """Reads through an engine that is the caller's: what was registered with it goes with `close`."""

    def __init__(self, engine: Engine, files: Mapping[str, SourceFile], counts: dict[int, int]) -> None:
        self._engine = engine
        self._files = files
        self._counts = counts
        self._numbers: dict[int, int] = {}  # descriptor → the engine's number
        self._buffers: list[int] = []

    def _sources(self, file: SourceFile, reads: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The engine's file for each read, and whether that is direct, cached or buffered."""
        is_cached = _cached(file, reads)
        numbers = np.where(is_cached, self._number(file.buffered), self._number(file.best))
        return numbers, np.where(is_cached, CACHED, DIRECT if file.direct >= 0 else BUFFERED)

    def _number(self, fd: int) -> int:
        if fd not in self._numbers:
            self._numbers[fd] = self._engine.add_file(fd)
        return self._numbers[fd]

    def _check(self, done: Completions, paths: Sequence[str], kinds: NDArray[np.int64]) -> None:
        """Each read brought all there is.

        Args:
            paths: of the files, [completions].
            kinds: of the reads, [completions].
        """
        sizes = np.array([self._files[path].size_bytes for path in paths], np.int64)
        wanted = np.minimum(done["length"], sizes - done["offset"])
        for index in np.flatnonzero(done["result"] != wanted).tolist():
            if done[index]["result"] < 0:
                raise failure(done[index], paths[index])
            self._files[paths[index]].check()
            at = int(done[index]["offset"] + done[index]["result"])
            raise CheckpointError(f"{paths[index]}: byte {at}: the file ended here for a moment; load it again")
        for kind in (DIRECT, CACHED, BUFFERED):
            self._counts[kind] += int(done["result"][kinds == kind].sum())

    def close(self) -> None:
        """End what is not read yet, and wait until memory is left alone; a second time does nothing."""
        self._engine.reset()
        while self._buffers:
            self._engine.remove_buffer(self._buffers.pop())
        while self._numbers:
            self._engine.remove_file(self._numbers.popitem()[1])


class SpanReader(Reader):
    """The reads of all spans, in order; iterating yields tensors as they are whole."""

    def __init__(
        self, engine: Engine, files: Mapping[str, SourceFile], counts: dict[int, int], parts: Sequence[Span]
    ) -> None:
        super().__init__(engine, files, counts)
        self._feeder: Feeder | None = None
        self._arenas = [Arena(span) for span in parts]
        self._tensors: list[tuple[int, int, TensorInfo]] = []  # number of the last read, of the span
        self._paths: list[str] = []  # [reads]
        requests: list[Requests] = [np.zeros(0, REQUEST_DTYPE)]
        kinds: list[NDArray[np.int64]] = [np.zeros(0, np.int64)]
        try:
            for number, (span, arena) in enumerate(zip(parts, self._arenas, strict=True)):
                reads = chunks(span.block_start, span.block_stop, READ_BYTES)
                sources, kind = self._sources(files[span.path], reads)
                buffer = engine.add_buffer(arena.memory, pin=False)  # or what is let go would not go back
                self._buffers.append(buffer)
                first = len(self._paths)
                requests.append(
                    batch(
                        READ,
                        file=sources,
                        offset=reads[:, 0],
                        length=reads[:, 1],
                        buffer=buffer,
                        buffer_offset=reads[:, 0] - span.block_start,
                        token=first + np.arange(len(reads)),
                    )
                )
                kinds.append(kind)
                self._paths += [span.path] * len(reads)
                self._tensors += [
                    (first + last, number, tensor)
                    for tensor, last in zip(span.tensors, last_reads(span, reads), strict=True)
                ]
            self._requests = np.concatenate(requests)
            self._kinds = np.concatenate(kinds)  # [reads]
            memory = {buffer: arena.memory for buffer, arena in zip(self._buffers, self._arenas, strict=True)}
            self._feeder = Feeder(engine, self._requests, memory)
        except BaseException:
            self.close()
            raise

    def __iter__(self) -> Generator[tuple[TensorInfo, NDArray[np.uint8], int]]:
        """Each tensor with its memory, and the bytes that have landed since the one before."""
        assert self._feeder is not None
        self._feeder.start()
        is_done = np.zeros(len(self._requests) + 1, bool)  # one more, which never is
        landed = 0  # reads, from the first without a gap
        landed_bytes = 0
        for last, number, tensor in self._tensors:
            while last >= landed:
                done = self._feeder.wait()
                reads = done["token"].astype(np.int64)
                self._check(done, [self._paths[read] for read in reads.tolist()], self._kinds[reads])
                is_done[reads] = True
                landed += int(np.argmin(is_done[landed:]))
                landed_bytes += int(done["result"].sum())
            yield tensor, self._arenas[number].part(tensor), landed_bytes
            landed_bytes = 0

    def close(self) -> None:
        try:
            if self._feeder is not None:
                self._feeder.stop()
        finally:
            super().close()
            if self._feeder is not None:
                self._feeder.close()


class SliceReader(Reader):
    """Slices in pieces: what holds them passes through a few blocks of memory, and they are copied out."""

    def __init__(
        self,
        engine: Engine,
        files: Mapping[str, SourceFile],
        counts: dict[int, int],
        parts: Sequence[tuple[TensorInfo, Runs]],
    ) -> None:
        super().__init__(engine, files, counts)
        self._parts = parts

    def __iter__(self) -> Generator[tuple[TensorInfo, NDArray[np.uint8], int]]:
        """Each slice with its memory, and the bytes that have landed since the one before."""
        if not self._parts:
            return
        with BufferPool(_GATHER_BYTES, READ_BYTES) as pool:
            slabs = pool.add_to(self._engine)
            self._buffers += slabs
            for tensor, where in self._parts:
                target = np.empty(where.run_bytes * where.count, np.uint8)
                yield tensor, target, self._gather(tensor, where, target, pool, slabs)

    def _gather(
        self, tensor: TensorInfo, where: Runs, target: NDArray[np.uint8], pool: BufferPool, slabs: Sequence[int]
    ) -> int:
        """Fill target with the runs; returns how many bytes were read for it."""
        start = tensor.start // BLOCK_BYTES * BLOCK_BYTES
        stop = -(-tensor.stop // BLOCK_BYTES) * BLOCK_BYTES
        reads = chunks(start, stop, READ_BYTES)
        reads = reads[holds_runs(where, reads)]
        sources, kinds = self._sources(self._files[tensor.path], reads)
        blocks: dict[int, Block] = {}  # number of the read → where it goes
        begun = finished = read_bytes = 0
        while finished < len(reads):
            while begun < len(reads) and (block := pool.acquire_nowait()) is not None:
                blocks[begun] = block
                self._engine.submit(
                    batch(
                        READ,
                        file=sources[begun : begun + 1],
                        offset=reads[begun, 0],
                        length=reads[begun, 1],
                        buffer=slabs[block.slab],
                        buffer_offset=block.offset,
                        token=begun,
                    )
                )
                begun += 1
            done = self._engine.wait(1)
            numbers = done["token"].astype(np.int64)
            self._check(done, [tensor.path] * len(done), kinds[numbers])
            for number, result in zip(numbers.tolist(), done["result"].tolist(), strict=True):
                block = blocks.pop(number)
                copy_runs(np.frombuffer(block.memory, np.uint8, result), int(reads[number, 0]), where, target)
                pool.release(block)
                read_bytes += result
            finished += len(done)
        return read_bytes


def _cached(file: SourceFile, reads: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which reads can be had from the page cache, in full."""
    residency = FileResidency(file.buffered)
    found = np.zeros(len(reads), bool)
    start = int(reads[0, 0])
    stop = min(int(reads[-1].sum()), file.size_bytes)
    if residency.exact and residency.resident_bytes(start, stop) == 0:
        return found
    for index, (low, length) in enumerate(reads.tolist()):
        found[index] = residency.is_resident(low, min(low + length, file.size_bytes))
    return found

"""From files to tensors: direct reads into the memory that the tensors then have.

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
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from penstock.checkpoint.base import FileIdentity, TensorInfo, open_regular
from penstock.checkpoint.files import Checkpoint, open_checkpoint
from penstock.checkpoint.frameworks import Framework, FrameworkName, framework_named
from penstock.checkpoint.plan import Slice, Span, chunks, last_reads, runs, spans
from penstock.errors import CheckpointError, UnsupportedError
from penstock.linux.pagecache import FileResidency
from penstock.storage.base import READ, REQUEST_DTYPE, Completions, Engine, Requests, batch, failure
from penstock.storage.buffers import HUGE_PAGE_BYTES
from penstock.storage.choose import EngineName, create_engine
from penstock.units import MiB, format_size

READ_BYTES = 4 * MiB  # chosen without measurement
_RETURNED_BYTES = 1 * MiB  # tensors from this size give their memory back one by one
_MADV_HUGEPAGE = 14
_DIRECT, _CACHED, _BUFFERED = 0, 1, 2

Progress = Callable[[int], None]  # called with the bytes that have landed since the last call


@dataclass(frozen=True, slots=True)
class LoadStatistics:
    """What a load did.

    Attributes:
        engine: that moved the bytes.
        fallback: why it is not the best one; "".
        direct_bytes: read past the page cache.
        cached_bytes: copied from the page cache.
        buffered_bytes: read through the page cache, as the file system has no O_DIRECT.
        seconds: from the first header to the last tensor.
    """

    engine: str
    fallback: str
    direct_bytes: int
    cached_bytes: int
    buffered_bytes: int
    seconds: float

    @property
    def bytes_read(self) -> int:
        """All of them."""
        return self.direct_bytes + self.cached_bytes + self.buffered_bytes


class Tensors(dict[str, Any]):
    """Tensors by name, and how they were loaded."""

    statistics: LoadStatistics


def load_file(
    path: str | os.PathLike[str],
    device: str = "cpu",
    *,
    framework: FrameworkName | Framework = "torch",
    engine: EngineName | Engine = "auto",
) -> Tensors:
    """Load one safetensors file, as safetensors' own load_file does.

    Args:
        path: of the file.
        device: ``cpu``.
        framework: ``torch`` or ``numpy``.
        engine: by name, or one that is there; it stays open then, and nobody else may wait for it meanwhile. ``auto``
            is threads: each begins reads and so pays for its share of fresh memory.

    Raises:
        CheckpointError: the file is damaged, or changes meanwhile.
        UnsupportedError: a dtype that the framework lacks, a device or an engine that cannot be had.
        OSError: it cannot be read.
    """
    if Path(path).is_dir():
        raise CheckpointError(f"{os.fspath(path)}: is a directory; use load_checkpoint")
    return load_checkpoint(path, device=device, framework=framework, engine=engine)


def load_checkpoint(
    path: str | os.PathLike[str],
    *,
    device: str = "cpu",
    names: Sequence[str] | None = None,
    slices: Mapping[str, Slice] | None = None,
    framework: FrameworkName | Framework = "torch",
    engine: EngineName | Engine = "auto",
    progress: Progress | None = None,
) -> Tensors:
    """Load a checkpoint, or some of its tensors, or parts of them; see `stream_checkpoint`."""
    found = Tensors()
    with CheckpointLoad(
        path, device=device, names=names, slices=slices, framework=framework, engine=engine, progress=progress
    ) as load:
        found.update(load)
    found.statistics = load.statistics()
    return found


def stream_checkpoint(
    path: str | os.PathLike[str],
    *,
    device: str = "cpu",
    names: Sequence[str] | None = None,
    slices: Mapping[str, Slice] | None = None,
    framework: FrameworkName | Framework = "torch",
    engine: EngineName | Engine = "auto",
    progress: Progress | None = None,
) -> Iterator[tuple[str, Any]]:
    """Tensors of a checkpoint one by one, as their bytes land: in the order in which they lie in the files.

    Memory is allocated for all of them at once; who wants less names fewer.

    Args:
        path: a safetensors file, an index, or a directory with either.
        device: ``cpu``.
        names: of the tensors wanted; all by default.
        slices: the part that is wanted of a tensor, by its name.
        framework: ``torch`` or ``numpy``.
        engine: as for `load_file`.
        progress: called with the number of bytes that have landed since the last call.

    Raises:
        CheckpointError: the checkpoint is damaged, lacks a tensor, or changes meanwhile. No tensor that was yielded
            before holds wrong bytes, unless the file was overwritten in place.
        UnsupportedError: a dtype that the framework lacks, a device or an engine that cannot be had.
        OSError: it cannot be read.
    """
    with CheckpointLoad(
        path, device=device, names=names, slices=slices, framework=framework, engine=engine, progress=progress
    ) as load:
        yield from load


class CheckpointLoad:
    """A load under way: iterate over it once, in a ``with`` statement. See `stream_checkpoint`."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        device: str = "cpu",
        names: Sequence[str] | None = None,
        slices: Mapping[str, Slice] | None = None,
        framework: FrameworkName | Framework = "torch",
        engine: EngineName | Engine = "auto",
        progress: Progress | None = None,
    ) -> None:
        if device != "cpu":
            raise UnsupportedError(
                f"device {device!r}: tensors are loaded into host memory so far; move them from there"
            )
        self._began_s = time.perf_counter()
        self._framework = framework if isinstance(framework, Framework) else framework_named(framework)
        self._progress = progress or (lambda _: None)
        self._closing = contextlib.ExitStack()
        self._counts: dict[int, int] = {_DIRECT: 0, _CACHED: 0, _BUFFERED: 0}
        self._seconds = 0.0
        checkpoint = open_checkpoint(path)
        self._identities = {header.file.path: header.file for header in checkpoint.headers}
        self._wanted = _wanted(checkpoint, names, slices or {})
        for tensor in self._wanted:
            self._framework.check(tensor)
        self._spans = spans(self._wanted)
        self._files: dict[str, _OpenFile] = {}
        try:
            for span in self._spans:
                if span.path not in self._files:
                    file = self._files[span.path] = _OpenFile(self._identities[span.path])
                    self._closing.callback(file.close)
            self._engine, self._fallback = self._choose(engine)
        except BaseException:
            self._closing.close()
            raise

    def _choose(self, engine: EngineName | Engine) -> tuple[Engine, str]:
        if isinstance(engine, Engine):
            return engine, ""
        # The memory is fresh, and whoever begins a read pays for its pages: 6.4 GB took 2.2 to 2.9 s with eight
        # threads, 3.8 to 6.2 with one that fills a ring.
        chosen, fallback = create_engine("threads" if engine == "auto" else engine)
        self._closing.enter_context(chosen)
        return chosen, fallback

    @property
    def size_bytes(self) -> int:
        """Of the tensors wanted."""
        return sum(tensor.size_bytes for tensor in self._wanted)

    def statistics(self) -> LoadStatistics:
        """What was done so far."""
        return LoadStatistics(
            self._engine.name,
            self._fallback,
            self._counts[_DIRECT],
            self._counts[_CACHED],
            self._counts[_BUFFERED],
            self._seconds or time.perf_counter() - self._began_s,
        )

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        for tensor in self._wanted:
            if not tensor.size_bytes:
                yield tensor.name, self._framework.tensor(tensor, np.zeros(0, np.uint8))
        reading = _Reading(self._engine, self._spans, self._files, self._counts)
        try:
            for tensor, memory, landed_bytes in reading:
                self._progress(landed_bytes)
                yield tensor.name, self._framework.tensor(tensor, memory)
        finally:
            reading.close()
        for file in self._files.values():
            file.check()
        self._seconds = time.perf_counter() - self._began_s

    def close(self) -> None:
        """End it, wherever it is; tensors that were yielded stay."""
        self._closing.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _wanted(checkpoint: Checkpoint, names: Sequence[str] | None, slices: Mapping[str, Slice]) -> list[TensorInfo]:
    chosen = list(checkpoint.tensors) if names is None else list(dict.fromkeys(names))
    for name in [*chosen, *slices]:
        if name not in checkpoint.tensors:
            raise CheckpointError(f"{checkpoint.path}: has no tensor {name!r}")
    found = []
    for name in chosen:
        tensor = checkpoint.tensors[name]
        if name in slices:
            part, where = runs(tensor, slices[name])
            if where.count > 1:
                raise UnsupportedError(
                    f"{tensor.path}: tensor {name!r}: a slice of dimension {slices[name].dimension} lies in "
                    f"{where.count} pieces; only slices in one piece can be loaded so far"
                )
            tensor = part
        found.append(tensor)
    return found


class _OpenFile:
    """A file with the descriptors that reading it takes."""

    def __init__(self, file: FileIdentity) -> None:
        self._identity = file
        self.size_bytes = file.size_bytes
        self.buffered = open_regular(file.path)
        self.direct = -1
        try:
            self.check()
            self.direct = open_regular(file.path, os.O_RDONLY | os.O_DIRECT)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                self.close()
                raise
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


class _Arena:
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


class _Reading:
    """The reads of all spans, in order; iterating yields tensors as they are whole."""

    def __init__(
        self, engine: Engine, parts: Sequence[Span], files: Mapping[str, _OpenFile], counts: dict[int, int]
    ) -> None:
        self._engine = engine
        self._spans = parts
        self._files = files
        self._counts = counts
        self._numbers: dict[int, int] = {}  # descriptor → the engine's number
        self._buffers: list[int] = []
        self._arenas = [_Arena(span) for span in parts]
        self._sizes = np.array([files[span.path].size_bytes for span in parts], np.int64)  # [spans]
        self._tensors: list[tuple[int, int, TensorInfo]] = []  # number of the last read, of the span
        requests: list[Requests] = [np.zeros(0, REQUEST_DTYPE)]
        kinds: list[NDArray[np.int64]] = [np.zeros(0, np.int64)]
        first = 0
        try:
            for number, (span, arena) in enumerate(zip(parts, self._arenas, strict=True)):
                file = files[span.path]
                reads = chunks(span.block_start, span.block_stop, READ_BYTES)
                is_cached = _cached(file, reads)
                buffer = engine.add_buffer(arena.memory)
                self._buffers.append(buffer)
                requests.append(
                    batch(
                        READ,
                        file=np.where(is_cached, self._number(file.buffered), self._number(file.best)),
                        offset=reads[:, 0],
                        length=reads[:, 1],
                        buffer=buffer,
                        buffer_offset=reads[:, 0] - span.block_start,
                        token=first + np.arange(len(reads)),
                    )
                )
                kinds.append(np.where(is_cached, _CACHED, _DIRECT if file.direct >= 0 else _BUFFERED))
                self._tensors += [
                    (first + last, number, tensor)
                    for tensor, last in zip(span.tensors, last_reads(span, reads), strict=True)
                ]
                first += len(reads)
        except BaseException:
            self.close()
            raise
        self._requests = np.concatenate(requests)
        self._kinds = np.concatenate(kinds)  # [reads]
        self._span_of = np.repeat(np.arange(len(parts)), [len(part) for part in requests[1:]])  # [reads]

    def _number(self, fd: int) -> int:
        if fd not in self._numbers:
            self._numbers[fd] = self._engine.add_file(fd)
        return self._numbers[fd]

    def __iter__(self) -> Iterator[tuple[TensorInfo, NDArray[np.uint8], int]]:
        """Each tensor with its memory, and the bytes that have landed since the one before."""
        self._engine.submit(self._requests)
        is_done = np.zeros(len(self._requests) + 1, bool)  # one more, which never is
        landed = 0  # reads, from the first without a gap
        landed_bytes = 0
        for last, number, tensor in self._tensors:
            while last >= landed:
                done = self._engine.wait(1)
                self._check(done)
                is_done[done["token"].astype(np.int64)] = True
                landed += int(np.argmin(is_done[landed:]))
                landed_bytes += int(done["result"].sum())
            yield tensor, self._arenas[number].part(tensor), landed_bytes
            landed_bytes = 0

    def _check(self, done: Completions) -> None:
        reads = done["token"].astype(np.int64)
        spans_ = self._span_of[reads]
        wanted = np.minimum(done["length"], self._sizes[spans_] - done["offset"])
        for index in np.flatnonzero(done["result"] != wanted).tolist():
            path = self._spans[spans_[index]].path
            if done[index]["result"] < 0:
                raise failure(done[index], path)
            self._files[path].check()
            at = int(done[index]["offset"] + done[index]["result"])
            raise CheckpointError(
                f"{path}: byte {at}: the file ended here for a moment; load it again once it is whole"
            )
        for kind in (_DIRECT, _CACHED, _BUFFERED):
            self._counts[kind] += int(done["result"][self._kinds[reads] == kind].sum())

    def close(self) -> None:
        """Cancel what is not read yet, and wait until memory is left alone; a second time does nothing."""
        self._engine.cancel()
        while len(self._engine.wait(max(1, self._engine.in_flight))):
            pass
        while self._buffers:
            self._engine.remove_buffer(self._buffers.pop())
        while self._numbers:
            self._engine.remove_file(self._numbers.popitem()[1])


def _cached(file: _OpenFile, reads: NDArray[np.int64]) -> NDArray[np.bool_]:
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

"""Loading checkpoints: what a user calls."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from penstock.checkpoint.base import TensorInfo, collection_paused
from penstock.checkpoint.files import Checkpoint, open_checkpoint
from penstock.checkpoint.frameworks import Framework, FrameworkName, Torch, framework_named
from penstock.checkpoint.plan import UNBOUNDED, Runs, Slice, Span, rounds, runs, spans
from penstock.checkpoint.reading import BUFFERED, CACHED, DIRECT, SliceReader, SourceFile, SpanReader
from penstock.checkpoint.sending import DeviceReader, to_device
from penstock.device.choose import open_device
from penstock.errors import CheckpointError, UnsupportedError
from penstock.linux.memory import read_memory
from penstock.storage.base import Engine
from penstock.storage.choose import EngineName, create_engine
from penstock.units import format_size

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
        device: as torch names it: ``cpu``, ``cuda``, ``cuda:1``.
        framework: ``torch`` or ``numpy``.
        engine: by name, or one that is there; it stays open then, and nobody else may wait for it meanwhile. ``auto``
            is io_uring where it works, else threads.

    Raises:
        CheckpointError: the file is damaged, or changes meanwhile.
        UnsupportedError: a dtype that the framework lacks, a device or an engine that cannot be had.
        MemoryError: it takes more than there is.
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
    """Load a checkpoint, or some of its tensors, or parts of them; see `stream_checkpoint`.

    Raises:
        MemoryError: they take more memory than there is, in the host or in a cgroup of this process.
    """
    found = Tensors()
    with (
        collection_paused(),
        CheckpointLoad(
            path, device=device, names=names, slices=slices, framework=framework, engine=engine, progress=progress
        ) as load,
    ):
        load.require_memory()
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

    Memory is filled for all of them ahead of their turn; where it is less than they take, in rounds of a quarter of it,
    one after another: who lets go of each tensor needs no more.

    Args:
        path: a safetensors file, an index, or a directory with either.
        device: as torch names it: ``cpu``, ``cuda``, ``cuda:1``.
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
        self._began_s = time.perf_counter()
        self._device = open_device(device)
        self._framework = framework if isinstance(framework, Framework) else framework_named(framework)
        if self._device is not None and not isinstance(self._framework, Torch):
            raise UnsupportedError(f"device {device!r}: only torch has tensors there, so framework must be 'torch'")
        self._progress = progress or (lambda _: None)
        self._closing = contextlib.ExitStack()
        self._counts: dict[int, int] = {DIRECT: 0, CACHED: 0, BUFFERED: 0}
        self._seconds = 0.0
        checkpoint = open_checkpoint(path)
        self._identities = {header.file.path: header.file for header in checkpoint.headers}
        self._wanted, self._scattered = _wanted(checkpoint, names, slices or {})
        for tensor in [*self._wanted, *(part for part, _ in self._scattered)]:
            self._framework.check(tensor)
        self._spans = spans(self._wanted)
        self._path = os.fspath(path)
        self._memory_bytes = sum(span.block_stop - span.block_start for span in self._spans) + sum(
            where.run_bytes * where.count for _, where in self._scattered
        )
        self._most_bytes, self._room = UNBOUNDED, ""
        if self._device is None:
            self._fit()
        self._files: dict[str, SourceFile] = {}
        try:
            for path_ in dict.fromkeys(
                [span.path for span in self._spans] + [part.path for part, _ in self._scattered]
            ):
                file = self._files[path_] = SourceFile(self._identities[path_])
                self._closing.callback(file.close)
            self._engine, self._fallback = self._choose(engine)
        except BaseException:
            self._closing.close()
            raise

    def _choose(self, engine: EngineName | Engine) -> tuple[Engine, str]:
        if isinstance(engine, Engine):
            return engine, ""
        chosen, fallback = create_engine(engine)
        self._closing.enter_context(chosen)
        return chosen, fallback

    def _fit(self) -> None:
        """Where not all fits into memory, have it come in rounds. Swap does not count: a cgroup may have none."""
        try:
            memory = read_memory()
        except (OSError, ValueError):  # no /proc, or one that shows less: load without having looked
            return
        room_bytes = memory.headroom_bytes
        if room_bytes >= self._memory_bytes:
            return
        self._room = f"{format_size(room_bytes)} ({memory.source})"
        if any(tensor.size_bytes > room_bytes for tensor in self._wanted):
            self.require_memory()
        self._most_bytes = room_bytes // 4
        self._spans = spans(self._wanted, most_bytes=self._most_bytes)

    def require_memory(self) -> None:
        """Refuse what cannot all be held: better than to be killed half way.

        Raises:
            MemoryError: there is less memory than the tensors take, in the host or in a cgroup of this process.
        """
        if self._room:
            raise MemoryError(
                f"{self._path}: its tensors take {format_size(self._memory_bytes)}, and {self._room} can be had; load "
                "some of them (names, slices), or take them one by one (stream_checkpoint)"
            )

    @property
    def size_bytes(self) -> int:
        """Of the tensors wanted."""
        pieces = sum(where.run_bytes * where.count for _, where in self._scattered)
        return sum(tensor.size_bytes for tensor in self._wanted) + pieces

    def statistics(self) -> LoadStatistics:
        """What was done so far."""
        return LoadStatistics(
            self._engine.name,
            self._fallback,
            self._counts[DIRECT],
            self._counts[CACHED],
            self._counts[BUFFERED],
            self._seconds or time.perf_counter() - self._began_s,
        )

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        for tensor in self._wanted:
            if not tensor.size_bytes:
                yield tensor.name, self._made(tensor, np.zeros(0, np.uint8))
        common = (self._engine, self._files, self._counts)
        with contextlib.ExitStack() as open_:
            if self._device is not None:
                sending = open_.enter_context(contextlib.closing(DeviceReader(*common, self._spans, self._device)))
                with contextlib.closing(iter(sending)) as sent:
                    for tensor, memory, landed_bytes in sent:
                        self._progress(landed_bytes)
                        yield tensor.name, self._on_device(tensor, memory)
            else:
                for parts in rounds(self._spans, self._most_bytes):
                    yield from self._round(parts)
            gathering = open_.enter_context(contextlib.closing(SliceReader(*common, self._scattered)))
            with contextlib.closing(iter(gathering)) as slices:
                for tensor, bytes_, landed_bytes in slices:
                    self._progress(landed_bytes)
                    yield tensor.name, self._made(tensor, bytes_)
        for file in self._files.values():
            file.check()
        self._seconds = time.perf_counter() - self._began_s

    def _round(self, parts: Sequence[Span]) -> Iterator[tuple[str, Any]]:
        """Tensors in host memory, of which nothing is held here once they are yielded."""
        with contextlib.closing(SpanReader(self._engine, self._files, self._counts, parts)) as reading:
            for tensor, bytes_, landed_bytes in reading:
                self._progress(landed_bytes)
                made = [self._framework.tensor(tensor, bytes_)]
                del bytes_
                yield tensor.name, made.pop()

    def _made(self, tensor: TensorInfo, memory: NDArray[np.uint8]) -> Any:
        """A tensor where it is wanted, of bytes in host memory."""
        if self._device is None:
            return self._framework.tensor(tensor, memory)
        return self._on_device(tensor, to_device(self._device, memory))

    def _on_device(self, tensor: TensorInfo, memory: Any) -> Any:
        assert isinstance(self._framework, Torch)
        return self._framework.on_device(tensor, memory)

    def close(self) -> None:
        """End it, wherever it is; tensors that were yielded stay."""
        self._closing.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _wanted(
    checkpoint: Checkpoint, names: Sequence[str] | None, slices: Mapping[str, Slice]
) -> tuple[list[TensorInfo], list[tuple[TensorInfo, Runs]]]:
    """What is wanted in one piece, and the slices that lie in several."""
    chosen = list(checkpoint.tensors) if names is None else list(dict.fromkeys(names))
    for name in [*chosen, *slices]:
        if name not in checkpoint.tensors:
            raise CheckpointError(f"{checkpoint.path}: has no tensor {name!r}")
    found: list[TensorInfo] = []
    scattered: list[tuple[TensorInfo, Runs]] = []
    for name in chosen:
        tensor = checkpoint.tensors[name]
        if name in slices:
            part, where = runs(tensor, slices[name])
            if where.count > 1 and part.size_bytes:
                scattered.append((part, where))
                continue
            tensor = part
        found.append(tensor)
    return found, scattered

"""The same random transfers, by an engine, a plain loop and fio."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from bench.errors import BenchError, RunError
from penstock.storage.base import READ, WRITE, Engine, batch
from penstock.storage.buffers import huge_buffer
from penstock.storage.threads import ThreadEngine
from penstock.storage.uring import UringEngine
from penstock.units import KiB, MiB, format_size

PAGE_BYTES = 4 * KiB  # each holds its own number, at the beginning of each sector
_SECTOR_WORDS = 512 // 8
_REST = np.random.default_rng(0).integers(0, 1 << 63, PAGE_BYTES // 8, np.uint64)  # what else a page holds
_SPREAD = np.uint64(0x9E3779B97F4A7C15)
_DRAWN = 1 << 20  # offsets: what 4 KiB requests take in ten seconds


@dataclass(frozen=True, slots=True)
class Shape:
    """What is asked for."""

    block_bytes: int
    depth: int
    operation: int  # READ or WRITE

    def __str__(self) -> str:
        verb = "read" if self.operation == READ else "write"
        return f"{verb} {format_size(self.block_bytes)} × {self.depth}"


@dataclass(frozen=True, slots=True)
class Figure:
    """What came of it."""

    bytes_per_s: float
    requests_per_s: float
    cpu_s_per_gb: float


SHAPES = tuple(
    Shape(block_bytes, depth, operation)
    for operation in (READ, WRITE)
    for block_bytes, depth in ((4 * KiB, 64), (128 * KiB, 32), (1 * MiB, 16), (4 * MiB, 8))
)


def make_file(path: Path, size_bytes: int) -> None:
    """A file whose every page holds its own number, in each sector."""
    with path.open("wb") as file:
        for start in range(0, size_bytes, 16 * MiB):
            file.write(_contents(start, min(16 * MiB, size_bytes - start)).tobytes())
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def check_file(path: Path) -> None:
    """Raises RunError where the file, read through the page cache, is not what it should be."""
    with path.open("rb") as file:
        start = 0
        while data := file.read(16 * MiB):
            if data != _contents(start, len(data)).tobytes():
                raise RunError(f"{path}: wrong bytes within {start}–{start + len(data)}")
            start += len(data)
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _contents(start: int, size_bytes: int) -> NDArray[np.uint64]:
    """Of a part of the file."""
    pages = np.arange(start // PAGE_BYTES, (start + size_bytes) // PAGE_BYTES, dtype=np.uint64)
    words = np.tile(_REST, (len(pages), 1))
    words[:, ::_SECTOR_WORDS] = (pages * _SPREAD)[:, None]
    return words.reshape(-1)


class _Offsets:
    """Random blocks of a file, without an end; drawn before anything is timed, as they are no engine's work."""

    def __init__(self, size_bytes: int, block_bytes: int, seed: int) -> None:
        random = np.random.default_rng(seed)
        self._offsets = random.integers(0, size_bytes // block_bytes, _DRAWN) * block_bytes
        self._taken = 0

    def take(self, count: int) -> NDArray[np.int64]:
        if self._taken + count > _DRAWN:
            self._taken = 0
        self._taken += count
        return self._offsets[self._taken - count : self._taken]


def _cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def with_engine(
    make: Callable[[], Engine], path: Path, shape: Shape, seconds: float, seed: int, *, is_timed: bool = False
) -> Figure:
    """By one of penstock's engines, which is made so that it has no more than the shape's depth under way.

    Three times as many requests wait in the engine: batches are what it is for. What is written is what belongs there,
    but where it is timed: then it is what the memory holds, as that is no engine's work.
    """
    size_bytes = path.stat().st_size
    offsets = _Offsets(size_bytes, shape.block_bytes, seed)
    blocks = 4 * shape.depth
    memory = np.frombuffer(huge_buffer(blocks * shape.block_bytes), np.uint8)
    memory[:] = np.tile(_REST.view(np.uint8), len(memory) // PAGE_BYTES)
    places = np.arange(blocks) * shape.block_bytes
    fd = os.open(path, os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC)
    try:
        with make() as engine:
            file, buffer = engine.add_file(fd), engine.add_buffer(memory)

            def begin(free: NDArray[np.int64]) -> None:
                at = offsets.take(len(free))
                if shape.operation == WRITE and not is_timed:
                    _stamp(memory, free, at, shape.block_bytes)
                engine.submit(
                    batch(
                        shape.operation,
                        file=file,
                        offset=at,
                        length=shape.block_bytes,
                        buffer=buffer,
                        buffer_offset=free,
                    )
                )

            cpu_s, begun_s = _cpu_s(), time.perf_counter()
            begin(places)
            requests = 0
            while True:
                done = engine.wait(shape.depth)
                if (done["result"] != shape.block_bytes).any():
                    raise RunError(f"{engine.name}: {shape}: results {np.unique(done['result']).tolist()}")
                requests += len(done)
                if time.perf_counter() - begun_s >= seconds:
                    break
                begin(done["buffer_offset"])
            elapsed_s, cpu_s = time.perf_counter() - begun_s, _cpu_s() - cpu_s
            rest = engine.wait(engine.in_flight)
            if shape.operation == READ:
                for part in (done, rest):
                    _check(memory, part["buffer_offset"], part["offset"], shape.block_bytes)
    finally:
        os.close(fd)
    return _figure(requests, shape, elapsed_s, cpu_s)


def plain(path: Path, shape: Shape, seconds: float, seed: int, *, is_timed: bool = False) -> Figure:
    """One call after another, in one thread; what is written is as in `with_engine`."""
    offsets = _Offsets(path.stat().st_size, shape.block_bytes, seed)
    buffer = huge_buffer(shape.block_bytes)
    memory = np.frombuffer(buffer, np.uint8)
    memory[:] = np.tile(_REST.view(np.uint8), len(memory) // PAGE_BYTES)
    first = np.zeros(1, np.int64)
    fd = os.open(path, os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC)
    try:
        cpu_s, begun_s = _cpu_s(), time.perf_counter()
        requests = 0
        while time.perf_counter() - begun_s < seconds:
            at = offsets.take(1)
            if shape.operation == READ:
                moved = os.preadv(fd, [buffer], int(at[0]))
            else:
                if not is_timed:
                    _stamp(memory, first, at, shape.block_bytes)
                moved = os.pwritev(fd, [buffer], int(at[0]))
            if moved != shape.block_bytes:
                raise RunError(f"plain: {shape}: {moved} bytes")
            requests += 1
        elapsed_s, cpu_s = time.perf_counter() - begun_s, _cpu_s() - cpu_s
        if shape.operation == READ:
            _check(memory, first, at, shape.block_bytes)
    finally:
        os.close(fd)
    return _figure(requests, shape, elapsed_s, cpu_s)


def fio(path: Path, shape: Shape, seconds: float, seed: int) -> Figure:
    """By fio; writes leave the file with fio's bytes."""
    if shutil.which("fio") is None:
        raise BenchError("fio is not installed (the package of that name, from the distribution)")
    verb = "randread" if shape.operation == READ else "randwrite"
    done = subprocess.run(
        [
            "fio", "--name=io", f"--filename={path}", f"--rw={verb}", f"--bs={shape.block_bytes}",
            f"--iodepth={shape.depth}", "--direct=1", "--ioengine=io_uring", "--registerfiles", "--fixedbufs",
            "--time_based", f"--runtime={seconds}", f"--randseed={seed}", "--norandommap", "--output-format=json",
            "--allow_file_create=0", f"--size={path.stat().st_size}",
        ],
        capture_output=True,
        text=True,
        check=False,
    )  # fmt: skip
    if done.returncode:
        raise RunError(f"fio ended with {done.returncode}: {done.stderr.strip() or done.stdout.strip()}")
    job = json.loads(done.stdout)["jobs"][0]
    side = job["read" if shape.operation == READ else "write"]
    elapsed_s = side["runtime"] / 1e3
    cpu_s = (job["usr_cpu"] + job["sys_cpu"]) / 100 * elapsed_s
    return Figure(side["bw_bytes"], side["iops"], cpu_s / (side["io_bytes"] / 1e9))


def _figure(requests: int, shape: Shape, elapsed_s: float, cpu_s: float) -> Figure:
    moved_bytes = requests * shape.block_bytes
    return Figure(moved_bytes / elapsed_s, requests / elapsed_s, cpu_s / (moved_bytes / 1e9))


def _stamp(memory: NDArray[np.uint8], places: NDArray[np.int64], offsets: NDArray[np.int64], block_bytes: int) -> None:
    """Make blocks of memory, which hold some pages of the file, what belongs at those offsets of it."""
    words = memory.view(np.uint64).reshape(-1, PAGE_BYTES // 8)[:, ::_SECTOR_WORDS]  # [pages, sectors]
    pages = np.arange(block_bytes // PAGE_BYTES)
    at = (places[:, None] // PAGE_BYTES + pages).ravel()
    numbers = (offsets[:, None] // PAGE_BYTES + pages).ravel().astype(np.uint64)
    words[at] = (numbers * _SPREAD)[:, None]


def _check(memory: NDArray[np.uint8], places: NDArray[np.int64], offsets: NDArray[np.int64], block_bytes: int) -> None:
    for place, offset in zip(places.tolist(), offsets.tolist(), strict=True):
        if memory[place : place + block_bytes].tobytes() != _contents(offset, block_bytes).tobytes():
            raise RunError(f"wrong bytes in the block of offset {offset}")


def check_engine(make: Callable[[], Engine], path: Path) -> None:
    """Read the whole file with an engine and look at every byte."""
    size_bytes, block_bytes = path.stat().st_size, 1 * MiB
    memory = np.frombuffer(huge_buffer(16 * block_bytes), np.uint8)
    fd = os.open(path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
    try:
        with make() as engine:
            file, buffer = engine.add_file(fd), engine.add_buffer(memory)
            for start in range(0, size_bytes, len(memory)):
                offset = np.arange(start, min(size_bytes, start + len(memory)), block_bytes)
                engine.submit(
                    batch(
                        READ, file=file, offset=offset, length=block_bytes, buffer=buffer, buffer_offset=offset - start
                    )
                )
                done = engine.wait(len(offset))
                if (done["result"] != block_bytes).any():
                    raise RunError(f"{engine.name}: results {np.unique(done['result']).tolist()}")
                _check(memory, done["buffer_offset"], done["offset"], block_bytes)
    finally:
        os.close(fd)


class Arm(Protocol):
    """One of what is compared, for a shape."""

    def __call__(self, path: Path, seconds: float, seed: int, *, is_timed: bool) -> Figure: ...


def arms(shape: Shape) -> dict[str, Arm]:
    """What is compared, by name."""

    def by_fio(path: Path, seconds: float, seed: int, *, is_timed: bool) -> Figure:  # noqa: ARG001
        return fio(path, shape, seconds, seed)

    def by_uring(path: Path, seconds: float, seed: int, *, is_timed: bool) -> Figure:
        return with_engine(lambda: UringEngine(shape.depth), path, shape, seconds, seed, is_timed=is_timed)

    def by_threads(path: Path, seconds: float, seed: int, *, is_timed: bool) -> Figure:
        count = min(shape.depth, 16)
        return with_engine(lambda: ThreadEngine(count), path, shape, seconds, seed, is_timed=is_timed)

    def by_plain(path: Path, seconds: float, seed: int, *, is_timed: bool) -> Figure:
        return plain(path, shape, seconds, seed, is_timed=is_timed)

    return {"fio": by_fio, "uring": by_uring, "threads": by_threads, "plain": by_plain}

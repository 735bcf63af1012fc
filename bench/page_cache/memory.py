"""The state of memory before a run: full of ballast, and the model in it or not."""

from __future__ import annotations

import mmap
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

from bench.page_cache.errors import BenchError, RunError
from penstock.linux.pagecache import FileResidency, drop
from penstock.units import GiB, MiB, format_size

FREE_BYTES = 600 * MiB  # left free: an order of magnitude above the watermarks of a 24 GB machine
STEP_BYTES = 64 * MiB
READ_BYTES = 8 * MiB
COLD_SHARE = 0.01
RESIDENT_SHARE = 0.99
_THREADS = 2
_SETTLE_S = 2.0
_SETTLED_BYTES = 1 * GiB  # less makes no difference that can be measured
_STALLED_BYTES = 512 * MiB


def meminfo(name: str) -> int:
    """A line of /proc/meminfo, in bytes."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) << 10
    raise BenchError(f"/proc/meminfo has no {name}")


class Ballast:
    """Old, clean page cache that keeps memory full, and the way to make a model cold without freeing memory.

    Args:
        path: the sparse file; made here, removed by `close`. None: no ballast, for tests of the benchmark.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._pool = ThreadPoolExecutor(_THREADS)
        self._buffers = [mmap.mmap(-1, READ_BYTES) for _ in range(_THREADS)]
        self._position = 0
        if path is None:
            return
        self._size_bytes = -(-meminfo("MemTotal") * 4 // 3 // GiB) * GiB
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        os.ftruncate(self._fd, self._size_bytes)
        self._residency = FileResidency(self._fd)
        for buffer in self._buffers:
            buffer.write(bytes(READ_BYTES))

    def __enter__(self) -> Ballast:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give the memory back and remove the file."""
        self._pool.shutdown()
        if self._path is not None:
            os.close(self._fd)
            self._path.unlink(missing_ok=True)
            self._path = None

    def fill(self) -> None:
        """Read ballast until little memory is free."""
        if self._path is None:
            return
        least_bytes, since_bytes = meminfo("MemFree"), 0
        while (excess_bytes := meminfo("MemFree") - FREE_BYTES) > 0:
            wanted = min(excess_bytes // READ_BYTES + 1, STEP_BYTES // READ_BYTES)
            starts = self._next(wanted)
            since_bytes += sum(self._pool.map(self._read, [self._fd] * wanted, range(wanted), starts))
            if excess_bytes + FREE_BYTES < least_bytes:
                least_bytes, since_bytes = excess_bytes + FREE_BYTES, 0
            elif since_bytes > _STALLED_BYTES:  # the kernel reclaims as fast as we read: memory is full
                if least_bytes > 2 * FREE_BYTES:
                    raise BenchError(
                        f"{format_size(least_bytes)} stay free although {format_size(since_bytes)} of ballast were "
                        "read; is the benchmark in a cgroup with a memory limit, or does another process free memory?"
                    )
                return

    def _next(self, count: int) -> list[int]:
        """Offsets of the next reads; ballast that is still cached is passed over, not made young."""
        reads: list[int] = []
        passed_bytes = 0
        while len(reads) < count:
            start = self._position
            self._position = (start + READ_BYTES) % self._size_bytes
            if self._residency.resident_bytes(start, start + READ_BYTES) < READ_BYTES // 2:
                reads.append(start)
            elif (passed_bytes := passed_bytes + READ_BYTES) > self._size_bytes:
                raise BenchError("all of the ballast is cached and memory is still free")
        return reads

    def _read(self, fd: int, index: int, start: int) -> int:
        # Two reads may meet in a buffer: nobody looks at what they read.
        return os.preadv(fd, [self._buffers[index % _THREADS]], start)

    def make_cold(self, files: list[Path]) -> None:
        """Swap the files' pages against ballast.

        Raises:
            RunError: more than 1 % stayed.
        """
        for path in files:
            with path.open("rb") as file:
                fd, size_bytes = file.fileno(), path.stat().st_size
                residency = FileResidency(fd)
                for start in range(0, size_bytes, STEP_BYTES):
                    stop = min(start + STEP_BYTES, size_bytes)
                    if residency.resident_bytes(start, stop):
                        drop(fd, start, stop)
                        self.fill()
                drop(fd)  # folios that lay across two steps
        self.fill()
        if self._path is None and sum(path.stat().st_size for path in files) >= _SETTLED_BYTES:
            time.sleep(_SETTLE_S)  # until the host has what it takes back: every run is to begin alike
        if (share := resident_share(files)) > COLD_SHARE:
            raise RunError(f"{share:.1%} of the model is still cached; another process maps it")

    def make_resident(self, files: list[Path]) -> None:
        """Read the files into the cache from start to end, in place of ballast.

        Raises:
            RunError: less than 99 % is cached afterwards.
        """
        for path in files:
            with path.open("rb", buffering=0) as file:
                residency = FileResidency(file.fileno())
                size_bytes = path.stat().st_size
                starts = [
                    start
                    for start in range(0, size_bytes, READ_BYTES)
                    if not residency.is_resident(start, min(start + READ_BYTES, size_bytes))
                ]
                count = len(starts)
                list(self._pool.map(self._read, [file.fileno()] * count, range(count), starts))
        self.fill()
        if (share := resident_share(files)) < RESIDENT_SHARE:
            raise RunError(f"only {share:.1%} of the model can be kept in the cache; it needs more memory")


def resident_share(files: list[Path]) -> float:
    """The share of the files' bytes that is cached."""
    cached_bytes = 0
    for path in files:
        with path.open("rb") as file:
            cached_bytes += FileResidency(file.fileno()).resident_bytes(0, path.stat().st_size)
    return cached_bytes / sum(path.stat().st_size for path in files)

"""The state of memory before a run: full of old page cache or free, and the model in it or not."""

from __future__ import annotations

import mmap
import os
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

from bench.errors import BenchError, RunError
from penstock.linux.pagecache import FileResidency, drop, populate
from penstock.units import GiB, MiB, format_size

# kswapd itself keeps about 1.6 GiB free while blocks of 2 MiB are asked for. The free pages have been away with the
# host for long: the run is to get those that are dropped for it, so ballast goes as soon as it takes any.
MOST_FREE_BYTES = 2 * GiB
LEAST_FREE_BYTES = MOST_FREE_BYTES - 192 * MiB
STEP_BYTES = 64 * MiB
READ_BYTES = 8 * MiB
COLD_SHARE = 0.01
RESIDENT_SHARE = 0.99
_DROP_BYTES = 256 * MiB
_FRESH_BYTES = 512 * MiB
_THREADS = 2
_FILL_ATTEMPTS = 10
_SETTLING_READS = 3  # until no read moves a page from one of the kernel's lists to another
_KEEPER_INTERVAL_S = 0.005
_SETTLE_S = 2.0
_TOLERATED_BYTES = 4 * GiB  # kswapd was seen to keep 2.4 GiB more than usual, after hours of other work
_SETTLED_BYTES = 1 * GiB  # less makes no difference that can be measured
# No offset is read again before the kernel has forgotten it: that would make its pages young. Where kswapd frees what
# is held, 40 arms of 3 rounds came to the end of 8 TiB.
_BALLAST_FILE_BYTES = 8 << 40


def meminfo(name: str) -> int:
    """A line of /proc/meminfo, in bytes."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) << 10
    raise BenchError(f"/proc/meminfo has no {name}")


class Ballast:
    """Old, clean page cache that keeps memory full, as on a machine that has been up for a while.

    It is there for virtual machines whose host takes freed memory back: a page that has been away costs the
    guest 3 to 9 µs at its first touch (1.2 to 3.5 s a GB), whoever touches it, and how many have been away is
    chance. With ballast every run gets its memory from pages that were in use until then. A thread drops ballast
    as the run takes memory, so that no run waits for reclaim.

    Args:
        path: the sparse file; made here, removed by `close`. None: no ballast, memory is free.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._pool = ThreadPoolExecutor(_THREADS)
        self._buffers = [mmap.mmap(-1, READ_BYTES) for _ in range(_THREADS)]
        self._next_start = 0
        self._held: deque[int] = deque()
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._least_free_bytes = LEAST_FREE_BYTES
        if path is None:
            return
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        os.ftruncate(self._fd, _BALLAST_FILE_BYTES)
        self._keeper = threading.Thread(target=self._keep, name="ballast-keeper", daemon=True)
        self._keeper.start()

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
            self._closing.set()
            self._keeper.join()
            os.close(self._fd)
            self._path.unlink(missing_ok=True)
            self._path = None

    @property
    def holds(self) -> bool:
        """Whether there is ballast at all."""
        return self._path is not None

    def fill(self) -> None:
        """Hold memory until little is free.

        Raises:
            BenchError: it cannot be filled.
        """
        if self._path is None:
            return
        self._least_free_bytes = LEAST_FREE_BYTES
        taken_bytes = 0
        while (excess_bytes := meminfo("MemFree") - MOST_FREE_BYTES) > 0:
            steps = min(excess_bytes // STEP_BYTES + 1, _THREADS)
            list(self._pool.map(self._hold, range(steps)))
            taken_bytes += steps * STEP_BYTES
            if taken_bytes > 2 * meminfo("MemTotal"):
                if excess_bytes < _TOLERATED_BYTES:  # others free and take memory too, the kernel for one
                    return
                raise BenchError(
                    f"{format_size(excess_bytes)} stay free although {format_size(taken_bytes)} of ballast were "
                    "read; is the benchmark in a cgroup with a memory limit, or does another process free memory?"
                )

    def freshen(self) -> None:
        """Let go of some ballast, and have as much free as that from now on: what is taken next was in use until now.

        Without it a run begins with the pages that stay free all the time, which the host has taken back: the first
        250 MiB of a load took 0.25 s, in which the disk could have read 700.
        """
        if self._path is None:
            return
        while self._held and meminfo("MemFree") < MOST_FREE_BYTES + _FRESH_BYTES:
            self._drop_one()
        self._least_free_bytes = MOST_FREE_BYTES + _FRESH_BYTES - STEP_BYTES

    def _drop_one(self) -> None:
        with self._lock:
            start = self._held.popleft()
        drop(self._fd, start, start + STEP_BYTES)

    def _hold(self, _: int) -> None:
        with self._lock:
            start = self._next_start
            self._next_start = (start + STEP_BYTES) % _BALLAST_FILE_BYTES
        populate(self._fd, start, start + STEP_BYTES)
        with self._lock:
            self._held.append(start)

    def _keep(self) -> None:
        while not self._closing.wait(_KEEPER_INTERVAL_S):
            while self._held and meminfo("MemFree") < self._least_free_bytes:
                self._drop_one()

    def make_cold(self, files: list[Path]) -> None:
        """Drop the files' pages, and hold the memory that they leave.

        Raises:
            RunError: more than 1 % stayed.
        """
        for path in files:
            with path.open("rb") as file:
                for start in range(0, path.stat().st_size, _DROP_BYTES):  # in steps: free memory does not stay long
                    drop(file.fileno(), start, start + _DROP_BYTES)
                    self.fill()
                drop(file.fileno())  # folios that lay across two steps
        if self._path is None and sum(path.stat().st_size for path in files) >= _SETTLED_BYTES:
            time.sleep(_SETTLE_S)  # until the host has what it takes back: every run is to begin alike
        if (share := resident_share(files)) > COLD_SHARE:
            raise RunError(f"{share:.1%} of the model is still cached; another process maps it")

    def make_resident(self, files: list[Path]) -> None:
        """Read the files into the cache from start to end, in place of ballast, and as often as it takes to be at rest.

        The first who reads pages that were read once has them moved to the active list: 6.4 GB in small folios took
        `read()` 0.8 to 1.3 s once and then 0.45, whoever it was that came first.

        Raises:
            RunError: less than 99 % is cached afterwards.
        """
        was_filled = False
        for _ in range(_FILL_ATTEMPTS):  # the kernel may take old pages of the model while new ones are read
            for path in files:
                was_filled |= self._fill_in(path)
            self.fill()
            share = resident_share(files)
            if share >= RESIDENT_SHARE:
                if was_filled:
                    self._settle(files)
                return
        raise RunError(f"only {share:.1%} of the model can be kept in the cache; it needs more memory")

    def _settle(self, files: list[Path]) -> None:
        for path in files * _SETTLING_READS:
            with path.open("rb", buffering=0) as file:
                self._read_all(file.fileno(), range(0, path.stat().st_size, READ_BYTES))

    def _fill_in(self, path: Path) -> bool:
        """Read what is not cached; whether there was any."""
        with path.open("rb", buffering=0) as file:
            residency = FileResidency(file.fileno())
            size_bytes = path.stat().st_size
            starts = [
                start
                for start in range(0, size_bytes, READ_BYTES)
                if not residency.is_resident(start, min(start + READ_BYTES, size_bytes))
            ]
            self._read_all(file.fileno(), starts)
            return bool(starts)

    def _read_all(self, fd: int, starts: Sequence[int]) -> None:
        count = len(starts)
        list(self._pool.map(self._read, [fd] * count, range(count), starts))

    def _read(self, fd: int, index: int, start: int) -> int:
        # Two reads may meet in a buffer: nobody looks at what they read.
        return os.preadv(fd, [self._buffers[index % _THREADS]], start)


def resident_share(files: list[Path]) -> float:
    """The share of the files' bytes that is cached."""
    cached_bytes = 0
    for path in files:
        with path.open("rb") as file:
            cached_bytes += FileResidency(file.fileno()).resident_bytes(0, path.stat().st_size)
    return cached_bytes / sum(path.stat().st_size for path in files)

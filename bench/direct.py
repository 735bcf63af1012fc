"""The disk's own speed: the model's files read with O_DIRECT, past the page cache."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue

from bench.errors import BenchError
from penstock.storage.buffers import huge_buffer
from penstock.units import MiB

_THREADS = 8
_READ_BYTES = 4 * MiB


@contextmanager
def opened(path: Path) -> Iterator[int]:
    """A descriptor of the file opened with O_DIRECT.

    Raises:
        BenchError: the file system has no O_DIRECT.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
    except OSError as error:
        raise BenchError(f"{path}: the file system has no O_DIRECT; give --dir on a disk") from error
    try:
        yield fd
    finally:
        os.close(fd)


def bandwidth(files: list[Path]) -> float:
    """Bytes a second over all of the files: 8 threads, 4 MiB a read, into huge pages touched before."""
    buffers: SimpleQueue[memoryview] = SimpleQueue()
    for _ in range(_THREADS):
        buffers.put(huge_buffer(_READ_BYTES))

    def read(fd: int, start: int) -> int:
        buffer = buffers.get()
        try:
            return os.preadv(fd, [buffer], start)
        finally:
            buffers.put(buffer)

    total_bytes, seconds = 0, 0.0
    with ThreadPoolExecutor(_THREADS) as pool:
        for path in files:
            with opened(path) as fd:
                starts = range(0, path.stat().st_size, _READ_BYTES)
                begin = time.perf_counter()
                got_bytes = sum(pool.map(read, [fd] * len(starts), starts))
                seconds += time.perf_counter() - begin
            if got_bytes != path.stat().st_size:
                raise BenchError(f"{path}: O_DIRECT read {got_bytes} bytes of {path.stat().st_size}")
            total_bytes += got_bytes
    return total_bytes / seconds


def fio_bandwidth(path: Path) -> float | None:
    """The same as fio sees it (1 MiB, 32 deep, 5 s at most), to compare; None where fio is not installed."""
    if shutil.which("fio") is None:
        return None
    done = subprocess.run(
        [
            "fio", "--name=limit", f"--filename={path}", "--readonly", "--rw=read", "--bs=1M", "--direct=1",
            "--ioengine=libaio", "--iodepth=32", "--runtime=5", "--output-format=json",
        ],
        capture_output=True,
        text=True,
        check=False,
    )  # fmt: skip
    try:
        return float(json.loads(done.stdout)["jobs"][0]["read"]["bw_bytes"])
    except (ValueError, KeyError, IndexError):
        return None

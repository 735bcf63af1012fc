"""What a device can deliver: measured with direct reads of a file that is there already."""

from __future__ import annotations

import errno
import itertools
import os
import threading
import time

from penstock.storage.buffers import huge_buffer
from penstock.units import MiB

# 32 MiB in flight; chosen without measurement.
_THREADS = 8
_CHUNK_BYTES = 4 * MiB
_SMALLEST_FILE_BYTES = 64 * MiB
# EINVAL: the file system has no O_DIRECT, or wants a stricter alignment than 4 KiB buffers and 4 MiB offsets.
_REFUSALS = (errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM, errno.EACCES)


def measure_read_bandwidth(
    path: str | os.PathLike[str],
    seconds: float = 0.5,
    *,
    threads: int = _THREADS,
    smallest_file_bytes: int = _SMALLEST_FILE_BYTES,
) -> float | None:
    """Bytes per second that large direct reads of a file reach, past the page cache; None where it is unknown.

    The page cache is neither used nor changed. Several threads read chunks of 4 MiB in file order, and start
    over at the end. None where O_DIRECT is refused, or the file is too small to say anything. A file of holes,
    or compressed by its file system, gives more than the device has.

    Raises:
        OSError: the file cannot be opened or read.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.EOPNOTSUPP):
            return None
        raise
    try:
        chunks = os.fstat(fd).st_size // _CHUNK_BYTES
        if chunks == 0 or chunks * _CHUNK_BYTES < smallest_file_bytes:
            return None
        return _measure(fd, chunks, seconds, threads)
    except OSError as error:
        if error.errno in _REFUSALS:
            return None
        raise
    finally:
        os.close(fd)


def _measure(fd: int, chunks: int, seconds: float, threads: int) -> float:
    buffers = [huge_buffer(_CHUNK_BYTES) for _ in range(threads)]
    numbers = itertools.count()  # next() on it is atomic under the interpreter lock
    finished: list[tuple[int, float]] = []  # bytes and time of each read
    errors: list[OSError] = []

    def read(buffer: memoryview) -> None:
        try:
            while not errors:
                got = os.preadv(fd, [buffer], next(numbers) % chunks * _CHUNK_BYTES)
                if got == 0:
                    raise OSError(errno.ENODATA, "the file became shorter while its bandwidth was measured")
                now_s = time.monotonic()
                finished.append((got, now_s))
                if now_s - began_s >= seconds:
                    return
        except OSError as error:
            errors.append(error)

    workers = [
        threading.Thread(target=read, args=(buffer,), name=f"penstock-probe-{number}", daemon=True)
        for number, buffer in enumerate(buffers)
    ]
    began_s = time.monotonic()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if errors:
        raise errors[0]
    return sum(got for got, _ in finished) / (max(at_s for _, at_s in finished) - began_s)

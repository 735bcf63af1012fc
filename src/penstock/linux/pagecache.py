"""What the kernel's page cache holds of a file, and the calls that fill and empty it.

Facts, each seen on 6.18:

- ``cachestat`` and ``mincore`` tell the truth only to who may write the file or owns it (or has the
  capability); for anyone else cachestat is EPERM and mincore calls every page resident. A one-byte
  ``preadv2(RWF_NOWAIT)`` works on every readable file: EAGAIN means not cached.
- But such a read of an uncached page starts reading it in, and neighbours with it (asking for 8 pages brought 11;
  asked again, all 8 were called cached). POSIX_FADV_RANDOM on the descriptor keeps it to the one page, and the
  next question must be about another. The advice belongs to the open file, which dup() shares, so asking takes a
  descriptor of its own.
- And where the device is quick, or the thread is held up, the page has arrived before the same call looks for it:
  20 questions about 8 cold pages each were all answered "cached". A fault cannot err so: it is a major one exactly
  when the page was not there. It waits for the device, so it only confirms what the read calls cached.
- It is filled best through a mapping: see `penstock.linux.window`.
- ``posix_fadvise(DONTNEED)`` drops only pages that nobody maps; ``process_madvise(MADV_PAGEOUT)`` drops those
  that one process maps. It returns the full length either way.
"""

from __future__ import annotations

import ctypes
import enum
import errno
import mmap
import os
import resource
import stat
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from penstock.linux.libc import function, syscall
from penstock.linux.nowait import is_resident_nowait
from penstock.linux.window import IOV_MAX, PAGE_BYTES, FileWindow, io_vectors

if TYPE_CHECKING:  # importing numpy takes 0.1 s, which the loader need not wait for
    import numpy as np
    from numpy.typing import NDArray

_NR_PROCESS_MADVISE = 440  # the same number on every architecture, as all calls since 5.x
_NR_CACHESTAT = 451

_MADV_COLD = 20
_MADV_PAGEOUT = 21
_CONFIRMING_SAMPLES = 16

_mincore = function("mincore", [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p])
_mmap = function(
    "mmap",
    [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long],
    ctypes.c_ssize_t,
)
_munmap = function("munmap", [ctypes.c_void_p, ctypes.c_size_t])
_readahead = function("readahead", [ctypes.c_int, ctypes.c_int64, ctypes.c_size_t], ctypes.c_ssize_t)


class _CachestatRange(ctypes.Structure):
    _fields_ = (("offset", ctypes.c_uint64), ("length", ctypes.c_uint64))


class _Cachestat(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_uint64) for name in ("cache", "dirty", "writeback", "evicted", "recently_evicted"))


@dataclass(frozen=True, slots=True)
class CacheStat:
    """Pages of one range, as cachestat(2) counts them."""

    cached_pages: int
    dirty_pages: int
    writeback_pages: int
    evicted_pages: int
    recently_evicted_pages: int


def cachestat(fd: int, start: int, stop: int) -> CacheStat:
    """Counts of the pages in bytes ``[start, stop)``, rounded outwards to pages.

    Raises:
        OSError: EPERM where the caller neither owns nor may write the file, ENOSYS before Linux 6.5.
    """
    counts = _Cachestat()
    if stop > start:  # a length of 0 would mean "to the end of the file"
        span = _CachestatRange(start, stop - start)
        syscall(_NR_CACHESTAT, "cachestat", fd, ctypes.pointer(span), ctypes.pointer(counts), 0)
    return CacheStat(counts.cache, counts.dirty, counts.writeback, counts.evicted, counts.recently_evicted)


def mincore(fd: int, start: int, stop: int) -> NDArray[np.bool_]:
    """Which pages of ``[start, stop)`` are resident; start is rounded down to a page.

    Only truthful for a caller who owns or may write the file: see `may_inspect`.
    """
    import numpy as np

    if stop <= start:
        return np.zeros(0, np.bool_)
    start -= start % PAGE_BYTES
    length = stop - start
    pages = np.zeros(-(-length // PAGE_BYTES), np.uint8)
    address = _mmap(None, length, mmap.PROT_READ, mmap.MAP_SHARED, fd, start)
    try:
        _mincore(address, length, pages.ctypes.data)
    finally:
        _munmap(address, length)
    return (pages & 1).astype(np.bool_)


def may_inspect(fd: int) -> bool:
    """Whether mincore and cachestat tell this process the truth about the file."""
    try:
        cachestat(fd, 0, 1)
    except PermissionError:
        return False
    except OSError:  # no cachestat: mincore's rule is ownership or write permission
        status = os.fstat(fd)
        return (
            os.geteuid() in (0, status.st_uid)
            or bool(status.st_mode & stat.S_IWOTH)
            or os.access(f"/proc/self/fd/{fd}", os.W_OK)
        )
    return True


def is_resident_fault(fd: int, offset: int) -> bool:
    """Whether the page at an offset is cached, asked by touching it: the fault is a major one if it is not.

    Works on any readable file, waits for a page that is not cached, and reads nothing else. It has to be a fault of
    its own: on 6.1 MADV_POPULATE_READ waits for the page, begins anew, and counts as minor what it then finds.

    Raises:
        OSError: EINVAL or ENODEV where the file system has no mappings, EFAULT past the file's end.
    """
    start = offset // PAGE_BYTES * PAGE_BYTES
    sink = os.memfd_create("penstock-fault", os.MFD_CLOEXEC)
    try:
        with FileWindow(fd, start, start + PAGE_BYTES) as window:
            before = resource.getrusage(resource.RUSAGE_THREAD).ru_majflt
            window.touch(sink)
            return resource.getrusage(resource.RUSAGE_THREAD).ru_majflt == before
    finally:
        os.close(sink)


class ResidencyMethod(enum.Enum):
    """How the residency of a file is found out."""

    CACHESTAT = "cachestat"
    MINCORE = "mincore"
    NOWAIT = "preadv2(RWF_NOWAIT) and page faults, sampled"
    ALWAYS = "memory file system"


class FileResidency:
    """What is cached of one open file, by the best means that this process is allowed.

    Args:
        fd: descriptor open for reading; the caller keeps it open and closes it.
        sample_bytes: distance of the sampled pages where only sampling is possible.

    Raises:
        OSError: only sampling is possible, and the file cannot be opened a second time for it.
    """

    def __init__(self, fd: int, sample_bytes: int = 1 << 20) -> None:
        self._fd = fd
        self._sample_bytes = sample_bytes
        self.method = self._choose()

    @property
    def exact(self) -> bool:
        """Whether every page is looked at. Else a few are, and looking has them read in."""
        return self.method is not ResidencyMethod.NOWAIT

    def _choose(self) -> ResidencyMethod:
        try:
            cachestat(self._fd, 0, 1)
        except OSError as error:
            if error.errno == errno.ENOSYS and may_inspect(self._fd):
                return ResidencyMethod.MINCORE
        else:
            return ResidencyMethod.CACHESTAT
        self._fd = os.open(f"/proc/self/fd/{self._fd}", os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self._fd)
        try:
            os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_RANDOM)
            is_resident_nowait(self._fd, [0])
        except OSError:
            return ResidencyMethod.ALWAYS
        return ResidencyMethod.NOWAIT

    def resident_bytes(self, start: int, stop: int) -> int:
        """Bytes of ``[start, stop)`` that are cached, in whole pages but never more than the range."""
        if stop <= start:
            return 0
        match self.method:
            case ResidencyMethod.CACHESTAT:
                pages = cachestat(self._fd, start, stop).cached_pages
                return min(pages * PAGE_BYTES, stop - start)
            case ResidencyMethod.MINCORE:
                return min(int(mincore(self._fd, start, stop).sum()) * PAGE_BYTES, stop - start)
            case ResidencyMethod.NOWAIT:
                return self._sampled_bytes(start, stop)
            case ResidencyMethod.ALWAYS:
                return stop - start

    def _sampled_bytes(self, start: int, stop: int) -> int:
        """One random page of each stride stands for it: the one asked for last time has been read in since."""
        stride = min(self._sample_bytes, max(PAGE_BYTES, (stop - start) // 4))
        strides = [(low, min(low + stride, stop)) for low in range(start, stop, stride)]
        if stride == PAGE_BYTES:  # no second page to ask for
            return sum(high - low for low, high in strides if self._is_page_cached(low))
        numbers = memoryview(os.urandom(8 * len(strides))).cast("Q")
        offsets = [low + number % (high - low) for (low, high), number in zip(strides, numbers, strict=True)]
        answers = zip(strides, offsets, is_resident_nowait(self._fd, offsets), strict=True)
        cached = [(low, high, offset) for (low, high), offset, resident in answers if resident]
        return sum(high - low for low, high, _ in self._confirmed(cached))

    def _confirmed(self, cached: list[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
        """The samples ``(low, high, offset)`` whose next page is cached too; all, if those of a few are."""

        def is_confirmed(sample: tuple[int, int, int]) -> bool:
            low, high, offset = sample
            return self._is_page_cached(low + (offset - low + PAGE_BYTES) % (high - low))

        few = set(cached[:: max(1, len(cached) // _CONFIRMING_SAMPLES)])
        refuted = {sample for sample in few if not is_confirmed(sample)}
        if refuted:
            refuted.update(sample for sample in cached if sample not in few and not is_confirmed(sample))
        return [sample for sample in cached if sample not in refuted]

    def _is_page_cached(self, offset: int) -> bool:
        try:
            return is_resident_fault(self._fd, offset)
        except OSError as error:
            if error.errno in {errno.EINVAL, errno.ENODEV}:  # the read is all there is to ask by
                return is_resident_nowait(self._fd, [offset])[0]
            return False

    def is_resident(self, start: int, stop: int) -> bool:
        """Whether all of the range is cached (all of its samples, where only sampling is possible)."""
        if self.exact and stop > start:  # whole pages: half of one and half of the next are two
            start, stop = start // PAGE_BYTES * PAGE_BYTES, -(-stop // PAGE_BYTES) * PAGE_BYTES
        return self.resident_bytes(start, stop) >= stop - start


def drop(fd: int, start: int = 0, stop: int = 0) -> None:
    """Drop clean pages of ``[start, stop)`` that nobody maps; stop 0 means the end of the file."""
    os.posix_fadvise(fd, start, max(0, stop - start), os.POSIX_FADV_DONTNEED)


def readahead(fd: int, start: int, length: int) -> None:
    """Start reading a range into the cache; the kernel cuts it at the device's read-ahead limit."""
    _readahead(fd, start, length)


def splice_fill(fd: int, start: int, stop: int) -> int:
    """Read a range into the cache by moving its pages through a pipe to /dev/null.

    Returns the bytes moved: less than asked for at the end of the file.
    """
    reader, writer = os.pipe2(os.O_CLOEXEC)
    null = os.open("/dev/null", os.O_WRONLY | os.O_CLOEXEC)
    try:
        offset = start
        while offset < stop:
            moved = os.splice(fd, writer, min(stop - offset, 1 << 20), offset_src=offset)
            if moved == 0:
                break
            offset += moved
            while moved:
                moved -= os.splice(reader, null, moved)
        return offset - start
    finally:
        for descriptor in (reader, writer, null):
            os.close(descriptor)


def populate(fd: int, start: int, stop: int) -> None:
    """Read ``[start, stop)`` of a file into the cache: see `FileWindow.populate`."""
    with FileWindow(fd, start, stop) as window:
        window.populate()


def page_out(pidfd: int, ranges: Sequence[tuple[int, int]]) -> None:
    """Ask for the pages at the address ranges ``[start, stop)`` of a process to be reclaimed.

    Success is read from residency: pages that another process maps too stay, without an error.

    Raises:
        PermissionError: without CAP_SYS_NICE and the right to inspect the process.
        ProcessLookupError: the process is gone.
    """
    for first in range(0, len(ranges), IOV_MAX):
        batch = ranges[first : first + IOV_MAX]
        vectors = io_vectors([start for start, _ in batch], [stop - start for start, stop in batch])
        pointer = ctypes.cast(vectors.buffer_info()[0], ctypes.POINTER(ctypes.c_uint64))
        syscall(_NR_PROCESS_MADVISE, "process_madvise", pidfd, pointer, len(batch), _MADV_PAGEOUT, 0)


@dataclass(frozen=True, slots=True)
class PageCacheSupport:
    """Which of the calls above this kernel and these privileges allow."""

    cachestat: bool
    populate_read: bool
    nowait_read: bool
    process_madvise: bool


def probe(directory: str | os.PathLike[str]) -> PageCacheSupport:
    """Try each call on a temporary file in a directory (the file system matters)."""
    import tempfile

    def works(call: object, *arguments: object) -> bool:
        assert callable(call)
        try:
            call(*arguments)
        except OSError:
            return False
        return True

    with tempfile.TemporaryFile(dir=directory) as file:
        file.write(b"\0" * PAGE_BYTES)
        file.flush()
        fd = file.fileno()
        pidfd = os.pidfd_open(os.getpid())
        try:
            return PageCacheSupport(
                cachestat=works(cachestat, fd, 0, PAGE_BYTES),
                populate_read=works(populate, fd, 0, PAGE_BYTES),
                nowait_read=works(is_resident_nowait, fd, [0]),
                process_madvise=_may_page_out_others(),
            )
        finally:
            os.close(pidfd)


def _may_page_out_others() -> bool:
    """process_madvise on another process: allowed with CAP_SYS_NICE (bit 23), refused without."""
    with open("/proc/self/status", encoding="ascii", errors="replace") as file:
        effective = next((int(line.split()[1], 16) for line in file if line.startswith("CapEff:")), 0)
    if not effective >> 23 & 1:
        return False
    pidfd = os.pidfd_open(os.getpid())
    try:
        page_out(pidfd, [])
        syscall(_NR_PROCESS_MADVISE, "process_madvise", pidfd, None, 0, _MADV_COLD, 0)
    except OSError as error:
        return error.errno != errno.ENOSYS
    finally:
        os.close(pidfd)
    return True

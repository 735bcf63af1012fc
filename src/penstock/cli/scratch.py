"""A place on a disk for the demo's model: removed however the demo ends, and really cold when it should be."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import click

from penstock.units import KiB, MiB, format_size

_PREFIX = "penstock-demo-"
_KEPT_PREFIX = "penstock-kept-demo-"  # not swept away by a later demo
_LEAST_BYTES = 64 * MiB  # less than this says nothing
_SHARE = 0.9  # of the room and of the memory budget: others need some too
_COLD_SHARE = 0.01  # of the model may be cached when a cold run begins
_DROP_TRIES = 20
_DROP_PAUSE_S = 0.05


def choose_place(directory: Path | None) -> Path:
    """Where the model goes: a disk, because what lies in memory is never cold.

    Raises:
        click.ClickException: there is no such place.
    """
    import platformdirs

    candidates = [directory] if directory else [Path.cwd(), platformdirs.user_cache_path("penstock")]
    for candidate in candidates:
        with contextlib.suppress(PermissionError, FileNotFoundError):
            if candidate is not directory and candidate != Path.cwd():
                candidate.mkdir(parents=True, exist_ok=True)
            if can_be_cold(candidate):
                return candidate.resolve()
    raise click.ClickException(
        f"{' and '.join(map(str, candidates))}: not writable, or in memory, where nothing is ever cold; "
        "choose a directory on a disk with --dir"
    )


def can_be_cold(directory: Path) -> bool:
    """Whether the page cache lets go of files there: tried, because no name of a file system says so."""
    with tempfile.TemporaryFile(dir=directory) as file:
        file.write(bytes(256 * KiB))
        file.flush()
        os.fsync(file.fileno())
        return _drop([file.fileno()]) == 0


def _drop(descriptors: Sequence[int]) -> int:
    """Drop files from the page cache; returns how many of their bytes stay."""
    from penstock.linux.pagecache import FileResidency, drop

    for _ in range(_DROP_TRIES):
        stayed = 0
        for descriptor in descriptors:
            drop(descriptor)
            stayed += FileResidency(descriptor).resident_bytes(0, os.fstat(descriptor).st_size)
        if not stayed:
            break
        time.sleep(_DROP_PAUSE_S)  # pages that another CPU has yet to put on its lists
    return stayed


def fitting_size(size_bytes: int, directory: Path) -> tuple[int, str]:
    """The size that room and memory allow, and why it is less than asked for ("" where it is not).

    Raises:
        click.ClickException: there is too little for anything.
    """
    from penstock.pagecache.headroom import Headroom

    headroom = Headroom(os.getpid())
    budget = headroom.read()
    headroom.close()
    free_bytes = shutil.disk_usage(directory).free
    most_bytes, why = min(
        (int(free_bytes * _SHARE), f"{format_size(free_bytes)} are free in {directory}"),
        (int(budget.bytes * _SHARE), f"{format_size(budget.bytes)} of page cache may be filled ({budget.source})"),
    )
    if size_bytes <= most_bytes:
        return size_bytes, ""
    if most_bytes < _LEAST_BYTES:
        raise click.ClickException(f"{why}, too little for a demo of {format_size(_LEAST_BYTES)}")
    return most_bytes // _LEAST_BYTES * _LEAST_BYTES, why


def use_memory(size_bytes: int) -> None:
    """Touch so much memory, if there is, and free it again: what lay with a virtual machine's host is at hand then.

    Without it, which of several runs has to wait for its memory is chance.
    """
    from penstock.storage.buffers import huge_buffer

    with contextlib.suppress(MemoryError):
        huge_buffer(size_bytes)


@contextlib.contextmanager
def scratch_directory(parent: Path, *, keep: bool) -> Iterator[Path]:
    """A directory that is removed however the demo ends, at the latest by the next demo beside it."""
    for left in parent.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError), _locked(left):  # BlockingIOError: a demo is running there
            shutil.rmtree(left)
    made = Path(tempfile.mkdtemp(prefix=_KEPT_PREFIX if keep else _PREFIX, dir=parent))
    finished = False
    try:
        with _locked(made):
            yield made
        finished = True
    finally:
        if not (keep and finished):
            before = [(number, signal.signal(number, signal.SIG_IGN)) for number in (signal.SIGINT, signal.SIGTERM)]
            shutil.rmtree(made, ignore_errors=True)
            for number, handler in before:
                signal.signal(number, handler)


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Raises OSError if another process has the directory."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def make_cold(files: Sequence[Path]) -> None:
    """Drop files from the page cache.

    Raises:
        click.ClickException: more than 1 % stays.
    """
    with contextlib.ExitStack() as stack:
        opened = [stack.enter_context(path.open("rb")) for path in files]
        stayed = _drop([file.fileno() for file in opened])
        size_bytes = sum(os.fstat(file.fileno()).st_size for file in opened)
    if stayed > _COLD_SHARE * size_bytes:
        raise click.ClickException(
            f"{files[0].parent}: {format_size(stayed)} of {format_size(size_bytes)} stay in the page cache, so that "
            "no run would be cold; choose another file system with --dir"
        )


def is_cached(files: Sequence[Path]) -> bool:
    """Whether all but 1 % of the files is in the page cache."""
    from penstock.linux.pagecache import FileResidency

    for path in files:
        with path.open("rb") as file:
            size_bytes = os.fstat(file.fileno()).st_size
            if FileResidency(file.fileno()).resident_bytes(0, size_bytes) < (1 - _COLD_SHARE) * size_bytes:
                return False
    return True

"""Both observers under the contract that ships in penstock.testing.observer."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tests.tracing import needs_access_tracepoints

from penstock.errors import ObserverError
from penstock.linux import process
from penstock.linux.pagecache import drop
from penstock.linux.tracefs import READ, TraceFs, instance_name
from penstock.pagecache.files import ModelFiles
from penstock.pagecache.ledger import Ledger
from penstock.pagecache.observers.base import Observer, ProcessTree
from penstock.pagecache.observers.process import ProcessObserver
from penstock.pagecache.observers.tracefs import TracefsObserver
from penstock.testing.observer import ObserverTests, Watched, write_files
from penstock.units import KiB, MiB

# Where this runs as an ordinary user: a directory with files of root's.
OTHERS_FILES = os.environ.get("PENSTOCK_TEST_OTHERS_FILES")


class TestProcessObserver(ObserverTests):
    def make_observer(self, files: ModelFiles, ledger: Ledger) -> Observer:
        return ProcessObserver(files, ledger)

    def make_files(self, tmp_path_factory: Any) -> tuple[Path, Path, Path]:
        if OTHERS_FILES is not None:
            first, second, other = sorted(Path(OTHERS_FILES).iterdir())
            self._paths[type(self)] = (first, second, other)
        return super().make_files(tmp_path_factory)

    @pytest.mark.xfail(strict=False, reason="through /proc a position that has moved counts as read, whatever moved it")
    def test_a_seek_reads_nothing(self, tmp_path_factory: Any) -> None:
        super().test_a_seek_reads_nothing(tmp_path_factory)

    @pytest.mark.xfail(strict=False, reason="through /proc a position that has moved counts as read, whatever moved it")
    def test_read_after_a_seek(self, tmp_path_factory: Any) -> None:
        super().test_read_after_a_seek(tmp_path_factory)

    @pytest.mark.xfail(
        strict=False, reason="an inherited descriptor's position counts as read by the one who inherits it"
    )
    def test_a_fork_alone_reads_nothing(self, tmp_path_factory: Any) -> None:
        super().test_a_fork_alone_reads_nothing(tmp_path_factory)

    @pytest.mark.xfail(
        strict=False, reason="bytes read of any file make the cached pages of the open model files count as read"
    )
    def test_other_files_are_left_out(self, tmp_path_factory: Any) -> None:
        super().test_other_files_are_left_out(tmp_path_factory)

    def test_a_process_that_is_gone(self) -> None:
        child = subprocess.Popen(["true"])
        child.wait()
        ledger = Ledger()
        with pytest.raises(ObserverError, match=f"/proc/{child.pid}"):
            self.make_observer(ModelFiles(), ledger).start(child.pid)


def test_a_look_that_had_to_wait_makes_nobody_blind(monkeypatch: pytest.MonkeyPatch) -> None:
    def slow_maps(pid: int, *args: Any, **kwargs: Any) -> list[process.Mapping]:
        time.sleep(0.2)  # for a CPU, for the program's own locks, or as the machine was stopped
        return read_maps(pid, *args, **kwargs)

    read_maps = process.read_maps
    monkeypatch.setattr(process, "read_maps", slow_maps)
    with subprocess.Popen(["sleep", "60"]) as program:  # little to look at: it is the waiting that counts
        tree = ProcessTree(program.pid, ModelFiles())
        try:
            assert tree.refresh()
            later = time.monotonic() + 0.5
            monkeypatch.setattr(time, "monotonic", lambda: later)
            assert tree.refresh()
        finally:
            tree.close()
            program.kill()


def test_the_next_shard_at_the_address_of_the_last(tmp_path: Path) -> None:
    """Its pages were taken for the last one's until the next look at the program's mappings."""
    first, second, _ = write_files(tmp_path)
    files = ModelFiles([first, second])
    tree = ProcessTree(os.getpid(), files, only_known=True)
    try:
        with first.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as shard:
            assert shard[5 * MiB] is not None
            tree.refresh(force=True)
            assert {part.file.path for part in tree.touched()} == {str(first)}
            (where,) = tree.mapped_parts(next(file for file in files if file.path == str(first)))
        with second.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as shard:
            assert shard[9 * MiB] is not None
            assert tree.touched() == []
            assert all(tree.mapped_parts(file) == [] for file in files)
            assert tree.refresh()  # at once, as it knows that it is out of date
            found = tree.touched()
            assert {part.file.path for part in found} == {str(second)}
            (now,) = tree.mapped_parts(found[0].file)
            assert now.address == where.address  # else this tests nothing
    finally:
        tree.close()


@pytest.mark.parametrize("model_cached", [False, True])
def test_a_small_file_read_between_two_looks(tmp_path: Path, model_cached: bool) -> None:
    path = write_files(tmp_path)[0]
    with path.open("rb") as file:
        os.fsync(file.fileno())
        drop(file.fileno())
        if model_cached:
            file.read()
    ledger, files = Ledger(), ModelFiles([path])
    observer = ProcessObserver(files, ledger, only_known=True)
    gate, starter = os.pipe()
    reader = subprocess.Popen(
        [sys.executable, "-c", "import sys; sys.stdin.read(); open(sys.argv[1], 'rb').read()", str(path)], stdin=gate
    )
    observer.start(reader.pid)
    os.close(starter)
    assert reader.wait() == 0
    seen = observer.last_poll()
    observer.stop()
    ledger.close()
    os.close(gate)
    assert sum(part.stop - part.start for part in seen) == (0 if model_cached else path.stat().st_size)


@pytest.mark.root
@needs_access_tracepoints
class TestTracefsObserver(ObserverTests):
    unseen_bytes = 64 * KiB

    def make_observer(self, files: ModelFiles, ledger: Ledger) -> Observer:
        return TracefsObserver(files)


_WORKER_THAT_ENDS = """
import os, sys
sys.stdin.readline()
worker = os.fork()
if worker == 0:
    sys.stdin.readline()
    open(sys.argv[1], "rb").read()
    os._exit(0)
print(worker, flush=True)
os.waitpid(worker, 0)
print("ended", flush=True)
sys.stdin.readline()
"""


@pytest.mark.root
@needs_access_tracepoints
def test_what_a_worker_read_before_its_end_is_its_own(tmp_path: Path) -> None:
    path = write_files(tmp_path)[0]
    files = ModelFiles([path])
    observer = TracefsObserver(files)
    launcher = subprocess.Popen(
        [sys.executable, "-c", _WORKER_THAT_ENDS, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert launcher.stdin is not None
    assert launcher.stdout is not None
    observer.start(launcher.pid)
    try:
        launcher.stdin.write(b"fork\n")
        launcher.stdin.flush()
        worker = int(launcher.stdout.readline())
        time.sleep(0.05)
        observer.poll()
        launcher.stdin.write(b"read\n")
        launcher.stdin.flush()
        assert launcher.stdout.readline() == b"ended\n"
        seen = observer.poll()
    finally:
        observer.stop()
        launcher.communicate(b"end\n")
    assert {part.pid for part in seen} == {worker}


class OnlyTheFirst(ObserverTests):
    """As with ``--model`` naming one file of two."""

    def __init__(self, tmp_path_factory: pytest.TempPathFactory, kind: str) -> None:
        self.known = ModelFiles([self.make_files(tmp_path_factory)[0]])
        self.kind = kind

    def make_observer(self, files: ModelFiles, ledger: Ledger) -> Observer:
        if self.kind == "process":
            return ProcessObserver(self.known, ledger, only_known=True)
        return TracefsObserver(self.known, only_known=True)


@pytest.mark.parametrize(
    "kind", ["process", pytest.param("tracefs", marks=(pytest.mark.root, needs_access_tracepoints))]
)
@pytest.mark.parametrize("how", ["open read", "map touch"])
def test_with_known_files_no_other_is_reported(tmp_path_factory: pytest.TempPathFactory, kind: str, how: str) -> None:
    case = OnlyTheFirst(tmp_path_factory, kind)
    begin, verb = how.split()
    ranges = (4 * MiB,) if verb == "read" else (0, 4 * MiB)
    with case.watch(tmp_path_factory) as (watched, first, second):
        for path in (second, first):
            watched.tell(begin, path)
            watched.settle()
            watched.tell(verb, path, *ranges)
            watched.settle()
        watched.expect(first, [(0, 4 * MiB)])
        assert {part.file.path for part in watched.seen} == {str(first)}
        assert [file.path for file in case.known] == [str(first)]


def records_reads() -> bool:
    tracefs = TraceFs()
    try:
        return tracefs.read(f"instances/{instance_name(os.getpid())}/events/filemap/{READ}/enable").startswith("1")
    finally:
        tracefs.close()


@contextmanager
def all_seen(tmp_path_factory: pytest.TempPathFactory, size_bytes: int) -> Iterator[tuple[Watched, Path]]:
    """A child that has read so much of the one known file, and an observer that was told that it is all."""
    case = OnlyTheFirst(tmp_path_factory, "tracefs")
    with case.watch(tmp_path_factory) as (watched, path, _):
        path.read_bytes()
        watched.tell("open", path)
        watched.tell("read", path, size_bytes)
        watched.expect(path, [(0, size_bytes)])
        watched.observer.all_is_seen()
        watched.seen.clear()
        yield watched, path


@pytest.mark.root
@needs_access_tracepoints
def test_once_all_is_seen_reads_are_followed_by_positions(tmp_path_factory: pytest.TempPathFactory) -> None:
    with all_seen(tmp_path_factory, 6 * MiB) as (watched, path):
        watched.settle()
        assert watched.seen == []  # the position has moved before
        watched.tell("read", path, 2 * MiB)  # both tell of it: events are not needed from here on
        watched.expect(path, [(6 * MiB, 8 * MiB)])
        assert not records_reads()
        watched.tell("read", path, 3 * MiB)
        watched.expect(path, [(6 * MiB, 11 * MiB)])
        watched.seen.clear()
        watched.tell("close", path)
        watched.tell("open", path)
        watched.tell("read", path, 4 * MiB)
        watched.settle()
        watched.tell("read", path, 1 * MiB)
        watched.poll_until(lambda: watched.reported(path, watched.pid).covers(4 * MiB, 5 * MiB), "a file opened again")


@pytest.mark.root
@needs_access_tracepoints
def test_reads_that_move_no_position_stay_seen(tmp_path_factory: pytest.TempPathFactory) -> None:
    with all_seen(tmp_path_factory, 12 * MiB) as (watched, path):
        for start in (3 * MiB, 8 * MiB):
            watched.tell("pread", path, start, start + MiB)
            watched.settle()
        watched.expect(path, [(3 * MiB, 4 * MiB), (8 * MiB, 9 * MiB)])
        assert records_reads()


@pytest.mark.root
@needs_access_tracepoints
def test_events_stay_where_other_files_may_be_read(tmp_path_factory: pytest.TempPathFactory) -> None:
    with TestTracefsObserver().watch(tmp_path_factory) as (watched, first, second):
        for path in (first, second):
            watched.tell("open", path)
        watched.tell("read", first, 4 * MiB)
        watched.expect(first, [(0, 4 * MiB)])
        watched.observer.all_is_seen()
        watched.tell("read", first, 4 * MiB)
        watched.expect(first, [(0, 8 * MiB)])
        assert records_reads()
        watched.tell("read", second, 4 * MiB)
        watched.expect(second, [(0, 4 * MiB)])


@pytest.mark.root
@pytest.mark.slow
def test_as_an_ordinary_user_with_anothers_files(as_ordinary_user: list[str], tmp_path: Path) -> None:
    if not as_ordinary_user:
        pytest.skip("needs root, to own files that the reader does not")
    for path in write_files(tmp_path):
        path.chmod(0o644)
    tmp_path.chmod(0o755)
    pytest_command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "TestProcessObserver"]
    done = subprocess.run(
        [*as_ordinary_user, *pytest_command, __file__],
        env={**os.environ, "PENSTOCK_TEST_OTHERS_FILES": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout


def test_an_ordinary_user_has_no_tracefs(as_ordinary_user: list[str]) -> None:
    code = (
        "import os\n"
        "from penstock.errors import ObserverError\n"
        "from penstock.pagecache.files import ModelFiles\n"
        "from penstock.pagecache.observers.tracefs import TracefsObserver\n"
        "try:\n"
        "    TracefsObserver(ModelFiles()).start(os.getpid())\n"
        "except ObserverError as error:\n"
        "    print(error)\n"
    )
    command = [*as_ordinary_user, sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("tracefs: no tracefs: ")

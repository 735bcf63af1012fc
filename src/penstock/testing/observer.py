"""The contract of an observer, as a class of tests to derive from.

::

    class TestMine(ObserverTests):
        def make_observer(self, files, ledger):
            return Mine(files)

Each test starts a real child that waits at a pipe for what to do, has it read or touch known ranges of a file,
and compares what the observer reports with them.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

from penstock.pagecache.base import ModelFile
from penstock.pagecache.files import ModelFiles
from penstock.pagecache.intervals import IntervalSet
from penstock.pagecache.ledger import Ledger
from penstock.pagecache.observers.base import Observed, Observer
from penstock.units import KiB, MiB

SLACK_BYTES = 2 * MiB  # what one page-table entry maps: an observer may report so much beside what was touched

_SIZE_BYTES = 12 * MiB + 5
_PATIENCE_S = 30.0
_PAUSE_S = 0.002  # between polls, so that they leave the processor to the child
_SETTLING_S = 0.08  # longer than the interval at which observers look through /proc

# Obeys one line at a time and answers each with the pid of the process that obeyed.
_READER = """
import mmap, os, sys, threading

files, mappings, gates = {}, {}, []

def obey(verb, *words):
    numbers = [int(word) for word in words if word.isdigit()]
    if verb == "open":
        files[words[0]] = os.open(words[0], os.O_RDONLY)
        os.posix_fadvise(files[words[0]], 0, 0, os.POSIX_FADV_RANDOM)  # nothing is cached but what is read
    elif verb == "close":
        os.close(files.pop(words[0]))
    elif verb in ("map", "populate"):
        flags = mmap.MAP_SHARED | (mmap.MAP_POPULATE if verb == "populate" else 0)
        fd = os.open(words[0], os.O_RDONLY)
        mappings[words[0]] = mmap.mmap(fd, 0, flags, mmap.PROT_READ)
        os.close(fd)
    elif verb == "unmap":
        mappings.pop(words[0]).close()
    elif verb == "touch":
        for at in range(*numbers, mmap.PAGESIZE):
            mappings[words[0]][at]
    elif verb == "read":
        left = numbers[0]
        while left:
            left -= len(os.read(files[words[0]], min(left, 1 << 20)))
    elif verb == "pread":
        for at in range(*numbers, 1 << 20):
            wanted = min(1 << 20, numbers[1] - at)
            assert len(os.pread(files[words[0]], wanted, at)) == wanted
    elif verb == "seek":
        os.lseek(files[words[0]], numbers[0], os.SEEK_SET)
    elif verb == "thread":
        done = threading.Event()
        threading.Thread(target=lambda: (obey(*words), done.set(), threading.Event().wait()), daemon=True).start()
        done.wait()
    elif verb == "exec":
        os.execv(sys.executable, [sys.executable, "-c", sys.argv[1], sys.argv[1]])
    elif verb == "reap":
        while gates:
            pid, gate = gates.pop()
            os.close(gate)
            os.waitpid(pid, 0)

def fork(words):
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(writer)
        for command in " ".join(words).split(" then "):
            obey(*command.split(" "))
        print(os.getpid(), flush=True)
        os.read(reader, 1)
        os._exit(0)
    os.close(reader)
    gates.append((pid, writer))

print(os.getpid(), flush=True)
while line := sys.stdin.readline():
    words = line.split()
    if words[0] == "fork":
        fork(words[1:])
    else:
        obey(*words)
        print(os.getpid(), flush=True)
"""


class Watched:
    """A child, the observer that watches it, and all that it has reported so far."""

    def __init__(
        self, reader: subprocess.Popen[str], observer: Observer, files: ModelFiles, ledger: Ledger, unseen_bytes: int
    ) -> None:
        self._reader = reader
        self._unseen_bytes = unseen_bytes
        self.observer = observer
        self.files = files
        self.ledger = ledger
        self.pid = reader.pid
        self.seen: list[Observed] = []

    def tell(self, *words: str | Path | int) -> int:
        """Have the child do something; returns the pid of the process that has done it."""
        assert self._reader.stdin is not None
        assert not any(" " in str(word) for word in words)
        self._reader.stdin.write(" ".join(map(str, words)) + "\n")
        self._reader.stdin.flush()
        return self.answer()

    def answer(self) -> int:
        """The pid that a process says when it is done."""
        assert self._reader.stdout is not None
        line = self._reader.stdout.readline()
        assert line, "the child has failed; see its messages above"
        return int(line)

    def end(self) -> None:
        """Let the child end, and wait for it."""
        assert self._reader.stdin is not None
        self._reader.stdin.close()
        assert self._reader.wait() == 0

    def poll(self) -> None:
        """One poll, with what was reported told to the ledger, as the runtime does."""
        for part in self.observer.poll():
            self.seen.append(part)
            self.ledger.access(self.ledger.record(part.file), part.start, part.stop)

    def poll_until(self, happened: Callable[[], bool], what: str) -> None:
        """Poll until something is the case."""
        deadline = time.monotonic() + _PATIENCE_S
        self.poll()
        while not happened():
            assert time.monotonic() < deadline, f"not within {_PATIENCE_S:.0f} s: {what}; reported: {self.seen}"
            time.sleep(_PAUSE_S)
            self.poll()

    def settle(self) -> None:
        """Poll until nothing more is to be expected."""
        deadline = time.monotonic() + _SETTLING_S
        while time.monotonic() < deadline:
            time.sleep(_PAUSE_S)
            self.poll()

    def reported(self, path: Path, pid: int | None = None) -> IntervalSet:
        """What was reported of a file, of all processes or one."""
        return IntervalSet(
            (part.start, part.stop)
            for part in self.seen
            if part.file.path == str(path) and (pid is None or part.pid == pid)
        )

    def expect(self, path: Path, ranges: Sequence[tuple[int, int]], pid: int | None = None) -> None:
        """Poll until all of the ranges are reported of a process, and assert that nothing else of the file is."""
        pid = self.pid if pid is None else pid
        what = f"{ranges} of {path.name} read by process {pid}"
        wanted = [(min(start + self._unseen_bytes, stop - 1), stop) for start, stop in ranges]
        self.poll_until(lambda: all(self.reported(path, pid).covers(*part) for part in wanted), what)
        self.settle()
        allowed = IntervalSet((start - SLACK_BYTES, stop + SLACK_BYTES) for start, stop in ranges)
        size_bytes = path.stat().st_size
        for part in self.seen:
            assert part.start < part.stop, f"empty: {part}"
            if part.file.path == str(path):
                assert part.pid == pid, f"process {pid} has read, not {part.pid}: {part}"
                assert part.start >= 0, f"outside the file: {part}"
                assert part.stop <= size_bytes, f"outside the file of {size_bytes} bytes: {part}"
                assert allowed.covers(part.start, part.stop), f"nobody has read this: {part}; only {ranges}"

    def file(self, path: Path) -> ModelFile:
        """The model file at a path."""
        return next(file for file in self.files if file.path == str(path))


class ObserverTests:
    """What every observer must do. The files' pages are not cached when a test begins.

    Attributes:
        unseen_bytes: that a read may begin with and the observer not see.
    """

    unseen_bytes: ClassVar[int] = 0
    _paths: ClassVar[dict[type, tuple[Path, Path, Path]]] = {}

    def make_observer(self, files: ModelFiles, ledger: Ledger) -> Observer:
        """An observer that has not been started."""
        raise NotImplementedError

    @contextmanager
    def watch(self, tmp_path_factory: Any, *, named: bool = True) -> Iterator[tuple[Watched, Path, Path]]:
        """A child under observation, and two model files.

        Args:
            tmp_path_factory: pytest's.
            named: the observer is told of the files beforehand.
        """
        first, second, _ = self.make_files(tmp_path_factory)
        ledger = Ledger()
        files = ModelFiles([first.parent] if named else [])
        command = [sys.executable, "-c", _READER, _READER]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as reader:
            observer = self.make_observer(files, ledger)
            watched = Watched(reader, observer, files, ledger, self.unseen_bytes)
            try:
                assert watched.answer() == reader.pid
                observer.start(reader.pid)
                yield watched, first, second
            finally:
                observer.stop()
                ledger.close()
                reader.kill()

    def make_files(self, tmp_path_factory: Any) -> tuple[Path, Path, Path]:
        """Two model files, and one that is none, all cold; written once for each class of tests."""
        if type(self) not in self._paths:
            self._paths[type(self)] = write_files(Path(tmp_path_factory.mktemp("model")))
        for path in self._paths[type(self)]:
            fd = os.open(path, os.O_RDONLY)
            try:
                os.fsync(fd)
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(fd)
        return self._paths[type(self)]

    def test_pages_touched_in_a_mapping(self, tmp_path_factory: Any) -> None:
        with self.watch(tmp_path_factory) as (watched, path, _):
            watched.tell("map", path)
            watched.tell("touch", path, 4 * MiB, 5 * MiB)
            watched.expect(path, [(4 * MiB, 5 * MiB)])
            watched.tell("touch", path, 9 * MiB, 10 * MiB)
            watched.expect(path, [(4 * MiB, 5 * MiB), (9 * MiB, 10 * MiB)])

    def test_a_mapping_of_pages_that_are_cached(self, tmp_path_factory: Any) -> None:
        with self.watch(tmp_path_factory) as (watched, path, _):
            path.read_bytes()
            watched.tell("map", path)
            watched.settle()
            watched.tell("touch", path, 5 * MiB, 7 * MiB)
            watched.expect(path, [(5 * MiB, 7 * MiB)])

    def test_a_mapping_that_is_read_through_is_told_in_few_parts(self, tmp_path_factory: Any) -> None:
        """To go through thousands takes longer than to read what is cached."""
        with self.watch(tmp_path_factory) as (watched, path, _):
            with path.open("rb", buffering=0) as file:
                while file.read(64 * KiB):  # read-ahead makes folios of several sizes
                    pass
            watched.tell("map", path)
            watched.settle()
            watched.tell("touch", path, 0, 12 * MiB)
            watched.expect(path, [(0, 12 * MiB)])
            assert len(watched.seen) <= 4, watched.seen

    def test_a_populated_mapping(self, tmp_path_factory: Any) -> None:
        with self.watch(tmp_path_factory) as (watched, path, _):
            watched.tell("populate", path)
            watched.expect(path, [(0, _SIZE_BYTES)])

    def test_a_mapping_made_while_it_is_watched(self, tmp_path_factory: Any) -> None:
        with self.watch(tmp_path_factory) as (watched, path, _):
            watched.settle()
            watched.tell("map", path)
            watched.settle()
            assert watched.seen == []
            watched.tell("touch", path, 0, MiB)
            watched.expect(path, [(0, MiB)])

    def test_the_last_page_of_a_mapping(self, tmp_path_factory: Any) -> None:
        with self.watch(tmp_path_factory) as (watched, path, _):
            watched.tell("map", path)
            watched.tell("touch", path, 12 * MiB, _SIZE_BYTES)
            watched.expect(path, [(12 * MiB, _SIZE_BYTES)])

    def test_read(self, tmp_path_factory: Any) -> None:
        with self.watch(tmp_path_factory) as (watched, path, _):
            watched.tell("open", path)
            watched.tell("read", path, 4 * MiB)
            watched.expect(path, [(0, 4 * MiB)])
            watched.tell("read", path, MiB)
            watched.expect(path, [(0, 5 * MiB)])

    def test_read_to_the_end(self, tmp_path_factory: Any) -> None:
        with self.watch(tmp_path_factory) as (watched, path, _):
            watched.tell("open", path)
            watched.tell("read", path, _SIZE_BYTES)
            watched.expect(path, [(0, _SIZE_BYTES)])

    def test_pread(self, tmp_path_factory: Any) -> None:
        with self.watch(tmp_path_factory) as (watched, path, _):
            watched.tell("open", path)
            watched.settle()
            watched.tell("pread", path, 4 * MiB, 8 * MiB)
            watched.expect(path, [(4 * MiB, 8 * MiB)])

    def test_pread_of_what_was_prefetched(self, tmp_path_factory: Any) -> None:
        """As the first run does ahead of a reader, while it records."""
        self._pread_of_what_was_claimed(tmp_path_factory, is_read_by_the_loader=True)

    def test_pread_of_what_was_to_be_prefetched(self, tmp_path_factory: Any) -> None:
        """The reader was quicker."""
        self._pread_of_what_was_claimed(tmp_path_factory, is_read_by_the_loader=False)

    def _pread_of_what_was_claimed(self, tmp_path_factory: Any, *, is_read_by_the_loader: bool) -> None:
        with self.watch(tmp_path_factory) as (watched, first, _):
            watched.tell("open", first)
            watched.settle()
            watched.tell("pread", first, 0, 3 * MiB)
            watched.settle()
            record = watched.ledger.record(watched.file(first))
            for start, stop in watched.ledger.claim(record, 3 * MiB, _SIZE_BYTES):
                os.posix_fadvise(record.fd, start, stop - start, os.POSIX_FADV_WILLNEED)
                assert len(os.pread(record.fd, stop - start, start)) == stop - start
                watched.ledger.settle(record, start, stop, (stop - start) * is_read_by_the_loader)
            watched.tell("pread", first, 3 * MiB, 8 * MiB)
            watched.expect(first, [(0, 8 * MiB)])

    def test_read_after_a_seek(self, tmp_path_factory: Any) -> None:
        with self.watch(tmp_path_factory) as (watched, path, _):
            watched.tell("open", path)
            watched.tell("seek", path, 6 * MiB)
            watched.settle()
            watched.tell("read", path, 2 * MiB)
            watched.expect(path, [(6 * MiB, 8 * MiB)])

    def test_a_seek_reads_nothing(self, tmp_path_factory: Any) -> None:
        """As a program does that asks how long a file is."""
        with self.watch(tmp_path_factory) as (watched, path, _):
            watched.tell("open", path)
            watched.settle()
            watched.tell("seek", path, _SIZE_BYTES)
            watched.settle()
            assert watched.reported(path).total <= 64 * KiB  # a count of bytes read may be a few bytes off

    def test_other_files_are_left_out(self, tmp_path_factory: Any) -> None:
        """A model file that is open, and cached, is not read because another file is."""
        other = self.make_files(tmp_path_factory)[2]
        with self.watch(tmp_path_factory) as (watched, path, _):
            path.read_bytes()
            watched.tell("open", path)
            watched.settle()
            watched.tell("open", other)
            watched.tell("read", other, 8 * MiB)
            watched.settle()
            assert watched.seen == []

    def test_a_thread(self, tmp_path_factory: Any) -> None:
        with self.watch(tmp_path_factory) as (watched, path, _):
            watched.tell("map", path)
            watched.tell("thread", "touch", path, 0, 2 * MiB)
            watched.expect(path, [(0, 2 * MiB)])

    def test_a_child_of_the_child(self, tmp_path_factory: Any) -> None:
        with self.watch(tmp_path_factory) as (watched, first, second):
            watched.tell("map", first)
            child = watched.tell("fork", "touch", first, 2 * MiB, 4 * MiB)
            assert child != watched.pid
            watched.expect(first, [(2 * MiB, 4 * MiB)], child)
            reader = watched.tell("fork", "open", second, "then", "read", second, 4 * MiB)
            watched.expect(second, [(0, 4 * MiB)], reader)

    def test_a_thread_of_a_child_of_the_child(self, tmp_path_factory: Any) -> None:
        with self.watch(tmp_path_factory) as (watched, path, _):
            watched.tell("map", path)
            child = watched.tell("fork", "thread", "touch", path, 2 * MiB, 4 * MiB)
            watched.expect(path, [(2 * MiB, 4 * MiB)], child)

    def test_a_fork_alone_reads_nothing(self, tmp_path_factory: Any) -> None:
        """Descriptors and mappings are inherited; what was read through them was read by the parent."""
        with self.watch(tmp_path_factory) as (watched, first, second):
            watched.tell("open", first)
            watched.tell("read", first, 4 * MiB)
            watched.tell("map", second)
            watched.tell("touch", second, 0, 4 * MiB)
            watched.expect(first, [(0, 4 * MiB)])
            watched.expect(second, [(0, 4 * MiB)])
            watched.tell("fork", "nothing")
            watched.settle()
            assert {part.pid for part in watched.seen} == {watched.pid}

    def test_another_program_in_the_same_process(self, tmp_path_factory: Any) -> None:
        with self.watch(tmp_path_factory) as (watched, first, second):
            watched.tell("map", first)
            watched.tell("touch", first, 0, MiB)
            watched.expect(first, [(0, MiB)])
            assert watched.tell("exec") == watched.pid
            watched.tell("map", second)
            watched.tell("touch", second, 8 * MiB, 9 * MiB)
            watched.expect(second, [(8 * MiB, 9 * MiB)])
            watched.expect(first, [(0, MiB)])

    def test_files_in_the_order_of_their_reading(self, tmp_path_factory: Any) -> None:
        with self.watch(tmp_path_factory) as (watched, first, second):
            for path in (second, first):
                watched.tell("open", path)
                watched.tell("read", path, 2 * MiB)
                watched.expect(path, [(0, 2 * MiB)])
            names = dict.fromkeys(part.file.name for part in watched.seen)
            assert list(names) == [second.name, first.name]

    def test_files_that_nobody_has_named(self, tmp_path_factory: Any) -> None:
        with self.watch(tmp_path_factory, named=False) as (watched, path, _):
            watched.tell("open", path)
            watched.tell("map", path)
            watched.settle()  # long enough for it to be found
            watched.tell("touch", path, 4 * MiB, 6 * MiB)
            watched.expect(path, [(4 * MiB, 6 * MiB)])
            assert [file.path for file in watched.files] == [str(path)]

    def test_where_a_file_is_mapped(self, tmp_path_factory: Any) -> None:
        with self.watch(tmp_path_factory) as (watched, first, second):
            watched.tell("map", first)
            child = watched.tell("fork", "map", second)
            first_file, second_file = watched.file(first), watched.file(second)
            watched.poll_until(
                lambda: (
                    len(watched.observer.mapped_parts(first_file)) == 2
                    and len(watched.observer.mapped_parts(second_file)) == 1
                ),
                "the mappings of both processes",
            )
            for file, pids in ((first_file, {watched.pid, child}), (second_file, {child})):
                parts = watched.observer.mapped_parts(file)
                assert {part.pid for part in parts} == pids
                for part in parts:
                    assert (part.start, part.stop) == (0, _SIZE_BYTES)
                    assert part.address == _address(part.pid, file.path)
                    assert f"Pid:\t{part.pid}\n" in Path(f"/proc/self/fdinfo/{part.pidfd}").read_text()
            watched.tell("unmap", first)
            watched.tell("reap")
            watched.poll_until(
                lambda: (
                    not watched.observer.mapped_parts(first_file) and not watched.observer.mapped_parts(second_file)
                ),
                "no mapping",
            )

    def test_the_end_of_the_child(self, tmp_path_factory: Any) -> None:
        with self.watch(tmp_path_factory) as (watched, path, _):
            watched.tell("map", path)
            watched.tell("touch", path, 0, MiB)
            watched.expect(path, [(0, MiB)])
            watched.end()
            watched.settle()
            watched.expect(path, [(0, MiB)])
            assert watched.observer.mapped_parts(watched.file(path)) == []

    def test_everything_is_taken_back(self, tmp_path_factory: Any) -> None:
        with self.watch(tmp_path_factory) as (watched, path, _):
            watched.tell("map", path)
            watched.ledger.record(watched.file(path))
            watched.observer.stop()
            before = os.listdir("/proc/self/fd")
            observer = self.make_observer(watched.files, watched.ledger)
            assert list(observer.poll()) == []
            observer.start(watched.pid)
            watched.observer = observer
            watched.tell("touch", path, 0, MiB)
            watched.expect(path, [(0, MiB)])
            assert len(os.listdir("/proc/self/fd")) > len(before)
            observer.stop()
            observer.stop()
            assert os.listdir("/proc/self/fd") == before
            assert list(observer.poll()) == []
            watched.tell("touch", path, 0, 2 * MiB)  # the child has not noticed
            watched.end()


def write_files(directory: Path) -> tuple[Path, Path, Path]:
    """Two model files, and one that is none."""
    names = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "tokenizer.json")
    for name in names:
        (directory / name).write_bytes((os.urandom(MiB) * 13)[:_SIZE_BYTES])  # random bytes of that size take a second
    return directory / names[0], directory / names[1], directory / names[2]


def _address(pid: int, path: str) -> int:
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        if line.endswith(f" {path}"):
            return int(line.partition("-")[0], 16)
    raise AssertionError(f"process {pid} does not map {path}")

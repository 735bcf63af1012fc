"""penstock.linux.tracefs: instances that record real children."""

from __future__ import annotations

import os
import shutil
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tests.tracing import LACKING, open_tracefs

from penstock.errors import UnsupportedError
from penstock.linux import tracefs as tracefs_module
from penstock.linux.ringbuffer import Events, decode_pages
from penstock.linux.tracefs import (
    ACCESS_EVENTS,
    INSTANCE_PREFIX,
    READ,
    Instance,
    TraceFs,
    follow,
    instance_name,
    remove_stale_instances,
)

PAGE = os.sysconf("SC_PAGE_SIZE")

# Obeys one line at a time: "read FILE START STOP" here, "fork …" the same in a new child, whose pid it answers.
READER = """
import os, sys

def read(path, start, stop):
    fd = os.open(path, os.O_RDONLY)
    assert len(os.pread(fd, int(stop) - int(start), int(start))) == int(stop) - int(start)
    os.close(fd)

for line in sys.stdin:
    verb, *arguments = line.split()
    pid = os.getpid()
    if verb == "fork":
        pid = os.fork()
        if pid == 0:
            read(*arguments[1:])
            os._exit(0)
        os.waitpid(pid, 0)
    elif verb == "reads":
        fd = os.open(arguments[0], os.O_RDONLY)
        for _ in range(int(arguments[1])):
            os.pread(fd, 1, 0)
        os.close(fd)
    else:
        read(*arguments)
    print(pid, flush=True)
"""


class TestNames:
    def test_a_name_tells_its_maker(self) -> None:
        name = instance_name(os.getpid())
        assert name.startswith(f"{INSTANCE_PREFIX}{os.getpid()}-")
        assert name == instance_name(os.getpid())
        assert name != instance_name(os.getppid())


class Reader:
    """The child and what it is told."""

    def __init__(self, popen: subprocess.Popen[str]) -> None:
        self._popen = popen
        self.pid = popen.pid

    def tell(self, line: str) -> int:
        assert self._popen.stdin is not None
        assert self._popen.stdout is not None
        self._popen.stdin.write(line + "\n")
        self._popen.stdin.flush()
        return int(self._popen.stdout.readline())


@contextmanager
def reading() -> Iterator[Reader]:
    command = [sys.executable, "-c", READER]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as popen:
        yield Reader(popen)
        assert popen.stdin is not None
        popen.stdin.close()


@pytest.fixture
def reader() -> Iterator[Reader]:
    with reading() as reader:
        yield reader


@pytest.fixture
def tracefs() -> Iterator[TraceFs]:
    if LACKING:
        pytest.skip(LACKING)
    tracefs = TraceFs()
    yield tracefs
    tracefs.close()


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / name for name in ("first", "second")]
    for path in paths:
        path.write_bytes(os.urandom(64 * PAGE))
    return paths


def instances(tracefs: TraceFs) -> set[str]:
    directory = os.open("instances", os.O_RDONLY | os.O_DIRECTORY, dir_fd=tracefs.fd)
    try:
        return set(os.listdir(directory))
    finally:
        os.close(directory)


def seen(instance: Instance) -> Events:
    return decode_pages(instance.read_pages(), instance.formats)


def reads_of(events: Events, path: Path) -> list[tuple[int, int, int]]:
    """Thread, first page and last page of the events of a file."""
    status = path.stat()
    chosen = events[(events["device"] == status.st_dev) & (events["inode"] == status.st_ino)]
    return [(int(e["thread"]), int(e["start"]) // PAGE, int(e["stop"]) // PAGE) for e in chosen]


@pytest.mark.root
class TestInstance:
    def test_it_lives_as_long_as_it_is_open(self, tracefs: TraceFs) -> None:
        before = os.listdir("/proc/self/fd")
        with Instance(tracefs) as instance:
            assert instance.name == instance_name(os.getpid())
            assert instance.name in instances(tracefs)
        assert instance.name not in instances(tracefs)
        assert os.listdir("/proc/self/fd") == before
        instance.close()

    def test_it_goes_when_an_error_does(self, tracefs: TraceFs) -> None:
        with pytest.raises(KeyError), Instance(tracefs) as instance:
            raise KeyError
        assert instance.name not in instances(tracefs)

    def test_a_process_that_cannot_be_followed(self, tracefs: TraceFs) -> None:
        with pytest.raises(OSError, match=r"Errno"):
            Instance(tracefs, pid=-5)
        assert instance_name(os.getpid()) not in instances(tracefs)

    def test_a_missing_tracepoint(self, tracefs: TraceFs) -> None:
        assert tracefs.available_events([READ, "mm_filemap_wishes"]) == [READ]
        with pytest.raises(UnsupportedError, match="mm_filemap_wishes"):
            Instance(tracefs, [READ, "mm_filemap_wishes"])
        assert instance_name(os.getpid()) not in instances(tracefs)

    def test_another_pid_namespace_is_refused(self, tracefs: TraceFs) -> None:
        if shutil.which("unshare") is None:
            pytest.skip("needs unshare (util-linux), for a pid namespace")
        code = (
            "from penstock.linux.tracefs import *\n"
            "name, tracefs = instance_name(os.getpid()), TraceFs()\n"
            "try:\n"
            "    Instance(tracefs)\n"
            "except UnsupportedError as error:\n"
            "    print(error)\n"
            "print(name in os.listdir(os.open('instances', os.O_RDONLY, dir_fd=tracefs.fd)))\n"
        )
        command = ["unshare", "--fork", "--pid", "--mount-proc", sys.executable, "-c", code]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert "pid namespace" in done.stdout
        assert done.stdout.endswith("False\n")


@pytest.mark.root
class TestRecording:
    def test_reads_with_their_ranges(self, tracefs: TraceFs, reader: Reader, files: list[Path]) -> None:
        with Instance(tracefs, pid=reader.pid) as instance:
            instance.start()
            reader.tell(f"read {files[0]} 0 {2 * PAGE}")
            reader.tell(f"read {files[0]} {10 * PAGE + 1} {10 * PAGE + 2}")
            instance.collect()
            instance.collect()  # nothing more; what was collected is kept
            found = reads_of(seen(instance), files[0])
            assert {pid for pid, _, _ in found} == {reader.pid}
            assert {page for _, first, last in found for page in range(first, last)} == {0, 1, 10}
            assert len(seen(instance)) == 0  # each event is told once

    def test_nothing_before_the_start(self, tracefs: TraceFs, reader: Reader, files: list[Path]) -> None:
        with Instance(tracefs, pid=reader.pid) as instance:
            reader.tell(f"read {files[0]} 0 {PAGE}")
            assert len(seen(instance)) == 0

    def test_only_the_files_watched(self, tracefs: TraceFs, reader: Reader, files: list[Path]) -> None:
        with Instance(tracefs, pid=reader.pid) as instance:
            status = files[1].stat()
            instance.watch([(status.st_dev, status.st_ino)])
            instance.start()
            for path in files:
                reader.tell(f"read {path} 0 {PAGE}")
            events = seen(instance)
            assert reads_of(events, files[0]) == []
            assert reads_of(events, files[1])
            assert set(events["inode"].tolist()) == {status.st_ino}

    @pytest.mark.parametrize("many", [0, 1000])
    def test_no_files_or_too_many_are_all_files(
        self, tracefs: TraceFs, reader: Reader, files: list[Path], many: int
    ) -> None:
        with Instance(tracefs, pid=reader.pid) as instance:
            instance.watch([(2049, 7)])
            instance.watch((2049, inode) for inode in range(1, many + 1))
            instance.start()
            for path in files:
                reader.tell(f"read {path} 0 {PAGE}")
            events = seen(instance)
            assert all(reads_of(events, path) for path in files)

    def test_children_are_followed(self, tracefs: TraceFs, reader: Reader, files: list[Path]) -> None:
        with Instance(tracefs, pid=reader.pid) as instance, reading() as stranger:
            instance.start()
            child = reader.tell(f"fork read {files[0]} 0 {PAGE}")
            stranger.tell(f"read {files[1]} 0 {PAGE}")
            events = seen(instance)
            assert {pid for pid, _, _ in reads_of(events, files[0])} == {child}
            assert child != reader.pid
            assert reads_of(events, files[1]) == []

    def test_everyone(self, tracefs: TraceFs, reader: Reader, files: list[Path]) -> None:
        with Instance(tracefs) as instance, reading() as stranger:
            status = [path.stat() for path in files]
            instance.watch((s.st_dev, s.st_ino) for s in status)
            instance.start()
            reader.tell(f"read {files[0]} 0 {PAGE}")
            stranger.tell(f"read {files[1]} 0 {PAGE}")
            events = seen(instance)
            assert {pid for pid, _, _ in reads_of(events, files[0])} == {reader.pid}
            assert {pid for pid, _, _ in reads_of(events, files[1])} == {stranger.pid}

    def test_what_was_overwritten_is_told(self, tracefs: TraceFs, reader: Reader, files: list[Path]) -> None:
        with Instance(tracefs, [READ], reader.pid) as instance:
            tracefs.write(f"instances/{instance.name}/buffer_size_kb", "64")
            instance.start()
            reader.tell(f"reads {files[0]} 20000")  # of 44 bytes each, on at most all CPUs
            instance.read_pages()
            assert instance.missed_pages > 0


@pytest.mark.root
class TestFollow:
    def test_the_name_is_announced_before_it_is_made(self, tracefs: TraceFs, reader: Reader, files: list[Path]) -> None:
        announced = []

        def announce(name: str) -> None:
            assert name not in instances(tracefs)
            announced.append(name)

        before = os.listdir("/proc/self/fd")
        instance = follow(reader.pid, announce)
        try:
            assert announced == [instance.name]
            assert instance.name in instances(tracefs)
            assert instance.events == ACCESS_EVENTS
            child = reader.tell(f"fork read {files[0]} 0 {PAGE}")
            assert {pid for pid, _, _ in reads_of(seen(instance), files[0])} == {child}
        finally:
            instance.close()
        assert instance.name not in instances(tracefs)
        assert os.listdir("/proc/self/fd") == before

    def test_detached_it_is_left_to_someone_else(self, tracefs: TraceFs, reader: Reader) -> None:
        before = os.listdir("/proc/self/fd")
        instance = follow(reader.pid)
        instance.detach()
        assert os.listdir("/proc/self/fd") == before
        assert instance.name in instances(tracefs)
        os.rmdir(f"instances/{instance.name}", dir_fd=tracefs.fd)

    def test_a_kernel_without_all_of_them(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """As before Linux 6.9. What tells of misses alone tells nothing of a program that is prefetched for."""
        tracefs = open_tracefs()
        monkeypatch.setattr(tracefs_module, "ACCESS_EVENTS", (*ACCESS_EVENTS, "mm_filemap_wishes"))
        before = instances(tracefs)
        with pytest.raises(UnsupportedError, match=r"lacks page-cache tracepoints: .*mm_filemap_wishes"):
            follow(os.getpid())
        assert instances(tracefs) == before
        tracefs.close()


@pytest.mark.root
class TestStale:
    MAKER = """
import os, signal, sys
from penstock.linux.tracefs import *
instance = Instance(TraceFs())
print(instance.name, flush=True)
sys.stdin.readline()
os.kill(os.getpid(), signal.SIGKILL)
"""

    def test_those_of_the_dead_are_removed_and_no_others(self, tracefs: TraceFs) -> None:
        command = [sys.executable, "-c", self.MAKER]
        with (
            Instance(tracefs) as own,
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as maker,
        ):
            assert maker.stdin is not None
            assert maker.stdout is not None
            name = maker.stdout.readline().strip()
            remove_stale_instances(tracefs)
            assert {name, own.name} <= instances(tracefs)
            maker.stdin.close()
            assert maker.wait() == -signal.SIGKILL
            remove_stale_instances(tracefs)
            assert name not in instances(tracefs)
            assert own.name in instances(tracefs)

    def test_a_pid_that_was_given_out_again(self, tracefs: TraceFs) -> None:
        name = f"{INSTANCE_PREFIX}{os.getpid()}-1"  # this process started at another time
        os.mkdir(f"instances/{name}", dir_fd=tracefs.fd)
        remove_stale_instances(tracefs)
        assert name not in instances(tracefs)

    def test_what_others_made_stays(self, tracefs: TraceFs) -> None:
        name = f"not-ours-{os.getpid()}"
        os.mkdir(f"instances/{name}", dir_fd=tracefs.fd)
        try:
            assert name not in remove_stale_instances(tracefs)
            assert name in instances(tracefs)
        finally:
            os.rmdir(f"instances/{name}", dir_fd=tracefs.fd)


def test_an_ordinary_user_is_told_why_not(as_ordinary_user: list[str]) -> None:
    code = (
        "from penstock.linux.tracefs import TraceFs, UnsupportedError\n"
        "try:\n"
        "    TraceFs()\n"
        "except UnsupportedError as error:\n"
        "    print(error)\n"
    )
    command = [*as_ordinary_user, sys.executable, "-c", code]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert output.startswith("no tracefs: ")


def test_records_one_by_one() -> None:
    record = struct.pack("<Hxxi", 7, 42) + bytes(8)
    small = struct.pack("<I", len(record) // 4 | 100 << 5) + record
    counted = struct.pack("<II", 0, 4 + 120) + record + bytes(104)
    extend = struct.pack("<II", tracefs_module.TIME_EXTEND | 5 << 5, 9)
    discarded = struct.pack("<II", tracefs_module.PADDING | 1 << 5, 4 + len(record)) + record
    rest = struct.pack("<I", tracefs_module.PADDING) + b"\xff" * 40
    data = extend + small + discarded + counted + small + rest
    assert list(tracefs_module.records(data)) == [record, record + bytes(104), record]
    assert list(tracefs_module.records(b"")) == []

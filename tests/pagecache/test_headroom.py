"""penstock.pagecache.headroom in a real limited cgroup, and on the device under a real file."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.contents import contents

from penstock.linux.memory import read_memory
from penstock.pagecache.headroom import THRESHOLD, Budget, DeviceMonitor, Headroom, OwnReads
from penstock.units import GiB, MiB


@pytest.mark.parametrize(
    ("budget_bytes", "keep_bytes"),
    [(0, 0), (100 * MiB, 10 * MiB), (10 * GiB, GiB), (100 * GiB, GiB)],
)
def test_the_keep_distance_is_a_tenth_up_to_a_gibibyte(budget_bytes: int, keep_bytes: int) -> None:
    assert Budget(budget_bytes, "host").keep_bytes == keep_bytes


class TestHeadroom:
    def test_a_fifth_of_the_limit_stays_free(self) -> None:
        headroom = Headroom(os.getpid())
        try:
            budget = headroom.read()
            state = read_memory(os.getpid())
        finally:
            headroom.close()
        expected = max(0, state.headroom_bytes - (1 - THRESHOLD) * state.limit_bytes)
        assert budget.source == state.source
        assert abs(budget.bytes - expected) < 512 * MiB  # the machine does other things meanwhile

    def test_a_limit_of_the_users(self) -> None:
        headroom = Headroom(os.getpid(), 16 * MiB)
        try:
            assert headroom.read() == Budget(16 * MiB, "--memory")
        finally:
            headroom.close()

    def test_a_limit_above_what_there_is_changes_nothing(self) -> None:
        headroom = Headroom(os.getpid(), 1 << 60)
        try:
            budget = headroom.read()
        finally:
            headroom.close()
        assert budget.source != "--memory"
        assert budget.bytes < 1 << 60

    def test_a_process_that_was_never_there(self) -> None:
        child = subprocess.Popen(["true"])
        child.wait()
        with pytest.raises(ProcessLookupError):
            Headroom(child.pid)

    def test_close_closes_its_files(self) -> None:
        before = os.listdir("/proc/self/fd")
        Headroom(os.getpid()).close()
        assert os.listdir("/proc/self/fd") == before


# Reads a file when told to.
READER = "import sys; input(); open(sys.argv[1], 'rb').read(); print('read', flush=True); input()"


@pytest.mark.root
class TestLimited:
    LIMIT_BYTES = 100 * MiB

    @pytest.fixture
    def cgroup(self, make_memory_cgroup: Callable[[int], Path]) -> Path:
        return make_memory_cgroup(self.LIMIT_BYTES)

    @pytest.fixture
    def child(self, cgroup: Path, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
        path = tmp_path / "file"
        with path.open("wb") as file:
            file.write(contents(32 * MiB))
            file.flush()
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        command = [sys.executable, "-c", READER, str(path)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
            (cgroup / "cgroup.procs").write_text(str(child.pid))
            yield child
            child.kill()

    def test_the_budget_is_the_cgroups(self, cgroup: Path, child: subprocess.Popen[str]) -> None:
        headroom = Headroom(child.pid)
        try:
            budget = headroom.read()
        finally:
            headroom.close()
        assert budget.source.endswith(f"/{cgroup.name}")
        assert 0 < budget.bytes <= self.LIMIT_BYTES * THRESHOLD + 1  # of rounding
        assert budget.keep_bytes == budget.bytes // 10

    def test_what_was_read_can_be_reclaimed(self, child: subprocess.Popen[str]) -> None:
        headroom = Headroom(child.pid)
        try:
            before = headroom.read()
            assert child.stdin is not None
            assert child.stdout is not None
            child.stdin.write("\n")
            child.stdin.flush()
            assert child.stdout.readline() == "read\n"
            after = headroom.read()
        finally:
            headroom.close()
        # The page cache of the file takes nothing away; what the child holds itself (the bytes it read) is gone by now.
        assert abs(after.bytes - before.bytes) < 16 * MiB

    def test_the_end_of_the_process_is_no_error(self, cgroup: Path, child: subprocess.Popen[str]) -> None:
        headroom = Headroom(child.pid)
        try:
            before = headroom.read()
            child.kill()
            child.wait()
            cgroup.rmdir()
            assert headroom.read() == before
        finally:
            headroom.close()


class TestDevices:
    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        path = tmp_path / "file"
        with path.open("wb") as file:
            file.write(os.urandom(MiB))
            file.flush()
            os.fsync(file.fileno())
        return path

    def test_reads_count_from_when_it_is_watched(self, path: Path) -> None:
        monitor = DeviceMonitor()
        assert monitor.read_bytes() == 0
        monitor.watch(path.stat().st_dev)
        before = monitor.read_bytes()
        fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
        try:
            with mmap.mmap(-1, MiB) as buffer:
                assert os.preadv(fd, [buffer], 0) == MiB
        except OSError as error:
            pytest.skip(f"{path}: no direct reads here: {error.strerror}")
        finally:
            os.close(fd)
        monitor.watch(path.stat().st_dev)  # a second time changes nothing
        after = monitor.read_bytes()
        monitor.close()
        if not Path(f"/sys/dev/block/{os.major(path.stat().st_dev)}:{os.minor(path.stat().st_dev)}").exists():
            assert after == 0
        else:
            assert after >= before + MiB

    def test_nothing_watched_is_not_busy(self) -> None:
        monitor = DeviceMonitor()
        assert not monitor.others_are_busy([os.getpid()])
        monitor.watch(os.makedev(0, 43))  # no block device
        assert not monitor.others_are_busy([os.getpid()])
        assert monitor.read_bytes() == 0
        monitor.close()

    def test_a_process_that_has_ended_has_read_nothing(self, path: Path) -> None:
        child = subprocess.Popen(["true"])
        child.wait()
        monitor = DeviceMonitor()
        monitor.watch(path.stat().st_dev)
        monitor.others_are_busy([child.pid, child.pid])
        monitor.close()

    def test_close_closes_its_files(self, path: Path) -> None:
        before = os.listdir("/proc/self/fd")
        monitor = DeviceMonitor()
        monitor.watch(path.stat().st_dev)
        monitor.close()
        assert os.listdir("/proc/self/fd") == before


@pytest.mark.parametrize(("accessed_bytes", "likely"), [(0, True), (1 * MiB, False)])
def test_a_program_that_reads_its_own_files(tmp_path: Path, accessed_bytes: int, likely: bool) -> None:
    path = tmp_path / "library"
    path.write_bytes(contents(4 * MiB))
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    code = "import sys; sys.stdin.readline(); open(sys.argv[1], 'rb').read(); print(flush=True); sys.stdin.readline()"
    with subprocess.Popen(
        [sys.executable, "-c", code, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as program:
        assert program.stdin is not None
        assert program.stdout is not None
        reads = OwnReads()
        reads.are_likely([program.pid], 0)
        program.stdin.write(b"\n")
        program.stdin.flush()
        program.stdout.readline()
        assert reads.are_likely([program.pid], accessed_bytes) is likely
        program.stdin.close()
    assert not OwnReads().are_likely([program.pid], 0)  # it has ended

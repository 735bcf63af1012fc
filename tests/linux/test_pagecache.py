"""penstock.linux.pagecache against what a plain read leaves in the cache of a real file."""

from __future__ import annotations

import errno
import mmap
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.contents import contents
from tests.examples import examples

from penstock.linux import pagecache
from penstock.linux.pagecache import FileResidency, ResidencyMethod
from penstock.linux.window import PAGE_BYTES, FileWindow
from penstock.testing.residency import kept_cached
from penstock.units import MiB

PAGES = 2048
SIZE_BYTES = PAGES * PAGE_BYTES

# Maps the file whole, touches every page and holds it until told to end.
MAPPER = """
import mmap, sys
with open(sys.argv[1], "rb") as file:
    mapping = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
total = sum(mapping[at] for at in range(0, len(mapping), mmap.PAGESIZE))
print("mapped", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "model.bin"
    with path.open("w+b") as file:
        file.write(contents(SIZE_BYTES))
        file.flush()
        os.fsync(file.fileno())
        pagecache.drop(file.fileno())
        if pagecache.mincore(file.fileno(), 0, SIZE_BYTES).any():
            pytest.skip(f"{tmp_path} is on a file system that keeps every page in memory")
    return path


@pytest.fixture
def fd(path: Path) -> Iterator[int]:
    """The file, cold."""
    fd = os.open(path, os.O_RDONLY)
    yield fd
    os.close(fd)


def has_cachestat() -> bool:
    """Linux 6.5 and later do."""
    with tempfile.TemporaryFile() as file:
        try:
            pagecache.cachestat(file.fileno(), 0, PAGE_BYTES)
        except OSError as error:
            if error.errno != errno.ENOSYS:
                raise
            return False
    return True


def read_pages(path: Path, first: int, last: int) -> None:
    """Have the pages ``[first, last)`` cached, and no others, by no means of penstock's."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
        wanted = (last - first) * PAGE_BYTES
        assert len(os.pread(fd, wanted, first * PAGE_BYTES)) == wanted
    finally:
        os.close(fd)


def resident(fd: int) -> set[int]:
    return set(np.flatnonzero(pagecache.mincore(fd, 0, SIZE_BYTES)).tolist())


@contextmanager
def mapped_by(path: Path, processes: int) -> Iterator[list[subprocess.Popen[str]]]:
    """Children that map the file and have touched all of it."""
    with ExitStack() as stack:
        children = []
        for _ in range(processes):
            command = [sys.executable, "-c", MAPPER, str(path)]
            child = stack.enter_context(
                subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            )
            assert child.stdin is not None
            stack.callback(child.stdin.close)
            children.append(child)
        for child in children:
            assert child.stdout is not None
            assert child.stdout.readline() == "mapped\n"
        yield children


def mapping_of(pid: int, path: Path) -> tuple[int, int]:
    """Addresses of the mapping of a whole file."""
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        if line.endswith(f" {path}"):
            start, _, stop = line.split()[0].partition("-")
            return int(start, 16), int(stop, 16)
    raise AssertionError(f"process {pid} does not map {path}")


class TestResidency:
    def test_three_ways_agree_with_what_was_read(self, path: Path, fd: int) -> None:
        expected: set[int] = set()
        for first, last in [(0, 1), (16, 48), (700, 701), (1000, 1003), (PAGES - 1, PAGES)]:
            read_pages(path, first, last)
            expected |= set(range(first, last))
        assert resident(fd) == expected
        if has_cachestat():
            assert pagecache.cachestat(fd, 0, SIZE_BYTES).cached_pages == len(expected)
        asked = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(asked, 0, 0, os.POSIX_FADV_RANDOM)
            offsets = sorted({0, 1, 15, 16, 47, 48, 700, 702, 1002, 1003, PAGES - 2, PAGES - 1})
            by_fault = [pagecache.is_resident_fault(asked, page * PAGE_BYTES) for page in offsets]
            assert by_fault == [page in expected for page in offsets]
            read = pagecache.is_resident_nowait(asked, [page * PAGE_BYTES for page in sorted(expected)])
        finally:
            os.close(asked)
        assert all(read)  # what it does not call cached is not

    @settings(max_examples=examples(100), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(
        reads=st.lists(st.tuples(st.integers(0, 63), st.integers(1, 8)), max_size=4),
        start=st.integers(0, 64 * PAGE_BYTES),
        length=st.integers(0, 32 * PAGE_BYTES),
    )
    def test_any_range(self, path: Path, reads: list[tuple[int, int]], start: int, length: int) -> None:
        fd = os.open(path, os.O_RDONLY)
        methods = [ResidencyMethod.MINCORE, *([ResidencyMethod.CACHESTAT] if has_cachestat() else [])]
        kept = ExitStack()
        try:
            pagecache.drop(fd)
            expected = set()
            for first, pages in reads:
                kept.enter_context(kept_cached(path, first * PAGE_BYTES, (first + pages) * PAGE_BYTES))
                expected |= set(range(first, first + pages))
            first_page, last_page = start // PAGE_BYTES, -(-(start + length) // PAGE_BYTES)
            wanted = [page in expected for page in range(first_page, last_page)] if length else []
            found = pagecache.mincore(fd, start, start + length)
            assert found.tolist() == wanted
            if ResidencyMethod.CACHESTAT in methods:
                assert pagecache.cachestat(fd, start, start + length).cached_pages == sum(wanted)
            for method in methods:
                residency = FileResidency(fd)
                residency.method = method
                assert residency.resident_bytes(start, start + length) == min(sum(wanted) * PAGE_BYTES, length)
                assert residency.is_resident(start, start + length) == all(wanted)
        finally:
            kept.close()
            os.close(fd)

    def test_a_file_that_ends_within_a_page(self, tmp_path: Path) -> None:
        path = tmp_path / "odd"
        path.write_bytes(b"x" * (3 * PAGE_BYTES + 5))
        with path.open("rb") as file:
            residency = FileResidency(file.fileno())
            assert residency.resident_bytes(0, 3 * PAGE_BYTES + 5) == 3 * PAGE_BYTES + 5
            assert pagecache.mincore(file.fileno(), 0, 3 * PAGE_BYTES + 5).tolist() == [True] * 4

    def test_dirty_pages_are_counted(self, tmp_path: Path) -> None:
        if not has_cachestat():
            pytest.skip("needs cachestat (Linux 6.5)")
        with (tmp_path / "dirty").open("wb", buffering=0) as file:
            file.write(bytes(4 * PAGE_BYTES))
            stat = pagecache.cachestat(file.fileno(), 0, 4 * PAGE_BYTES)
            assert stat.cached_pages == 4
            assert stat.dirty_pages + stat.writeback_pages <= 4

    def test_the_owner_gets_an_exact_answer(self, fd: int) -> None:
        assert pagecache.may_inspect(fd)
        residency = FileResidency(fd)
        assert residency.exact
        assert residency.method in {ResidencyMethod.CACHESTAT, ResidencyMethod.MINCORE}


# What a user sees of a file that another owns: argv[1] is the file, argv[2] what to run with `residency`.
ANOTHERS = """
import os, sys
from penstock.linux.pagecache import *
fd = os.open(sys.argv[1], os.O_RDONLY)
size = os.fstat(fd).st_size
descriptors = len(os.listdir("/proc/self/fd"))
residency = FileResidency(fd)
exec(sys.argv[2])
"""


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to own a file that the reader does not")
class TestAnothersFile:
    @pytest.fixture
    def look(self, path: Path, as_ordinary_user: list[str]) -> Callable[[str], str]:
        path.chmod(0o644)

        def look(code: str) -> str:
            command = [*as_ordinary_user, sys.executable, "-c", ANOTHERS, str(path), code]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
            return done.stdout.strip()

        return look

    def test_it_is_sampled_and_says_so(self, look: Callable[[str], str]) -> None:
        assert look("print(residency.method.name, residency.exact, may_inspect(fd))") == "NOWAIT False False"
        assert look("print(mincore(fd, 0, size).all())") == "True"  # which is why mincore is not asked

    def test_what_is_cached_is_found(self, path: Path, look: Callable[[str], str]) -> None:
        with kept_cached(path, SIZE_BYTES // 2, SIZE_BYTES):
            first, *others = map(int, look("print(*(residency.resident_bytes(0, size) for _ in range(3)))").split())
            told = look("print(residency.is_resident(size // 2, size), residency.is_resident(0, size))")
        assert first == SIZE_BYTES // 2
        # What was asked for before has been read in, and is hit again with a chance of 1 in 100 for each MiB.
        assert all(SIZE_BYTES // 2 <= found <= SIZE_BYTES // 2 + 2 * MiB for found in others)
        assert told == "True False"

    def test_asking_again_and_again_does_not_make_it_cached(
        self, path: Path, fd: int, look: Callable[[str], str]
    ) -> None:
        # Each question has one page of each MiB read in, or two where the device is quick, and few are hit again.
        answers = look("print(*(residency.resident_bytes(0, size) for _ in range(20)))").split()
        strides = SIZE_BYTES // MiB
        assert len(answers) == 20
        assert sum(map(int, answers)) < 20 * SIZE_BYTES // 4
        assert len(resident(fd)) <= 1 + 2 * 20 * strides

    def test_a_device_as_quick_as_the_question_is_no_cache(
        self, path: Path, fd: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # Each page arrives before the read that asks for it looks: it is always said to be cached.
        monkeypatch.setattr(pagecache, "is_resident_nowait", lambda fd, offsets: [True for _ in offsets])
        residency = FileResidency(fd)
        residency.method = ResidencyMethod.NOWAIT
        assert residency.resident_bytes(0, SIZE_BYTES) == 0
        assert residency.resident_bytes(0, 3 * PAGE_BYTES) <= PAGE_BYTES  # one may have been asked for above
        with kept_cached(path, SIZE_BYTES // 2, SIZE_BYTES):
            assert residency.resident_bytes(SIZE_BYTES // 2, SIZE_BYTES) == SIZE_BYTES // 2
            assert not residency.is_resident(0, SIZE_BYTES)

    @pytest.mark.parametrize("number", [errno.EINVAL, errno.ENODEV])
    def test_where_a_fault_cannot_be_asked_for(
        self, path: Path, fd: int, monkeypatch: pytest.MonkeyPatch, number: int
    ) -> None:
        def refused(fd: int, offset: int) -> bool:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(pagecache, "is_resident_fault", refused)
        read_pages(path, 0, PAGES)
        residency = FileResidency(fd)
        residency.method = ResidencyMethod.NOWAIT
        assert residency.resident_bytes(0, 3 * PAGE_BYTES) == 3 * PAGE_BYTES
        assert residency.resident_bytes(0, SIZE_BYTES) >= SIZE_BYTES // 2

    def test_a_short_range_is_asked_page_by_page(self, path: Path, look: Callable[[str], str]) -> None:
        with kept_cached(path, 10 * PAGE_BYTES, 12 * PAGE_BYTES):
            assert look("print(residency.resident_bytes(10 * PAGE_BYTES, 12 * PAGE_BYTES))") == str(2 * PAGE_BYTES)
        assert look("print(residency.resident_bytes(12 * PAGE_BYTES, 13 * PAGE_BYTES))") == "0"
        assert look("print(residency.resident_bytes(5, 5))") == "0"

    def test_its_own_descriptor_goes_with_it(self, look: Callable[[str], str]) -> None:
        code = "during = len(os.listdir('/proc/self/fd')); del residency; "
        code += "print(during - descriptors, len(os.listdir('/proc/self/fd')) - descriptors)"
        assert look(code) == "1 0"

    def test_a_memory_file_system_counts_as_cached(self, as_ordinary_user: list[str]) -> None:
        shared = Path("/dev/shm")
        if not shared.is_dir():
            pytest.skip("there is no /dev/shm")
        path = shared / f"penstock-test-{os.getpid()}"
        try:
            path.write_bytes(bytes(MiB))
            path.chmod(0o644)
            code = "print(residency.resident_bytes(0, size) == size, residency.is_resident(0, size))"
            command = [*as_ordinary_user, sys.executable, "-c", ANOTHERS, str(path), code]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        finally:
            path.unlink()
        assert done.stdout == "True True\n", done.stderr

    def test_page_out_is_refused(self, path: Path, as_ordinary_user: list[str]) -> None:
        code = (
            "import os, sys\n"
            "from penstock.linux.pagecache import page_out\n"
            "fd = os.pidfd_open(int(sys.argv[1]))\n"
            "try:\n"
            "    page_out(fd, [(int(sys.argv[2]), int(sys.argv[3]))])\n"
            "except PermissionError:\n"
            "    print('refused')\n"
        )
        with mapped_by(path, 1) as [child]:
            where = [str(number) for number in mapping_of(child.pid, path)]
            command = [*as_ordinary_user, sys.executable, "-c", code, str(child.pid), *where]
            assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "refused\n"


class TestFilling:
    def test_populate_a_part(self, fd: int) -> None:
        pagecache.populate(fd, 512 * PAGE_BYTES, 1024 * PAGE_BYTES)
        assert set(range(512, 1024)) <= resident(fd)

    def test_populate_all(self, fd: int) -> None:
        pagecache.populate(fd, 0, SIZE_BYTES)
        assert resident(fd) == set(range(PAGES))

    def test_populate_up_to_an_end_within_a_page(self, tmp_path: Path) -> None:
        path = tmp_path / "odd"
        path.write_bytes(bytes(PAGE_BYTES + 1))
        with path.open("rb") as file:
            pagecache.populate(file.fileno(), 0, PAGE_BYTES + 1)
            assert pagecache.mincore(file.fileno(), 0, PAGE_BYTES + 1).all()

    @pytest.mark.parametrize("start_page", [0, PAGES - 1, PAGES, PAGES + 100])
    def test_populate_past_the_end_is_an_error(self, fd: int, start_page: int) -> None:
        with pytest.raises(OSError, match="madvise") as caught:
            pagecache.populate(fd, start_page * PAGE_BYTES, SIZE_BYTES + 101 * PAGE_BYTES)
        assert caught.value.errno == errno.EFAULT

    def test_a_window_begins_at_a_page(self, fd: int) -> None:
        with pytest.raises(OSError, match="mmap") as caught:
            FileWindow(fd, 100, SIZE_BYTES)
        assert caught.value.errno == errno.EINVAL

    def test_splice(self, fd: int) -> None:
        assert pagecache.splice_fill(fd, 100, 3 * MiB) == 3 * MiB - 100
        assert set(range(3 * MiB // PAGE_BYTES)) <= resident(fd)

    def test_splice_stops_at_the_end(self, fd: int) -> None:
        assert pagecache.splice_fill(fd, SIZE_BYTES - 5, SIZE_BYTES + MiB) == 5
        assert pagecache.splice_fill(fd, SIZE_BYTES + 1, SIZE_BYTES + MiB) == 0
        assert PAGES - 1 in resident(fd)

    def test_readahead_begins_to_read(self, fd: int) -> None:
        pagecache.readahead(fd, 64 * PAGE_BYTES, 8 * PAGE_BYTES)
        deadline = time.monotonic() + 20
        while 64 not in resident(fd):
            assert time.monotonic() < deadline, "nothing was read ahead"

    def test_descriptors_are_closed(self, fd: int) -> None:
        before = os.listdir("/proc/self/fd")
        pagecache.splice_fill(fd, 0, MiB)
        pagecache.populate(fd, 0, MiB)
        pagecache.probe(os.path.dirname(os.readlink(f"/proc/self/fd/{fd}")))
        assert os.listdir("/proc/self/fd") == before


class TestTouch:
    @pytest.fixture
    def sink(self) -> Iterator[int]:
        sink = os.memfd_create("sink", os.MFD_CLOEXEC)
        yield sink
        os.close(sink)

    def test_every_page_is_read(self, path: Path, fd: int, sink: int) -> None:
        with FileWindow(fd, 0, SIZE_BYTES) as window:
            window.touch(sink)
        assert resident(fd) == set(range(PAGES))
        # The last batch of pages leaves its first bytes in the sink.
        expected = path.read_bytes()[::PAGE_BYTES]
        assert os.pread(sink, 1024, 0) == expected[-1024:]

    def test_a_part_of_a_window(self, path: Path, fd: int, sink: int) -> None:
        with FileWindow(fd, 1024 * PAGE_BYTES, SIZE_BYTES) as window:
            window.touch(sink, 10 * PAGE_BYTES, 13 * PAGE_BYTES)
        assert {1034, 1035, 1036} <= resident(fd)
        assert os.pread(sink, 1024, 0) == path.read_bytes()[1034 * PAGE_BYTES : 1037 * PAGE_BYTES : PAGE_BYTES]

    def test_nothing_is_read_ahead(self, fd: int, sink: int) -> None:
        pagecache.populate(fd, 0, 512 * PAGE_BYTES)  # marks its first page for those whose reading comes to it
        with FileWindow(fd, 0, 512 * PAGE_BYTES) as window:
            window.touch(sink)
        time.sleep(0.1)
        assert resident(fd) <= set(range(512))

    @pytest.mark.parametrize("left_bytes", [0, 100 * PAGE_BYTES, 1024 * PAGE_BYTES, 1500 * PAGE_BYTES + 1])
    def test_a_file_truncated_meanwhile(self, path: Path, left_bytes: int) -> None:
        # In a process of its own: what must not happen is a SIGBUS.
        code = (
            "import os, sys\n"
            "from penstock.linux.window import FileWindow\n"
            "path, size, left = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])\n"
            "fd, sink = os.open(path, os.O_RDWR), os.memfd_create('sink')\n"
            "with FileWindow(fd, 0, size) as window:\n"
            "    window.populate()\n"
            "    os.truncate(path, left)\n"
            "    try:\n"
            "        window.touch(sink)\n"
            "    except OSError as error:\n"
            "        print(error.errno)\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, str(path), str(SIZE_BYTES), str(left_bytes)],
            capture_output=True,
            text=True,
            check=False,
        )
        assert (done.returncode, done.stdout) == (0, f"{errno.EFAULT}\n"), done.stderr


class TestDropping:
    def test_a_range(self, path: Path, fd: int) -> None:
        read_pages(path, 0, PAGES)
        pagecache.drop(fd, 100 * PAGE_BYTES, 200 * PAGE_BYTES)
        assert resident(fd) == set(range(100)) | set(range(200, PAGES))

    def test_to_the_end(self, path: Path, fd: int) -> None:
        read_pages(path, 0, PAGES)
        pagecache.drop(fd, 100 * PAGE_BYTES)
        assert resident(fd) == set(range(100))

    def test_pages_that_a_process_maps_stay(self, path: Path, fd: int) -> None:
        with mapped_by(path, 1):
            pagecache.drop(fd)
            assert resident(fd) == set(range(PAGES))

    @pytest.mark.root
    @pytest.mark.skipif(os.geteuid() != 0, reason="needs CAP_SYS_NICE, to page out another process's memory")
    def test_page_out_drops_what_one_process_maps(self, path: Path, fd: int) -> None:
        with mapped_by(path, 1) as [child]:
            start, stop = mapping_of(child.pid, path)
            half = start + (stop - start) // 2
            with pidfd_of(child.pid) as pidfd:
                pagecache.page_out(pidfd, [(start, start + PAGE_BYTES), (start + PAGE_BYTES, half)])
                pagecache.drop(fd, 0, SIZE_BYTES // 2)
            left = resident(fd)
            assert len({page for page in left if page < PAGES // 2}) < PAGES // 20
            assert left >= set(range(PAGES // 2, PAGES))

    @pytest.mark.root
    @pytest.mark.skipif(os.geteuid() != 0, reason="needs CAP_SYS_NICE, to page out another process's memory")
    def test_page_out_leaves_what_two_processes_map(self, path: Path, fd: int) -> None:
        with mapped_by(path, 2) as [child, other]:
            with pidfd_of(child.pid) as pidfd:
                pagecache.page_out(pidfd, [mapping_of(child.pid, path)])
                assert len(resident(fd)) > PAGES * 9 // 10
                end(other)
                pagecache.page_out(pidfd, [mapping_of(child.pid, path)])
            pagecache.drop(fd)
            assert len(resident(fd)) < PAGES // 20

    def test_page_out_of_a_process_that_is_gone(self, path: Path) -> None:
        with mapped_by(path, 1) as [child], pidfd_of(child.pid) as pidfd:
            where = mapping_of(child.pid, path)
            end(child)
            with pytest.raises((ProcessLookupError, PermissionError)):
                pagecache.page_out(pidfd, [where])


@contextmanager
def pidfd_of(pid: int) -> Iterator[int]:
    pidfd = os.pidfd_open(pid)
    try:
        yield pidfd
    finally:
        os.close(pidfd)


def end(child: subprocess.Popen[str]) -> None:
    assert child.stdin is not None
    child.stdin.close()
    child.wait()


class TestProbe:
    def test_what_works_here(self, path: Path, fd: int) -> None:
        support = pagecache.probe(path.parent)

        def works(call: Callable[..., object], *arguments: object) -> bool:
            try:
                call(*arguments)
            except OSError:
                return False
            return True

        assert support.cachestat == works(pagecache.cachestat, fd, 0, 1)
        assert support.populate_read == works(pagecache.populate, fd, 0, PAGE_BYTES)
        assert support.nowait_read == works(pagecache.is_resident_nowait, fd, [0])
        assert os.listdir(path.parent) == [path.name]

    def test_process_madvise_as_an_ordinary_user(self, as_ordinary_user: list[str], tmp_path: Path) -> None:
        tmp_path.chmod(0o777)
        code = "import sys; from penstock.linux.pagecache import probe; print(probe(sys.argv[1]).process_madvise)"
        command: Sequence[str] = [*as_ordinary_user, sys.executable, "-c", code, "/tmp"]
        assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "False\n"

    @pytest.mark.root
    @pytest.mark.skipif(os.geteuid() != 0, reason="needs CAP_SYS_NICE")
    def test_process_madvise_as_root(self, path: Path) -> None:
        support = pagecache.probe(path.parent)
        with mapped_by(path, 1) as [child], pidfd_of(child.pid) as pidfd:
            pagecache.page_out(pidfd, [mapping_of(child.pid, path)])
        assert support.process_madvise


def test_the_page_size_is_the_machines() -> None:
    assert PAGE_BYTES == mmap.PAGESIZE == os.sysconf("SC_PAGE_SIZE")

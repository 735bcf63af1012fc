"""penstock.pagecache.evictor on real files that real children map."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import pytest

from penstock.linux.pagecache import drop, mincore
from penstock.pagecache.base import ModelFile
from penstock.pagecache.evictor import Evictor, MappedPart
from penstock.pagecache.ledger import Ledger
from penstock.testing.residency import About
from penstock.units import MiB

SIZE_BYTES = 40 * MiB
PAGE = mmap.PAGESIZE

# Maps the file, touches every page and then answers each line with the sum of the first bytes of all pages.
MAPPER = """
import mmap, sys
with open(sys.argv[1], "rb") as file:
    mapping = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
def total():
    return sum(mapping[::mmap.PAGESIZE])
print(total(), flush=True)
for line in sys.stdin:
    print(total(), flush=True)
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> ModelFile:
    path = tmp_path_factory.mktemp("evictor") / "model.gguf"
    with path.open("w+b") as file:
        for _ in range(SIZE_BYTES // MiB):
            file.write(os.urandom(MiB))
        file.flush()
        os.fsync(file.fileno())
        drop(file.fileno())
        if mincore(file.fileno(), 0, SIZE_BYTES).any():
            pytest.skip(f"{path} is on a file system that keeps every page in memory")
    path.chmod(0o644)
    status = path.stat()
    return ModelFile(path.name, str(path), status.st_size, status.st_dev, status.st_ino)


@pytest.fixture
def cached(file: ModelFile) -> None:
    """The whole file is in the cache, in single pages: a large folio goes only whole."""
    with open(file.path, "rb", buffering=0) as reader:
        os.posix_fadvise(reader.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        os.posix_fadvise(reader.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        while reader.read(8 * MiB):
            pass


def resident(file: ModelFile, start: int = 0, stop: int = SIZE_BYTES) -> int:
    with open(file.path, "rb") as opened:
        return int(np.count_nonzero(mincore(opened.fileno(), start, stop))) * PAGE


class Mapper:
    """A child that maps the file."""

    def __init__(self, popen: subprocess.Popen[str], file: ModelFile) -> None:
        self.popen = popen
        self.sum = self.answer()
        for line in Path(f"/proc/{popen.pid}/maps").read_text().splitlines():
            if line.endswith(f" {file.path}"):
                self.address = int(line.partition("-")[0], 16)

    def answer(self) -> int:
        assert self.popen.stdout is not None
        return int(self.popen.stdout.readline())

    def ask(self) -> int:
        assert self.popen.stdin is not None
        self.popen.stdin.write("\n")
        self.popen.stdin.flush()
        return self.answer()


@contextmanager
def mappers(file: ModelFile, processes: int) -> Iterator[tuple[list[Mapper], list[MappedPart]]]:
    with ExitStack() as stack:
        found, parts = [], []
        for _ in range(processes):
            command = [sys.executable, "-c", MAPPER, file.path]
            popen = stack.enter_context(
                subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            )
            stack.callback(popen.kill)
            mapper = Mapper(popen, file)
            pidfd = os.pidfd_open(popen.pid)
            stack.callback(os.close, pidfd)
            found.append(mapper)
            parts.append(MappedPart(popen.pid, pidfd, mapper.address, 0, SIZE_BYTES))
        yield found, parts


def nobody_maps(file: ModelFile) -> Sequence[MappedPart]:
    return ()


@pytest.mark.usefixtures("cached")
class TestUnmapped:
    def test_at_once(self, ledger: Ledger, file: ModelFile) -> None:
        evictor = Evictor(ledger, nobody_maps)
        ledger.access(ledger.record(file), 0, SIZE_BYTES)
        evictor.evict(file, MiB, 5 * MiB, at_once=True)
        assert resident(file, MiB, 5 * MiB) == About(0)
        assert resident(file) == About(SIZE_BYTES - 4 * MiB)
        assert ledger.totals().evicted_bytes == About(4 * MiB)
        assert ledger.record(file).present.missing(0, SIZE_BYTES) == [(MiB, 5 * MiB)]

    def test_small_pieces_wait_for_each_other(self, ledger: Ledger, file: ModelFile) -> None:
        evictor = Evictor(ledger, nobody_maps)
        for start in range(0, 16 * MiB, MiB):
            evictor.evict(file, start, start + MiB)
        assert resident(file) == About(SIZE_BYTES)
        for start in range(16 * MiB, 32 * MiB, MiB):
            evictor.evict(file, start, start + MiB)
        assert resident(file) == About(SIZE_BYTES - 32 * MiB)
        assert ledger.totals().evicted_bytes == About(32 * MiB)

    def test_a_batch_is_of_whole_folios(self, ledger: Ledger, file: ModelFile) -> None:
        evictor = Evictor(ledger, nobody_maps)
        evictor.evict(file, MiB, 35 * MiB + 5)
        assert resident(file, 2 * MiB, 34 * MiB) == About(0)
        assert resident(file) == About(SIZE_BYTES - 32 * MiB)
        evictor.flush()
        assert resident(file, MiB, 35 * MiB) == About(0)
        assert resident(file, 36 * MiB, 40 * MiB) == About(4 * MiB)

    def test_flush_drops_what_waits(self, ledger: Ledger, file: ModelFile) -> None:
        evictor = Evictor(ledger, nobody_maps)
        evictor.evict(file, 0, 3 * MiB)
        evictor.evict(file, 10 * MiB, 11 * MiB)
        evictor.flush()
        assert resident(file) == About(SIZE_BYTES - 4 * MiB)
        evictor.flush()
        assert ledger.totals().evicted_bytes == About(4 * MiB)

    def test_what_is_not_cached_costs_nothing(self, ledger: Ledger, file: ModelFile) -> None:
        asked = []

        def mapped_parts(file: ModelFile) -> Sequence[MappedPart]:
            asked.append(file)
            return ()

        evictor = Evictor(ledger, mapped_parts)
        drop(ledger.record(file).fd)
        evictor.evict(file, 0, SIZE_BYTES)
        assert asked == []
        assert ledger.totals().evicted_bytes == About(0)

    def test_nothing_to_evict(self, ledger: Ledger, file: ModelFile) -> None:
        evictor = Evictor(ledger, nobody_maps)
        evictor.evict(file, 5 * MiB, 5 * MiB)
        evictor.evict(file, 5 * MiB, 5 * MiB, at_once=True)
        evictor.flush()
        assert resident(file) == About(SIZE_BYTES)


def test_a_file_that_is_gone(ledger: Ledger, tmp_path: Path) -> None:
    file = ModelFile("gone", str(tmp_path / "gone"), MiB, 1, 2)
    evictor = Evictor(ledger, nobody_maps)
    evictor.evict(file, 0, MiB)  # waits
    evictor.flush()
    with pytest.raises(FileNotFoundError):
        evictor.evict(file, 0, MiB, at_once=True)


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="needs CAP_SYS_NICE, to page out another process's memory")
@pytest.mark.usefixtures("cached")
class TestMapped:
    def test_pages_that_a_child_maps_go_and_it_still_reads_them(self, ledger: Ledger, file: ModelFile) -> None:
        with mappers(file, 1) as ([child], parts):
            assert resident(file) == About(SIZE_BYTES)
            evictor = Evictor(ledger, lambda _: parts)
            evictor.evict(file, 0, 32 * MiB)
            assert resident(file, 0, 32 * MiB) < 2 * MiB
            assert resident(file, 32 * MiB) == About(8 * MiB)
            assert ledger.totals().evicted_bytes > 30 * MiB
            assert evictor.warning == ""
            assert child.ask() == child.sum
            assert resident(file) == About(SIZE_BYTES)

    def test_only_the_part_that_is_asked_for(self, ledger: Ledger, file: ModelFile) -> None:
        with mappers(file, 1) as (_, [whole]):
            # As if the process mapped the file from 8 MiB on: addresses and offsets do not begin together.
            part = MappedPart(whole.pid, whole.pidfd, whole.address + 8 * MiB, 8 * MiB, SIZE_BYTES)
            evictor = Evictor(ledger, lambda _: [part])
            evictor.evict(file, 4 * MiB, 16 * MiB, at_once=True)
            assert resident(file, 8 * MiB, 16 * MiB) < MiB
            assert resident(file, 0, 8 * MiB) == About(8 * MiB)
            assert resident(file, 16 * MiB) == About(SIZE_BYTES - 16 * MiB)

    def test_what_two_processes_map_stays_and_stays_known(self, ledger: Ledger, file: ModelFile) -> None:
        with mappers(file, 2) as ([_, other], parts):
            record = ledger.record(file)
            ledger.access(record, 0, SIZE_BYTES)
            evictor = Evictor(ledger, lambda _: parts[:1])  # the other is not observed
            evictor.evict(file, 0, 32 * MiB)
            assert resident(file, 0, 32 * MiB) > 30 * MiB
            assert ledger.totals().evicted_bytes < 2 * MiB
            assert record.present.covers(0, SIZE_BYTES)
            other.popen.kill()
            other.popen.wait()
            evictor.evict(file, 0, 32 * MiB)
            assert resident(file, 0, 32 * MiB) < 2 * MiB

    def test_a_process_that_has_ended(self, ledger: Ledger, file: ModelFile) -> None:
        with mappers(file, 1) as ([child], parts):
            child.popen.kill()
            child.popen.wait()
            evictor = Evictor(ledger, lambda _: parts)
            evictor.evict(file, 0, SIZE_BYTES, at_once=True)
            assert resident(file) == About(0)
            assert evictor.warning == ""


UNPRIVILEGED = """
import os, sys
from penstock.pagecache.base import ModelFile
from penstock.pagecache.evictor import Evictor, MappedPart
from penstock.pagecache.ledger import Ledger
path, address, pid, *numbers = sys.argv[1], *map(int, sys.argv[2:])
file = ModelFile("m", path, *numbers)
part = MappedPart(pid, os.pidfd_open(pid), address, 0, file.size_bytes)
ledger = Ledger()
ledger.access(ledger.record(file), 0, file.size_bytes)
evictor = Evictor(ledger, lambda _: [part])
for _ in range(2):
    evictor.evict(file, 0, 32 << 20)
print("CAP_SYS_NICE" in evictor.warning, ledger.totals().evicted_bytes)
"""


@pytest.mark.usefixtures("cached")
def test_an_ordinary_user_is_told_what_cannot_be_done(file: ModelFile, as_ordinary_user: list[str]) -> None:
    with mappers(file, 1) as ([child], _):
        numbers = (child.address, child.popen.pid, file.size_bytes, file.device, file.inode)
        command = [*as_ordinary_user, sys.executable, "-c", UNPRIVILEGED, file.path, *map(str, numbers)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert done.stdout == "True 0\n"
        assert resident(file) == About(SIZE_BYTES)

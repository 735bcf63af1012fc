"""penstock.pagecache.ledger: bookkeeping over real files."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.contents import contents
from tests.examples import examples

from penstock.linux.pagecache import drop
from penstock.pagecache.base import ModelFile
from penstock.pagecache.ledger import FileRecord, Ledger
from penstock.units import KiB, MiB

SIZE_BYTES = 4 * MiB


def make_file(path: Path) -> ModelFile:
    path.write_bytes(contents(SIZE_BYTES))
    with path.open("r+b") as file:
        os.fsync(file.fileno())
        drop(file.fileno())
    status = path.stat()
    return ModelFile(path.name, str(path), status.st_size, status.st_dev, status.st_ino)


@pytest.fixture
def file(tmp_path: Path) -> ModelFile:
    return make_file(tmp_path / "model.gguf")


@pytest.fixture
def record(ledger: Ledger, file: ModelFile) -> FileRecord:
    return ledger.record(file)


class TestRecords:
    def test_one_for_each_file(self, ledger: Ledger, file: ModelFile, tmp_path: Path) -> None:
        other = make_file(tmp_path / "other.gguf")
        assert ledger.record(file) is ledger.record(replace(file))
        assert ledger.record(other) is not ledger.record(file)
        assert [record.file for record in ledger.records()] == [file, other]

    def test_a_file_that_is_gone(self, ledger: Ledger, file: ModelFile) -> None:
        os.unlink(file.path)
        with pytest.raises(FileNotFoundError):
            ledger.record(file)
        assert ledger.records() == []

    def test_a_file_that_was_replaced(self, ledger: Ledger, file: ModelFile, tmp_path: Path) -> None:
        (tmp_path / "new").write_bytes(b"other contents")
        os.replace(tmp_path / "new", file.path)
        before = os.listdir("/proc/self/fd")
        with pytest.raises(FileNotFoundError, match="replaced by another file"):
            ledger.record(file)
        assert os.listdir("/proc/self/fd") == before

    def test_a_file_that_is_deleted_later_stays(self, ledger: Ledger, record: FileRecord, file: ModelFile) -> None:
        os.unlink(file.path)
        assert ledger.record(file) is record
        assert len(os.pread(record.fd, 10, 0)) == 10

    def test_close(self, file: ModelFile) -> None:
        before = os.listdir("/proc/self/fd")
        ledger = Ledger()
        ledger.record(file)
        ledger.close()
        ledger.close()
        assert os.listdir("/proc/self/fd") == before


class TestAccounts:
    def test_a_read_that_nobody_foresaw(self, ledger: Ledger, record: FileRecord) -> None:
        assert ledger.access(record, 0, MiB) == MiB
        assert ledger.access(record, 0, 2 * MiB) == MiB  # the first half is cached by now
        totals = ledger.totals()
        assert (totals.accessed_bytes, totals.prefetched_bytes, totals.waiting_bytes) == (2 * MiB, 0, 0)
        assert ledger.is_accessed(record, 0, 2 * MiB)
        assert not ledger.is_accessed(record, 0, 2 * MiB + 1)

    def test_prefetched_and_then_read(self, ledger: Ledger, record: FileRecord) -> None:
        assert ledger.claim(record, 0, 2 * MiB) == [(0, 2 * MiB)]
        assert ledger.totals().waiting_bytes == 2 * MiB
        ledger.settle(record, 0, 2 * MiB, 2 * MiB)
        assert ledger.totals().prefetched_bytes == ledger.totals().waiting_bytes == 2 * MiB
        assert ledger.access(record, 0, MiB) == 0
        assert ledger.totals().waiting_bytes == MiB

    def test_a_range_is_claimed_once(self, ledger: Ledger, record: FileRecord) -> None:
        ledger.access(record, MiB, 2 * MiB)
        assert ledger.claim(record, 0, 4 * MiB) == [(0, MiB), (2 * MiB, 4 * MiB)]
        assert ledger.claim(record, 0, 4 * MiB) == []

    def test_what_was_cached_already_was_not_prefetched(self, ledger: Ledger, record: FileRecord) -> None:
        ledger.claim(record, 0, MiB)
        ledger.settle(record, 0, MiB, 0)
        totals = ledger.totals()
        assert (totals.prefetched_bytes, totals.waiting_bytes) == (0, 0)
        assert ledger.access(record, 0, MiB) == 0

    def test_a_claim_that_failed_is_as_if_it_had_not_been(self, ledger: Ledger, record: FileRecord) -> None:
        ledger.claim(record, 0, MiB)
        ledger.abandon(record, 0, MiB)
        assert ledger.totals().waiting_bytes == 0
        assert ledger.claim(record, 0, MiB) == [(0, MiB)]

    def test_what_was_evicted_is_missed_again(self, ledger: Ledger, record: FileRecord) -> None:
        ledger.access(record, 0, MiB)
        ledger.claim(record, MiB, 2 * MiB)
        ledger.evicted(record, 0, 2 * MiB, 2 * MiB - 4 * KiB)
        totals = ledger.totals()
        assert (totals.evicted_bytes, totals.waiting_bytes) == (2 * MiB - 4 * KiB, 0)
        assert totals.accessed_bytes == MiB
        assert ledger.access(record, 0, 2 * MiB) == 2 * MiB
        assert ledger.totals().accessed_bytes == 2 * MiB  # each byte counts once

    @settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=examples(60))
    @given(
        st.lists(
            st.tuples(
                st.sampled_from(["access", "claim", "abandon", "evicted", "settle"]),
                st.integers(0, 40),
                st.integers(0, 40),
            ),
            max_size=30,
        )
    )
    def test_sums_agree_with_the_records(self, file: ModelFile, steps: list[tuple[str, int, int]]) -> None:
        ledger = Ledger()
        record = ledger.record(file)
        try:
            for verb, start, stop in steps:
                if verb == "settle":
                    ledger.settle(record, start, stop, 0)
                elif verb == "evicted":
                    ledger.evicted(record, start, stop, 0)
                else:
                    getattr(ledger, verb)(record, start, stop)
                totals = ledger.totals()
                assert totals.waiting_bytes == record.waiting.total
                assert totals.accessed_bytes == record.accessed.total
                # What is waited for is cached, or being read, and nobody has read it since it was asked for.
                assert all(record.present.covers(*part) for part in record.waiting)
        finally:
            ledger.close()

    def test_from_several_threads(self, ledger: Ledger, record: FileRecord) -> None:
        claimed: list[list[tuple[int, int]]] = [[] for _ in range(4)]

        def claim(number: int) -> None:
            for at in range(400):
                claimed[number] += ledger.claim(record, at * 100, at * 100 + 150)

        threads = [threading.Thread(target=claim, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sum(stop - start for part in claimed for start, stop in part) == 399 * 100 + 150
        assert ledger.totals().waiting_bytes == 399 * 100 + 150


class TestResidency:
    def test_it_is_the_kernels(self, ledger: Ledger, record: FileRecord, file: ModelFile) -> None:
        if ledger.resident_bytes():
            pytest.skip(f"{file.path} is on a file system that keeps every page in memory")
        ledger.access(record, 0, 4 * MiB)  # an account is not the truth
        assert ledger.resident_bytes() == 0
        with open(file.path, "rb") as reader:
            reader.read()
        assert ledger.resident_bytes() == SIZE_BYTES

    def test_what_is_found_cached_needs_no_reading(self, ledger: Ledger, file: ModelFile) -> None:
        record = ledger.record(file)
        ledger.found_cached(record)
        assert ledger.claim(record, 0, SIZE_BYTES) == []
        assert ledger.present_bytes() == SIZE_BYTES
        assert ledger.totals().waiting_bytes == 0
        assert ledger.access(record, 0, SIZE_BYTES) == 0

    @pytest.mark.root
    def test_of_anothers_file_it_is_the_account(self, file: ModelFile, as_ordinary_user: list[str]) -> None:
        if not as_ordinary_user:
            pytest.skip("needs root, to own a file that the reader does not")
        os.chmod(file.path, 0o644)
        code = (
            "import sys\n"
            "from penstock.pagecache.base import ModelFile\n"
            "from penstock.pagecache.ledger import Ledger\n"
            "numbers = [int(number) for number in sys.argv[2:]]\n"
            "ledger = Ledger()\n"
            "record = ledger.record(ModelFile('m', sys.argv[1], *numbers))\n"
            "before = ledger.resident_bytes()\n"
            "ledger.claim(record, 0, 1 << 20)\n"
            "print(record.residency.exact, before, ledger.resident_bytes())\n"
        )
        numbers = [str(number) for number in (file.size_bytes, file.device, file.inode)]
        command = [*as_ordinary_user, sys.executable, "-c", code, file.path, *numbers]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert done.stdout == f"False 0 {MiB}\n"

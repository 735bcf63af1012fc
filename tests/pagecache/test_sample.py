"""penstock.pagecache.sample: residency counted by the kernel, and carried on between two counts."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from tests.contents import contents

from penstock.linux.pagecache import drop
from penstock.pagecache.base import ModelFile
from penstock.pagecache.ledger import Ledger
from penstock.pagecache.sample import ResidencyMeter
from penstock.units import MiB

SIZE_BYTES = 8 * MiB


@pytest.fixture
def file(tmp_path: Path) -> ModelFile:
    path = tmp_path / "model.gguf"
    with path.open("w+b") as opened:
        opened.write(contents(SIZE_BYTES))
        opened.flush()
        os.fsync(opened.fileno())
    status = path.stat()
    return ModelFile(path.name, str(path), status.st_size, status.st_dev, status.st_ino)


def test_counted_no_more_often_than_it_is_worth(ledger: Ledger, file: ModelFile) -> None:
    times = iter([0.0, 0.01, 5.0, 5.0, 6.0, 6.0])  # the first count takes 10 ms
    meter = ResidencyMeter(ledger)
    record = ledger.record(file)
    assert meter.read(100.0, times.__next__) == SIZE_BYTES  # nothing known in the ledger: cached before
    drop(record.fd)
    if ledger.resident_bytes():
        pytest.skip(f"{file.path} is on a file system that keeps every page in memory")
    assert meter.read(100.49, times.__next__) == SIZE_BYTES
    ledger.evicted(record, 0, 2 * MiB, 2 * MiB)  # of what nobody had noted as present
    assert meter.read(100.49, times.__next__) == SIZE_BYTES
    assert meter.read(100.51, times.__next__) == 0
    ledger.access(record, 0, 3 * MiB)
    assert meter.read(100.51, times.__next__) == 0  # that count cost nothing: the kernel is asked again
    assert meter.peak_bytes == SIZE_BYTES


def test_carried_on_by_what_was_read_and_evicted(ledger: Ledger, file: ModelFile) -> None:
    meter = ResidencyMeter(ledger)
    record = ledger.record(file)
    drop(record.fd)
    if ledger.resident_bytes():
        pytest.skip(f"{file.path} is on a file system that keeps every page in memory")
    times = iter([0.0, 1.0])
    assert meter.read(0.0, times.__next__) == 0
    ledger.access(record, 0, 3 * MiB)
    assert meter.read(1.0, times.__next__) == 3 * MiB
    ledger.evicted(record, 0, MiB, MiB)
    assert meter.read(2.0, times.__next__) == 2 * MiB
    ledger.access(record, 0, SIZE_BYTES)
    assert meter.read(3.0, times.__next__) == SIZE_BYTES
    assert meter.peak_bytes == 0  # only what was counted

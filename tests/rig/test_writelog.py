"""rig.writelog on logs made by hand."""

from __future__ import annotations

import random
import struct
from pathlib import Path

import pytest
from rig.writelog import disk_after_cut, read_log

FLUSH, FUA = 1, 2
SECTOR = 512
MAGIC = 0x6A736677736872


def write_log(path: Path, entries: list[tuple[int, bytes, int]]) -> None:
    """Entries of (sector, data, flags)."""
    text = struct.pack("<QQQI", MAGIC, 1, 0, SECTOR).ljust(SECTOR, b"\0")
    for sector, data, flags in entries:
        text += struct.pack("<QQQQ", sector, len(data) // SECTOR, flags, 0).ljust(SECTOR, b"\0") + data
    path.write_bytes(text)


def sectors(letter: str, count: int = 1) -> bytes:
    return letter.encode() * SECTOR * count


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "log"
    write_log(
        path,
        [
            (0, sectors("a", 2), 0),
            (0, b"", FLUSH),
            (1, sectors("b"), 0),
            (4, sectors("c", 4), 0),
            (2, sectors("d"), FUA),
        ],
    )
    return path


@pytest.fixture
def before(tmp_path: Path) -> Path:
    path = tmp_path / "before"
    path.write_bytes(sectors(".", 8))
    return path


def letters(path: Path) -> str:
    data = path.read_bytes()
    return "".join(chr(data[at]) for at in range(0, len(data), SECTOR))


def test_entries(log: Path) -> None:
    entries = read_log(log)
    assert [(entry.offset, entry.length, entry.is_flush) for entry in entries] == [
        (0, 1024, False),
        (0, 0, True),
        (512, 512, False),
        (2048, 2048, False),
        (1024, 512, False),
    ]


def test_a_log_whose_writer_was_killed(log: Path) -> None:
    whole = log.read_bytes()
    for size in range(0, len(whole), 100):
        log.write_bytes(whole[:size])
        assert len(read_log(log)) <= 5
    log.write_bytes(whole + bytes(4096))
    assert len(read_log(log)) == 5


def test_what_was_flushed_is_there_and_the_rest_perhaps(log: Path, before: Path, tmp_path: Path) -> None:
    entries = read_log(log)
    seen = set()
    for seed in range(200):
        disk_after_cut(before, log, entries, len(entries), random.Random(seed), tmp_path / "after")
        seen.add(letters(tmp_path / "after"))
    assert {text[0] for text in seen} == {"a"}  # flushed
    assert {text[2] for text in seen} == {"d"}  # written through
    assert {text[1] for text in seen} == {"a", "b"}
    assert {text[4:] for text in seen} == {"....", "c...", "cc..", "ccc.", "cccc"}
    assert {text[3] for text in seen} == {"."}


def test_before_the_flush(log: Path, before: Path, tmp_path: Path) -> None:
    entries = read_log(log)
    seen = set()
    for seed in range(100):
        disk_after_cut(before, log, entries, 2, random.Random(seed), tmp_path / "after")
        seen.add(letters(tmp_path / "after"))
    assert seen == {"aa......"}
    for seed in range(100):
        disk_after_cut(before, log, entries, 1, random.Random(seed), tmp_path / "after")
        seen.add(letters(tmp_path / "after"))
    assert seen == {"aa......", "a.......", "........"}

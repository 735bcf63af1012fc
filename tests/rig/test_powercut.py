"""rig.powercut without a machine: what it writes is found good, and what is damaged is found."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
from rig.powercut import check

from penstock.kv.session import session_path
from penstock.storage.region import DATA_START
from penstock.units import KiB

DEADLINE_S = 60.0


@pytest.fixture
def told(tmp_path: Path) -> dict[str, int]:
    """The work was killed while it was at it."""
    (tmp_path / "disk").mkdir()
    notes = tmp_path / "told"
    command = [sys.executable, "-m", "rig.powercut", str(tmp_path / "disk"), str(notes)]
    with subprocess.Popen(command) as working:
        deadline = time.monotonic() + DEADLINE_S
        while "blocks 3\n" not in (notes.read_text() if notes.exists() else ""):
            assert working.poll() is None
            assert time.monotonic() < deadline, "nothing is written"
            time.sleep(0.01)
        working.kill()
    return {kind: int(number) for kind, number in (line.split() for line in notes.read_text().splitlines())}


def test_what_was_written_is_found(told: dict[str, int], tmp_path: Path) -> None:
    found = check(tmp_path / "disk", told)
    assert found.wrong == []
    assert found.session in (told["session"], told["session"] + 1)
    assert found.template >= told["template"]


def test_what_is_missing_is_found(told: dict[str, int], tmp_path: Path) -> None:
    session_path(tmp_path / "disk", "context").unlink()
    (tmp_path / "disk" / "region").unlink()
    assert [text.split(",")[0] for text in check(tmp_path / "disk", told).wrong] == [
        f"session {told['session']} was acknowledged",
        "the region was made",
    ]
    assert check(tmp_path / "disk", {}).wrong == []


def test_what_is_older_than_was_told_is_found(told: dict[str, int], tmp_path: Path) -> None:
    wrong = check(tmp_path / "disk", {**told, "session": 10**6, "blocks": 10**6}).wrong
    assert wrong[0].startswith("session 1000000 was acknowledged, and ")
    assert "block 0: generation 1000000 was flushed, and " in wrong[1]


def test_damage_is_found(told: dict[str, int], tmp_path: Path) -> None:
    with (tmp_path / "disk" / "region").open("r+b") as file:
        file.seek(DATA_START + 100)
        byte = file.read(1)
        file.seek(DATA_START + 100)
        file.write(bytes([byte[0] ^ 1]))
        file.seek(DATA_START + 64 * KiB)
        file.write(bytes(64 * KiB))
    before = check(tmp_path / "disk", {})
    found = check(tmp_path / "disk", told)
    assert found.torn == before.torn >= 1
    assert found.wrong == ["block 1 was flushed, and is empty"]

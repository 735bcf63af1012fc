"""What tests of several commands need."""

from __future__ import annotations

from pathlib import Path

import pytest

from penstock.cli.scratch import can_be_cold


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty directory on a disk; the working directory is beside it."""
    if not can_be_cold(tmp_path):
        pytest.skip(f"needs a directory on a disk; {tmp_path} is in memory (choose one with pytest --basetemp)")
    (tmp_path / "cwd").mkdir()
    (tmp_path / "disk").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    return tmp_path / "disk"

"""The benchmark of the checkpoint loaders runs, every arm that is installed; nothing is timed here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from bench.errors import BenchError
from bench.readahead import ReadAhead, block_device

REPOSITORY = Path(__file__).resolve().parents[2]


def test_quick_runs_every_arm(tmp_path: Path) -> None:
    rows = quick_rows(tmp_path, "--models", "model", "--states", "cold")
    assert {"penstock", "safetensors", "readinto"} <= {row["arm"] for row in rows}
    assert all(run["seconds"] > 0 for row in rows for run in row["runs"])


def test_quick_runs_every_model_and_state(tmp_path: Path) -> None:
    rows = quick_rows(tmp_path, "--arms", "penstock,safetensors,readinto")
    found = {(row["model"], row["state"]) for row in rows}
    assert found == {(model, state) for model in ("model", "experts") for state in ("cold", "warm")}
    assert all(run["seconds"] > 0 for row in rows for run in row["runs"])


def test_the_read_ahead_is_put_back(tmp_path: Path) -> None:
    try:
        read_ahead = ReadAhead(tmp_path)
    except BenchError as error:
        pytest.skip(f"needs temporary files on a block device: {error}")
    if not read_ahead.may_set():
        pytest.skip(f"takes root to write {read_ahead.path}")
    before = read_ahead.path.read_text()
    quick_rows(tmp_path, "--arms", "readinto", "--models", "model", "--states", "cold", "--read-ahead", "64")
    assert read_ahead.path.read_text() == before
    assert json.loads((tmp_path / "answer.json").read_text())["read_ahead_kib"] == 64


def quick_rows(tmp_path: Path, *options: str) -> list[dict[str, Any]]:
    try:
        block_device(tmp_path)
    except BenchError as error:
        pytest.skip(f"needs temporary files on a block device: {error}")
    answer = tmp_path / "answer.json"
    place = ["--dir", str(tmp_path / "bench"), "--json", str(answer)]
    done = subprocess.run(
        [sys.executable, "-m", "bench.checkpoint", "--quick", *place, *options],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows: list[dict[str, Any]] = json.loads(answer.read_text())["rows"]
    return rows


def test_an_arm_that_is_none() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "bench.checkpoint", "--arms", "penstock,tortoise"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "'tortoise' is none of penstock, " in done.stderr

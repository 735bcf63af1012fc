"""The benchmark of the checkpoint loaders runs, every arm that is installed; nothing is timed here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from bench.readahead import block_device

REPOSITORY = Path(__file__).resolve().parents[2]


def test_quick_runs_every_arm(tmp_path: Path) -> None:
    try:
        block_device(tmp_path)
    except FileNotFoundError as error:
        pytest.skip(f"needs temporary files on a block device: {error}")
    answer = tmp_path / "answer.json"
    done = subprocess.run(
        [sys.executable, "-m", "bench.checkpoint", "--quick", "--dir", str(tmp_path / "bench"), "--json", str(answer)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(answer.read_text())["rows"]
    found = {(row["model"], row["state"]) for row in rows}
    assert found == {(model, state) for model in ("model", "experts") for state in ("cold", "warm")}
    arms = {row["arm"] for row in rows}
    assert {"penstock", "safetensors", "readinto"} <= arms
    assert all(run["seconds"] > 0 for row in rows for run in row["runs"])


def test_an_arm_that_is_none() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "bench.checkpoint", "--arms", "penstock,tortoise"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "'tortoise' is none of penstock, " in done.stderr

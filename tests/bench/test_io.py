"""The benchmark of the engines runs, and notices wrong bytes; nothing is timed here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from bench.errors import RunError
from bench.io.loops import SHAPES, Shape, check_engine, check_file, make_file, plain, with_engine

from penstock.linux import uring
from penstock.storage.base import READ, WRITE
from penstock.storage.threads import ThreadEngine
from penstock.units import KiB, MiB

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    make_file(path, 16 * MiB)
    return path


def test_quick_runs_every_arm(tmp_path: Path) -> None:
    answer = tmp_path / "answer.json"
    done = subprocess.run(
        [sys.executable, "-m", "bench.io", "--quick", "--dir", str(tmp_path), "--json", str(answer)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(answer.read_text())["rows"]
    arms = ["threads", "plain"] if uring.probe() else ["uring", "threads", "plain"]
    assert [(row["shape"], row["arm"]) for row in rows] == [(str(shape), arm) for shape in SHAPES for arm in arms]
    assert all(figure["bytes_per_s"] > 0 for row in rows for figure in row["figures"])
    assert list(tmp_path.iterdir()) == [answer]


def test_only_the_sizes_that_are_asked_for(tmp_path: Path) -> None:
    answer = tmp_path / "answer.json"
    command = [sys.executable, "-m", "bench.io", "--quick", "--dir", str(tmp_path), "--json", str(answer), "--block"]
    subprocess.run([*command, "1MiB"], cwd=REPOSITORY, check=True, stdout=subprocess.DEVNULL)
    shapes = {row["shape"] for row in json.loads(answer.read_text())["rows"]}
    assert shapes == {"read 1.0 MiB × 16", "write 1.0 MiB × 16"}
    done = subprocess.run([*command, "5KiB"], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode != 0
    assert "--block 5KiB: there are 4.0 KiB, 128 KiB" in done.stderr


@pytest.mark.parametrize("operation", [READ, WRITE])
def test_what_arms_write_belongs_there(path: Path, operation: int) -> None:
    with_engine(lambda: ThreadEngine(2), path, Shape(128 * KiB, 4, operation), 0.05, 1)
    plain(path, Shape(4 * KiB, 1, operation), 0.05, 2)
    check_file(path)


def test_wrong_bytes_are_noticed(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(5 * MiB + 17)
        file.write(b"\xff")
    with pytest.raises(RunError, match="wrong bytes"):
        check_file(path)
    with pytest.raises(RunError, match=f"wrong bytes in the block of offset {5 * MiB}"):
        check_engine(lambda: ThreadEngine(2), path)
    assert np.fromfile(path, np.uint64).nbytes == 16 * MiB

"""`penstock inspect`, as a user runs it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from tests.checkpoint.test_load import Tensor, write

from penstock.cli.inspect import inspect

TENSORS: list[Tensor] = [
    ("b.weight", "F32", (1024, 256)),
    ("a.weight", "BF16", (10,)),
    ("c.scale", "F64", ()),
]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write(tmp_path / "model.safetensors", TENSORS)
    return tmp_path / "model.safetensors"


def names(path: Path, *arguments: str) -> list[str]:
    result = CliRunner().invoke(inspect, [*arguments, str(path)])
    assert result.exit_code == 0, result.output
    return [line.split()[0] for line in result.stdout.splitlines()[:-1]]


def test_the_table(path: Path) -> None:
    result = CliRunner().invoke(inspect, [str(path)])
    assert result.stdout.splitlines() == [
        "b.weight  F32          1024 × 256    1.0 MiB",
        "a.weight  BF16                 10       20 B",
        "c.scale   F64              scalar        8 B",
        "3 tensors in 1 file, 1.0 MiB: F32 1.0 MiB, BF16 20 B, F64 8 B",
    ]


def test_sorted(path: Path) -> None:
    assert names(path) == ["b.weight", "a.weight", "c.scale"]
    assert names(path, "--sort", "name") == ["a.weight", "b.weight", "c.scale"]
    assert names(path, "--sort", "size") == ["b.weight", "a.weight", "c.scale"]
    assert names(path, "--sort", "dtype") == ["a.weight", "b.weight", "c.scale"]


def test_shards_are_named(tmp_path: Path) -> None:
    write(tmp_path / "one.safetensors", TENSORS[:1])
    write(tmp_path / "two.safetensors", TENSORS[1:])
    result = CliRunner().invoke(inspect, [str(tmp_path)])
    assert [line.split()[-1] for line in result.stdout.splitlines()[:-1]] == [
        "one.safetensors",
        "two.safetensors",
        "two.safetensors",
    ]
    assert "3 tensors in 2 files" in result.stdout


def test_as_json(path: Path) -> None:
    result = CliRunner().invoke(inspect, ["--json", str(path)])
    first, *_ = json.loads(result.stdout)
    assert first == {
        "name": "b.weight",
        "dtype": "F32",
        "shape": [1024, 256],
        "size_bytes": 1 << 20,
        "path": str(path),
        "start": first["start"],
    }


def test_an_empty_one_and_a_broken_one(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    write(path, [])
    assert CliRunner().invoke(inspect, [str(path)]).stdout == "0 tensors in 1 file, 0 B\n"
    path.write_bytes(b"PK\3\4 not a checkpoint")
    result = CliRunner().invoke(inspect, [str(path)])
    assert result.exit_code == 1
    assert "this is no safetensors file" in result.output


def test_it_starts_without_numpy() -> None:
    code = "import sys, penstock.cli.inspect, penstock.cli.load; print({'numpy', 'rich'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"

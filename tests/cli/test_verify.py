"""`penstock verify`, as a user runs it: everything that is wrong, not only the first of it."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from click.testing import CliRunner, Result
from tests.checkpoint.test_load import MIXED, write

from penstock.cli.verify import verify


def run(*arguments: object) -> Result:
    return CliRunner().invoke(verify, [str(argument) for argument in arguments])


def test_a_good_one(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    write(path, MIXED)
    for target in (path, tmp_path):
        result = run(target)
        assert (result.exit_code, result.stderr) == (0, "")
        assert result.stdout.endswith("nothing is wrong\n")
        assert ": 1 file, " in result.stdout


def test_checksums(tmp_path: Path) -> None:
    paths = [tmp_path / "one.safetensors", tmp_path / "two.safetensors"]
    for seed, path in enumerate(paths):
        write(path, [(f"x{seed}", "U8", (5_000_000,))], seed=seed)
    result = run("--checksum", tmp_path)
    assert result.exit_code == 0
    assert result.stdout == "".join(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path}\n" for path in paths)


def test_everything_that_is_wrong(tmp_path: Path) -> None:
    write(tmp_path / "one.safetensors", [("a", "U8", (8,)), ("b", "U8", (8,))])
    write(tmp_path / "two.safetensors", [("b", "U8", (8,)), ("d", "U8", (8,))])
    write(tmp_path / "cut.safetensors", MIXED)
    os.truncate(tmp_path / "cut.safetensors", 1000)
    located = {
        "a": "one.safetensors",
        "b": "one.safetensors",
        "c": "one.safetensors",
        "d": "one.safetensors",
        "e": "gone.safetensors",
        "weight": "cut.safetensors",
        "z": "two.safetensors",
    }
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": located}))
    result = run(tmp_path)
    assert result.exit_code == 1
    lines = result.stderr.splitlines()
    for words in (
        "two.safetensors: tensor 'b' is in",
        "cut.safetensors: byte 1000",
        "names gone.safetensors, which is not there",
        "tensor 'c' is said to be in one.safetensors, and is in no file",
        "tensor 'd' is said to be in one.safetensors, and is in",
        "tensor 'z' is said to be in two.safetensors, and is in no file",
        f"6 problems in {tmp_path}",
    ):
        assert any(words in line for line in lines), (words, lines)
    assert len(lines) == 7


def test_an_index_by_its_name(tmp_path: Path) -> None:
    write(tmp_path / "one.safetensors", [("a", "U8", (8,)), ("b", "U8", (8,))])
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "one.safetensors"}}))
    result = run(index)
    assert result.exit_code == 1
    assert "does not name tensor 'b'" in result.stderr
    index.write_text("{")
    result = run(index)
    assert result.exit_code == 1
    assert "is not JSON" in result.stderr


def test_nothing_there(tmp_path: Path) -> None:
    result = run(tmp_path)
    assert result.exit_code == 1
    assert "neither a *.safetensors nor a *.gguf file is there" in result.stderr

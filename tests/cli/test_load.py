"""`penstock load`, as a user runs it."""

from __future__ import annotations

import json
import os
from pathlib import Path

from click.testing import CliRunner

from penstock.cli.load import load
from penstock.testing.checkpoint import generate_checkpoint
from penstock.testing.shapes import PRESETS
from penstock.units import MiB


def checkpoint(path: Path) -> Path:
    generate_checkpoint(path, PRESETS["tiny-llama"], size_bytes=16 * MiB, shard_bytes=6 * MiB)
    for file in path.glob("*.safetensors"):
        fd = os.open(file, os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)
    return path


def test_what_it_says(tmp_path: Path) -> None:
    result = CliRunner().invoke(load, [str(checkpoint(tmp_path / "model"))])
    assert result.exit_code == 0, result.output
    first, second, *_ = result.stdout.splitlines()
    assert "tensors, " in first
    assert first.endswith("GB/s")
    assert second.startswith(("engine uring; ", "engine threads; "))


def test_as_json(tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "model")
    result = CliRunner().invoke(load, ["--json", "--engine", "threads", str(path)])
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    assert (answer["engine"], answer["fallback"], answer["path"]) == ("threads", "", str(path))
    read = answer["direct_bytes"] + answer["cached_bytes"] + answer["buffered_bytes"]
    assert read >= answer["size_bytes"] > 0
    assert answer["tensors"] > 0


def test_what_is_wrong(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"\0" * 4)
    result = CliRunner().invoke(load, [str(path)])
    assert result.exit_code == 1
    assert "Error: " in result.output
    assert "model.safetensors: has 4 bytes" in result.output
    path = checkpoint(tmp_path / "model")
    result = CliRunner().invoke(load, ["--device", "gpu", str(path)])
    assert result.exit_code == 1
    assert "device 'gpu'" in result.output

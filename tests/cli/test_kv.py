"""`penstock kv` on sessions, damaged ones, and what is none."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from penstock.cli.commands import penstock
from penstock.kv.cache import OWNER
from penstock.kv.session import SessionWriter, session_path
from penstock.storage.region import Region
from penstock.units import MiB

FACTS = {"model": "llama 0123", "dtype": "torch.bfloat16", "tokens": 4096, "ids": "abc"}


def write(directory: Path, name: str) -> Path:
    path = session_path(directory, name)
    with SessionWriter(path, FACTS) as writer:
        writer.add("0 keys", np.arange(100_000, dtype=np.uint32).view(np.uint8), {"layer": 0})
        writer.commit()
    return path


def run(*arguments: str | Path, status: int = 0, told: str | None = None) -> str:
    done = CliRunner().invoke(penstock, ["kv", *map(str, arguments)], input=told)
    assert done.exit_code == status, done.output
    return done.output


@pytest.fixture
def sessions(tmp_path: Path) -> list[Path]:
    paths = [write(tmp_path, "one"), write(tmp_path, "two"), write(tmp_path, "zero")]
    contents = bytearray(paths[1].read_bytes())
    contents[5000] ^= 1
    paths[1].write_bytes(contents)
    paths[2].write_bytes(b"no table")
    return paths


def test_inspect(tmp_path: Path, sessions: list[Path]) -> None:
    lines = run("inspect", tmp_path).splitlines()
    assert lines[0] == f"{sessions[0]}  396 KiB  4096 tokens  torch.bfloat16  llama 0123"
    assert "is no session of penstock" in lines[2]
    found = json.loads(run("inspect", "--json", sessions[0]))
    assert found == [{"path": str(sessions[0]), "size_bytes": sessions[0].stat().st_size, "parts": 1} | FACTS]


def test_verify(tmp_path: Path, sessions: list[Path]) -> None:
    assert run("verify", sessions[0]) == f"{sessions[0]}: 396 KiB: every checksum is right\n"
    output = run("verify", tmp_path, status=1)
    assert f"{sessions[1]}: damaged at offset 4096: the checksum of 0 keys is" in output
    assert f"{sessions[2]}: is no session of penstock" in output


def test_delete(tmp_path: Path, sessions: list[Path]) -> None:
    assert run("delete", sessions[0]) == f"deleted {sessions[0]}\n"
    run("delete", tmp_path, told="n\n", status=1)
    assert sessions[1].exists()
    run("delete", "--yes", tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert run("delete", tmp_path) == f"{tmp_path}: no sessions\n"
    assert run("inspect", tmp_path) == f"{tmp_path}: no sessions\n"


def test_the_region_of_one_that_was_killed(tmp_path: Path) -> None:
    path, others = tmp_path / "kv", tmp_path / "others"
    Region.create(others, 1 * MiB, owner="someone").close()
    with Region.create(path, 1 * MiB, owner=OWNER):
        assert "in use" in run("delete", path, status=1)
    run("delete", path)
    assert not path.exists()
    assert "belongs to 'someone'" in run("delete", others, status=1)
    plain = tmp_path / "plain"
    plain.write_text("mine")
    assert "it is left as it is" in run("delete", plain, status=1)
    assert plain.read_text() == "mine"

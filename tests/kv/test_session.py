"""penstock.kv.session: whole or not at all."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from penstock.errors import SessionError
from penstock.kv import session
from penstock.kv.session import SessionReader, SessionWriter, session_path
from penstock.units import MiB

FACTS = {"model": "tiny 0123", "tokens": 7}


def data_of(size_bytes: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, size_bytes, np.uint8)


def write(path: Path, sizes: list[int], seed: int = 0) -> dict[str, np.ndarray]:
    parts = {f"part {number}": data_of(size, seed + number) for number, size in enumerate(sizes)}
    with SessionWriter(path, FACTS) as writer:
        for name, data in parts.items():
            writer.add(name, data, {"layer": name})
        writer.commit()
    return parts


@pytest.mark.parametrize("named", [False, True])
def test_it_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: bool) -> None:
    if named:  # a file system without files that have no name
        opened = os.open

        def without(path: os.PathLike[str], flags: int, *rest: int) -> int:
            if flags & os.O_TMPFILE == os.O_TMPFILE:
                raise OSError(errno.EOPNOTSUPP, "no O_TMPFILE here")
            return opened(path, flags, *rest)

        monkeypatch.setattr(session.os, "open", without)
    path = session_path(tmp_path, "one")
    parts = write(path, [0, 1, 5000, 9 * MiB + 3])
    with SessionReader(path) as reader:
        assert reader.facts == FACTS
        assert {name: reader.read(name).tobytes() for name in reader.parts} == {
            name: data.tobytes() for name, data in parts.items()
        }
        assert reader.parts["part 2"].about == {"layer": "part 2"}
        assert all(part.offset % 4096 == 0 for part in reader.parts.values())
        reader.require({"tokens": 7})
        with pytest.raises(SessionError, match="its tokens is 7, and 8 is asked for"):
            reader.require({"tokens": 8})
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_what_is_not_committed_leaves_nothing(tmp_path: Path) -> None:
    path = session_path(tmp_path, "one")
    before = write(path, [100])
    with SessionWriter(path, FACTS) as writer:
        writer.add("part 0", data_of(5 * MiB, 9), {})
    with SessionReader(path) as reader:
        assert reader.read("part 0").tobytes() == before["part 0"].tobytes()
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    after = write(path, [200], seed=3)
    with SessionReader(path) as reader:
        assert reader.read("part 0").tobytes() == after["part 0"].tobytes()


def read_all(path: Path) -> dict[str, bytes]:
    with SessionReader(path) as reader:
        return {name: reader.read(name).tobytes() for name in reader.parts}


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_damage_is_an_error(tmp_path: Path, data: st.DataObject) -> None:
    path = session_path(tmp_path, "one")
    parts = write(path, [10_000, 1, 3000])
    contents = bytearray(path.read_bytes())
    if data.draw(st.booleans()):
        cut = data.draw(st.integers(0, len(contents) - 1))
        del contents[cut:]
    else:
        at = data.draw(st.integers(0, len(contents) - 1))
        contents[at] ^= data.draw(st.integers(1, 255))
    path.write_bytes(contents)
    try:
        found = read_all(path)
    except SessionError as error:
        assert str(path) in str(error)  # noqa: PT017 — a flip between the parts changes nothing
    else:
        assert found == {name: part.tobytes() for name, part in parts.items()}


def test_what_is_no_session(tmp_path: Path) -> None:
    path = tmp_path / "other"
    path.write_bytes(b"something else" * 1000)
    with pytest.raises(SessionError, match="is no session of penstock"):
        SessionReader(path)
    write(path, [10])
    contents = bytearray(path.read_bytes())
    contents[16] = 9
    path.write_bytes(contents)
    with pytest.raises(SessionError, match="is of version 9"):
        SessionReader(path)


@pytest.mark.parametrize("name", ["", ".hidden", "a/b", "..", "x" * 201, "a b"])
def test_names(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="a name has letters"):
        session_path(tmp_path, name)

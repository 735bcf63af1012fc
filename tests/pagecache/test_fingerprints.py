"""penstock.pagecache.fingerprints: sampled once, and again when the file has changed."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from penstock.pagecache.base import ModelFile
from penstock.pagecache.fingerprints import FingerprintCache
from penstock.pagecache.template import fingerprint
from penstock.units import KiB


def model_file(path: Path) -> ModelFile:
    status = path.stat()
    return ModelFile(path.name, str(path), status.st_size, status.st_dev, status.st_ino)


def settle() -> None:
    """Let what was changed grow old enough to be remembered."""
    time.sleep(0.15)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "model.gguf"
    path.write_bytes(os.urandom(300 * KiB))
    settle()
    return path


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "fingerprints"


def entry(directory: Path) -> Path:
    (entry,) = directory.iterdir()
    return entry


def test_it_is_the_files(path: Path, directory: Path) -> None:
    cache = FingerprintCache(directory)
    assert not directory.exists()
    assert cache.get(model_file(path)) == fingerprint(path, 300 * KiB)
    assert json.loads(entry(directory).read_text())["path"] == str(path)


def test_an_unchanged_file_is_not_read(path: Path, directory: Path) -> None:
    FingerprintCache(directory).get(model_file(path))
    known = json.loads(entry(directory).read_text())
    entry(directory).write_text(json.dumps({**known, "fingerprint": "remembered"}))
    assert FingerprintCache(directory).get(model_file(path)) == "remembered"


def write_in_place(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(os.urandom(4 * KiB))


def replace(path: Path) -> None:
    new = path.with_name("new")
    new.write_bytes(os.urandom(300 * KiB))
    os.utime(new, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))
    new.replace(path)


def grow(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"more")


def change_and_put_the_date_back(path: Path) -> None:
    status = path.stat()
    write_in_place(path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize("change", [write_in_place, replace, grow, change_and_put_the_date_back])
def test_a_changed_file_is_sampled_again(path: Path, directory: Path, change: Callable[[Path], None]) -> None:
    cache = FingerprintCache(directory)
    before = cache.get(model_file(path))
    change(path)
    after = cache.get(model_file(path))
    assert after != before
    assert after == fingerprint(path, path.stat().st_size)
    change(path)  # perhaps in the tick in which it was looked at
    assert cache.get(model_file(path)) == fingerprint(path, path.stat().st_size)
    settle()
    assert cache.get(model_file(path)) == fingerprint(path, path.stat().st_size)
    assert len(os.listdir(directory)) == 1


def test_a_copy_of_the_bytes_has_the_same(path: Path, directory: Path, tmp_path: Path) -> None:
    cache = FingerprintCache(directory)
    copy = tmp_path / "elsewhere"
    copy.write_bytes(path.read_bytes())
    settle()
    assert cache.get(model_file(copy)) == cache.get(model_file(path))
    assert len(os.listdir(directory)) == 2


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"key": 5}', b'{"fingerprint": "x"}'])
def test_a_damaged_entry_is_written_anew(path: Path, directory: Path, damage: bytes) -> None:
    cache = FingerprintCache(directory)
    expected = cache.get(model_file(path))
    entry(directory).write_bytes(damage)
    assert cache.get(model_file(path)) == expected
    assert json.loads(entry(directory).read_text())["fingerprint"] == expected


def test_without_a_place_for_it(path: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    cache = FingerprintCache(tmp_path / "file" / "below")
    assert cache.get(model_file(path)) == fingerprint(path, 300 * KiB)


def test_a_name_that_is_not_text(tmp_path: Path, directory: Path) -> None:
    path = tmp_path / os.fsdecode(b"\xff.gguf")
    path.write_bytes(b"x")
    settle()
    cache = FingerprintCache(directory)
    assert cache.get(model_file(path)) == cache.get(model_file(path)) == fingerprint(path, 1)
    assert len(os.listdir(directory)) == 1


def test_a_file_that_is_gone(path: Path, directory: Path) -> None:
    file = model_file(path)
    path.unlink()
    with pytest.raises(FileNotFoundError):
        FingerprintCache(directory).get(file)

"""penstock.checkpoint.files: single files, shards, and indices that do not fit them."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest

from penstock.checkpoint.files import open_checkpoint
from penstock.errors import CheckpointError


def write(path: Path, *names: str) -> Path:
    table = {
        name: {"dtype": "U8", "shape": [2], "data_offsets": [2 * number, 2 * number + 2]}
        for number, name in enumerate(names)
    }
    text = json.dumps(table).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(2 * len(names)))
    return path


def index(directory: Path, located: object, name: str = "model.safetensors.index.json") -> Path:
    path = directory / name
    path.write_text(json.dumps({"metadata": {"total_size": 8}, "weight_map": located}))
    return path


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    write(tmp_path / "model-1.safetensors", "a", "b")
    write(tmp_path / "model-2.safetensors", "c")
    index(tmp_path, {"a": "model-1.safetensors", "b": "model-1.safetensors", "c": "model-2.safetensors"})
    return tmp_path


def test_a_file(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write(tmp_path / "x.safetensors", "a", "b"))
    assert list(checkpoint.tensors) == ["a", "b"]
    assert checkpoint.size_bytes == 4
    assert checkpoint.index is None


def test_shards_with_an_index(sharded: Path) -> None:
    for path in (sharded, sharded / "model.safetensors.index.json"):
        checkpoint = open_checkpoint(path)
        assert sorted(checkpoint.tensors) == ["a", "b", "c"]
        assert [Path(header.file.path).name for header in checkpoint.headers] == [
            "model-1.safetensors",
            "model-2.safetensors",
        ]
        assert checkpoint.index == sharded / "model.safetensors.index.json"


def test_a_directory_without_an_index(tmp_path: Path) -> None:
    write(tmp_path / "one.safetensors", "a")
    write(tmp_path / "two.safetensors", "b")
    (tmp_path / "config.json").write_text("{}")
    assert sorted(open_checkpoint(tmp_path).tensors) == ["a", "b"]
    write(tmp_path / "model.safetensors", "a", "b", "c")  # what others would load
    assert sorted(open_checkpoint(tmp_path).tensors) == ["a", "b", "c"]


def test_files_that_no_index_names_are_left_out(sharded: Path) -> None:
    write(sharded / "adapter.safetensors", "a", "z")
    assert sorted(open_checkpoint(sharded).tensors) == ["a", "b", "c"]


def test_tensors_that_no_index_names_are_there(sharded: Path) -> None:
    index(sharded, {"a": "model-1.safetensors"})
    assert sorted(open_checkpoint(sharded).tensors) == ["a", "b"]


def test_the_usual_index_comes_first(sharded: Path) -> None:
    index(sharded, {"c": "model-2.safetensors"}, "model.fp16.safetensors.index.json")
    assert sorted(open_checkpoint(sharded).tensors) == ["a", "b", "c"]
    assert sorted(open_checkpoint(sharded / "model.fp16.safetensors.index.json").tensors) == ["c"]
    (sharded / "model.safetensors.index.json").rename(sharded / "other.safetensors.index.json")
    with pytest.raises(CheckpointError, match=r"several indices, model.fp16.* name the one"):
        open_checkpoint(sharded)


@pytest.mark.parametrize(
    ("located", "words"),
    [
        ({"a": "model-1.safetensors", "b": "model-9.safetensors"}, "names model-9.safetensors, which is not there"),
        ({"a": "model-1.safetensors", "b": "model-1.safetensors", "d": "model-1.safetensors"}, "'d' .* is in no file"),
        ({"a": "model-2.safetensors", "b": "model-1.safetensors"}, "'a' .* is in .*model-1"),
        ({"a": "../model-1.safetensors"}, "not a file below it"),
        ({"a": "/etc/passwd"}, "not a file below it"),
        ({"a": ""}, "not a file below it"),
        ({"a": 5}, "no weight_map"),
        (["a"], "no weight_map"),
    ],
)  # fmt: skip
def test_an_index_that_does_not_fit(sharded: Path, located: object, words: str) -> None:
    path = index(sharded, located)
    with pytest.raises(CheckpointError, match=words) as caught:
        open_checkpoint(sharded)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"weight_map": 5}', "[" * 100_000, "\udcff"])
def test_an_index_that_is_none(sharded: Path, text: str) -> None:
    (sharded / "model.safetensors.index.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(CheckpointError, match=r"is not JSON|no weight_map"):
        open_checkpoint(sharded)


def test_a_tensor_in_two_files(tmp_path: Path) -> None:
    write(tmp_path / "one.safetensors", "a")
    write(tmp_path / "two.safetensors", "a")
    with pytest.raises(CheckpointError, match=r"two.safetensors: tensor 'a' is in .*one.safetensors as well"):
        open_checkpoint(tmp_path)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"neither a \*.safetensors nor a \*.gguf"):
        open_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="cannot be opened"):
        open_checkpoint(tmp_path / "nothing.safetensors")
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="truncated"):
        open_checkpoint(tmp_path)

"""penstock.checkpoint.gguf, beside the gguf package: what either makes of good files, and of bad ones only ours."""

from __future__ import annotations

import struct
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from penstock.checkpoint.files import open_checkpoint
from penstock.checkpoint.gguf import read_header
from penstock.checkpoint.load import load_checkpoint
from penstock.checkpoint.plan import Slice
from penstock.errors import CheckpointError, UnsupportedError

gguf = pytest.importorskip("gguf", reason="needs the package gguf")


def string(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def packed(
    pairs: list[bytes],
    tensors: list[bytes],
    data: bytes = b"",
    *,
    counts: tuple[int, int] | None = None,
    version: int = 3,
) -> bytes:
    head = b"GGUF" + struct.pack("<IQQ", version, *(counts or (len(tensors), len(pairs))))
    text = head + b"".join(pairs) + b"".join(tensors)
    return text + bytes(-len(text) % 32) + data


def entry(name: str, shape: list[int], kind: int = 0, offset: int = 0) -> bytes:
    return string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


GOOD = packed(
    [
        string("general.name") + struct.pack("<I", 8) + string("tiny"),
        string("answer") + struct.pack("<Ii", 5, -42),
        string("tokens") + struct.pack("<IIQ", 9, 8, 2) + string("a") + string("bc"),
        string("scores") + struct.pack("<IIQ3f", 9, 6, 3, 1, 2, 3),
    ],
    [entry("a", [4, 2]), entry("b", [64], 8, 32)],
    bytes(range(32)) + bytes(68),
)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """One of real types, written by the package."""
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    random = np.random.default_rng(1)
    writer.add_string("general.name", "tiny")
    writer.add_array("tokenizer.ggml.tokens", [f"token {number}" for number in range(1000)])
    writer.add_tensor("plain", random.standard_normal((48, 256)).astype(np.float32))
    writer.add_tensor("half", random.standard_normal((7, 96)).astype(np.float16))
    blocks = gguf.quants.quantize(random.standard_normal((64, 512)).astype(np.float32), gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("blocks", blocks, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_the_same_as_the_package(model: Path) -> None:
    header = read_header(model)
    theirs = {tensor.name: tensor for tensor in gguf.GGUFReader(model).tensors}
    assert {tensor.name for tensor in header.tensors} == set(theirs)
    for tensor in header.tensors:
        other = theirs[tensor.name]
        assert tensor.shape == tuple(reversed(other.shape.tolist()))
        assert tensor.dtype == other.tensor_type.name
        assert (tensor.start, tensor.size_bytes) == (other.data_offset, other.n_bytes)
    assert header.metadata["general.name"] == "tiny"
    assert header.metadata["tokenizer.ggml.tokens"] == "1000 elements"


@pytest.mark.parametrize("framework", ["numpy", "torch"])
def test_loaded(model: Path, framework: str) -> None:
    theirs = {tensor.name: tensor.data for tensor in gguf.GGUFReader(model).tensors}
    found = load_checkpoint(model, framework=framework)
    for name, data in theirs.items():
        array = np.asarray(found[name])
        assert array.dtype == data.dtype
        assert array.shape == data.shape
        assert np.array_equal(array, data)
    part = load_checkpoint(model, names=["blocks"], slices={"blocks": Slice(1, 64, 128)}, framework=framework)
    assert np.array_equal(np.asarray(part["blocks"]), theirs["blocks"][:, 2 * 34 : 4 * 34])
    with pytest.raises(CheckpointError, match="whole blocks of 32 elements"):
        load_checkpoint(model, names=["blocks"], slices={"blocks": Slice(1, 10, 128)})


def test_by_name_by_magic_and_in_a_directory(model: Path) -> None:
    assert set(open_checkpoint(model).tensors) == {"plain", "half", "blocks"}
    assert set(open_checkpoint(model.parent).tensors) == {"plain", "half", "blocks"}
    model.rename(model.with_name("blob"))
    assert set(open_checkpoint(model.with_name("blob")).tensors) == {"plain", "half", "blocks"}


def header_of(tmp_path: Path, contents: bytes) -> list[str]:
    path = tmp_path / "model.gguf"
    path.write_bytes(contents)
    return [tensor.name for tensor in read_header(path).tensors]


def test_a_good_header(tmp_path: Path) -> None:
    assert header_of(tmp_path, GOOD) == ["a", "b"]
    metadata = read_header(tmp_path / "model.gguf").metadata
    assert metadata == {"general.name": "tiny", "answer": "-42", "tokens": "2 elements", "scores": "3 elements"}


def test_truncated_anywhere(tmp_path: Path) -> None:
    for length in range(len(GOOD)):
        with pytest.raises(CheckpointError, match=r"model.gguf: byte \d+: "):
            header_of(tmp_path, GOOD[:length])


HUGE = 1 << 60


@pytest.mark.parametrize(
    ("contents", "words"),
    [
        (b"GGML" + bytes(100), "byte 0: does not begin with GGUF"),
        (packed([], [], version=1), "version 1 is none of 2 and 3"),
        (b"GGUF" + struct.pack(">I", 3) + bytes(16), "big-endian"),
        (packed([], [], counts=(HUGE, 0)), f"{HUGE} tensors takes"),
        (packed([], [], counts=(0, HUGE)), f"{HUGE} key-value pairs takes"),
        (packed([struct.pack("<Q", HUGE) + bytes(50)], []), f"a key is said to have {HUGE} bytes"),
        (packed([string("k") + struct.pack("<IQ", 8, HUGE) + bytes(50)], []), f"takes {HUGE} bytes, and"),
        (packed([string("k") + struct.pack("<IIQ", 9, 4, HUGE) + bytes(50)], []), "the array 'k' takes"),
        (packed([string("k") + struct.pack("<IIQ", 9, 8, HUGE) + bytes(50)], []), "the array 'k' takes"),
        (packed([string("k") + struct.pack("<IIQ", 9, 9, HUGE) + bytes(50)], []), "the array 'k' takes"),
        (packed([string("k") + struct.pack("<II", 77, 0) + bytes(50)], []), "of kind 77, which is none"),
        (packed([string("k") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 8 + bytes(99)], []), "which is none"),
        (packed([struct.pack("<Q", 1) + b"\xff" + struct.pack("<II", 4, 0)], []), "byte 32: a key is not UTF-8"),
        (packed([string("k") + struct.pack("<II", 4, 0)] * 2, []), "'k' is there twice"),
        (packed([string("general.alignment") + struct.pack("<II", 4, 3)], []), "not a power of two"),
        (packed([string("general.alignment") + struct.pack("<II", 4, 0)], []), "not a power of two"),
        (packed([string("general.alignment") + struct.pack("<I", 8) + string("x")], []), "not a power of two"),
        (packed([], [entry("a", [1] * 9)]), "9 dimensions"),
        (packed([], [entry("a", [HUGE, HUGE])], bytes(32)), "beyond the file"),
        (packed([], [entry("a", [8], offset=HUGE)], bytes(32)), "beyond the file"),
        (packed([], [entry("a", [2], offset=4)], bytes(32)), "its offset 4 is no multiple of the alignment, 32"),
        (packed([], [entry("a", [33], 8)], bytes(99)), "are no blocks of 32"),
        (packed([], [entry("a", [8]), entry("b", [8])], bytes(64)), "overlaps"),
        (packed([], [entry("a", [8]), entry("a", [8], offset=32)], bytes(64)), "is there twice"),
    ],
)  # fmt: skip
def test_broken_rules(tmp_path: Path, contents: bytes, words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        header_of(tmp_path, contents)


def test_a_type_of_the_future(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="type 9999, which the installed gguf package does not know"):
        header_of(tmp_path, packed([], [entry("a", [8], 9999)], bytes(32)))


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf.constants", None)
    with pytest.raises(UnsupportedError, match="take the package gguf; install it"):
        header_of(tmp_path, GOOD)


@settings(max_examples=500, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.data())
def test_whatever_is_in_it(tmp_path: Path, data: st.DataObject) -> None:
    contents = bytearray(GOOD)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(contents) - 1))
        kind = data.draw(st.sampled_from(["byte", "word", "delete", "insert"]))
        if kind == "byte":
            contents[at] = data.draw(st.integers(0, 255))
        elif kind == "word":
            word = data.draw(st.sampled_from([0, 1, 255, 1 << 31, (1 << 32) - 1, 1 << 63, (1 << 64) - 1]))
            contents[at : at + 8] = struct.pack("<Q", word)
        elif kind == "delete":
            del contents[at : at + data.draw(st.integers(1, 9))]
        else:
            contents[at:at] = data.draw(st.binary(min_size=1, max_size=9))
        if not contents:
            return
    path = tmp_path / "model.gguf"
    path.write_bytes(contents)
    try:
        header = read_header(path)
    except (CheckpointError, UnsupportedError):
        return
    for tensor in header.tensors:
        assert header.data_start <= tensor.start <= tensor.stop <= len(contents)

"""penstock.checkpoint.safetensors, beside the safetensors library: what either makes of good and bad files."""

from __future__ import annotations

import json
import os
import struct
import tempfile
from pathlib import Path
from typing import Any

import pytest
import safetensors
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from penstock.checkpoint.base import DTYPE_BITS, FileIdentity
from penstock.checkpoint.safetensors import Header, parse_header, read_header
from penstock.errors import CheckpointError

GOOD: dict[str, Any] = {
    "__metadata__": {"format": "pt", "ключ": "значение"},
    "b": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "a": {"dtype": "BOOL", "shape": [3], "data_offsets": [24, 27]},
    "scalar": {"dtype": "F64", "shape": [], "data_offsets": [27, 35]},
    "empty": {"dtype": "BF16", "shape": [0, 7], "data_offsets": [35, 35]},
}
SIZE = 35


def packed(table: object, data: bytes = bytes(SIZE), *, padding: int = 0) -> bytes:
    text = (table if isinstance(table, bytes) else json.dumps(table).encode()) + b" " * padding
    return struct.pack("<Q", len(text)) + text + data


def header_of(tmp_path: Path, contents: bytes) -> Header:
    path = tmp_path / "model.safetensors"
    path.write_bytes(contents)
    return read_header(path)


def test_a_good_header(tmp_path: Path) -> None:
    header = header_of(tmp_path, packed(GOOD, padding=7))
    assert [tensor.name for tensor in header.tensors] == ["b", "a", "scalar", "empty"]
    assert header.metadata == GOOD["__metadata__"]
    b, a, scalar, empty = header.tensors
    assert (b.shape, b.dtype, b.start, b.size_bytes, b.elements) == ((2, 3), "F32", header.data_start, 24, 6)
    assert (a.start, a.stop) == (header.data_start + 24, header.data_start + 27)
    assert (scalar.shape, scalar.elements, scalar.size_bytes) == ((), 1, 8)
    assert (empty.shape, empty.elements, empty.size_bytes) == ((0, 7), 0, 0)
    assert header.data_start % 8 == (8 + len(json.dumps(GOOD).encode()) + 7) % 8


def test_every_dtype_that_the_library_knows(tmp_path: Path) -> None:
    for dtype, bits in DTYPE_BITS.items():
        contents = packed({"x": {"dtype": dtype, "shape": [8], "data_offsets": [0, bits]}}, bytes(bits))
        assert header_of(tmp_path, contents).tensors[0].dtype == dtype
        safetensors.deserialize(contents)
    with pytest.raises(CheckpointError, match="none of F4, "):
        header_of(tmp_path, packed({"x": {"dtype": "F128", "shape": [1], "data_offsets": [0, 16]}}, bytes(16)))


def test_truncated_anywhere(tmp_path: Path) -> None:
    contents = packed(GOOD)
    for length in range(len(contents)):
        with pytest.raises(CheckpointError, match=r"model.safetensors: .*trunc|model.safetensors: byte"):
            header_of(tmp_path, contents[:length])
    with pytest.raises(CheckpointError, match="belongs to no tensor"):
        header_of(tmp_path, contents + b"x")


def tensor(**changes: object) -> dict[str, Any]:
    good = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    return {"x": {key: value for key, value in (good | changes).items() if value is not None}}


@pytest.mark.parametrize(
    ("contents", "words"),
    [
        (b"", "length of the header alone takes 8"),
        (struct.pack("<Q", 1 << 63) + b"{}", "more than the 100000000"),
        (struct.pack("<Q", 3) + b"{}", "said to have 3 bytes, and 2 follow"),
        (packed(b"[]", b""), "does not begin with '{'"),
        (packed(b" {}", b""), "does not begin with '{'"),
        (packed(b'{"a\xff": 1}', b""), "byte 11: the header is not UTF-8"),
        (packed(b'{"a": 1', b""), "byte 15: the header is not JSON"),
        (packed(b'{"a": 1}}', b""), "not JSON"),
        (packed(b'{"a": NaN}', b""), "NaN is no JSON"),
        (packed(b'{"a": ' + b"[" * 100_000, b""), "not JSON that can be read"),
        (packed(b'{"a": ' + b"9" * 5000 + b"}", b""), "not JSON that can be read"),
        (packed(b'{"\\ud800": {}}', b""), "surrogate"),
        (packed(b'{"__metadata__": {"a": "\\ud800"}}', b""), "surrogate"),
        (packed({"__metadata__": {"a": 1}}, b""), "must map strings to strings"),
        (packed({"__metadata__": "a"}, b""), "must map strings to strings"),
        (packed({"x": 5}, b""), "is described by an object"),
        (packed(tensor(dtype=None), bytes(8)), "has no dtype"),
        (packed(tensor(shape=None, data_offsets=None), bytes(8)), "has no data_offsets, shape"),
        (packed(tensor(dtype="f32"), bytes(8)), "dtype 'f32' is none of"),
        (packed(tensor(dtype=7), bytes(8)), "dtype 7 is none of"),
        (packed(tensor(shape=[-2]), bytes(8)), "no list of whole numbers"),
        (packed(tensor(shape=[2.0]), bytes(8)), "no list of whole numbers"),
        (packed(tensor(shape=[True, 2]), bytes(8)), "no list of whole numbers"),
        (packed(tensor(shape=2), bytes(8)), "no list of whole numbers"),
        (packed(tensor(shape=[1 << 64]), bytes(8)), "no list of whole numbers"),
        (packed(tensor(shape=[1 << 62, 8]), bytes(8)), "takes 147573952589676412928 bytes"),
        (packed(tensor(data_offsets=[0]), bytes(8)), "not two whole numbers"),
        (packed(tensor(data_offsets=[0, 8, 16]), bytes(8)), "not two whole numbers"),
        (packed(tensor(data_offsets=["0", 8]), bytes(8)), "not two whole numbers"),
        (packed(tensor(data_offsets=[-8, 0]), bytes(8)), "not two whole numbers"),
        (packed(tensor(data_offsets=[8, 0]), bytes(8)), "decrease"),
        (packed(tensor(data_offsets=[0, 1 << 63]), bytes(8)), "beyond the file"),
        (packed(tensor(shape=[3]), bytes(8)), "takes 12 bytes, and data_offsets .* hold 8"),
        (packed(tensor(dtype="F4", shape=[3], data_offsets=[0, 2]), bytes(2)), "12 bits, which are no whole bytes"),
        (packed(tensor(data_offsets=[8, 16]), bytes(16)), "leaves a hole"),
        (packed(tensor() | {"y": tensor()["x"]}, bytes(8)), "overlaps"),
        (packed(tensor() | {"y": tensor(data_offsets=[4, 12])["x"]}, bytes(12)), "overlaps"),
        (packed(tensor() | {"y": tensor(data_offsets=[12, 20])["x"]}, bytes(20)), "leaves a hole"),
        (packed(tensor(), bytes(9)), "belongs to no tensor"),
        (packed(b'{"x": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}, "x": {}}', b"1"), "'x' is there twice"),
        (packed(b'{"x": {"dtype": "U8", "dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}', b"1"), "twice"),
    ],
)  # fmt: skip
def test_broken_rules(tmp_path: Path, contents: bytes, words: str) -> None:
    with pytest.raises(CheckpointError, match=words) as caught:
        header_of(tmp_path, contents)
    assert str(tmp_path / "model.safetensors") in str(caught.value)


def test_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for name, words in ((".", "is a directory"), ("fifo", "is a FIFO"), ("none", "cannot be opened: No such file")):
        with pytest.raises(CheckpointError, match=words):
            read_header(tmp_path / name)
    with pytest.raises(CheckpointError, match="is a device"):
        read_header("/dev/null")


def test_what_may_not_be_read() -> None:
    with tempfile.TemporaryDirectory() as directory:  # pytest's are root's alone
        os.chmod(directory, 0o755)  # noqa: S103
        path = Path(directory) / "model.safetensors"
        path.write_bytes(packed(GOOD))
        path.chmod(0)
        user = os.geteuid()
        if user == 0:
            os.seteuid(65534)  # and with it the capabilities go
        try:
            with pytest.raises(CheckpointError, match="cannot be opened: Permission denied"):
                read_header(path)
        finally:
            os.seteuid(user)


def both(contents: bytes) -> tuple[bool, bool]:
    """Whether we take it, and whether the library does."""
    length = int.from_bytes(contents[:8], "little")
    try:
        text = contents[8 : 8 + length]
        if len(contents) < 8 or length > len(contents) - 8:
            raise CheckpointError("as read_header would")
        parse_header(text, FileIdentity("file", len(contents), 0, 0, 0))
        ours = True
    except CheckpointError:
        ours = False
    try:
        safetensors.deserialize(contents)
        theirs = True
    except safetensors.SafetensorError:
        theirs = False
    return ours, theirs


@settings(max_examples=400, suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(st.data())
def test_what_we_take_the_library_takes(data: st.DataObject) -> None:
    contents = bytearray(packed(GOOD, padding=data.draw(st.integers(0, 3))))
    for _ in range(data.draw(st.integers(1, 4))):
        kind = data.draw(st.sampled_from(["flip", "insert", "delete", "digit"]))
        at = data.draw(st.integers(0, len(contents) - 1))
        if kind == "flip":
            contents[at] ^= 1 << data.draw(st.integers(0, 7))
        elif kind == "insert":
            contents[at:at] = data.draw(st.binary(min_size=1, max_size=3))
        elif kind == "delete":
            del contents[at : at + data.draw(st.integers(1, 4))]
        elif chr(contents[at]).isdigit():
            contents[at] = ord(data.draw(st.sampled_from("0123456789")))
        if not contents:
            return
    ours, theirs = both(bytes(contents))
    assert theirs or not ours


TENSORS = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*DTYPE_BITS, "F31", "", "bool"]),
        "shape": st.lists(st.integers(-1, 9) | st.just(1 << 63), max_size=3),
        "data_offsets": st.lists(st.integers(-1, 40), min_size=1, max_size=3).map(sorted),
    },
    optional={"extra": st.none() | st.booleans()},
)


@settings(max_examples=400, deadline=None)
@given(st.dictionaries(st.text(max_size=3), TENSORS, max_size=3), st.binary(max_size=40))
@example({"a": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2], "extra": None}}, b"12")
@example({"a": {"dtype": "F4", "shape": [2, 2], "data_offsets": [0, 2]}}, b"12")
def test_both_take_the_same_headers(table: dict[str, Any], data: bytes) -> None:
    ours, theirs = both(packed(table, data))
    assert ours == theirs

"""Checkpoints with a real model's tensor names and shapes, and random weights.

A benchmark of model loading needs the files of the model: their number and sizes, the tensors' names, shapes
and order in the file. What the weights say does not matter, as long as no layer below can compress them away
and every number is finite. So this module writes what Hugging Face's `save_pretrained` would have written, at
the speed of the disk and without a download; gguf.py writes what llama.cpp's converter would have. There is
no tokenizer among the files.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import struct
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final

import numpy as np

from penstock.testing.shapes import PRESETS as PRESETS  # tests/cli imports it from here
from penstock.testing.shapes import ModelShape, TensorSpec, model_config, scaled, tensors, weight_bytes
from penstock.units import MiB, format_size

Progress = Callable[[int], None]  # called with the bytes written since the last call

SHARD_BYTES: Final = 5_000_000_000  # "5GB", the shard size of nearly every published checkpoint
_BLOCK_BYTES: Final = MiB  # in one run 3.8 GB/s; 4 MiB 3.2, 16 MiB 2.2: the masks find 1 MiB in the cache


def shards(specs: Sequence[TensorSpec], shard_bytes: int = SHARD_BYTES) -> list[list[TensorSpec]]:
    """The tensors of each file, in the order in which they lie in it.

    As Hugging Face does it: filled in the order of the modules until the next tensor would go over
    `shard_bytes`, a larger tensor alone in its file; inside a file sorted by name, so that layer 10 lies
    before layer 2.

    Raises:
        ValueError: `shard_bytes` is not positive.
    """
    if shard_bytes <= 0:
        raise ValueError(f"shards of {shard_bytes} bytes hold nothing; ask for a positive shard size")
    filled: list[list[TensorSpec]] = []
    room_bytes = 0
    for spec in specs:
        if not filled or spec.size_bytes > room_bytes:
            filled.append([])
            room_bytes = shard_bytes
        filled[-1].append(spec)
        room_bytes -= spec.size_bytes
    return [sorted(shard, key=lambda spec: spec.name) for shard in filled]


def safetensors_header(specs: Sequence[TensorSpec]) -> bytes:
    """Length, JSON and padding of a safetensors file, to where the first tensor's bytes begin (8-aligned)."""
    table: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for spec in specs:
        stop = offset + spec.size_bytes
        table[spec.name] = {"dtype": spec.dtype, "shape": spec.shape, "data_offsets": [offset, stop]}
        offset = stop
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def generate_checkpoint(
    directory: str | os.PathLike[str],
    shape: ModelShape,
    *,
    size_bytes: int | None = None,
    shard_bytes: int | None = None,
    seed: int = 0,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> list[Path]:
    """Write a safetensors checkpoint and its configuration; the weight files, in order.

    Args:
        directory: made where it does not exist.
        size_bytes: take `scaled(shape, size_bytes)`; None keeps the model's own size.
        shard_bytes: largest file; None is 5 GB. Weights that fit in one go to model.safetensors, no index.
        seed: a tensor's bytes depend on this and on its name only, not on how the files are cut.
        overwrite: replace the checkpoint that is there, once the new one is complete; both need room.

    Every file is written beside its place, flushed to the disk, and renamed when all are complete; a failure
    leaves the directory as it was.

    Raises:
        FileExistsError: the directory holds safetensors files and `overwrite` is not set.
        OSError: the file system has no room (ENOSPC, seen before anything is written where possible).
        ValueError: a size is not positive, or the seed is negative.
    """
    directory = Path(directory)
    if size_bytes is not None:
        shape = scaled(shape, size_bytes)
    old = sorted(directory.glob("*.safetensors"))
    if old and not overwrite:
        raise FileExistsError(
            errno.EEXIST,
            f"{len(old)} safetensors files are there already; choose another directory or overwrite",
            str(directory),
        )
    check_room(directory, weight_bytes(shape))
    files = shards(tensors(shape), SHARD_BYTES if shard_bytes is None else shard_bytes)

    names = [_shard_name(index, len(files)) for index in range(len(files))]
    config = model_config(shape)
    texts = {"config.json": config}
    texts["generation_config.json"] = {key: config[key] for key in ("bos_token_id", "eos_token_id")}
    if len(files) > 1:
        weight_map = {spec.name: name for name, file in zip(names, files, strict=True) for spec in file}
        texts["model.safetensors.index.json"] = {
            "metadata": {"total_size": weight_bytes(shape)},
            "weight_map": weight_map,
        }
    with Staging(directory) as staging:
        for name, file in zip(names, files, strict=True):
            write_file(staging.path(name), safetensors_header(file), file, seed=seed, progress=progress)
        for name, content in texts.items():
            text = json.dumps(content, indent=2, sort_keys=True) + "\n"
            write_file(staging.path(name), text.encode(), (), seed=seed, progress=None)
        staging.publish()
    for path in directory.glob("model*.safetensors*"):
        if _CHECKPOINT_FILE.fullmatch(path.name) and path.name not in texts and path.name not in names:
            path.unlink()  # the replaced checkpoint had other shards
    return [directory / name for name in names]


_CHECKPOINT_FILE: Final = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json")


def _shard_name(index: int, count: int) -> str:
    return "model.safetensors" if count == 1 else f"model-{index + 1:05}-of-{count:05}.safetensors"


class Staging:
    """Files written beside their places in one directory: all of them are published, or none is left."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._made = [path for path in (directory, *directory.parents) if not path.exists()]
        self._names: list[str] = []

    def __enter__(self) -> Staging:
        self._directory.mkdir(parents=True, exist_ok=True)
        return self

    def path(self, name: str) -> Path:
        self._names.append(name)
        return self._partial(name)

    def publish(self) -> None:
        while self._names:
            self._partial(self._names[0]).replace(self._directory / self._names[0])
            self._names.pop(0)
        self._made.clear()
        descriptor = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def __exit__(self, *_: object) -> None:
        for name in self._names:
            self._partial(name).unlink(missing_ok=True)
        for directory in self._made:
            with contextlib.suppress(OSError):  # someone else put a file there meanwhile
                directory.rmdir()

    def _partial(self, name: str) -> Path:
        return self._directory / f"{name}.partial"


def check_room(directory: Path, wanted_bytes: int) -> None:
    """Raise OSError (ENOSPC) where the file system of `directory`, which may not exist yet, has less room."""
    existing = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    free_bytes = shutil.disk_usage(existing).free
    if wanted_bytes > free_bytes:
        raise OSError(
            errno.ENOSPC,
            f"the checkpoint takes {format_size(wanted_bytes)} and {format_size(free_bytes)} are free; "
            "make room, choose another file system or ask for a smaller size",
            str(directory),
        )


def write_file(
    path: Path,
    header: bytes,
    specs: Sequence[TensorSpec],
    *,
    alignment_bytes: int = 1,
    seed: int,
    progress: Progress | None,
) -> None:
    """Write one file and flush it to the disk; a failed write's error names the file and the offset.

    After `header` come the weights of `specs`, each padded with zeros to a multiple of `alignment_bytes`.
    """
    offset = 0
    try:
        with path.open("wb", buffering=0) as file:
            for block in _blocks(header, specs, alignment_bytes, seed):
                rest = block
                while rest:  # a raw write may be short
                    written = file.write(rest)
                    offset += written
                    rest = rest[written:]
                if progress is not None:
                    progress(len(block))
            os.fsync(file.fileno())
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, f"writing at {offset}: {os.strerror(error.errno)}", str(path)) from error


def _blocks(header: bytes, specs: Sequence[TensorSpec], alignment_bytes: int, seed: int) -> Iterator[memoryview]:
    yield memoryview(header)
    for spec in specs:
        yield from _weights(spec, seed)
        padding = -spec.size_bytes % alignment_bytes
        if padding:
            yield memoryview(bytes(padding))


# Sign and mantissa are random. Of the eight exponent bits, 011x0xxx, four are: exponents from 96 to 103 and
# from 112 to 119 of a bias of 127, so every weight is finite and below 2**-7. 12 of 16 bits cannot be
# compressed; trained bf16 weights have about 11.
_RANDOM_BITS: Final = 0b1_00010111_1111111
_SET_BITS: Final = 0b0_01100000_0000000
_MASKS: Final = {
    "BF16": (_RANDOM_BITS * 0x0001_0001_0001_0001, _SET_BITS * 0x0001_0001_0001_0001),
    "F32": ((_RANDOM_BITS << 16 | 0xFFFF) * 0x0000_0001_0000_0001, _SET_BITS * 0x0001_0000_0001_0000),
}


def _weights(spec: TensorSpec, seed: int) -> Iterator[memoryview]:
    """The tensor's bytes, block by block."""
    generator = np.random.Generator(np.random.SFC64([seed, int.from_bytes(spec.name.encode(), "little")]))
    random_bits, set_bits = (np.uint64(mask) for mask in _MASKS[spec.dtype])
    for start in range(0, spec.size_bytes, _BLOCK_BYTES):
        block_bytes = min(_BLOCK_BYTES, spec.size_bytes - start)
        words = generator.integers(0, 1 << 64, size=-(-block_bytes // 8), dtype=np.uint64)
        words &= random_bits
        words |= set_bits
        yield words.data.cast("B")[:block_bytes]

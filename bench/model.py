"""The model that is loaded: its files, and what an independent reader says is in them."""

from __future__ import annotations

import json
import mmap
import os
import struct
import subprocess
import sys
import zlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bench.direct import opened
from bench.errors import BenchError
from penstock.units import MiB, format_size

_READ_BYTES = 8 * MiB
_PAGE_BYTES = 4096


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes ``[start, stop)`` of a file that a client reads as one: a tensor, a worker's share of it, a file."""

    name: str
    path: Path
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Contents:
    """What a client must report: its bytes, the sum of samples, a CRC of each piece."""

    bytes: int
    samples: int
    crcs: dict[str, int]


@dataclass(frozen=True, slots=True)
class Model:
    """The same weights twice: as sharded safetensors, and as one GGUF file (None where not asked for)."""

    directory: Path
    gguf: Path | None

    def path(self, client: str) -> Path:
        """What the client is given."""
        if client != "gguf":
            return self.directory
        if self.gguf is None:
            raise BenchError("the model was not generated as GGUF")
        return self.gguf

    def files(self, client: str) -> list[Path]:
        """The weight files that the client reads, in order."""
        path = self.path(client)
        return [path] if client == "gguf" else sorted(path.glob("*.safetensors"))

    def bytes(self, client: str) -> int:
        """The size of these files."""
        return sum(path.stat().st_size for path in self.files(client))


def generate(directory: Path, *, preset: str, size_bytes: int, gguf: bool) -> Model:
    """The model in a directory of the benchmark's; generated only where it is not there already."""
    place = directory / f"{preset}-{size_bytes}"
    model = Model(place / "safetensors", place / "gguf" / f"{preset}-BF16.gguf" if gguf else None)
    shard_bytes = min(5_000_000_000, size_bytes * 2 // 5)
    if not list(model.directory.glob("*.safetensors")):
        _generate(model.directory, preset, size_bytes, "--shard-size", str(shard_bytes))
    if model.gguf is not None and not model.gguf.exists():
        _generate(model.gguf.parent, preset, size_bytes, "--format", "gguf")
        (found,) = model.gguf.parent.glob("*.gguf")
        if found != model.gguf:
            raise BenchError(f"penstock generate wrote {found} where {model.gguf} was expected")
    return model


def _generate(directory: Path, preset: str, size_bytes: int, *options: str) -> None:
    penstock = Path(sys.executable).with_name("penstock")
    if not penstock.exists():
        raise BenchError("penstock is not installed in this environment: pip install -e .")
    print(f"generating {format_size(size_bytes)} in {directory}", file=sys.stderr, flush=True)
    command = [
        str(penstock), "generate", str(directory), "--preset", preset, "--size", str(size_bytes), *options,
    ]  # fmt: skip
    done = subprocess.run(command, stdout=subprocess.DEVNULL, check=False)
    if done.returncode:
        raise BenchError(f"{' '.join(command)} failed with status {done.returncode}")


def expected(model: Model, client: str) -> Contents:
    """What the client must find, read with O_DIRECT once and kept beside the model for these very files."""
    files = model.files(client)
    store = files[0].parent / f"expected-{'tensors' if client in ('hf', 'mmap') else client}.json"
    key = [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files]
    if store.exists():
        saved = json.loads(store.read_text())
        if saved["files"] == key:
            return Contents(saved["bytes"], saved["samples"], saved["crcs"])
    contents = _contents(_pieces(files, client))
    beside = store.with_suffix(".partial")
    beside.write_text(
        json.dumps({"files": key, "bytes": contents.bytes, "samples": contents.samples, "crcs": contents.crcs})
    )
    beside.replace(store)
    return contents


def _pieces(files: list[Path], client: str) -> list[Piece]:
    if client == "read":
        return [Piece(path.name, path, 0, path.stat().st_size) for path in files]
    if client == "gguf":
        return _gguf_pieces(files[0])
    pieces = []
    for path in files:
        with path.open("rb") as file:
            (header_bytes,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(header_bytes))
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            start, stop = (8 + header_bytes + offset for offset in entry["data_offsets"])
            if client == "tp2":
                rows = entry["shape"][0]
                row_bytes = (stop - start) // rows
                middle = start + rows // 2 * row_bytes
                matrix = len(entry["shape"]) > 1
                pieces.append(Piece(f"{name}@0", path, start, middle if matrix else stop))
                pieces.append(Piece(f"{name}@1", path, middle if matrix else start, stop))
            else:
                pieces.append(Piece(name, path, start, stop))
    return pieces


def _gguf_pieces(path: Path) -> list[Piece]:
    from gguf import GGUFReader

    tensors = GGUFReader(path).tensors
    return [
        Piece(tensor.name, path, tensor.data_offset, tensor.data_offset + int(tensor.n_bytes)) for tensor in tensors
    ]


def _contents(pieces: Iterable[Piece]) -> Contents:
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = list(pool.map(_read_piece, pieces := list(pieces)))
    return Contents(
        sum(piece.stop - piece.start for piece in pieces),
        sum(samples for _, samples in results) % (1 << 64),
        {piece.name: crc for piece, (crc, _) in zip(pieces, results, strict=True)},
    )


def _read_piece(piece: Piece) -> tuple[int, int]:
    """CRC and sum of samples of one piece."""
    crc, samples = 0, 0
    with mmap.mmap(-1, _READ_BYTES + _PAGE_BYTES) as buffer, opened(piece.path) as fd:
        for start in range(piece.start, piece.stop, _READ_BYTES):
            size_bytes = min(_READ_BYTES, piece.stop - start)
            skip_bytes = start % _PAGE_BYTES
            got_bytes = os.preadv(fd, [buffer], start - skip_bytes)
            if got_bytes < skip_bytes + size_bytes:
                raise BenchError(f"{piece.path}: {got_bytes} bytes at {start}, {size_bytes} wanted")
            data = buffer[skip_bytes : skip_bytes + size_bytes]
            crc = zlib.crc32(data, crc)
            words = np.frombuffer(data, np.uint64, size_bytes // 8)
            samples += int(words[:: _PAGE_BYTES // 8].sum(dtype=np.uint64))
    return crc, samples % (1 << 64)

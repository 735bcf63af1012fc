"""What the clients share: the ring that stands in for the device, the tally of what arrived, the last line.

Only numpy is imported. The clients that read safetensors parse its header themselves and copy from the mapping,
which is what the safetensors library does for PyTorch, but without the 1.2 s that importing torch takes: that
time is free for a prefetcher, so with it every figure would flatter penstock. The hf client has it.
"""

from __future__ import annotations

import argparse
import json
import mmap
import struct
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

PAGE_BYTES = 4096
CHUNK_BYTES = 4 << 20  # one copy; a multiple of the page, so that samples do not depend on it
_MADV_POPULATE_WRITE = 23


@dataclass(frozen=True, slots=True)
class Options:
    """What every client is told."""

    path: Path
    reverse: bool
    verify: bool
    ring_bytes: int
    passes: int


def parse_options(description: str) -> Options:
    """The options from the command line."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("path", type=Path, help="directory with safetensors files, or a .gguf file")
    parser.add_argument("--order", choices=("file", "reverse"), default="file")
    parser.add_argument("--verify", action="store_true", help="also a CRC of every tensor or file")
    parser.add_argument("--ring-bytes", type=int, default=256 << 20)
    parser.add_argument("--passes", type=int, default=1, help="read everything so many times (read and mmap)")
    arguments = parser.parse_args()
    reverse = arguments.order == "reverse"
    return Options(arguments.path, reverse, arguments.verify, arguments.ring_bytes, arguments.passes)


class Tally:
    """Counts what arrived: bytes, samples of every page, and CRCs where they are asked for.

    The samples are the sum, modulo 2**64, of the first word of every 4 KiB of each piece. It does not depend on
    the order of pieces or chunks, touches one cache line in 64, and so is taken in timed runs too.
    """

    def __init__(self, verify: bool) -> None:
        self.bytes = 0
        self.samples = np.uint64(0)
        self.pieces: dict[str, int] = {}
        self.phases: dict[str, float] = {}
        self._verify = verify

    def add(self, piece: str, data: NDArray[np.uint8]) -> None:
        """Count the next bytes of a piece; all but its last ones must be a multiple of 4 KiB."""
        words = data[: data.nbytes // 8 * 8].view(np.uint64)
        with np.errstate(over="ignore"):
            self.samples += words[:: PAGE_BYTES // 8].sum(dtype=np.uint64)
        self.bytes += data.nbytes
        if self._verify:
            self.pieces[piece] = zlib.crc32(data, self.pieces.get(piece, 0))

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure a phase of the client."""
        start = time.perf_counter()
        yield
        self.phases[f"{name}_s"] = time.perf_counter() - start

    def report(self) -> None:
        """Print the client's last line."""
        print(
            json.dumps(
                {
                    "bytes": self.bytes,
                    "samples": int(self.samples),
                    "pieces": self.pieces,
                    "phases": {name: round(seconds, 4) for name, seconds in self.phases.items()},
                }
            )
        )


class Ring:
    """A prefaulted buffer that tensors are copied through, as through pinned memory on the way to a device."""

    def __init__(self, size_bytes: int) -> None:
        size_bytes = max(size_bytes, 2 * CHUNK_BYTES)
        memory = mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._slots = np.frombuffer(memory, np.uint8)
        try:
            memory.madvise(_MADV_POPULATE_WRITE)
        except OSError:  # before Linux 5.14
            self._slots[::PAGE_BYTES] = 0
        self._position = 0

    def copy(self, tally: Tally, piece: str, source: NDArray[np.uint8]) -> None:
        """Copy one tensor, or a worker's share of it, through the ring."""
        for start in range(0, source.nbytes, CHUNK_BYTES):
            chunk = source[start : start + CHUNK_BYTES]
            if self._position + chunk.nbytes > self._slots.nbytes:
                self._position = 0
            slot = self._slots[self._position : self._position + chunk.nbytes]
            np.copyto(slot, chunk)
            tally.add(piece, slot)
            self._position += -(-chunk.nbytes // 64) * 64


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor of a safetensors file: bytes ``[start, stop)`` of the file."""

    name: str
    rows: int | None  # None for a vector, which is not cut among workers
    start: int
    stop: int


def map_file(path: Path) -> NDArray[np.uint8]:
    """The whole file as one shared, read-only mapping, which lives as long as the array."""
    with path.open("rb") as file:
        return np.frombuffer(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ), np.uint8)


def safetensors_index(file: NDArray[np.uint8]) -> list[Tensor]:
    """The tensors of a mapped safetensors file, in the order in which they lie in it."""
    (header_bytes,) = struct.unpack("<Q", file[:8].tobytes())
    header = json.loads(file[8 : 8 + header_bytes].tobytes())
    base = 8 + header_bytes
    tensors = []
    for name, entry in header.items():
        if name != "__metadata__":
            start, stop = entry["data_offsets"]
            rows = entry["shape"][0] if len(entry["shape"]) >= 2 else None
            tensors.append(Tensor(name, rows, base + start, base + stop))
    return sorted(tensors, key=lambda tensor: tensor.start)


def weight_files(directory: Path, *, reverse: bool) -> list[Path]:
    """The checkpoint's files in the order of their names, or the reverse."""
    files = sorted(directory.glob("*.safetensors"), reverse=reverse)
    if not files:
        raise FileNotFoundError(f"{directory}: no .safetensors files in it")
    return files

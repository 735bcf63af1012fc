"""What is written and read, and the device that it is copied to."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.errors import RunError
from penstock.device.choose import open_device
from penstock.kv.residency import KVTensor
from penstock.linux.process import memory_bytes
from penstock.storage.buffers import huge_buffer
from penstock.units import MiB

_SOURCE_BYTES = 16 * MiB  # of different rows, handed out again and again
_DEVICE_BYTES = 64 * MiB
# glibc copies 1 MiB and more past the CPU's caches: 27 GB/s became 23 here. So the device takes less at a time, or what
# an arm hands over at once would decide how fast its device is. It gets a row of the ring each, in one call of numpy's:
# what is handed over is copied without a look at the interpreter's lock in between, as a GPU would.
_PITCH_BYTES = 1 * MiB
_PIECE_BYTES = _PITCH_BYTES - 4096


@dataclass(frozen=True, slots=True)
class Workload:
    """The shape of a cache.

    Attributes:
        row_bytes: what one token adds to one layer's keys or values, for the whole batch.
        prompt: tokens that prefill writes.
        steps: tokens that are decoded, the last one to compare.
        device: that rows are copied to: ``cpu``, which is a ring of host memory, or as torch names it.
    """

    layers: int
    row_bytes: int
    prompt: int
    steps: int
    device: str = "cpu"

    @property
    def tensors(self) -> list[KVTensor]:
        """In the order in which a step asks for them."""
        return [KVTensor(layer, kind) for layer in range(self.layers) for kind in ("keys", "values")]

    @property
    def tokens(self) -> int:
        """At the end."""
        return self.prompt + self.steps

    @property
    def kv_bytes(self) -> int:
        """Of all rows at the end."""
        return 2 * self.layers * self.tokens * self.row_bytes


class Source:
    """The rows of a workload."""

    def __init__(self, workload: Workload) -> None:
        count = max(2, _SOURCE_BYTES // workload.row_bytes)
        self._rows = np.random.default_rng(1).integers(0, 256, (count, workload.row_bytes), np.uint8)

    def _place(self, tensor: KVTensor, row: int) -> int:
        return ((2 * tensor.layer + (tensor.kind == "values")) * 101 + row) % len(self._rows)

    def rows(self, tensor: KVTensor, first: int, last: int) -> Iterator[NDArray[np.uint8]]:
        """Rows ``[first, last)``, [rows, row_bytes], in pieces."""
        while first < last:
            place = self._place(tensor, first)
            count = min(last - first, len(self._rows) - place)
            yield self._rows[place : place + count]
            first += count


class Device:
    """A ring of memory, one copy at a time.

    Args:
        name: ``cpu``, or as torch names it.

    Attributes:
        opened: that has the ring; None where it is host memory.
    """

    def __init__(self, name: str = "cpu") -> None:
        self.opened = open_device(name)
        if self.opened is None:
            self._ring: Any = np.frombuffer(huge_buffer(_DEVICE_BYTES), np.uint8).reshape(-1, _PITCH_BYTES)
        else:
            self._ring = self.opened.allocate(_DEVICE_BYTES)
        self._at = 0
        self._lock = threading.Lock()
        self.copied_bytes = 0

    def copy(self, rows: NDArray[np.uint8]) -> None:
        """Take rows; their memory may be used again afterwards."""
        flat = rows.reshape(-1)
        with self._lock:
            self.copied_bytes += len(flat)
            while len(flat):
                flat = flat[self._take(flat) :]

    def _take(self, flat: NDArray[np.uint8]) -> int:
        """Copy some bytes, as many as there is room for at once; returns how many."""
        if self._at == len(self._ring):
            self._at = 0
        if self.opened is not None:
            size_bytes = min(len(flat), len(self._ring))
            if self._at + size_bytes > len(self._ring):
                self._at = 0
            self.opened.copy(self._ring, self._at, flat[:size_bytes].data).wait()
            self._at += size_bytes
            return size_bytes
        rows = min(len(flat) // _PIECE_BYTES, len(self._ring) - self._at) or 1
        pieces = flat[: rows * _PIECE_BYTES].reshape(rows, -1)
        np.copyto(self._ring[self._at : self._at + rows, : pieces.shape[1]], pieces)
        self._at += rows
        return pieces.size

    def bandwidth(self) -> float:
        """Bytes a second of a copy from memory that is in no cache of the CPU's, and pinned for a GPU."""
        memory = huge_buffer(256 * MiB)
        unpin = None if self.opened is None else self.opened.pin(memory)
        source = np.frombuffer(memory, np.uint8)
        best = 0.0
        for _ in range(5):
            begin = time.perf_counter()
            self.copy(source)
            best = max(best, len(source) / (time.perf_counter() - begin))
        if unpin is not None:
            unpin()
        return best


class Comparing:
    """A target that compares rows with what they must be. Rows may come more than once; the last time counts.

    Attributes:
        is_right: of each row, [tokens].
    """

    def __init__(self, source: Source, tensor: KVTensor, tokens: int) -> None:
        self._source = source
        self._tensor = tensor
        self.is_right = np.zeros(tokens, bool)

    def write(self, first: int, rows: NDArray[np.uint8]) -> None:
        at = 0
        for expected in self._source.rows(self._tensor, first, first + len(rows)):
            part = rows[at : at + len(expected)]
            self.is_right[first + at : first + at + len(part)] = (part == expected).all(axis=1)
            at += len(expected)

    def check(self) -> None:
        """Complain unless all of them have come, and were right."""
        wrong = np.flatnonzero(~self.is_right)
        if len(wrong):
            raise RunError(f"{self._tensor}: {len(wrong)} rows from {wrong[0]} on are not what was written")


class Baseline:
    """What the benchmark itself takes of the memory: the interpreter, its rows and its device."""

    def __init__(self, workload: Workload) -> None:
        self._kept = Device(workload.device), Source(workload)

    def anon_bytes(self) -> int:
        """Anonymous memory of this process."""
        return memory_bytes(os.getpid())["RssAnon"]

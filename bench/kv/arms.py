"""The ways to keep a KV cache that are compared."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.kv.workload import Comparing, Device, Source, Workload
from bench.space import use_space
from penstock.kv.cache import BUFFER_BYTES, DEPTH, POOL_BYTES, KVCache
from penstock.kv.fetch import Fetch
from penstock.kv.residency import KVTensor
from penstock.kv.residency import Path as Residence
from penstock.kv.store import KVStore
from penstock.storage.choose import create_engine
from penstock.storage.pool import BufferPool
from penstock.storage.region import DATA_START, Region
from penstock.units import MiB

_AHEAD = 8  # tensors whose rows are asked for before they are needed: four layers


class Arm(ABC):
    """A cache of one workload, in a directory."""

    data_start = 0  # of each of its files, bytes: what comes before is a header

    def __init__(self, workload: Workload, directory: Path) -> None:
        self.workload = workload
        self.directory = directory
        self.device = Device(workload.device)
        self.source = Source(workload)

    def prefill(self) -> None:
        """Write the prompt's rows."""
        for tensor in self.workload.tensors:
            for rows in self.source.rows(tensor, 0, self.workload.prompt):
                self.append(tensor, rows)

    @abstractmethod
    def append(self, tensor: KVTensor, rows: NDArray[np.uint8]) -> None:
        """Write rows behind those that are there."""

    @abstractmethod
    def step(self, tokens: int) -> None:
        """Copy the first so many rows of each tensor to the device, and write the next."""

    @abstractmethod
    def compare(self, tokens: int) -> None:
        """Complain unless the first so many rows of each tensor are what they must be."""

    def use_space(self) -> None:
        """Have the disk find the space of what is going to be written."""
        for path in self.directory.iterdir():
            use_space(path, self.data_start)

    def figures(self) -> dict[str, Any]:
        """What else is worth knowing."""
        return {}

    @abstractmethod
    def close(self) -> None:
        """Remove everything."""


class Memmap(Arm):
    """One np.memmap file a tensor."""

    def __init__(self, workload: Workload, directory: Path) -> None:
        super().__init__(workload, directory)
        shape = (workload.tokens, workload.row_bytes)
        self._files = {
            tensor: np.memmap(directory / f"{tensor.layer}-{tensor.kind}", np.uint8, "w+", shape=shape)
            for tensor in workload.tensors
        }
        self._tokens = dict.fromkeys(workload.tensors, 0)

    def append(self, tensor: KVTensor, rows: NDArray[np.uint8]) -> None:
        first = self._tokens[tensor]
        self._files[tensor][first : first + len(rows)] = rows
        self._tokens[tensor] = first + len(rows)

    def step(self, tokens: int) -> None:
        for tensor, file in self._files.items():
            self.device.copy(file[:tokens])
            self.append(tensor, next(self.source.rows(tensor, tokens, tokens + 1)))

    def compare(self, tokens: int) -> None:
        for tensor, file in self._files.items():
            comparing = Comparing(self.source, tensor, tokens)
            for start in range(0, tokens, 64):
                comparing.write(start, file[start : min(start + 64, tokens)])
            comparing.check()

    def close(self) -> None:
        self._files.clear()
        for path in self.directory.iterdir():
            path.unlink()


@dataclass(frozen=True, slots=True)
class _ToDevice:
    device: Device

    def write(self, first: int, rows: NDArray[np.uint8]) -> None:
        del first
        self.device.copy(rows)


class Kept(Arm):
    """penstock's store or cache."""

    kept: KVStore | KVCache
    data_start = DATA_START

    def __init__(self, workload: Workload, directory: Path) -> None:
        super().__init__(workload, directory)
        self._region = directory / "region"
        self._target = _ToDevice(self.device)
        self._fetches: deque[Fetch] = deque()

    def append(self, tensor: KVTensor, rows: NDArray[np.uint8]) -> None:
        self.kept.append(tensor, rows)

    def step(self, tokens: int) -> None:
        tensors = self.workload.tensors
        if not self._fetches:
            self._fetches.extend(self._fetch(tensor, tokens) for tensor in tensors[:_AHEAD])
        for number, tensor in enumerate(tensors):
            self._fetches.popleft().wait()
            following = number + _AHEAD
            if following < len(tensors):
                self._fetches.append(self._fetch(tensors[following], tokens))
            self.append(tensor, next(self.source.rows(tensor, tokens, tokens + 1)))
            if following >= len(tensors):  # the next step's; its rows are all there
                self._fetches.append(self._fetch(tensors[following - len(tensors)], tokens + 1))
        if isinstance(self.kept, KVCache):
            self.kept.step()

    def _fetch(self, tensor: KVTensor, tokens: int) -> Fetch:
        return self.kept.fetch(tensor, self._target, tokens=tokens)

    def compare(self, tokens: int) -> None:
        for tensor in self.workload.tensors:
            comparing = Comparing(self.source, tensor, tokens)
            self.kept.fetch(tensor, comparing, tokens=tokens).wait()
            comparing.check()

    def add(self) -> None:
        if self.device.opened is not None:
            self.kept.pin(self.device.opened)
        for tensor in self.workload.tensors:
            self.kept.add(tensor, self.workload.row_bytes, reserve_tokens=self.workload.tokens)


class Stored(Kept):
    """Every tensor on one path: past the page cache, or through it."""

    def __init__(self, workload: Workload, directory: Path, path: Residence) -> None:
        super().__init__(workload, directory)
        self._closing = ExitStack()
        made = self._closing.enter_context(Region.create(self._region, region_bytes(workload), owner="penstock bench"))
        engine = self._closing.enter_context(create_engine(depth=DEPTH)[0])
        pool = self._closing.enter_context(BufferPool(POOL_BYTES, BUFFER_BYTES))
        store = self._closing.enter_context(KVStore(made, engine, pool))
        self.kept = store
        self.add()
        for tensor in workload.tensors:
            store.move(tensor, path)

    def close(self) -> None:
        self._closing.close()
        self._region.unlink()


class Penstock(Kept):
    """Both paths, as memory allows."""

    def __init__(self, workload: Workload, directory: Path) -> None:
        super().__init__(workload, directory)
        self.kept = KVCache(self._region, size_bytes=region_bytes(workload))
        self.add()

    def prefill(self) -> None:
        super().prefill()
        assert isinstance(self.kept, KVCache)
        self.kept.step()

    def figures(self) -> dict[str, Any]:
        assert isinstance(self.kept, KVCache)
        found = self.kept.statistics()
        pipeline = found.store.pipeline
        return {
            "engine": found.engine,
            "cached_bytes": found.plan.cached_bytes,
            "budget_bytes": found.plan.budget_bytes,
            "moved": found.moved,
            "memory_threads": pipeline.memory_threads,
            "taken_back_bytes": pipeline.taken_back_bytes,
            "chunk_bytes": pipeline.fitted.chunk_bytes,
            "depth": pipeline.fitted.depth,
            "starved_s": pipeline.starved_s,
        }

    def close(self) -> None:
        self.kept.close()


def region_bytes(workload: Workload) -> int:
    """Of the file that an arm of penstock's has, which no other arm's files take more than."""
    return workload.kv_bytes + 2 * workload.layers * 4 * MiB  # blocks that are not full, extents on whole folios


def make_arm(name: str, workload: Workload, directory: Path) -> Arm:
    """An arm by its name, as in the package's docstring."""
    match name:
        case "memmap" | "memmap-128":
            return Memmap(workload, directory)
        case "buffered":
            return Stored(workload, directory, Residence.CACHED)
        case "direct":
            return Stored(workload, directory, Residence.DIRECT)
        case "penstock":
            return Penstock(workload, directory)
    raise ValueError(f"no arm is called {name!r}")


ARMS = ("memmap", "memmap-128", "buffered", "direct", "penstock")

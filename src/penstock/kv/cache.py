"""A KV cache over two paths: a store, and the budget that says which of its tensors stay in memory."""

from __future__ import annotations

import errno
import os
import pathlib
import stat
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Literal, Self, TypeAlias

import numpy as np
from numpy.typing import NDArray

from penstock.device.base import Device
from penstock.errors import RegionError
from penstock.kv.codec import RAW, Codec
from penstock.kv.delivery import Target
from penstock.kv.fetch import Fetch
from penstock.kv.kept import KeptBlocks
from penstock.kv.residency import Budget, Decision, KVTensor, Plan, Ranking, Reading, plan, spread
from penstock.kv.store import KVStore, StoreStatistics
from penstock.linux.memory import MemoryReader, Pressure, read_pressure
from penstock.storage.choose import EngineName, create_engine
from penstock.storage.pool import BufferPool
from penstock.storage.region import Region
from penstock.units import MiB, format_size

OWNER = "penstock kv"

Memory: TypeAlias = int | Literal["auto"]

BUFFER_BYTES = 4 * MiB  # steps from the device took 1.6 s with 4, 1.75 with 2 and 1.6 to 1.8 with 8 (4.5 GB, medians)
_SMALL_BUFFER_BYTES = 2 * MiB  # where there are too few of the others
_FEW = 12
POOL_BYTES = 96 * MiB  # a virtio disk was dry 4 % of the time with 64, and steps took 5 to 10 % longer
_LEAST_POOL_BYTES = 4 * _SMALL_BUFFER_BYTES
DEPTH = 32  # as many as there are buffers: what waits in the engine waits for a thread to wake up, 5 % of a step
_FIRST_BYTES = 256 * MiB  # of a region whose size is not known
_LARGEST_STEP_BYTES = 4096 * MiB  # by which it grows at once
# Of the limit, for whoever else needs memory. With half as much the kernel took back rows of the page cache, where
# folios are larger than what was wanted.
_RESERVE_SHARE = 1 / 128
_PAGE_CACHE_RESERVE_SHARE = 1 / 32
_PRESSURE_EVERY_S = 0.1


@dataclass(frozen=True, slots=True)
class KVStatistics:
    """How a cache is doing.

    Attributes:
        engine: that moves its bytes, and why it is no better one ("" if it is the best).
        fallback: why not a better engine.
        is_direct: the direct path avoids the page cache; the file system can refuse that.
        not_kept: why cached tensors are not in memory of their own, and where they are read; "" if they are there.
        plan: where each tensor is, and why.
        steps: that were planned for.
        moved: tensors that have changed their path since they were new, each time counted.
        store: what was read and written.
    """

    engine: str
    fallback: str
    is_direct: bool
    not_kept: str
    plan: Plan
    steps: int
    moved: int
    store: StoreStatistics


class KVCache:
    """Tensors of rows on a storage device, as many of them in memory as there is.

    A step is what happens between two calls of `step`: each tensor is fetched, and appended to. Only `step` moves
    tensors between the paths; a fetch keeps the path that it began with.

    Args:
        path: a directory, in which there will be a file without a name, gone with the process; a file that does not
            exist yet, removed when it is closed; or a block device, all of which is used.
        memory: bytes that cached tensors may take, or ``auto``: what memory there is, at every step anew. A number is
            kept to as long as there is that much.
        size_bytes: of the region; 0 if that is not known: it grows then.
        engine: ``auto``, ``uring`` or ``threads``.
        pool_bytes: for buffers: all caches of the process share those that the first of them has set aside.
        codec: what blocks pass through.
        ranking: which tensors are worth memory.
        overwrite: a device may be overwritten though it carries something; see `Region.create`.
        destroying: what it carries.

    Raises:
        RegionError: the device carries something, or is in use.
        FileExistsError: the file is there.
        OSError: ENOSPC: the size cannot be had.
        MemoryError: there is none for the buffers.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        memory: Memory = "auto",
        size_bytes: int = 0,
        engine: EngineName = "auto",
        pool_bytes: int = POOL_BYTES,
        codec: Codec = RAW,
        ranking: Ranking = spread,
        overwrite: bool = False,
        destroying: str = "",
    ) -> None:
        if memory != "auto" and memory < 0:
            raise ValueError(f"memory: {memory} bytes; give 0 or more, or 'auto'")
        self._memory = memory
        self._ranking = ranking
        with ExitStack() as undo:
            self._can_grow = not size_bytes
            self._region, remove = _create(pathlib.Path(path), size_bytes, overwrite, destroying)
            undo.callback(remove)
            undo.callback(self._region.close)
            self._reader = MemoryReader()
            undo.callback(self._reader.close)
            pool = undo.enter_context(_shared_pool(self._affordable(pool_bytes)))
            made, self._fallback = create_engine(engine, depth=DEPTH)
            self._engine = undo.enter_context(made)
            self._kept, self._not_kept = _memory_to_keep(self._region, can_grow=self._can_grow)
            self._reserve_share = _RESERVE_SHARE if self._kept else _PAGE_CACHE_RESERVE_SHARE
            self._store = undo.enter_context(KVStore(self._region, self._engine, pool, self._kept, codec=codec))
            self._pressure: tuple[float, Pressure | None] = (time.monotonic(), read_pressure())
            self._budget = Budget(self._reading(), reserve_bytes=0)
            self._plan = plan({}, 0)
            self._steps = self._moved = 0
            self._closing = undo.pop_all()
        _live.add(self)
        weakref.finalize(self, self._closing.close)  # of one that nobody has closed

    def _affordable(self, pool_bytes: int) -> int:
        """For buffers: a quarter of the memory there is at most, better than to be killed for it."""
        state = self._reader.read()
        if state.headroom_bytes < 2 * _LEAST_POOL_BYTES:
            raise MemoryError(
                f"{self._region.path}: a KV cache takes {format_size(2 * _LEAST_POOL_BYTES)} at least, and "
                f"{format_size(state.headroom_bytes)} can be had ({state.source})"
            )
        return max(_LEAST_POOL_BYTES, min(pool_bytes, state.headroom_bytes // 4))

    def pin(self, device: Device) -> None:
        """Have a device copy by itself from all memory that rows come from; it must not be closed before the cache."""
        self._store.pin(device)

    @property
    def plan(self) -> Plan:
        """Where each tensor is, and why."""
        return self._plan

    def add(self, name: KVTensor, row_bytes: int, *, reserve_tokens: int = 0) -> None:
        """A new tensor without rows; see `KVStore.add`. It is on the direct path until the next step."""
        self._with_room(lambda: self._store.add(name, row_bytes, reserve_tokens=reserve_tokens))

    def append(self, name: KVTensor, rows: NDArray[np.uint8]) -> None:
        """Add rows, [rows, row_bytes]; see `KVStore.append`."""
        self._with_room(lambda: self._store.append(name, rows))

    def fetch(self, name: KVTensor, target: Target, *, tokens: int | None = None) -> Fetch:
        """Begin to bring rows to a target; see `KVStore.fetch`."""
        return self._store.fetch(name, target, tokens=tokens)

    def read(self, name: KVTensor, *, tokens: int | None = None) -> NDArray[np.uint8]:
        """All rows, or the first so many: [tokens, row_bytes]; see `KVStore.read`."""
        return self._store.read(name, tokens=tokens)

    def truncate(self, name: KVTensor, tokens: int) -> None:
        """Keep the first rows only; see `KVStore.truncate`."""
        self._store.truncate(name, tokens)

    def remove(self, name: KVTensor) -> None:
        """Forget a tensor; see `KVStore.remove`."""
        self._store.remove(name)

    def tokens(self, name: KVTensor) -> int:
        """Rows of a tensor; KeyError for one that is not there."""
        return self._store.tensors[name].tokens

    def step(self) -> Sequence[Decision]:
        """Decide anew where tensors are; returns what has moved. What is being fetched goes on as it began."""
        self._steps += 1
        budget_bytes = self._budget.update(self._reading())
        sizes = {name: tensor.stored_bytes for name, tensor in self._store.tensors.items()}
        before = self._plan
        self._plan = plan(sizes, budget_bytes, self._ranking, in_part=self._kept is not None)
        moved = []
        for decision in self._plan.decisions.values():
            if decision.path is not self._store.tensors[decision.tensor].path:
                moved.append(decision)
            self._store.move(decision.tensor, decision.path, part_bytes=decision.cached_bytes)
        self._moved += len(self._plan.moved(before))
        return moved

    def _reading(self) -> Reading:
        state = self._reader.read()
        headroom_bytes = max(0, state.headroom_bytes - int(state.limit_bytes * self._reserve_share))
        headroom_bytes = min(headroom_bytes, self._memory) if self._memory != "auto" else self._share(headroom_bytes)
        return Reading(headroom_bytes, self._stalled_share())

    def _share(self, headroom_bytes: int) -> int:
        """What of it is this cache's, beside the others of the process: by their sizes."""
        others = [cache for cache in list(_live) if cache is not self]
        given = sum(cache.plan.cached_bytes for cache in others if cache._memory != "auto")
        own = self._stored_bytes()
        total = own + sum(cache._stored_bytes() for cache in others if cache._memory == "auto")
        return max(0, headroom_bytes - given) * own // total if total > own else max(0, headroom_bytes - given)

    def _stored_bytes(self) -> int:
        return sum(tensor.stored_bytes for tensor in self._store.tensors.values())

    def _stalled_share(self) -> float:
        then_s, before = self._pressure
        now_s = time.monotonic()
        if before is None or now_s - then_s < _PRESSURE_EVERY_S:
            return 0.0
        after = read_pressure()
        self._pressure = now_s, after
        if after is None or after.source != before.source:
            return 0.0
        return max(0.0, (after.full_total_us - before.full_total_us) / 1e6 / (now_s - then_s))

    def _with_room(self, do: Callable[[], object]) -> None:
        """Do something that takes space of the region, and make that larger where it may be."""
        while True:
            try:
                do()
            except OSError as error:
                if error.errno != errno.ENOSPC or not self._can_grow:
                    raise
                size_bytes = self._region.size_bytes
                self._region.grow(size_bytes + min(size_bytes, _LARGEST_STEP_BYTES))
            else:
                return

    def statistics(self) -> KVStatistics:
        """The figures at this moment."""
        return KVStatistics(
            self._engine.name,
            self._fallback,
            self._region.is_direct,
            self._not_kept or self._not_kept_any_more(),
            self._plan,
            self._steps,
            self._moved,
            self._store.statistics(),
        )

    def _not_kept_any_more(self) -> str:
        if self._kept is None or not self._kept.refused:
            return ""
        return f"{self._kept.refused}: what is not there yet is read from the device each time"

    def close(self) -> None:
        """Give everything back; what it holds is lost. A second time does nothing."""
        _live.discard(self)
        self._closing.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


_live: weakref.WeakSet[KVCache] = weakref.WeakSet()
_pool_lock = threading.Lock()
_pool: tuple[BufferPool, int] | None = None  # with the number of its users


@contextmanager
def _shared_pool(size_bytes: int) -> Iterator[BufferPool]:
    """The buffers of all caches of this process."""
    global _pool
    with _pool_lock:
        buffer_bytes = BUFFER_BYTES if size_bytes >= _FEW * BUFFER_BYTES else _SMALL_BUFFER_BYTES
        pool, users = _pool or (BufferPool(size_bytes, buffer_bytes), 0)
        _pool = pool, users + 1
    try:
        yield pool
    finally:
        with _pool_lock:
            assert _pool is not None
            _pool = (pool, _pool[1] - 1) if _pool[1] > 1 else None
            if _pool is None:
                pool.close()


def _memory_to_keep(region: Region, *, can_grow: bool) -> tuple[KeptBlocks | None, str]:
    """For the blocks of cached tensors, and why there is none, if so."""
    size_bytes = region.header.size_bytes
    if can_grow and stat.S_ISREG(os.fstat(region.fd).st_mode):
        found = os.fstatvfs(region.fd)
        size_bytes = max(size_bytes, found.f_blocks * found.f_frsize)  # addresses, not memory
    try:
        return KeptBlocks(size_bytes), ""
    except OSError as error:
        return None, f"there is no memory that the kernel could take back ({error.strerror}): the page cache serves"


def _create(path: pathlib.Path, size_bytes: int, overwrite: bool, destroying: str) -> tuple[Region, Callable[[], None]]:
    """A region, and what removes it."""
    if path.exists() and stat.S_ISBLK(path.stat().st_mode):
        try:
            region = Region.open(path, owner=OWNER)  # of one that has ended: nothing of it can be used again
        except RegionError:
            region = Region.create(path, size_bytes, owner=OWNER, overwrite=overwrite, destroying=destroying)
        if region.size_bytes < size_bytes:
            region.close()
            carried = f"a region of {OWNER}"
            region = Region.create(path, size_bytes, owner=OWNER, overwrite=True, destroying=carried)
        return region, lambda: None
    wanted_bytes = size_bytes or _FIRST_BYTES
    if path.is_dir():
        return Region.create_unnamed(path, wanted_bytes, owner=OWNER), lambda: None
    if path.exists():
        raise FileExistsError(
            errno.EEXIST,
            f"is there already; remove it, or give a directory ({format_size(path.stat().st_size)})",
            str(path),
        )
    return Region.create(path, wanted_bytes, owner=OWNER), lambda: path.unlink(missing_ok=True)

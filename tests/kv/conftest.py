"""Regions, engines and stores for the tests of KV caches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from penstock.kv.kept import KeptBlocks
from penstock.kv.store import KVStore
from penstock.storage.base import Engine
from penstock.storage.choose import create_engine
from penstock.storage.pool import BufferPool
from penstock.storage.region import Region
from penstock.units import KiB, MiB

MakeStore = Callable[..., KVStore]


@pytest.fixture(params=["threads", "uring"])
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    made, fallback = create_engine("auto" if request.param == "uring" else "threads")
    with made:
        if fallback:
            pytest.skip(fallback)
        yield made


@pytest.fixture
def make_store(tmp_path: Path) -> Iterator[MakeStore]:
    """Makes stores with buffers of 256 KiB on regions of their own."""
    with ExitStack() as stack:

        def make(
            engine: Engine, size_bytes: int = 64 * MiB, pool_bytes: int = 4 * MiB, *, is_kept: bool = False
        ) -> KVStore:
            path = tmp_path / f"region-{len(list(tmp_path.iterdir()))}"
            stack.callback(path.unlink, missing_ok=True)  # one test may make hundreds
            region = stack.enter_context(Region.create(path, size_bytes, owner="penstock kv"))
            pool = stack.enter_context(BufferPool(pool_bytes, 256 * KiB))
            kept = KeptBlocks(region.header.size_bytes) if is_kept else None
            return stack.enter_context(KVStore(region, engine, pool, kept, block_bytes=64 * KiB))

        yield make

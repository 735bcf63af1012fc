"""penstock.pagecache.session: when there is nothing to hurry for. What it does for programs: tests/cli/test_run.py."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.contents import contents

from penstock.linux.pagecache import FileResidency
from penstock.pagecache.base import Range
from penstock.pagecache.files import ModelFiles
from penstock.pagecache.fingerprints import FingerprintCache
from penstock.pagecache.policies import create_policy
from penstock.pagecache.runtime import CacheMode
from penstock.pagecache.session import Session, SessionOptions
from penstock.pagecache.template import FileIdentity, Template, TemplateStore
from penstock.units import KiB, MiB

SIZE_BYTES = 8 * MiB


@pytest.fixture
def session(tmp_path: Path) -> Iterator[Session]:
    """With a template for a model that is cached."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "model.safetensors").write_bytes(contents(SIZE_BYTES))
    (file,) = ModelFiles([model])
    identity = FileIdentity(file.name, SIZE_BYTES, FingerprintCache(tmp_path / "fingerprints").get(file))
    group = (Range(file.name, 0, SIZE_BYTES),)
    TemplateStore(tmp_path / "templates").save(
        Template("s", (identity,), (group,), (str(model),), "2026-01-01T00:00:00+00:00")
    )
    options = SessionOptions(
        command=("serve", str(model)),
        service="s",
        models=(model,),
        models_are_all=False,
        memory_bytes=None,
        cache=CacheMode.AUTO,
        templates=tmp_path / "templates",
        fingerprints=tmp_path / "fingerprints",
        sampling=False,
    )
    session = Session(options, create_policy("maio"), os.getpid(), None, {}, 0.0)
    assert session.mode == "replay"
    yield session
    session._headroom.close()
    session._ledger.close()


@pytest.mark.parametrize(
    ("missing_bytes", "exact", "expected"),
    [(0, True, True), (32 * KiB, True, True), (36 * KiB, True, False), (SIZE_BYTES, True, False), (0, False, False)],
)
def test_nothing_is_urgent_where_the_model_is_cached_or_as_good_as(
    session: Session, monkeypatch: pytest.MonkeyPatch, missing_bytes: int, exact: bool, expected: bool
) -> None:
    (file,) = session.files
    monkeypatch.setattr(FileResidency, "resident_bytes", lambda _, start, stop: stop - start - missing_bytes)
    monkeypatch.setattr(FileResidency, "exact", property(lambda _: exact), raising=False)
    assert session._nothing_is_urgent() == expected
    record = session._ledger.record(file)
    assert record.present.covers(0, SIZE_BYTES) == expected

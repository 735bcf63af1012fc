"""`penstock run` on a kernel that lacks what it would rather use: it records, replays, and says what it uses then."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from tests.contents import contents
from tests.observed import run_observed, wait_until_cached
from tests.tracing import open_tracefs

from penstock.linux import pagemap
from penstock.linux.pagecache import drop, probe
from penstock.linux.tracefs import ACCESS_EVENTS
from penstock.pagecache.template import TemplateStore
from penstock.units import MiB

pytestmark = pytest.mark.rig

PENSTOCK = str(Path(sys.executable).with_name("penstock"))
SIZE_BYTES = 24 * MiB

# Wait for a line, read a file by each of the means that programs use, and serve until the input ends.
READERS = {
    "mmap": """
import mmap, sys, zlib
sys.stdin.readline()
with open(sys.argv[1], "rb") as file:
    view = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
print(zlib.crc32(view), flush=True)
sys.stdin.read()
""",
    "read": """
import sys, zlib
sys.stdin.readline()
total = 0
file = open(sys.argv[1], "rb", buffering=0)
while piece := file.read(1 << 20):
    total = zlib.crc32(piece, total)
print(total, flush=True)
sys.stdin.read()
""",
    "pread": """
import os, sys, zlib
total = at = 0
fd = os.open(sys.argv[1], os.O_RDONLY)  # what is read before the first look at an open file is not counted
sys.stdin.readline()
while piece := os.pread(fd, 1 << 20, at):
    total = zlib.crc32(piece, total)
    at += len(piece)
print(total, flush=True)
sys.stdin.read()
""",
}


@pytest.fixture(autouse=True)
def lacking() -> Iterator[None]:
    tracefs = open_tracefs()
    there = tracefs.available_events(ACCESS_EVENTS)
    if there:
        tracefs.close()
        pytest.skip(f"this kernel has the tracepoints of reads ({', '.join(there)}): nothing is lacking")
    before = tracefs.instances()
    yield
    assert tracefs.instances() == before
    tracefs.close()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    path.write_bytes(contents(SIZE_BYTES))
    return path


def make_cold(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
        drop(file.fileno())


@pytest.mark.parametrize("means", sorted(READERS))
def test_it_records_and_replays(tmp_path: Path, model: Path, means: str) -> None:
    store = TemplateStore(tmp_path / "templates")
    plain = [sys.executable, "-S", "-c", READERS[means], str(model)]
    expected = subprocess.run(plain, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True).stdout
    reports = []
    for mode in ("record", "replay"):
        make_cold(model)
        report = tmp_path / f"{mode}.json"
        options = ["--service", means, "--templates", str(tmp_path / "templates"), "--report", str(report)]
        line, errors = run_observed(
            [PENSTOCK, "run", *options, "--", *plain], report,
            ready=partial(wait_until_cached, [model]) if mode == "replay" else None,  # what is not read yet
            bytes_accessed=SIZE_BYTES,
        )  # fmt: skip
        assert line == expected
        reports.append(json.loads(report.read_text()))
        assert (reports[-1]["mode"], reports[-1]["observer"]) == (mode, "process")
        assert "observing through /proc, because tracefs is not usable" in errors
        fallback, *others = reports[-1]["warnings"]
        assert all(name in fallback for name in ("lacks page-cache tracepoints", *ACCESS_EVENTS))
        assert others == []
        if not probe(tmp_path).cachestat:
            assert reports[-1]["residency_method"] == "mincore"
    template = store.load(means)
    assert template is not None
    assert [(part.name, part.start, part.stop) for group in template.groups for part in group] == [
        (model.name, 0, SIZE_BYTES)
    ]
    replayed = reports[1]
    assert replayed["bytes_prefetched"] == SIZE_BYTES
    assert replayed["bytes_accessed"] == SIZE_BYTES
    assert replayed["model_bytes"] == SIZE_BYTES


def test_tracefs_alone_is_refused(tmp_path: Path) -> None:
    done = subprocess.run(
        [PENSTOCK, "run", "--observer", "tracefs", "--", "touch", str(tmp_path / "ran")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 125
    assert "lacks page-cache tracepoints: mm_filemap_fault" in done.stderr
    assert not (tmp_path / "ran").exists()


def test_doctor_names_the_fallbacks(tmp_path: Path) -> None:
    done = subprocess.run([PENSTOCK, "doctor", "--json", str(tmp_path)], capture_output=True, text=True, check=True)
    rows = {row["name"]: row for row in json.loads(done.stdout)}
    assert rows["observer"]["state"] == "degraded"
    assert rows["observer"]["detail"] == f"not by tracefs (tracepoint {ACCESS_EVENTS[0]}: not in this kernel)"
    assert rows["observer"]["instead"].startswith("/proc: ")
    for name in ACCESS_EVENTS:
        assert rows[f"tracepoint {name}"]["state"] == "missing"
        assert rows[f"tracepoint {name}"]["instead"] == "programs are observed through /proc"
    if not probe(tmp_path).cachestat:
        assert (rows["cachestat"]["state"], rows["cachestat"]["instead"]) == ("degraded", "mincore, one byte a page")
    if pagemap.best_method() != "pagemap_scan":
        assert rows["pagemap"]["instead"] == "every page's word of /proc/PID/pagemap is read"

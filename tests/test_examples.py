"""The examples do what they say."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from penstock.linux.pagecache import FileResidency, drop
from penstock.pagecache.base import Access, Context, Evict, ModelFile, Prefetch
from penstock.report.report import Report
from penstock.testing.checkpoint import generate_checkpoint
from penstock.testing.shapes import PRESETS, scaled
from penstock.units import MiB

EXAMPLES = Path(__file__).parent.parent / "examples"
MAIN = [sys.executable, "-c", "from penstock.cli.entry import main; main()", "run"]

# Waits until its first file is in the page cache, where only a policy can have put it, and then reads all.
READER = """
import sys, time, zlib
from pathlib import Path
from penstock.linux.pagecache import FileResidency

files = sorted(Path(sys.argv[1]).glob("*.safetensors"))
if sys.argv[2] == "wait":
    with files[0].open("rb") as file:
        residency, size = FileResidency(file.fileno()), files[0].stat().st_size
        while not residency.is_resident(0, size):
            time.sleep(0.01)
print(zlib.crc32(b"".join(path.read_bytes() for path in files)))
"""


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_example_is_tested() -> None:
    assert sorted(path.name for path in EXAMPLES.glob("*.py")) == ["my_policy.py"]
    assert len((EXAMPLES / "my_policy.py").read_text().splitlines()) < 60


def test_my_policy_by_plain_values() -> None:
    first, second, third = (ModelFile(f"{n}.safetensors", f"/m/{n}", 100, 1, n) for n in (1, 2, 3))

    def access(file: ModelFile, start: int) -> Access:
        return Access(file, start, start + 10, worker=0, time_s=1.0, miss=True)

    policy = load("my_policy").NextShard()
    policy.start(Context(files=(second, first)))
    assert policy.prefetch(None) == [Prefetch(first, 0, 100)]
    assert policy.prefetch(access(first, 0)) == [Prefetch(first, 0, 100, 0), Prefetch(second, 0, 100, 0)]
    assert policy.prefetch(access(first, 20)) == ()
    assert policy.evict(access(first, 20)) == []
    assert policy.evict(access(first, 60)) == [Evict(first, 0, 50)]
    assert policy.prefetch(access(third, 10)) == [Prefetch(third, 10, 100, 0)]  # nobody had named it
    assert policy.prefetch(access(second, 0)) == [Prefetch(second, 0, 100, 0), Prefetch(third, 0, 100, 0)]
    assert policy.evict(None) == [Evict(first, 0, 100), Evict(third, 0, 100)]
    assert policy.evict(None) == []


def test_my_policy_under_penstock_run(tmp_path: Path) -> None:
    model = tmp_path / "model"
    files = generate_checkpoint(model, scaled(PRESETS["tiny-llama"], 24 * MiB), shard_bytes=8 * MiB)
    assert len(files) > 2
    for path in files:
        with path.open("rb") as file:
            drop(file.fileno())
            if FileResidency(file.fileno()).resident_bytes(0, path.stat().st_size):
                pytest.skip(f"needs a directory on a disk; {tmp_path} keeps its files in memory")
    reader = [sys.executable, "-c", READER, str(model)]
    report = tmp_path / "report.json"
    options = ["--policy", "my_policy:NextShard", "--cache", "burn", "--observer", "process", "--report", str(report)]
    environment = {
        **os.environ,
        "PENSTOCK_TEMPLATES": str(tmp_path / "templates"),
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "PYTHONPATH": str(Path(__file__).parent.parent / "src"),
    }
    under_policy = subprocess.run(
        [*MAIN, *options, "--", *reader, "wait"], cwd=EXAMPLES, env=environment, capture_output=True, text=True
    )
    assert under_policy.returncode == 0, under_policy.stderr
    natively = subprocess.run([*reader, "go"], env=environment, capture_output=True, text=True, check=True)
    assert under_policy.stdout == natively.stdout
    found = Report.load(report)
    assert found.policy == "my_policy:NextShard"
    assert found.bytes_prefetched >= files[0].stat().st_size
    assert not [warning for warning in found.warnings if "policy" in warning]

"""The benchmark runs: every client and every arm on a tiny model; nothing is timed here."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from bench.errors import BenchError
from bench.memory import Ballast, resident_share
from bench.page_cache.arms import ARMS, CLIENTS, Key, Setting
from bench.page_cache.results import Results
from bench.page_cache.run import Run
from bench.page_cache.suites import SUITES, Bar, quick
from bench.readahead import block_device

from penstock.units import GiB, MiB

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """A directory on a disk."""
    try:
        block_device(tmp_path)
    except BenchError as error:
        pytest.skip(f"needs temporary files on a block device: {error}")
    return tmp_path


def _start(disk: Path, *options: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "bench.page_cache", "--dir", str(disk / "bench"), *options],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.slow
def test_quick_runs_every_client_and_arm(disk: Path) -> None:
    process = _start(disk, "--quick", "--json", str(disk / "out.json"))
    output, _ = process.communicate(timeout=170)
    assert process.returncode == 0, output
    found = json.loads((disk / "out.json").read_text())
    assert found["failures"] == []
    done = {(run["key"]["setting"]["client"], run["key"]["arm"]) for run in found["runs"]}
    skipped = {line.partition(",")[0] for line in found["skipped"] if "memory ample" in line and ", root" in line}
    assert {client for client, _ in done} | skipped == set(CLIENTS), output
    assert {arm for _, arm in done} == set(ARMS), output
    if os.geteuid() == 0:
        assert any(run["limit"] is not None for run in found["runs"]), output
        assert any(run["key"]["setting"]["user"] == "user" for run in found["runs"]), output
    left = {path.name for path in (disk / "bench").iterdir()}
    assert left == {"tiny-llama-50331648"}


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: the read-ahead and a cgroup are to be put back")
def test_terminated_benchmark_puts_everything_back(disk: Path) -> None:
    read_ahead = block_device(disk) / "queue" / "read_ahead_kb"
    before = read_ahead.read_text()
    other = "64" if before.strip() != "64" else "128"
    process = _start(
        disk, "--size", "48MiB", "--preset", "tiny-llama", "--no-ballast", "--rounds", "1000",
        "--clients", "mmap", "--arms", "native", "--memory", "45%", "--read-ahead", other,
    )  # fmt: skip
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("round"):
            break
    changed = read_ahead.read_text()
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert changed.strip() == other
    assert read_ahead.read_text() == before
    assert not list(Path("/sys/fs/cgroup").glob(f"**/penstock-bench-{process.pid}"))
    assert [path.name for path in (disk / "bench").iterdir()] == ["tiny-llama-50331648"]


def test_wrong_bytes_are_found(disk: Path) -> None:
    """A byte is changed that no sample looks at, and one that the expectation was taken of."""
    from bench.model import expected, generate

    model = generate(disk, preset="tiny-llama", size_bytes=8 * MiB, gguf=False)
    good = expected(model, "mmap")
    path = model.files("mmap")[0]
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2 | 1)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
        file.flush()
        os.fsync(file.fileno())
    os.utime(path, ns=(time.time_ns(), time.time_ns() + 1))
    changed = expected(model, "mmap")
    assert changed.bytes == good.bytes
    assert sum(good.crcs[name] != changed.crcs[name] for name in good.crcs) == 1
    done = subprocess.run(
        [sys.executable, "-m", "bench.page_cache.clients.mmap", str(model.directory), "--verify"],
        cwd=REPOSITORY, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert json.loads(done.stdout)["pieces"] == changed.crcs


@pytest.mark.parametrize("client", ["mmap", "read", "tp2"])
def test_clients_report_what_an_independent_reader_finds(disk: Path, client: str) -> None:
    from bench.model import expected, generate

    model = generate(disk, preset="tiny-llama", size_bytes=8 * MiB, gguf=False)
    command = [sys.executable, "-m", f"bench.page_cache.clients.{client}", str(model.path(client))]
    wanted = expected(model, client)
    for options in (["--verify"], ["--order", "reverse"]):
        done = subprocess.run([*command, *options], cwd=REPOSITORY, capture_output=True, text=True, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
        assert (found["bytes"], found["samples"]) == (wanted.bytes, wanted.samples)
        assert found["pieces"] == (wanted.crcs if "--verify" in options else {})


def test_a_model_is_made_cold_and_resident(disk: Path) -> None:
    files = [disk / "one", disk / "two"]
    for path in files:
        with path.open("wb") as file:
            file.write(os.urandom(9 * MiB + 1))
            file.flush()
            os.fsync(file.fileno())
    with Ballast(None) as memory:
        memory.make_resident(files)
        assert resident_share(files) > 0.99
        memory.make_cold(files)
        assert resident_share(files) < 0.01


def test_results_compare_within_rounds() -> None:
    setting = Setting("mmap")
    native, maio, resident = (Key(setting, arm) for arm in ("native", "maio", "resident"))

    def run(key: Key, number: int, seconds: float) -> Run:
        return Run(key=key, round=number, seconds=seconds, bytes=GiB, penstock_peak_bytes=50 * MiB)

    runs = [
        *(run(native, number, seconds) for number, seconds in enumerate((4.0, 8.0, 4.0), start=1)),
        *(run(maio, number, seconds) for number, seconds in enumerate((2.0, 2.0, 3.0), start=1)),
        *(run(resident, number, 0.5) for number in (1, 2, 3)),
    ]
    results = Results(runs, [GiB / 1.6, GiB / 1.6], failed=set())
    assert results.ratio(maio, native) == 0.5  # of 0.5, 0.25 and 0.75
    assert results.limit_s(setting) == pytest.approx(1.6)  # the disk, not the resident model
    assert results.verdict(Bar(maio, 0.5, native)).passed
    assert not results.verdict(Bar(maio, 0.49, native)).passed
    assert results.verdict(Bar(maio, 1.3)).value == pytest.approx(2.0 / 1.6)
    assert results.verdict(Bar(maio, 80 * MiB, kind="memory")).passed
    missing = results.verdict(Bar(Key(setting, "eager"), 1.0, native))
    assert missing.value is None
    assert not missing.passed
    assert not Results(runs, [], failed={maio}).verdict(Bar(maio, 1.0, native)).passed


@pytest.mark.parametrize("suite", [*SUITES.values(), quick()], ids=lambda suite: suite.name)
def test_bars_are_about_arms_that_run(suite) -> None:
    keys = {Key(setting, arm) for setting, arms in suite.arms.items() for arm in arms}
    for bar in suite.bars:
        assert bar.subject in keys
        if bar.against is not None:
            assert bar.against in keys
        elif bar.kind == "ratio":
            assert Key(bar.subject.setting, "resident") in keys

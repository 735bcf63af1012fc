"""What cgroup v2 says of memory, against the real one; and a program under penstock that keeps within it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tests.contents import contents
from tests.observed import run_observed

from penstock.linux.memory import MemoryReader, read_memory, read_pressure
from penstock.linux.pagecache import FileResidency, drop
from penstock.units import MiB

pytestmark = pytest.mark.rig

PENSTOCK = str(Path(sys.executable).with_name("penstock"))
DEADLINE_S = 120.0

# Obeys one line at a time: "hold N" takes N bytes of memory, "read FILE" reads a file. Answers each with a line.
CHILD = """
import sys
held = []
for line in sys.stdin:
    verb, what = line.split()
    if verb == "hold":
        held.append(bytearray(b"x" * 4096) * (int(what) // 4096))
    else:
        with open(what, "rb", buffering=0) as file:
            while file.read(1 << 20):
                pass
    print("done", flush=True)
"""
READER = """
import mmap, sys, zlib
sys.stdin.readline()
total, views = 0, []
for path in sys.argv[1:]:
    with open(path, "rb") as file:
        views.append(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ))
    for start in range(0, len(views[-1]), 1 << 20):
        total = zlib.crc32(views[-1][start : start + (1 << 20)], total)
print(total, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def make_v2_cgroup(make_memory_cgroup: Callable[[int], Path]) -> Callable[[int], Path]:
    def make(limit_bytes: int) -> Path:
        path = make_memory_cgroup(limit_bytes)
        if not (path / "memory.max").exists():
            pytest.skip("needs the memory controller in cgroup v2")
        return path

    return make


class Child:
    """A process in a cgroup, and what it is told."""

    def __init__(self, popen: subprocess.Popen[str]) -> None:
        self._popen = popen
        self.pid = popen.pid

    def say(self, *words: str | Path | int) -> None:
        assert self._popen.stdin is not None
        self._popen.stdin.write(" ".join(map(str, words)) + "\n")
        self._popen.stdin.flush()

    def tell(self, *words: str | Path | int) -> None:
        """Have it do something, and wait until it has."""
        self.say(*words)
        assert self._popen.stdout is not None
        assert self._popen.stdout.readline() == "done\n"


@contextmanager
def child_in(cgroup: Path) -> Iterator[Child]:
    command = [sys.executable, "-S", "-c", CHILD]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as popen:
        try:
            (cgroup / "cgroup.procs").write_text(str(popen.pid))
            yield Child(popen)
        finally:
            popen.kill()


def write_cold(path: Path, size_bytes: int) -> None:
    with path.open("wb") as file:
        file.write(contents(size_bytes))
        file.flush()
        os.fsync(file.fileno())
        drop(file.fileno())


class TestMemory:
    def test_max(self, make_v2_cgroup: Callable[[int], Path]) -> None:
        cgroup = make_v2_cgroup(256 * MiB)
        with child_in(cgroup) as child:
            child.tell("hold", 32 * MiB)
            state = read_memory(child.pid)
            assert (state.limit_bytes, state.source) == (256 * MiB, f"cgroup v2 /{cgroup.name}")
            # The kernel's sums lag by some pages for each CPU; the interpreter was charged before it came here.
            assert abs(state.headroom_bytes - (256 - 32) * MiB) < 8 * MiB
            assert abs(state.anon_bytes - 32 * MiB) < 8 * MiB

    def test_high_is_a_limit_and_may_change(self, make_v2_cgroup: Callable[[int], Path]) -> None:
        cgroup = make_v2_cgroup(256 * MiB)
        with child_in(cgroup) as child, MemoryReader(child.pid) as reader:
            for limit_bytes in (128 * MiB, 64 * MiB):
                (cgroup / "memory.high").write_text(str(limit_bytes))
                assert reader.read().limit_bytes == limit_bytes
            (cgroup / "memory.high").write_text("max")
            assert reader.read().limit_bytes == 256 * MiB

    def test_an_ancestors_limit(self, make_v2_cgroup: Callable[[int], Path]) -> None:
        cgroup = make_v2_cgroup(128 * MiB)
        (cgroup / "cgroup.subtree_control").write_text("+memory")
        inner = cgroup / "inner"
        inner.mkdir()
        try:
            with child_in(inner) as child:
                state = read_memory(child.pid)
                assert (state.limit_bytes, state.source) == (128 * MiB, f"cgroup v2 /{cgroup.name}")
                (inner / "memory.max").write_text(str(64 * MiB))
                state = read_memory(child.pid)
                assert (state.limit_bytes, state.source) == (64 * MiB, f"cgroup v2 /{cgroup.name}/inner")
        finally:
            inner.rmdir()

    def test_what_was_read_can_go_again(self, make_v2_cgroup: Callable[[int], Path], tmp_path: Path) -> None:
        write_cold(tmp_path / "file", 48 * MiB)
        with child_in(make_v2_cgroup(128 * MiB)) as child, MemoryReader(child.pid) as reader:
            before = reader.read()
            child.tell("read", tmp_path / "file")
            after = reader.read()
        assert after.usage_bytes - before.usage_bytes > 40 * MiB
        assert after.file_bytes - before.file_bytes > 40 * MiB
        assert after.headroom_bytes > before.headroom_bytes - 8 * MiB

    def test_pages_that_another_has_read_are_not_charged(
        self, make_v2_cgroup: Callable[[int], Path], tmp_path: Path
    ) -> None:
        write_cold(tmp_path / "file", 48 * MiB)
        (tmp_path / "file").read_bytes()
        with child_in(make_v2_cgroup(128 * MiB)) as child, MemoryReader(child.pid) as reader:
            before = reader.read()
            child.tell("read", tmp_path / "file")
            assert reader.read().usage_bytes - before.usage_bytes < 8 * MiB


class TestPressure:
    @pytest.fixture(autouse=True)
    def psi(self) -> None:
        try:
            Path("/proc/pressure/memory").read_text()
        except OSError as error:
            pytest.skip(f"this kernel has no pressure stall information: {error.strerror}")

    @pytest.mark.parametrize("resource", ["memory", "io"])
    def test_it_is_that_of_the_processs_cgroup(
        self, make_v2_cgroup: Callable[[int], Path], resource: str
    ) -> None:  # fmt: skip
        assert resource in ("memory", "io")
        cgroup = make_v2_cgroup(256 * MiB)
        with child_in(cgroup) as child:
            pressure = read_pressure(resource, child.pid)  # type: ignore[arg-type]
        assert pressure is not None
        assert pressure.source == f"cgroup v2 /{cgroup.name}"

    def test_a_process_that_is_throttled_waits_for_memory(self, make_v2_cgroup: Callable[[int], Path]) -> None:
        cgroup, idle = make_v2_cgroup(256 * MiB), make_v2_cgroup(256 * MiB)
        (cgroup / "memory.high").write_text(str(16 * MiB))
        with child_in(cgroup) as child, child_in(idle) as other:
            child.say("hold", 64 * MiB)
            deadline = time.monotonic() + DEADLINE_S
            while (pressure := read_pressure("memory", child.pid)) is None or not pressure.some_total_us:
                assert time.monotonic() < deadline, "nobody waits"
                time.sleep(0.05)
            assert pressure.some_total_us >= pressure.full_total_us
            calm = read_pressure("memory", other.pid)
        assert calm is not None
        assert calm.some_total_us == 0


class TestRun:
    """A model that is larger than what the cgroup has room for."""

    SIZE_BYTES = 48 * MiB
    LIMIT_BYTES = 112 * MiB  # two interpreters take half of it

    def test_it_stays_inside(
        self, make_v2_cgroup: Callable[[int], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        paths = [tmp_path / f"model-{number}.safetensors" for number in range(2)]
        for path in paths:
            write_cold(path, self.SIZE_BYTES)
        plain = [sys.executable, "-c", READER, *map(str, paths)]
        expected = subprocess.run(
            plain, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True
        ).stdout  # fmt: skip
        for mode in ("record", "replay"):
            for path in paths:
                with path.open("rb") as file:
                    drop(file.fileno())
                    assert FileResidency(file.fileno()).resident_bytes(0, self.SIZE_BYTES) == 0
            cgroup = make_v2_cgroup(self.LIMIT_BYTES)
            wanted = {"bytes_accessed": self.SIZE_BYTES + 1, "bytes_evicted": int(mode == "replay")}
            report = self.run(cgroup, plain, expected, tmp_path / "report.json", wanted)
            assert report["mode"] == mode
            assert report["memory_source"] == f"cgroup v2 /{cgroup.name}"
            model_bytes = int(str(report["model_bytes"]))
            if report["observer"] == "process" and mode == "replay":
                # What the kernel reclaims between two looks is seen by nobody, and is not in the template.
                assert self.SIZE_BYTES < model_bytes <= len(paths) * self.SIZE_BYTES
            else:
                assert model_bytes == len(paths) * self.SIZE_BYTES
            assert 0 < int(str(report["budget_bytes"])) < model_bytes
            events = dict(re.findall(r"^(\w+) (\d+)$", (cgroup / "memory.events").read_text(), re.MULTILINE))
            assert (events["oom"], events["oom_kill"]) == ("0", "0")
        assert int(str(report["bytes_evicted"])) > 0  # behind the reader, before the kernel had to

    def run(
        self, cgroup: Path, command: list[str], expected: str, report: Path, wanted: dict[str, int]
    ) -> dict[str, object]:
        tasks = cgroup / "cgroup.procs"
        line, _ = run_observed(
            [PENSTOCK, "run", "--service", "small", "--report", report, "--", *command],
            report, preexec_fn=lambda: tasks.write_text(str(os.getpid())), **wanted,
        )  # fmt: skip
        assert line == expected
        body: dict[str, object] = json.loads(report.read_text())
        return body

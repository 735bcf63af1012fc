"""The memory limit of a run: a cgroup of its own, version 1 or 2."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from bench.errors import BenchError


@dataclass(frozen=True, slots=True)
class LimitUse:
    """What the cgroup counted.

    Attributes:
        peak_bytes: the highest charge; None where the kernel does not say (version 2 before Linux 5.19).
        hits: how often the limit made the kernel reclaim.
        oom_kills: processes killed for memory.
    """

    limit_bytes: int
    peak_bytes: int | None
    hits: int
    oom_kills: int


class MemoryLimit:
    """A cgroup with a limit on memory, to be entered by a child before it executes its program."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        parent, self._version = _hierarchy()
        self.path = parent / f"penstock-bench-{os.getpid()}"
        self.path.mkdir()
        self.limit_path = self.path / ("memory.limit_in_bytes" if self._version == 1 else "memory.max")
        self.limit_path.write_text(str(limit_bytes))
        self._procs = os.open(self.path / "cgroup.procs", os.O_WRONLY | os.O_CLOEXEC)

    def enter(self) -> None:
        """Move this process inside; for the child, between fork and exec."""
        os.write(self._procs, b"0")

    def use(self) -> LimitUse:
        """What it counted so far."""
        if self._version == 1:
            return LimitUse(
                self.limit_bytes,
                int((self.path / "memory.max_usage_in_bytes").read_text()),
                int((self.path / "memory.failcnt").read_text()),
                _counter(self.path / "memory.oom_control", "oom_kill"),
            )
        peak = self.path / "memory.peak"
        return LimitUse(
            self.limit_bytes,
            int(peak.read_text()) if peak.exists() else None,
            _counter(self.path / "memory.events", "max"),
            _counter(self.path / "memory.events", "oom_kill"),
        )

    def remove(self) -> None:
        """Remove the cgroup, once it is empty; what is still inside after 5 s is killed."""
        os.close(self._procs)
        deadline = time.monotonic() + 5
        while True:
            overdue = time.monotonic() > deadline
            for pid in (self.path / "cgroup.procs").read_text().split() if overdue else ():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            try:
                self.path.rmdir()
            except OSError:
                if time.monotonic() > deadline + 5:
                    raise
                time.sleep(0.02)
            else:
                return


def may_limit() -> str | None:
    """Why no cgroup with a memory limit can be made here; None if it can."""
    if os.geteuid() != 0:
        return "a cgroup with a memory limit takes root"
    try:
        _hierarchy()
    except BenchError as error:
        return str(error)
    return None


def _hierarchy() -> tuple[Path, int]:
    """Where cgroups with the memory controller are made, and their version."""
    for line in Path("/proc/mounts").read_text().splitlines():
        _, mount, kind, options, *_ = line.split()
        if kind == "cgroup" and "memory" in options.split(","):
            return Path(mount), 1
        if kind == "cgroup2":
            controllers = Path(mount) / "cgroup.controllers"
            if controllers.exists() and "memory" in controllers.read_text().split():
                subtree = Path(mount) / "cgroup.subtree_control"
                if "memory" not in subtree.read_text().split():
                    subtree.write_text("+memory")
                return Path(mount), 2
    raise BenchError("no cgroup hierarchy has the memory controller")


def _counter(path: Path, name: str) -> int:
    for line in path.read_text().splitlines():
        key, value = line.split()
        if key == name:
            return int(value)
    return 0

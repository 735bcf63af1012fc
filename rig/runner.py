"""Runs jobs and power cuts, each in a machine of its own, and says what they came to."""

from __future__ import annotations

import re
import shlex
import shutil
import threading
import time
import xml.etree.ElementTree as ET
from dataclasses import dataclass
from pathlib import Path

from penstock.units import GiB, format_size
from rig.cuts import CutResult, cut_power
from rig.errors import RigError
from rig.image import make_disk, make_image
from rig.machine import Boot, Machine
from rig.plan import Age, Job, jobs, tests_of
from rig.provision import Kernel, provide_kernels, provide_tools

_DISK_BYTES = 4 * GiB  # sparse
# Under emulation what takes a second elsewhere takes ten.
_DEADLINES = ("-o", "timeout=400", "-o", "faulthandler_timeout=390")
_PYTEST = (
    "python", "-m", "pytest", "-p", "no:cacheprovider", "-o", "tmp_path_retention_policy=failed", *_DEADLINES,
    "-o", "junit_family=xunit1",  # which has properties of tests
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Result:
    """What a job came to.

    Attributes:
        trouble: why it counts as failed, where no test says so.
        notes: figures.
    """

    job: Job
    kernel: str
    passed: int = 0
    failed: int = 0
    skipped: int = 0
    seconds: float = 0.0
    trouble: str = ""
    notes: tuple[str, ...] = ()

    @property
    def is_good(self) -> bool:
        """Something was run, and nothing failed."""
        return not self.trouble and not self.failed and self.passed > 0


class Rig:
    """Boots machines.

    Args:
        directory: for images, drives and what comes back.

    Raises:
        RigError: this machine lacks something that cannot be installed.
    """

    def __init__(self, directory: Path) -> None:
        provide_tools()
        old, new = provide_kernels()
        self.kernels: dict[Age, Kernel] = {"old": old, "new": new}
        self._directory = directory
        self._image = directory / "image"
        self._over = tuple(make_image(self._image, tests_of(jobs())))
        self._lock = threading.Lock()
        self._count = 0

    def boot(self, job: Job, command: list[str]) -> Boot:
        """Start a job's machine."""
        place = self._place(f"{job.name}-{job.age}")
        place.mkdir()
        disk = place / "disk"
        make_disk(disk, _DISK_BYTES)
        machine = Machine(self.kernels[job.age], self._image, self._over, drives=job.drives, disk=disk)
        return Boot(machine, command, place / "boot")

    def run(self, job: Job, arguments: tuple[str, ...] = ()) -> Result:
        """Run a job's tests; what goes wrong is in the result."""
        began = time.monotonic()
        kernel = self.kernels[job.age].release
        try:
            words = shlex.join([*_PYTEST, *job.arguments, *arguments])
            boot = self.boot(job, ["bash", "-c", f"{words} --junitxml $PENSTOCK_RIG_SHARED/junit.xml"])
            status = boot.wait(job.timeout_s)
        except RigError as error:
            return Result(job, kernel, seconds=time.monotonic() - began, trouble=str(error))
        (boot.directory.parent / "disk").unlink()
        report, log = boot.shared / "junit.xml", boot.tail(400)
        counts = _counts(report) if report.exists() else {}
        trouble = "" if status == 0 and counts else f"pytest ended with {status}:\n{log}"
        notes = _figures(report) if report.exists() else []
        if job.drives:
            commands = _commands(boot.directory / "trace")
            notes.append(str(commands))
            trouble = trouble or commands.trouble
        return Result(
            job, kernel, **counts, seconds=time.monotonic() - began, trouble=trouble, notes=tuple(notes)
        )  # fmt: skip

    def cut(self, number: int) -> CutResult:
        """Cut a machine's power at a random moment; old and new kernels take turns."""
        age: Age = "old" if number % 2 else "new"
        machine = Machine(self.kernels[age], self._image, self._over)
        place = self._place(f"cut-{age}")
        try:
            return cut_power(machine, place, number)
        except RigError as error:
            return CutResult(self.kernels[age].release, wrong=[str(error)])
        finally:
            shutil.rmtree(place, ignore_errors=True)

    def _place(self, name: str) -> Path:
        with self._lock:
            self._count += 1
            return self._directory / f"{self._count}-{name}"


@dataclass(frozen=True, slots=True)
class Commands:
    """What the drives of a machine were told, as the emulator wrote it down."""

    count: int
    largest_bytes: int
    too_large: int  # more than the drive's MDTS

    @property
    def trouble(self) -> str:
        """Why that is wrong; "" where it is not."""
        if not self.count:
            return "the drives were told nothing"
        return f"{self.too_large} commands were larger than the drive's MDTS" if self.too_large else ""

    def __str__(self) -> str:
        largest = format_size(self.largest_bytes)
        return f"drives: {self.count} reads and writes, {largest} at most, {self.too_large} larger than MDTS"


def _commands(trace: Path) -> Commands:
    text = trace.read_text(errors="replace") if trace.exists() else ""
    moved = [int(size) for size in re.findall(r"^pci_nvme_(?:read|write) .*\bcount (\d+)", text, re.MULTILINE)]
    return Commands(len(moved), max(moved, default=0), len(re.findall(r"^pci_nvme_err_mdts", text, re.MULTILINE)))


def _figures(path: Path) -> list[str]:
    """What tests measured, as they told it by `record_property`: of each name, the least and the largest."""
    values: dict[str, list[float]] = {}
    for figure in ET.parse(path).getroot().iter("property"):  # noqa: S314 (our own)
        name = figure.get("name", "")
        if not name.startswith("hypothesis-"):
            values.setdefault(name, []).append(float(figure.get("value", "nan")))
    return [f"{name}: {min(found):.4f} to {max(found):.4f}, {len(found)} figures" for name, found in values.items()]


def _counts(path: Path) -> dict[str, int]:
    suite = ET.parse(path).getroot().find("testsuite")  # noqa: S314 (our own)
    if suite is None:
        return {}
    failed = int(suite.get("failures", 0)) + int(suite.get("errors", 0))
    skipped = int(suite.get("skipped", 0))
    return {"passed": int(suite.get("tests", 0)) - failed - skipped, "failed": failed, "skipped": skipped}

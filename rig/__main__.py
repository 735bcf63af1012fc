"""The command line of the rig."""

from __future__ import annotations

import shlex
import shutil
import sys
import tempfile
import threading
import time
import xml.etree.ElementTree as ET
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from penstock.units import GiB
from rig.errors import RigError
from rig.image import make_disk, make_image
from rig.machine import Boot, Machine
from rig.plan import Age, Job, jobs
from rig.provision import Kernel, provide_kernels, provide_tools

_DISK_BYTES = 2 * GiB
# Under emulation what takes a second elsewhere takes ten.
_PYTEST = ("python", "-m", "pytest", "-p", "no:cacheprovider", "-o", "timeout=400", "-o", "faulthandler_timeout=390")
_LANES = 2  # machines at once: each has two CPUs, and seldom uses both


@dataclass(frozen=True, slots=True)
class Result:
    """What a job came to."""

    job: Job
    kernel: str
    passed: int = 0
    failed: int = 0
    skipped: int = 0
    seconds: float = 0.0
    trouble: str = ""

    @property
    def is_good(self) -> bool:
        """Something was run, and nothing failed."""
        return not self.trouble and not self.failed and self.passed > 0


class Rig:
    """Boots jobs.

    Args:
        directory: for images, drives and what comes back.
    """

    def __init__(self, directory: Path) -> None:
        provide_tools()
        old, new = provide_kernels()
        self.kernels: dict[Age, Kernel] = {"old": old, "new": new}
        self._directory = directory
        self._image = directory / "image"
        self._over = tuple(make_image(self._image))
        self._lock = threading.Lock()
        self._count = 0

    def boot(self, job: Job, command: list[str]) -> Boot:
        """Start a job's machine."""
        with self._lock:
            self._count += 1
            place = self._directory / f"{self._count}-{job.name}-{job.age}"
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
            (boot.directory.parent / "disk").unlink()
            print(boot.tail(400 if status else 12), flush=True)
            counts = _counts(boot.shared / "junit.xml") if (boot.shared / "junit.xml").exists() else {}
        except RigError as error:
            return Result(job, kernel, seconds=time.monotonic() - began, trouble=str(error))
        trouble = "" if status in (0, 1) and counts else f"pytest ended with {status}"
        return Result(job, kernel, **counts, seconds=time.monotonic() - began, trouble=trouble)


def _counts(path: Path) -> dict[str, int]:
    suite = ET.parse(path).getroot().find("testsuite")  # noqa: S314 (our own)
    if suite is None:
        return {}
    failed = int(suite.get("failures", 0)) + int(suite.get("errors", 0))
    skipped = int(suite.get("skipped", 0))
    return {"passed": int(suite.get("tests", 0)) - failed - skipped, "failed": failed, "skipped": skipped}


def _print(results: list[Result]) -> None:
    table = Table("job", "kernel", "nodes", "drives", "passed", "failed", "skipped", "seconds")
    for result in results:
        drives = "\n".join(map(str, result.job.drives)) or "–"
        counts = [str(number) for number in (result.passed, result.failed, result.skipped)]
        table.add_row(result.job.name, result.kernel, "2", drives, *counts, f"{result.seconds:.0f}")
    console = Console(width=120)
    console.print(table)
    for result in results:
        if not result.is_good:
            console.print(f"[red]{result.job}: {result.trouble or 'tests failed, or none was run'}", markup=True)


@click.command()
@click.option("--job", "names", multiple=True, help="Only jobs of this name, or NAME-old, NAME-new.")
@click.option("--run", "command", help="Boot the one job, run this instead of its tests, and print what it prints.")
@click.option("--keep", type=click.Path(path_type=Path), help="Leave images and results in this directory.")
@click.argument("arguments", nargs=-1)
def main(names: tuple[str, ...], command: str | None, keep: Path | None, arguments: tuple[str, ...]) -> None:
    """Run the rig's jobs; ARGUMENTS go to pytest."""
    chosen = [job for job in jobs() if not names or job.name in names or f"{job.name}-{job.age}" in names]
    directory = keep or Path(tempfile.mkdtemp(prefix="penstock-rig-"))
    directory.mkdir(parents=True, exist_ok=True)
    try:
        rig = Rig(directory)
        if command is not None:
            boot = rig.boot(chosen[0], shlex.split(command))
            status = boot.wait(chosen[0].timeout_s)
            print(boot.tail(10_000))
            sys.exit(status)
        with ThreadPoolExecutor(_LANES) as pool:
            results = list(pool.map(lambda job: rig.run(job, arguments), chosen))
    except RigError as error:
        print(f"the rig cannot run here: {error}")
        sys.exit(3)
    finally:
        if keep is None:
            shutil.rmtree(directory, ignore_errors=True)
    _print(results)
    sys.exit(0 if results and all(result.is_good for result in results) else 1)


if __name__ == "__main__":
    main()

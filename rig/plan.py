"""What the rig runs: jobs, each a boot with tests of its own."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from rig.machine import Drive

Age = Literal["old", "new"]

# Of the page cache's tests: they need no torch, and what they say of time is bounded by deadlines alone.
_PAGE_CACHE = ("tests/pagecache", "tests/linux", "tests/cli/test_doctor.py", "-m", "not slow and not rig")
# Without what is the same whatever the kernel.
_RUN = ("tests/cli/test_run.py", "-m", "not slow", "-k", "not (damaged or broken or cannot or unknown or not_exist)")
_FALLBACKS = ("tests/cli/test_run_old_kernel.py",)
_NODES = ("tests/pagecache/test_placed.py", "tests/linux/test_cgroup2.py")
_NVME = ("tests/linux/test_nvme.py", "tests/storage/test_nvme.py", "-m", "rig", "-k")
# A ring of a few entries is the same whatever the kernel.
_ENGINES: dict[Age, str] = {"old": "Nvme or nvme", "new": "not SmallRing"}
# Both sizes of a logical block with both limits of a transfer, two of the four on each kernel. 16 KiB, an MDTS of 2, is
# less than any chunk in use.
_DRIVES: dict[Age, tuple[Drive, ...]] = {
    "old": (Drive(512, 7), Drive(4096, 2)),
    "new": (Drive(512, 2), Drive(4096, 7)),
}


@dataclass(frozen=True, slots=True)
class Job:
    """One boot.

    Attributes:
        age: of the kernel: the oldest or the newest that there is.
        arguments: for pytest.
        drives: NVMe drives.
        timeout_s: of the whole boot.
    """

    name: str
    age: Age
    arguments: tuple[str, ...]
    drives: tuple[Drive, ...] = ()
    timeout_s: float = 900.0

    def __str__(self) -> str:
        return f"{self.name}, {self.age} kernel"


def tests_of(jobs: Iterable[Job]) -> list[str]:
    """The files and directories of their tests."""
    return sorted({word for job in jobs for word in job.arguments if word.startswith("tests/")})


def jobs() -> list[Job]:
    """All of them, the longest first."""
    ages: tuple[Age, ...] = ("old", "new")
    return [
        Job("page-cache", "old", _PAGE_CACHE),
        Job("run", "old", _RUN),
        *(Job("nvme", age, (*_NVME, _ENGINES[age]), _DRIVES[age]) for age in ages),
        *(Job("numa", age, _NODES) for age in ages),
        Job("fallbacks", "old", _FALLBACKS),
    ]

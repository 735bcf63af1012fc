"""What holds for all tests."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from tests.examples import examples

settings.register_profile(
    "here",
    max_examples=examples(100),
    suppress_health_check=[HealthCheck.too_slow] if "PENSTOCK_RIG" in os.environ else (),
)
settings.load_profile("here")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What is marked rig runs in the virtual machine of `make rig` alone."""
    if "PENSTOCK_RIG" in os.environ:
        return
    for item in items:
        if item.get_closest_marker("rig"):
            item.add_marker(pytest.mark.skip(reason="needs the virtual machine of `make rig`"))


@pytest.fixture(autouse=True, scope="session")
def interruptible() -> Iterator[None]:
    """A shell has its background jobs ignore SIGINT, and children inherit that: programs under test would too."""
    before = signal.getsignal(signal.SIGINT)
    if before is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def as_ordinary_user() -> list[str]:
    """What to put before a command that is to run without privileges.

    As root that is another user, who may read whatever root may (the interpreter can lie in root's home).
    """
    if os.geteuid() != 0:
        return []
    if shutil.which("setpriv") is None:
        pytest.skip("needs setpriv (util-linux), to become an ordinary user")
    identity = ["--reuid=65534", "--regid=65534", "--clear-groups"]
    return ["setpriv", *identity, "--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"]


@pytest.fixture
def make_memory_cgroup() -> Iterator[Callable[[int], Path]]:
    """Makes a cgroup with a memory limit in bytes; what is still in it at the end must have ended."""
    if os.geteuid() != 0:
        pytest.skip("needs root, to make a cgroup")
    v1, v2 = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")
    control = v2 / "cgroup.subtree_control"
    if (v1 / "memory.limit_in_bytes").exists():
        parent, limit = v1, "memory.limit_in_bytes"
    elif control.exists() and "memory" in control.read_text():
        parent, limit = v2, "memory.max"
    else:
        pytest.skip("needs a cgroup file system with the memory controller")
    made: list[Path] = []

    def make(limit_bytes: int) -> Path:
        path = parent / f"penstock-test-{os.getpid()}-{len(made)}"
        path.mkdir()
        made.append(path)
        (path / limit).write_text(str(limit_bytes))
        return path

    yield make
    for path in made:
        deadline = time.monotonic() + 10
        while path.exists():
            try:
                path.rmdir()
            except OSError:  # what has just ended is leaving it, penstock's janitor for one
                assert time.monotonic() < deadline, f"processes stay in {path}"
                time.sleep(0.05)


@pytest.fixture
def loop_device(tmp_path: Path) -> Iterator[Path]:
    """A block device of 32 MiB, all zeros."""
    if os.geteuid() != 0 or shutil.which("losetup") is None:
        pytest.skip("needs root and losetup (util-linux), to make a loop device")
    image = tmp_path / "image"
    with image.open("wb") as file:
        file.truncate(32 << 20)
    done = subprocess.run(["losetup", "--find", "--show", str(image)], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"needs a loop device: {done.stderr.strip()}")
    yield Path(done.stdout.strip())
    subprocess.run(["losetup", "--detach", done.stdout.strip()], check=True)

"""penstock.linux.janitor: a tracefs instance goes with its maker, however that ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.tracing import LACKING

from penstock.linux.tracefs import TraceFs

# Makes an instance and says its name, its janitor and itself.
MAKER = """
import os, signal, sys
from penstock.linux.janitor import Janitor
from penstock.linux.tracefs import follow
janitor = Janitor()
instance = follow(os.getpid(), janitor.announce)
print(instance.name, janitor.pid, flush=True)
sys.stdin.readline()
exec(sys.argv[1])
"""


@pytest.fixture
def tracefs() -> Iterator[TraceFs]:
    if LACKING:
        pytest.skip(LACKING)
    tracefs = TraceFs()
    yield tracefs
    tracefs.close()


def wait_until(happened: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 30
    while not happened():
        assert time.monotonic() < deadline, what
        os.sched_yield()


def exists(tracefs: TraceFs, instance: str) -> bool:
    try:
        os.stat(f"instances/{instance}", dir_fd=tracefs.fd)
    except FileNotFoundError:
        return False
    return True


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.root
@pytest.mark.parametrize(
    "end",
    [
        "os.kill(os.getpid(), signal.SIGKILL)",
        "os._exit(1)",
        "instance.detach()",
        "instance.close()",
        "os.killpg(0, signal.SIGINT)",  # ^C, which the janitor must not die of
        "signal.signal(signal.SIGTERM, signal.SIG_DFL); os.killpg(0, signal.SIGTERM)",
    ],
)
def test_the_instance_goes_when_the_maker_does(tracefs: TraceFs, end: str) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", MAKER, end],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    ) as maker:
        assert maker.stdout is not None
        name, janitor = maker.stdout.readline().split()
        assert exists(tracefs, name)
        assert is_running(int(janitor))
        maker.communicate("\n")
    wait_until(lambda: not exists(tracefs, name), f"{name} is still there, 30 s after {end}")
    wait_until(lambda: not is_running(int(janitor)), f"the janitor is still there, 30 s after {end}")


@pytest.mark.parametrize("names", [[], ["penstock-0-0"]])
def test_nothing_to_remove(names: list[str]) -> None:
    code = (
        "import sys\n"
        "from penstock.linux.janitor import Janitor\n"
        "janitor = Janitor()\n"
        "for name in sys.argv[1:]:\n"
        "    janitor.announce(name)\n"
        "print(janitor.pid)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, *names], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    wait_until(lambda: not is_running(int(done.stdout)), "the janitor is still there after 30 s")


def test_it_holds_nothing_of_its_makers_open() -> None:
    """A pipe of the maker's is at its end once the maker has closed it; the janitor has only its own descriptors."""
    code = (
        "import os\n"
        "from penstock.linux.janitor import Janitor\n"
        "reader, writer = os.pipe()\n"
        "janitor = Janitor()\n"
        "os.close(writer)\n"
        "print(os.read(reader, 1))\n"  # returns while the janitor lives
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "b''\n"


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT"])
def test_it_cannot_be_ended_by_what_is_meant_for_its_maker(name: str) -> None:
    code = (
        "import os, signal, sys\n"
        "from penstock.linux.janitor import Janitor\n"
        "before = signal.pthread_sigmask(signal.SIG_BLOCK, [])\n"
        "janitor = Janitor()\n"
        "assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before\n"
        "os.kill(janitor.pid, getattr(signal, sys.argv[1]))\n"  # at once: before its first instruction, perhaps
        "print(janitor.pid, flush=True)\n"
        "sys.stdin.readline()\n"
    )
    command = [sys.executable, "-c", code, name]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as maker:
        assert maker.stdout is not None
        janitor = int(maker.stdout.readline())
        assert is_running(janitor)
        status = Path(f"/proc/{janitor}/status").read_text()
        pending = next(int(line.split()[1], 16) for line in status.splitlines() if line.startswith("ShdPnd:"))
        assert pending >> (signal.Signals[name] - 1) & 1
        maker.communicate("\n")
    wait_until(lambda: not is_running(janitor), "the janitor is still there after 30 s")

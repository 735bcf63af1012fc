"""penstock.linux.program: each program under a small launcher process, as `penstock run` is one."""

from __future__ import annotations

import errno
import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import pytest

LAUNCHER = """
import os, sys
from penstock.linux.program import Program, exit_like
program = Program(sys.argv[1:])
program.forward_signals()
try:
    program.release()
except OSError as error:
    print(error.errno, error.filename)
    sys.exit(126)
sys.exit(exit_like(program.wait()))
"""


def launch(*command: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    whole = [sys.executable, "-c", LAUNCHER, *command]
    return subprocess.run(whole, input=stdin, capture_output=True, text=True, check=False)


def start(launcher: str, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", launcher, *arguments]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


class TestExit:
    @pytest.mark.parametrize("code", [0, 3, 255])
    def test_the_code_is_the_programs(self, code: int) -> None:
        assert launch("sh", "-c", f"exit {code}").returncode == code

    @pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV, signal.SIGPIPE])
    def test_death_by_a_signal(self, number: int) -> None:
        assert launch("sh", "-c", f"kill -{int(number)} $$").returncode == 128 + number

    def test_a_program_that_is_not_there(self) -> None:
        done = launch("penstock-no-such-program")
        assert (done.returncode, done.stdout) == (126, f"{errno.ENOENT} penstock-no-such-program\n")

    def test_a_file_that_is_no_program(self, tmp_path: Path) -> None:
        path = tmp_path / "notes.txt"
        path.write_text("not a program\n")
        done = launch(str(path))
        assert (done.returncode, done.stdout) == (126, f"{errno.EACCES} {path}\n")

    def test_a_program_without_an_interpreter(self, tmp_path: Path) -> None:
        path = tmp_path / "script"
        path.write_text("#!/no/such/interpreter\n")
        path.chmod(0o755)
        assert launch(str(path)).stdout == f"{errno.ENOENT} {path}\n"


class TestSurroundings:
    def test_standard_streams_are_the_launchers(self) -> None:
        done = launch("sh", "-c", "cat; echo said >&2", stdin="three\nlines\nhere\n")
        assert (done.stdout, done.stderr) == ("three\nlines\nhere\n", "said\n")

    def test_nothing_else_is_open(self) -> None:
        done = launch(sys.executable, "-c", "import os; print(os.listdir('/proc/self/fd'))")
        assert done.stdout == "['0', '1', '2', '3']\n"  # 3 is the listing itself

    def test_directory_environment_and_group(self) -> None:
        code = "import os; print(os.getcwd(), os.environ['PENSTOCK_TEST'], os.getpgrp() == os.getpgid(os.getppid()))"
        done = subprocess.run(
            [sys.executable, "-c", LAUNCHER, sys.executable, "-c", code],
            env={**os.environ, "PENSTOCK_TEST": "ä b"},
            cwd="/",
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout == "/ ä b True\n"

    def test_no_signal_is_ignored_or_blocked(self) -> None:
        """As a shell starts it: Python ignores SIGPIPE and SIGXFSZ, which `yes | head` would show."""
        command = ["grep", "-E", "^Sig(Ign|Blk):", "/proc/self/status"]
        plain = subprocess.run(command, capture_output=True, text=True, check=True)  # restores them itself
        assert launch(*command).stdout == plain.stdout

    def test_arguments_arrive_as_they_are(self) -> None:
        arguments = ["", " ", "-x", "$HOME", "*", "ä", "a\nb"]
        done = launch(sys.executable, "-c", "import sys; print(sys.argv[1:])", *arguments)
        assert done.stdout == f"{arguments}\n"


class TestGate:
    def test_it_does_not_run_before_it_is_released(self, tmp_path: Path) -> None:
        marker = tmp_path / "ran"
        launcher = (
            "import os, sys\n"
            "from penstock.linux.program import Program\n"
            "program = Program(['touch', sys.argv[1]])\n"
            "print(open(f'/proc/{program.pid}/stat').read().split()[3], os.getpid(), flush=True)\n"
            "sys.stdin.readline()\n"
            "print(os.path.exists(sys.argv[1]), flush=True)\n"
            "program.release()\n"
            "print(program.wait(), os.path.exists(sys.argv[1]))\n"
        )
        with start(launcher, str(marker)) as process:
            assert process.stdout is not None
            parent, own = process.stdout.readline().split()
            assert parent == own
            output, _ = process.communicate("\n")
        assert output == "False\n0 True\n"

    @pytest.mark.parametrize("end", ["os.kill(os.getpid(), signal.SIGKILL)", "program.abandon()", "sys.exit()"])
    def test_it_never_runs_when_the_launcher_goes_first(self, tmp_path: Path, end: str) -> None:
        marker = tmp_path / "ran"
        launcher = (
            "import os, signal, sys\n"
            "from penstock.linux.program import Program\n"
            "program = Program(['touch', sys.argv[1]])\n"
            f"{end}\n"
        )
        with start(launcher, str(marker)) as process:
            process.communicate()  # until the child, which holds the pipes too, has ended
        assert not marker.exists()

    def test_one_that_cannot_be_started_is_waited_for(self) -> None:
        launcher = (
            "import os\n"
            "from penstock.linux.program import Program\n"
            "program = Program(['penstock-no-such-program'])\n"
            "try:\n"
            "    program.release()\n"
            "except FileNotFoundError:\n"
            "    print(os.path.exists(f'/proc/{program.pid}'))\n"
        )
        with start(launcher) as process:
            assert process.communicate()[0] == "False\n"


# Counts what it gets; ends at the end of its input, with as many as its exit code.
COUNTER = """
import signal, sys
counts = {}
def count(number, frame):
    counts[number] = counts.get(number, 0) + 1
for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT, signal.SIGQUIT):
    signal.signal(number, count)
print("ready", flush=True)
while line := sys.stdin.readline():
    print(sorted((signal.Signals(number).name, times) for number, times in counts.items()), flush=True)
"""
WAIT_FOR = """
import signal, sys
signal.signal(int(sys.argv[1]), lambda number, frame: sys.exit(3))
print("ready", flush=True)
while True:
    signal.pause()
"""


class TestSignals:
    @pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGINT", "SIGQUIT"])
    def test_what_the_launcher_gets_alone_is_passed_on(self, name: str) -> None:
        number = signal.Signals[name]
        with start(LAUNCHER, sys.executable, "-c", WAIT_FOR, str(int(number))) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            process.send_signal(number)
            assert process.wait() == 3

    def test_one_that_comes_when_nothing_would_look_before_the_program_ends(self) -> None:
        """Sent to another thread: a wait of the main one is not interrupted by it, nor is one that has yet to begin."""
        to_another = (
            "import signal, threading\n"
            "def send():\n"
            "    sys.stdin.readline()\n"
            "    signal.pthread_kill(threading.get_ident(), signal.SIGTERM)\n"
            "threading.Thread(target=send).start()\n"
        )
        launcher = LAUNCHER.replace("sys.exit(exit_like", to_another + "sys.exit(exit_like")
        with start(launcher, sys.executable, "-c", WAIT_FOR, str(int(signal.SIGTERM))) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            try:
                assert process.stdout.readline() == "ready\n"
                process.stdin.write("now\n")
                process.stdin.flush()
                assert process.wait(30) == 3
            finally:
                process.kill()

    def test_death_by_a_signal_that_was_passed_on(self) -> None:
        with start(LAUNCHER, "sh", "-c", "echo ready; exec cat") as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            process.send_signal(signal.SIGTERM)
            assert process.wait() == 128 + signal.SIGTERM

    @pytest.mark.parametrize(("key", "name"), [("\x03", "SIGINT"), ("\x1c", "SIGQUIT")])
    def test_what_the_terminal_sends_arrives_once(self, key: str, name: str) -> None:
        launcher = "import fcntl, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0)\n" + LAUNCHER
        command = [sys.executable, "-c", launcher, sys.executable, "-u", "-c", COUNTER]
        terminal, inside = pty.openpty()
        try:
            with subprocess.Popen(command, stdin=inside, stdout=inside, stderr=inside, start_new_session=True):
                os.close(inside)
                read_until(terminal, b"ready\r\n")
                # The line discipline sends the signal before it hands over the line that follows.
                os.write(terminal, key.encode() + b"\n")
                output = read_until(terminal, b"]\r\n")
                os.write(terminal, b"\x04")
        finally:
            os.close(terminal)
        assert f"[('{name}', 1)]" in output.decode()


def read_until(fd: int, end: bytes) -> bytes:
    data = b""
    while not data.endswith(end):
        part = os.read(fd, 4096)
        assert part, data
        data += part
    return data

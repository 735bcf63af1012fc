"""Starting the user's command so that nobody can tell the difference, and waiting for it."""

from __future__ import annotations

import os

TYPE_CHECKING = False  # typing's own takes 8 ms to import, and a program waits for this module
if TYPE_CHECKING:
    import signal
    from collections.abc import Sequence
    from types import FrameType
else:
    import _signal as signal  # what signal adds to it, enumerations, takes 3 ms

# Sent to penstock alone (by an init system, an orchestrator): meant for the program. SIGINT, SIGQUIT and SIGTSTP
# from a terminal reach the whole foreground group, the program with it; passing SIGINT on would send it twice.
_FORWARDED = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGALRM, signal.SIGCONT)
_FROM_TERMINAL = (signal.SIGINT, signal.SIGQUIT)
_IGNORED_BY_PYTHON = (signal.SIGPIPE, signal.SIGXFSZ)  # and what is ignored stays so in the program


class Program:
    """A child process that waits before its first instruction until it is released.

    It keeps the terminal, the standard streams, the environment and the process group that penstock got.
    Make it while the process has one thread only.
    """

    def __init__(self, command: Sequence[str]) -> None:
        self.command = tuple(command)
        gate, self._gate = os.pipe2(os.O_CLOEXEC)
        failure, status = os.pipe2(os.O_CLOEXEC)
        self.pid = os.fork()
        if self.pid == 0:
            try:
                os.close(self._gate)
                if os.read(gate, 1):  # nothing: penstock gave up or was killed before it began
                    for number in _IGNORED_BY_PYTHON:
                        signal.signal(number, signal.SIG_DFL)
                    os.execvp(command[0], list(command))
            except OSError as error:
                os.write(status, str(error.errno).encode())
            finally:
                os._exit(127)
        os.close(gate)
        os.close(status)
        self._failure = failure
        self._pidfd = os.pidfd_open(self.pid)
        self._signalled: int | None = None

    def release(self) -> None:
        """Let it run.

        Raises:
            OSError: it could not be started; errno says why, as the shell would find.
        """
        os.write(self._gate, b"x")
        os.close(self._gate)
        number = os.read(self._failure, 16)
        os.close(self._failure)
        if number:
            os.waitpid(self.pid, 0)
            error = int(number)
            raise OSError(error, os.strerror(error), self.command[0])

    def abandon(self) -> None:
        """End it before it has begun."""
        os.close(self._gate)
        os.waitpid(self.pid, 0)

    def forward_signals(self) -> None:
        """From now on, pass on the signals that are meant for the program."""

        def forward(number: int, _frame: FrameType | None) -> None:
            try:
                signal.pidfd_send_signal(self._pidfd, number)
            except ProcessLookupError:
                pass

        def leave_to_group(number: int, _frame: FrameType | None) -> None:
            if not _terminal_sends_signals():
                forward(number, None)

        # Python runs a handler between two steps of its own: for a signal that comes when the last one before a wait is
        # done, that would be when the program has ended. So what waits looks at a pipe, too.
        self._signalled, arrived = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        signal.set_wakeup_fd(arrived, warn_on_full_buffer=False)
        for number in _FORWARDED:
            signal.signal(number, forward)
        for number in _FROM_TERMINAL:
            signal.signal(number, leave_to_group)

    def wait_ended(self, timeout_s: float | None = None) -> bool:
        """Wait for it to end, but no longer than that; returns whether it has."""
        import select
        import time

        until = None if timeout_s is None else time.monotonic() + timeout_s
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        if self._signalled is not None:
            poll.register(self._signalled, select.POLLIN)
        while True:
            ready = poll.poll(None if until is None else max(0.0, until - time.monotonic()) * 1000)
            if not ready or any(fd == self._pidfd for fd, _ in ready):
                return bool(ready)
            assert self._signalled is not None
            os.read(self._signalled, 4096)  # its handler runs before the next step

    def wait(self) -> int:
        """Wait for it to end; returns its wait status."""
        self.wait_ended()
        return os.waitpid(self.pid, 0)[1]


def _terminal_sends_signals() -> bool:
    """Whether we are in the foreground group of a terminal, which signals all of the group itself."""
    for descriptor in (0, 1, 2):
        try:
            return os.tcgetpgrp(descriptor) == os.getpgrp()
        except OSError:
            continue
    return False


def exit_like(wait_status: int) -> int:
    """The exit code that stands for a wait status, as shells count: 128 + the signal's number."""
    code = os.waitstatus_to_exitcode(wait_status)
    return code if code >= 0 else 128 - code

"""A small process that removes a tracefs instance once its maker is gone, however it went.

An instance outlives its maker, and nothing in the kernel ties the two. So a forked process waits at the end of
a pipe whose other end only the maker holds; when the maker exits or is killed, the pipe closes and the
instance goes. That also takes its removal (0.1 s, RCU grace periods) out of the maker's exit.
"""

from __future__ import annotations

import os

TYPE_CHECKING = False  # typing's own takes 8 ms to import, and a program waits for this module
if TYPE_CHECKING:
    import signal
else:
    import _signal as signal  # what signal adds to it, enumerations, takes 3 ms

_FOR_THE_MAKER = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


class Janitor:
    """Removes announced instances after this process.

    Fork it while the process has one thread only.
    """

    def __init__(self) -> None:
        reader, self._writer = os.pipe2(os.O_CLOEXEC)
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, _FOR_THE_MAKER)  # and blocked they stay in the janitor
        self.pid = os.fork()
        if self.pid == 0:
            try:
                os.close(self._writer)
                _serve(reader)
            finally:
                os._exit(0)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        os.close(reader)

    def announce(self, instance: str) -> None:
        """Name an instance to be removed."""
        os.write(self._writer, instance.encode() + b"\n")


def _serve(reader: int) -> None:
    os.setsid()  # a signal for the maker's group, such as ^C, is not for us
    null = os.open("/dev/null", os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(null, standard)
    os.closerange(3, reader)  # the caller's pipes must see their ends
    os.closerange(reader + 1, 1 << 16)
    os.chdir("/")
    text = b""
    while part := os.read(reader, 4096):
        text += part
    from penstock.linux.tracefs import TraceFs

    names = text.decode().split()
    if names:
        tracefs = TraceFs()
        for name in names:
            try:
                os.rmdir(f"instances/{name}", dir_fd=tracefs.fd)
            except OSError:  # gone already
                pass

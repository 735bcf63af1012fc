"""Starting the program of `penstock run`, with as little as possible imported before it.

Of what penstock needs, the command line alone takes longer to import than many programs need to read a model that is
cached. So where the arguments leave no doubt, the program is started first; they are parsed for good beside it.
"""

from __future__ import annotations

import errno
import os
import sys
import time

from penstock.errors import UnsupportedError
from penstock.linux.nowait import is_resident_nowait
from penstock.linux.program import Program, exit_like
from penstock.linux.scheduling import GiveWay

TYPE_CHECKING = False  # typing's own takes 8 ms to import, and a program waits for this module
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from typing import Any, NoReturn

    from penstock.linux.tracefs import Instance

# A program starts on several CPUs at once (numpy's thread pool alone keeps one busy for 0.1 s). What we import is worth
# 0.1 s of one; where nothing is to be prefetched, it comes after that.
_UNDISTURBED_S = 0.15
_SMALLEST_SAMPLED_BYTES = 64 << 20
_SAMPLES = 8  # of each file
_COLLECT_S = 0.04  # of what is read by mapping it, a ring holds some 0.2 s

OWN_FAILURE = 125  # penstock itself failed and the command did not run; as env, timeout and docker run count
_NOT_FOUND, _NOT_EXECUTABLE = 127, 126

POLICIES = ("native", "eager", "sequential", "maio")
CACHE_MODES = ("auto", "keep", "burn")
OBSERVERS = ("auto", "tracefs", "process")


class Launched:
    """A program that runs or waits for its release, and what follows it.

    Attributes:
        options: what was asked for.
        instance: the tracefs instance that has followed it from before its first instruction, or None.
        reason: why there is none; "" where none was to be expected.
        environment: what the program was given.
        started_s: time.monotonic() of its start.
        failed: it could not be started.
        give_way: from then on; the program starts, and what we import meanwhile may wait for it.
    """

    started_s: float
    give_way: GiveWay

    def __init__(
        self,
        options: RunOptions,
        program: Program,
        instance: Instance | None,
        reason: str,
        environment: dict[str, str],
    ) -> None:
        self.options = options
        self.program = program
        self.instance = instance
        self.reason = reason
        self.environment = environment
        self.failed = False
        self._released = False
        self._exit_code: int | None = None

    def release(self) -> None:
        """Let the program run; a second time does nothing. Ends penstock, with a message, where it cannot."""
        if self._released:
            return
        self._released = True
        self.started_s = time.monotonic()
        try:
            self.program.release()
        except OSError as error:
            self.failed = True
            words = f"{self.program.command[0]}: {error.strerror}"
            fail(words, _NOT_FOUND if error.errno == errno.ENOENT else _NOT_EXECUTABLE)
        self.give_way = GiveWay()

    def run_ahead(self) -> None:
        """Leave the program alone while it starts, if nothing is to be prefetched and it is recorded anyway.

        If something is, the program will wait for it longer than for the CPU: we stop giving way.
        """
        options = self.options
        if self.instance is None:
            return
        if options.policy != "native" and not _seem_cached([*options.command[1:], *options.models]):
            self.give_way.end()
            return
        until = time.monotonic() + _UNDISTURBED_S
        while (left_s := until - time.monotonic()) > 0 and not self.program.wait_ended(min(left_s, _COLLECT_S)):
            self.instance.collect()

    def wait(self) -> int:
        """Wait for the program's end; returns the exit code that stands for it, a second time as well."""
        if self._exit_code is None:
            self._exit_code = exit_like(self.program.wait())
        return self._exit_code


class RunOptions:
    """What `penstock run` was asked to do, as it was written: see its help."""

    __slots__ = (
        "cache",
        "command",
        "memory",
        "models",
        "observer",
        "plot",
        "policy",
        "quiet",
        "report",
        "service",
        "templates",
    )

    def __init__(
        self,
        command: Sequence[str],
        *,
        service: str | None = None,
        policy: str = "maio",
        models: Sequence[str] = (),
        memory: str = "auto",
        cache: str = "auto",
        observer: str = "auto",
        templates: str | None = None,
        report: str | None = None,
        plot: str | None = None,
        quiet: bool = False,
    ) -> None:
        self.command = tuple(command)
        self.service = service
        self.policy = policy
        self.models = tuple(models)
        self.memory = memory
        self.cache = cache
        self.observer = observer
        self.templates = templates
        self.report = report
        self.plot = plot
        self.quiet = quiet


def launch(options: RunOptions) -> Launched:
    """Start the command, followed through tracefs where that is possible and wanted.

    Where it is not, the program waits for its `Launched.release`: through /proc nothing is seen of it until we are
    ready to look. Ends penstock, with a message, where the command cannot be started as asked for.
    """
    environment = dict(os.environ)
    program = Program(options.command)
    # For our own copy of numpy: its thread pool would only take memory.
    os.environ["OPENBLAS_NUM_THREADS"] = "1"
    instance, reason = _trace(program.pid, options.observer)
    if instance is None and options.observer == "tracefs":
        program.abandon()
        fail(f"--observer tracefs: {reason}")
    program.forward_signals()
    launched = Launched(options, program, instance, reason, environment)
    if instance is not None:
        launched.release()
    return launched


def _trace(pid: int, observer: str) -> tuple[Instance | None, str]:
    """A tracefs instance that follows the program, or why there is none ("" where none was to be expected)."""
    if observer == "process":
        return None, ""
    if os.geteuid() != 0:
        return None, "it needs root" if observer == "tracefs" else ""
    from penstock.linux.janitor import Janitor
    from penstock.linux.tracefs import follow

    try:
        return follow(pid, Janitor().announce), ""
    except (OSError, UnsupportedError) as error:
        return None, str(error)


def _seem_cached(words: Iterable[str]) -> bool:
    """Whether among words of a command there are large files, or directories that hold some, and all are cached.

    By a few bytes of each: it takes less than to import what could tell, and a wrong answer costs 0.15 s of the disk's
    time or of the CPU's.
    """
    found = False
    for word in words:
        for path in dict.fromkeys((word, word.partition("=")[2])):
            try:
                for file, size_bytes in _large_files(path):
                    found = True
                    if not _seems_cached(file, size_bytes):
                        return False
            except (OSError, ValueError):  # no path, or none of ours
                continue
    return found


def _large_files(path: str) -> Iterator[tuple[str, int]]:
    """A path, or what lies in it as a directory, with its bytes."""
    if os.path.isdir(path):
        with os.scandir(path) as entries:
            for entry in entries:
                if entry.is_file() and (size_bytes := entry.stat().st_size) >= _SMALLEST_SAMPLED_BYTES:
                    yield entry.path, size_bytes
    elif os.path.isfile(path) and (size_bytes := os.stat(path).st_size) >= _SMALLEST_SAMPLED_BYTES:
        yield path, size_bytes


def _seems_cached(file: str, size_bytes: int) -> bool:
    offsets = (size_bytes * (2 * number + 1) // (2 * _SAMPLES) for number in range(_SAMPLES))
    try:
        fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        try:
            # One by one, no further than to the first that is not: to ask is to have it read in.
            return all(is_resident_nowait(fd, [offset])[0] for offset in offsets)
        finally:
            os.close(fd)
    except OSError:  # not ours to read, or a file system that cannot tell
        return False


def say(line: str) -> None:
    """A line on stderr, if there is one: closed streams are the program's business, and no reason to fail."""
    try:
        sys.stderr.write(f"{line}\n")
        sys.stderr.flush()
    except (AttributeError, OSError, ValueError):
        pass


def fail(message: str, code: int = OWN_FAILURE) -> NoReturn:
    """End penstock because the command was not started."""
    say(f"penstock: {message}")
    sys.exit(code)


def plain(arguments: Sequence[str]) -> RunOptions | None:
    """The arguments of `penstock run`, if they are right beyond doubt.

    None leaves them to the real parser, whether they are wrong or only less plain: an unusual spelling, a policy of
    the user's own, which has to be imported first.
    """
    values: dict[str, Any] = {"models": []}
    index = 0
    while index < len(arguments):
        word = arguments[index]
        if word == "--" or not word.startswith("-"):
            break
        if word in _FLAGS:
            values["quiet"] = True
            index += 1
            continue
        is_valid = _OPTIONS.get(word)
        if is_valid is None or index + 1 >= len(arguments):
            return None
        value = arguments[index + 1]
        if value.startswith("-") or not is_valid(value):
            return None
        if word == "--model":
            values["models"].append(value)
        else:
            values[word[2:]] = value
        index += 2
    command = arguments[index + (arguments[index : index + 1] == ["--"]) :]
    return RunOptions(command, **values) if command else None


def _is_size(value: str) -> bool:
    number = value[:-3] if value.endswith(("KiB", "MiB", "GiB", "TiB")) else value
    return value == "auto" or (number.isascii() and number.isdecimal())


def _is_readable(value: str) -> bool:
    return os.access(value, os.R_OK)


def _is_no_directory(value: str) -> bool:
    return not os.path.lexists(value) or (os.path.isfile(value) and os.access(value, os.R_OK))


_FLAGS = ("-q", "--quiet")
_OPTIONS: dict[str, Callable[[str], bool]] = {
    "--service": bool,
    "--policy": POLICIES.__contains__,
    "--model": _is_readable,
    "--memory": _is_size,
    "--cache": CACHE_MODES.__contains__,
    "--observer": OBSERVERS.__contains__,
    "--templates": bool,
    "--report": _is_no_directory,
    "--plot": _is_no_directory,
}

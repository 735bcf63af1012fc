"""Programs under `penstock run --report`, and when they are observed: under emulation that takes penstock seconds.

What a test program may need itself is imported in the function: its source is for programs too.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from penstock.linux.pagecache import mincore

DEADLINE_S = 120.0


def wait_until_observed(report: str, **at_least: int) -> bool:
    """Wait until the report of a run that goes on exists, and its figures are this large; False after a minute."""
    import json
    import time

    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            with open(report) as file:
                body = json.load(file)
            if body["exit_code"] is None and all(body[name] >= value for name, value in at_least.items()):
                return True
        except FileNotFoundError:
            pass
        time.sleep(0.05)
    return False


def wait_until_cached(paths: Sequence[Path]) -> None:
    """Wait until all of the files is in the page cache."""
    deadline = time.monotonic() + DEADLINE_S
    while not all(map(_is_cached, paths)):
        assert time.monotonic() < deadline, "it is not prefetched"
        time.sleep(0.05)


def _is_cached(path: Path) -> bool:
    with path.open("rb") as file:
        return bool(mincore(file.fileno(), 0, path.stat().st_size).all())


def run_observed(
    command: Sequence[str | Path],
    report: Path,
    *,
    ready: Callable[[], None] | None = None,
    preexec_fn: Callable[[], object] | None = None,
    **at_least: int,
) -> tuple[str, str]:
    """Run a program under penstock that reads at a line, says a line, and serves until its input ends.

    Args:
        command: with `penstock run --report` in it.
        report: where that is written.
        ready: called when the program is observed, before it reads.
        preexec_fn: subprocess's.
        at_least: figures of the report that are waited for before it ends.

    Returns:
        The program's line, and what it and penstock said on stderr.
    """
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=preexec_fn
    ) as running:
        try:
            assert running.stdin is not None
            assert running.stdout is not None
            assert wait_until_observed(str(report)), "it is not observed"
            if ready is not None:
                ready()
            running.stdin.write("go\n")
            running.stdin.flush()
            line = running.stdout.readline()
            assert wait_until_observed(str(report), **at_least), f"not seen of it: {at_least}: {report.read_text()}"
            _, errors = running.communicate(timeout=DEADLINE_S)
        except BaseException:
            running.kill()
            raise
    assert running.returncode == 0, errors
    return line, errors

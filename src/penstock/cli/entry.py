"""Where the `penstock` command begins: a program to be run is started before all else is imported."""

from __future__ import annotations

import os
import sys


def main() -> None:
    """Run the command line in ``sys.argv``."""
    launched = None
    if sys.argv[1:2] == ["run"]:
        from penstock.cli.launch import launch, plain

        words = plain(sys.argv[2:])
        if words is not None:
            command, observer, policy = words
            launched = launch(command, observer)
            if policy == "native":
                launched.run_ahead()
    try:
        from penstock.cli.commands import penstock

        penstock(obj=launched)
    except BaseException as error:
        if launched is None or launched.failed:
            raise
        # `penstock run` does not come back. Whatever this is (an installation that lacks a module, a file of --report
        # that has become a directory meanwhile), the program runs, and its end is ours.
        if not isinstance(error, SystemExit):
            sys.stderr.write(f"penstock: not prefetching: {type(error).__name__}: {error}\n")
        launched.release()
        os._exit(launched.wait())

"""Where the `penstock` command begins: a program to be run is started before all else is imported."""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False  # typing's own takes 8 ms to import, and a program waits for this module
if TYPE_CHECKING:
    from typing import NoReturn

    from penstock.cli.launch import Launched


def main() -> None:
    """Run the command line in ``sys.argv``."""
    if sys.argv[1:2] == ["run"]:
        from penstock.cli.launch import launch, plain

        options = plain(sys.argv[2:])
        if options is not None:
            _supervise(launch(options))
    from penstock.cli.commands import penstock

    penstock()


def _supervise(launched: Launched) -> NoReturn:
    try:
        from penstock.cli.supervise import supervise

        supervise(launched)
    except BaseException as error:
        if launched.failed:
            raise
        # Whatever this is (an installation that lacks a module, or is being replaced), the program
        # runs, and its end is ours.
        launched.release()
        if not isinstance(error, SystemExit):
            from penstock.cli.launch import say

            say(f"penstock: not prefetching: {type(error).__name__}: {error}")
        os._exit(launched.wait())

"""Where the `penstock` command begins: a program to be run is started before all else is imported."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line in ``sys.argv``."""
    launched = None
    if sys.argv[1:2] == ["run"]:
        from penstock.cli.launch import launch, plain

        words = plain(sys.argv[2:])
        if words is not None:
            launched = launch(*words)
    from penstock.cli.commands import penstock

    penstock(obj=launched)

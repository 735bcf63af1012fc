"""`penstock plot`: draws the reports of runs over one another."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from penstock.errors import PenstockError

if TYPE_CHECKING:
    from penstock.report.report import Report


@click.command(
    epilog="""\b
Examples:
  penstock run --policy native --report native.json -- python serve.py --model /models/llama-3b
  penstock run --report maio.json -- python serve.py --model /models/llama-3b
  penstock plot native.json maio.json -o load.png --limit 2.1
"""
)
@click.argument(
    "reports",
    metavar="REPORT...",
    nargs=-1,
    required=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
)
@click.option(
    "--output",
    "-o",
    required=True,
    metavar="FILE",
    type=click.Path(dir_okay=False, path_type=Path),
    help="The picture: .png, .svg or .pdf.",
)
@click.option(
    "--limit",
    "limit_gb_per_s",
    metavar="GB/s",
    type=click.FloatRange(min=0, min_open=True),
    help="Mark this as the device's maximum.",
)
def plot(reports: tuple[Path, ...], output: Path, limit_gb_per_s: float | None) -> None:
    """Draw what `penstock run --report` wrote: bandwidth and cached bytes over time, all runs in one picture."""
    from penstock.report import plot as drawing
    from penstock.report.report import Report

    try:
        loaded = [(path, Report.load(path)) for path in reports]
        limit = None if limit_gb_per_s is None else limit_gb_per_s * 1e9
        drawing.plot(_labelled(loaded), output, limit)
    except (PenstockError, OSError) as error:
        raise click.ClickException(str(error)) from error
    click.echo(f"{output}: {len(reports)} {'run' if len(reports) == 1 else 'runs'}")


def _labelled(reports: Sequence[tuple[Path, Report]]) -> list[tuple[str, Report]]:
    """Runs with their labels, and the file's name before those that would have the same."""
    from penstock.report.plot import label

    counts = Counter(label(report) for _, report in reports)
    return [
        (f"{path.stem} · {label(report)}" if counts[label(report)] > 1 else label(report), report)
        for path, report in reports
    ]

"""The command line of the benchmark; the package's docstring has the method."""

from __future__ import annotations

import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from statistics import median

import click
from rich.console import Console
from rich.table import Table

from bench.errors import BenchError, RunError
from bench.io.loops import SHAPES, Arm, Figure, Shape, arms, check_engine, check_file, make_file
from bench.machine import describe
from bench.output import write_json
from penstock.linux import uring
from penstock.storage.base import READ, WRITE
from penstock.storage.threads import ThreadEngine
from penstock.storage.uring import UringEngine
from penstock.units import MiB, format_size, parse_size

_BARS = {"uring": 0.85, "threads": 0.9}  # of fio's rate; threads at 4 MiB only
_LARGE_BYTES = 4 * MiB


@click.command(
    epilog="""\b
Examples:
  python -m bench.io --dir /mnt/nvme
  python -m bench.io --block 4KiB --rounds 15
  python -m bench.io --quick
"""
)
@click.option("--size", default="4GiB", show_default=True, help="Of the file.")
@click.option("--block", "blocks", multiple=True, help="Only shapes of this size; again for more than one.")
@click.option("--rounds", default=5, show_default=True, type=click.IntRange(min=1))
@click.option("--seconds", default=2.0, show_default=True, help="Of each arm in each round.")
@click.option(
    "--dir",
    "directory",
    default=".",
    show_default=True,
    type=click.Path(path_type=Path, file_okay=False, exists=True),
    help="On the disk to measure; the file is removed afterwards.",
)
@click.option("--json", "json_path", type=click.Path(path_type=Path, dir_okay=False), help="Every figure.")
@click.option("--quick", is_flag=True, help="A small file, one short round, no bars.")
def main(
    size: str,
    blocks: tuple[str, ...],
    rounds: int,
    seconds: float,
    directory: Path,
    json_path: Path | None,
    quick: bool,
) -> None:
    """How fast penstock's engines move bytes, beside fio."""
    console = Console() if sys.stdout.isatty() else Console(width=132)
    if quick:
        size, rounds, seconds = "32MiB", 1, 0.05
    reason = uring.probe()
    if reason:
        console.print(f"skipped: uring: {reason}", style="yellow", highlight=False)
    try:
        wanted = set(map(parse_size, blocks))
        shapes = [shape for shape in SHAPES if not wanted or shape.block_bytes in wanted]
        if not shapes:
            there = ", ".join(dict.fromkeys(format_size(shape.block_bytes) for shape in SHAPES))
            raise BenchError(f"--block {' '.join(blocks)}: there are {there}")
        machine = describe(directory)
        with tempfile.TemporaryDirectory(prefix="bench-io-", dir=directory) as scratch:
            path = Path(scratch) / "file"
            size_bytes = parse_size(size) // _LARGE_BYTES * _LARGE_BYTES
            if size_bytes < 4 * _LARGE_BYTES:
                raise click.ClickException(f"--size {size}: at least 16 MiB")
            make_file(path, size_bytes)
            for make in (ThreadEngine, UringEngine)[: 1 if reason else 2]:
                check_engine(make, path)
            found = _measure(console, path, shapes, rounds, seconds, without_uring=bool(reason), without_fio=quick)
    except (BenchError, RunError, ValueError) as error:
        raise click.ClickException(str(error)) from error
    for name, value in machine.lines():
        console.print(f"{name:12} {value}", highlight=False)
    failed = False
    for shape, figures in found.items():
        console.print(_table(shape, figures))
    if not quick:
        failed = not _verdicts(console, found)
    if json_path is not None:
        rows = [
            {"shape": str(shape), "arm": arm, "figures": [asdict(figure) for figure in values]}
            for shape, figures in found.items()
            for arm, values in figures.items()
        ]
        write_json(json_path, {"machine": asdict(machine), "rows": rows})
    sys.exit(failed)


def _measure(
    console: Console,
    path: Path,
    shapes: list[Shape],
    rounds: int,
    seconds: float,
    *,
    without_uring: bool,
    without_fio: bool,
) -> dict[Shape, dict[str, list[Figure]]]:
    found: dict[Shape, dict[str, list[Figure]]] = {}
    for shape, before in zip(shapes, [None, *shapes], strict=False):
        if shape.operation == WRITE and before is not None and before.operation == READ:
            check_file(path)
        chosen = arms(shape)
        if without_uring:
            del chosen["uring"]
        if without_fio:
            del chosen["fio"]
        names = list(chosen)
        figures = found[shape] = {name: [] for name in names}
        for number in range(rounds):
            first = number % len(names)
            order = names[first:] + names[:first]
            for name in order[:: -1 if number % 2 else 1]:  # nobody always comes after the same one
                figure = chosen[name](path, seconds, 1000 * number + 1, is_timed=True)
                figures[name].append(figure)
                if shape.operation == WRITE and name != "fio" and number == rounds - 1:
                    _check_written(path, chosen[name], seconds)
            console.print(
                f"{shape}, round {number + 1}/{rounds}: "
                + ", ".join(f"{name} {figures[name][-1].bytes_per_s / 1e9:.2f} GB/s" for name in names),
                highlight=False,
            )
    return found


def _check_written(path: Path, arm: Arm, seconds: float) -> None:
    """All that an arm writes belongs where it writes it: a file made anew stays as it was."""
    make_file(path, path.stat().st_size)
    arm(path, min(seconds, 0.5), 7, is_timed=False)
    check_file(path)


def _table(shape: Shape, figures: dict[str, list[Figure]]) -> Table:
    table = Table(title=str(shape), title_justify="left", title_style="bold")
    for column in ("arm", "GB/s", "requests/s", "of fio", "CPU s/GB"):
        table.add_column(column, justify="left" if column == "arm" else "right")
    for name, values in figures.items():
        ratio = _ratio(figures, name)
        table.add_row(
            name,
            f"{median(value.bytes_per_s for value in values) / 1e9:.2f}",
            f"{median(value.requests_per_s for value in values):,.0f}",
            "" if ratio is None else f"{ratio:.2f}",
            f"{median(value.cpu_s_per_gb for value in values):.2f}",
        )
    return table


def _ratio(figures: dict[str, list[Figure]], name: str) -> float | None:
    if "fio" not in figures:
        return None
    return median(
        ours.bytes_per_s / theirs.bytes_per_s for ours, theirs in zip(figures[name], figures["fio"], strict=True)
    )


def _verdicts(console: Console, found: dict[Shape, dict[str, list[Figure]]]) -> bool:
    passed = True
    for shape, figures in found.items():
        for name, least in _BARS.items():
            if name == "threads" and shape.block_bytes != _LARGE_BYTES:
                continue
            ratio = _ratio(figures, name) if name in figures else None
            good = ratio is not None and ratio >= least
            passed = passed and good
            text = "–" if ratio is None else f"{ratio:.2f}"
            console.print(f"{'PASS' if good else 'FAIL'}  {shape}: {name}/fio {text} ≥ {least}", highlight=False)
    return passed


if __name__ == "__main__":
    main()

"""`penstock warm`: reads models into the page cache ahead of their use."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from penstock.units import format_size, parse_size

if TYPE_CHECKING:
    from penstock.linux.memory import MemoryState
    from penstock.pagecache.base import ModelFile
    from penstock.pagecache.ledger import Ledger

_RESERVE = 0.2  # of the memory limit stays free: the paper's threshold of 80 %
_POLL_S = 0.1


def _memory(_context: click.Context, _parameter: click.Parameter, text: str) -> int | None:
    if text == "auto":
        return None
    try:
        return parse_size(text)
    except ValueError as error:
        raise click.BadParameter(f"{error}; or auto") from error


@dataclass(frozen=True, slots=True)
class _Outcome:
    read_bytes: int
    elapsed_s: float
    stopped: str  # why before the end, or ""
    warnings: tuple[str, ...]


@click.command(
    epilog="""\b
Examples:
  penstock warm /models/llama-3b
  penstock warm --memory 20GiB /models/llama-70b
"""
)
@click.argument("paths", metavar="PATH...", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@click.option(
    "--memory",
    "memory_bytes",
    metavar="SIZE|auto",
    default="auto",
    show_default=True,
    callback=_memory,
    help="How much may be cached; of larger models the first part is read. auto takes what is free and can be "
    "reclaimed, less 20 % of the limit, and refuses a model that does not fit.",
)
@click.pass_context
def warm(context: click.Context, paths: tuple[Path, ...], memory_bytes: int | None) -> None:
    """Read whole models into the page cache, at the device's speed.

    Of a directory the weight files are read, of a file that file. What is cached already is not read again.
    """
    from penstock.linux.memory import read_memory
    from penstock.pagecache.files import ModelFiles
    from penstock.pagecache.ledger import Ledger

    files = list(ModelFiles(paths))
    if not files:
        raise click.ClickException(f"no weight files below {', '.join(map(str, paths))}; name a file to read any other")
    size_bytes = sum(file.size_bytes for file in files)
    with contextlib.closing(Ledger()) as ledger:
        try:
            for file in files:
                ledger.record(file)
        except OSError as error:
            raise click.ClickException(f"{error.filename}: {error.strerror}") from error
        missing_bytes = size_bytes - ledger.resident_bytes()
        if memory_bytes is None and missing_bytes:
            _check_fits(size_bytes, read_memory())
        parts = list(_first_bytes(files, size_bytes if memory_bytes is None else memory_bytes))
        outcome = _read(ledger, parts, missing_bytes, watch_memory=memory_bytes is None)
        cached_bytes = ledger.resident_bytes()
    rate = f", {outcome.read_bytes / outcome.elapsed_s / 1e9:.2f} GB/s" if outcome.read_bytes else ""
    click.echo(
        f"{format_size(cached_bytes)} of {format_size(size_bytes)} cached, {len(files)} "
        f"{'file' if len(files) == 1 else 'files'}; {format_size(outcome.read_bytes)} read in "
        f"{outcome.elapsed_s:.1f} s{rate}"
    )
    wanted_bytes = sum(stop for _, stop in parts)
    if outcome.stopped:
        click.echo(f"Stopped: {outcome.stopped}", err=True)
    elif not outcome.warnings and cached_bytes < 0.99 * wanted_bytes:
        click.echo("The kernel has evicted a part of it meanwhile: there is too little memory for it.", err=True)
    for warning in outcome.warnings:
        click.echo(f"Warning: {warning}", err=True)
    if outcome.stopped == _INTERRUPTED:
        context.exit(130)
    if outcome.stopped or outcome.warnings:
        context.exit(1)


_INTERRUPTED = "interrupted"


def _check_fits(size_bytes: int, state: MemoryState) -> None:
    """Refuse what does not fit: its end would push out its beginning.

    What is cached of the model already counts as reclaimable in the headroom, so it is compared as a whole.
    """
    budget_bytes = _budget_bytes(state)
    if size_bytes > budget_bytes:
        raise click.ClickException(
            f"the model has {format_size(size_bytes)}, and {format_size(budget_bytes)} may be filled "
            f"({format_size(state.headroom_bytes)} free or reclaimable, less 20 % of the limit of "
            f"{format_size(state.limit_bytes)}, {state.source}); choose how much to read with --memory"
        )


def _budget_bytes(state: MemoryState) -> int:
    return max(0, state.headroom_bytes - int(_RESERVE * state.limit_bytes))


def _first_bytes(files: Sequence[ModelFile], memory_bytes: int) -> Iterator[tuple[ModelFile, int]]:
    """Each file with how much of it fits, in order."""
    for file in files:
        if memory_bytes > 0:
            yield file, min(file.size_bytes, memory_bytes)
        memory_bytes -= file.size_bytes


def _read(
    ledger: Ledger, parts: Sequence[tuple[ModelFile, int]], missing_bytes: int, *, watch_memory: bool
) -> _Outcome:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    from penstock.linux.memory import MemoryReader
    from penstock.pagecache.base import Prefetch
    from penstock.pagecache.loader import Loader

    console = Console(stderr=True)
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    stopped = ""
    total_bytes = min(missing_bytes, sum(stop for _, stop in parts))
    began_s = time.monotonic()
    loader = Loader(ledger)
    try:
        with (
            MemoryReader() as memory,
            Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar,
        ):
            task = bar.add_task("", total=total_bytes)
            loader.submit(Prefetch(file, 0, stop) for file, stop in parts)
            while not loader.wait_idle(_POLL_S):
                bar.update(task, completed=ledger.totals().prefetched_bytes)
                state = memory.read()
                # Filling the cache leaves the headroom as it is; somebody else needs the memory.
                if watch_memory and state.headroom_bytes < _RESERVE * state.limit_bytes:
                    stopped = f"only {format_size(state.headroom_bytes)} are free or reclaimable ({state.source})"
                    break
    except KeyboardInterrupt:
        stopped = _INTERRUPTED
    finally:
        elapsed_s = time.monotonic() - began_s
        loader.close()
    return _Outcome(ledger.totals().prefetched_bytes, elapsed_s, stopped, loader.statistics().warnings)

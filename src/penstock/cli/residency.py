"""`penstock residency`: what of a model the page cache holds, and where in each file."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from penstock.units import format_size

if TYPE_CHECKING:
    from penstock.linux.pagecache import FileResidency, ResidencyMethod

_CELLS = 40


@dataclass(frozen=True, slots=True)
class _File:
    path: Path
    size_bytes: int
    resident_bytes: int
    method: ResidencyMethod
    bar: str


@click.command(
    epilog="""\b
Examples:
  penstock residency /models/llama-3b
  penstock residency --json /models/llama-3b/model-00001-of-00002.safetensors
"""
)
@click.argument("paths", metavar="PATH...", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="A list of objects, sizes in bytes.")
def residency(paths: tuple[Path, ...], as_json: bool) -> None:
    """Show what of each file is in the page cache.

    Of a directory the weight files are shown, of a file that file. The bar is the file from its start to its
    end: ░ stands for a part that is not cached, ▒ for one cached up to half, ▓ for more, █ for all of it.
    """
    files = [_look_at(path) for path in _files_at(paths)]
    if as_json:
        rows = [
            {
                "path": str(file.path),
                "size_bytes": file.size_bytes,
                "resident_bytes": file.resident_bytes,
                "method": file.method.value,
            }
            for file in files
        ]
        click.echo(json.dumps(rows, indent=2))
        return
    for file in files:
        click.echo(f"{file.bar}  {_figures(file.resident_bytes, file.size_bytes)}  {file.path}")
    if len(files) > 1:
        resident_bytes, size_bytes = sum(f.resident_bytes for f in files), sum(f.size_bytes for f in files)
        click.echo(f"{'':{_CELLS}}  {_figures(resident_bytes, size_bytes)}  {len(files)} files")
    _explain(files)


def _files_at(paths: tuple[Path, ...]) -> list[Path]:
    from penstock.pagecache.files import find_weights

    found: dict[Path, None] = {}
    for path in paths:
        if not (path.is_dir() or path.is_file()):
            raise click.ClickException(f"{path} is neither a file nor a directory")
        below = find_weights(path)
        if not below:
            raise click.ClickException(f"{path}: no weight files below; name a file to see any other kind")
        found.update(dict.fromkeys(below))
    return list(found)


def _look_at(path: Path) -> _File:
    from penstock.linux.pagecache import FileResidency, ResidencyMethod

    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            size_bytes = os.fstat(fd).st_size
            residency = FileResidency(fd)
            bar, in_cells_bytes = _bar(residency, size_bytes)
            if residency.method is ResidencyMethod.NOWAIT:
                resident_bytes = in_cells_bytes  # each question reads its page in: ask once
            else:
                resident_bytes = residency.resident_bytes(0, size_bytes)
            return _File(path, size_bytes, resident_bytes, residency.method, bar)
        finally:
            os.close(fd)
    except OSError as error:
        raise click.ClickException(f"{path}: {error.strerror or error}") from error


def _bar(residency: FileResidency, size_bytes: int) -> tuple[str, int]:
    """The cells' shades, and the bytes cached in them.

    Cells end at pages, so that no page counts in two; only the cells of a file of fewer pages share them.
    """
    from penstock.linux.window import PAGE_BYTES

    pages = -(-size_bytes // PAGE_BYTES)
    shades = []
    total_bytes = 0
    for cell in range(_CELLS):
        first = pages * cell // _CELLS
        start = first * PAGE_BYTES
        stop = min(max(pages * (cell + 1) // _CELLS, first + 1) * PAGE_BYTES, size_bytes)
        if start >= stop:
            shades.append("░")
            continue
        resident_bytes = residency.resident_bytes(start, stop)
        total_bytes += resident_bytes
        fraction = resident_bytes / (stop - start)
        shades.append("░" if fraction == 0 else "▒" if fraction <= 0.5 else "▓" if fraction < 1 else "█")
    return "".join(shades), min(total_bytes, size_bytes)


def _figures(resident_bytes: int, size_bytes: int) -> str:
    # 99.96 % is not all of it.
    percent = int(1000 * resident_bytes / size_bytes) / 10 if size_bytes else 100.0
    return f"{percent:5.1f} %  {format_size(resident_bytes):>9} of {format_size(size_bytes):>9}"


def _explain(files: list[_File]) -> None:
    from penstock.linux.pagecache import ResidencyMethod

    methods = {file.method for file in files}
    if ResidencyMethod.NOWAIT in methods:
        click.echo(
            "Sampled: the kernel counts the cached pages only for a file's owner, or who may write it.",
            err=True,
        )
    if ResidencyMethod.ALWAYS in methods:
        click.echo("A file in a memory file system (or one that cannot be asked) counts as cached.", err=True)

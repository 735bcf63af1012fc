"""`penstock verify`: whether a checkpoint is whole, as far as its structure tells."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import click

from penstock.errors import CheckpointError, PenstockError
from penstock.units import MiB, format_size

_READ_BYTES = 4 * MiB


@click.command(
    epilog="""\b
Examples:
  penstock verify /models/llama-3b
  penstock verify --checksum /models/llama-3b > SHA256SUMS"""
)
@click.argument("path", type=click.Path(exists=True, path_type=Path))
@click.option("--checksum", is_flag=True, help="Read everything and print each file's SHA-256, as sha256sum does.")
@click.pass_context
def verify(context: click.Context, path: Path, checksum: bool) -> None:
    """Check headers, offsets and sizes of every file, and the index against the shards.

    PATH is a safetensors or GGUF file, an index, or a directory with such files. Everything that is wrong is named, not
    only the first of it; the exit status is 1 then.
    """
    problems = 0
    files = _files(path)
    for problem in _problems(path, files):
        problems += 1
        click.echo(problem, err=True)
    if checksum:
        _checksums(context, files)
    if problems:
        click.echo(f"{problems} {'problem' if problems == 1 else 'problems'} in {path}", err=True)
        context.exit(1)
    size_bytes = sum(file.stat().st_size for file in files)
    word = "file" if len(files) == 1 else "files"
    click.echo(f"{path}: {len(files)} {word}, {format_size(size_bytes)}: nothing is wrong", err=checksum)


def _files(path: Path) -> list[Path]:
    """The weight files that belong to it, as far as they are there."""
    from penstock.checkpoint.files import INDEX_SUFFIX, read_index

    if path.is_dir():
        return sorted(entry for entry in path.iterdir() if entry.name.endswith((".safetensors", ".gguf")))
    if path.name.endswith(INDEX_SUFFIX):
        try:
            names = sorted(set(read_index(path).values()))
        except CheckpointError:
            return []
        return [path.parent / name for name in names if (path.parent / name).exists()]
    return [path]


def _problems(path: Path, files: list[Path]) -> Iterator[str]:
    from penstock.checkpoint.files import INDEX_SUFFIX, differences, read_header, read_index

    names: dict[Path, dict[str, None]] = {}  # of the tensors in each file that is whole
    for file in files:
        try:
            names[file] = dict.fromkeys(tensor.name for tensor in read_header(file).tensors)
        except (PenstockError, OSError) as error:
            yield str(error)
    together = _loaded_together(path, files)
    owner: dict[str, Path] = {}
    for file in names:
        for name in names[file] if file in together else ():
            if owner.setdefault(name, file) != file:
                yield f"{file}: tensor {name!r} is in {owner[name]} as well"
    indices = [path] if path.name.endswith(INDEX_SUFFIX) else []
    if path.is_dir():
        indices = sorted(entry for entry in path.iterdir() if entry.name.endswith(INDEX_SUFFIX))
    if not files and not indices:
        yield f"{path}: neither a *.safetensors nor a *.gguf file is there"
    for index in indices:
        try:
            located = read_index(index)
        except (PenstockError, OSError) as error:
            yield str(error)
        else:
            yield from differences(index, located, names)
            for file in sorted({index.parent / name for name in located.values()}):
                for name in names.get(file, ()):
                    if name not in located:
                        yield f"{index}: does not name tensor {name!r} of {file}"


def _loaded_together(path: Path, files: list[Path]) -> set[Path]:
    """Those that make one checkpoint: variants may lie beside it, with the same names."""
    from penstock.checkpoint.files import files_in, read_index

    try:
        index, chosen = files_in(path) if path.is_dir() else (None, files)
        return {index.parent / name for name in read_index(index).values()} if index else set(chosen)
    except PenstockError:  # told elsewhere
        return set()


def _checksums(context: click.Context, files: list[Path]) -> None:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    console = Console(stderr=True)
    total = sum(file.stat().st_size for file in files)
    with Progress(
        BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn(), console=console, transient=True,
        disable=not console.is_terminal,
    ) as bar:  # fmt: skip
        task = bar.add_task("", total=total)
        for file in files:
            digest = hashlib.sha256()
            try:
                with file.open("rb", buffering=0) as source:
                    os.posix_fadvise(source.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
                    while part := source.read(_READ_BYTES):
                        digest.update(part)
                        bar.advance(task, len(part))
            except OSError as error:
                click.echo(f"{file}: {error.strerror}", err=True)
                context.exit(1)
            except KeyboardInterrupt:
                context.exit(130)
            click.echo(f"{digest.hexdigest()}  {file}")

"""`penstock load`: how fast the direct path brings a checkpoint into memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from penstock.errors import PenstockError
from penstock.units import format_size

if TYPE_CHECKING:
    from penstock.storage.choose import EngineName


@click.command(
    epilog="""\b
Examples:
  penstock load /models/llama-3b
  penstock load --engine threads --json /models/llama-3b/model-00001-of-00002.safetensors"""
)
@click.argument("path", type=click.Path(exists=True, path_type=Path))
@click.option("--device", default="cpu", show_default=True, help="Where the tensors go.")
@click.option(
    "--engine",
    type=click.Choice(["auto", "uring", "threads"]),
    default="auto",
    show_default=True,
    help="auto is io_uring where it works, else threads.",
)
@click.option("--json", "as_json", is_flag=True, help="One object, sizes in bytes.")
@click.pass_context
def load(context: click.Context, path: Path, device: str, engine: EngineName, as_json: bool) -> None:
    """Load a checkpoint past the page cache, and tell how fast that was.

    PATH is a safetensors or GGUF file, an index, or a directory with such files. Each tensor is let go as it is whole.
    """
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TransferSpeedColumn

    from penstock.checkpoint.frameworks import Plain
    from penstock.checkpoint.load import CheckpointLoad

    console = Console(stderr=True)
    try:
        with (
            Progress(
                BarColumn(),
                DownloadColumn(),
                TransferSpeedColumn(),
                console=console,
                transient=True,
                disable=as_json or not console.is_terminal,
            ) as bar,
            CheckpointLoad(
                path,
                device=device,
                framework=Plain() if device.partition(":")[0] == "cpu" else "torch",
                engine=engine,
                progress=lambda landed_bytes: bar.advance(task, landed_bytes),
            ) as loading,
        ):
            task = bar.add_task("", total=loading.size_bytes)
            tensors = sum(1 for _ in loading)
            done = loading.statistics()
            size_bytes = loading.size_bytes
    except (PenstockError, ValueError, MemoryError) as error:
        raise click.ClickException(str(error)) from error
    except OSError as error:
        raise click.ClickException(f"{error.filename or path}: {error.strerror or error}") from error
    except KeyboardInterrupt:
        context.exit(130)
    if as_json:
        click.echo(
            json.dumps(
                {
                    "path": str(path),
                    "tensors": tensors,
                    "size_bytes": size_bytes,
                    "seconds": done.seconds,
                    "bytes_per_s": done.bytes_read / done.seconds,
                    "engine": done.engine,
                    "fallback": done.fallback,
                    "direct_bytes": done.direct_bytes,
                    "cached_bytes": done.cached_bytes,
                    "buffered_bytes": done.buffered_bytes,
                },
                indent=2,
            )
        )
        return
    click.echo(
        f"{tensors} tensors, {format_size(size_bytes)} in {done.seconds:.2f} s: "
        f"{done.bytes_read / done.seconds / 1e9:.2f} GB/s"
    )
    parts = [
        (done.direct_bytes, "read past the page cache"),
        (done.cached_bytes, "copied from it"),
        (done.buffered_bytes, "read through it, as the file system has no O_DIRECT"),
    ]
    words = ", ".join(f"{format_size(part)} {what}" for part, what in parts if part)
    click.echo(f"engine {done.engine}; {words or 'nothing to read'}")
    if done.fallback:
        click.echo(f"not the best engine: {done.fallback}", err=True)

"""`penstock generate`: a checkpoint to measure with, without a download."""

from __future__ import annotations

import time
from pathlib import Path

import click

from penstock.errors import PenstockError
from penstock.units import format_size, parse_size

# The names in testing.shapes.PRESETS, repeated so that --help imports nothing of testing; a test compares.
PRESET_NAMES = (
    "tiny-llama",
    "llama-3.2-1b",
    "llama-3.2-3b",
    "llama-3.1-8b",
    "llama-3.1-70b",
    "qwen2.5-7b",
    "qwen2.5-72b",
    "opt-6.7b",
    "mixtral-8x7b",
)


def _size(_context: click.Context, _parameter: click.Parameter, text: str | None) -> int | None:
    if text is None:
        return None
    try:
        size_bytes = parse_size(text)
    except ValueError as error:
        raise click.BadParameter(str(error)) from error
    if size_bytes <= 0:
        raise click.BadParameter(f"{text!r} is nothing; ask for at least one byte")
    return size_bytes


@click.command(
    epilog="""\b
Examples:
  penstock generate /data/llama-3b --preset llama-3.2-3b
  penstock generate /data/20g --preset qwen2.5-72b --size 20GiB --shard-size 2GB
  penstock generate /data/gguf --preset llama-3.1-8b --format gguf
"""
)
@click.argument("directory", metavar="DIR", type=click.Path(file_okay=False, path_type=Path))
@click.option(
    "--preset",
    required=True,
    type=click.Choice(PRESET_NAMES),
    help="The model whose names and shapes to take.",
)
@click.option(
    "--size",
    "size_bytes",
    metavar="SIZE",
    callback=_size,
    help="As many layers as come closest to this, such as 6GiB.  [default: the model's own]",
)
@click.option(
    "--shard-size",
    "shard_bytes",
    metavar="SIZE",
    callback=_size,
    help="The largest safetensors file.  [default: 5GB]",
)
@click.option(
    "--format",
    "file_format",
    type=click.Choice(["safetensors", "gguf"]),
    default="safetensors",
    show_default=True,
    help="GGUF is one file, DIR/PRESET-BF16.gguf.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Same seed, same bytes.")
@click.option("--overwrite", is_flag=True, help="Replace the checkpoint that is there.")
def generate(
    directory: Path,
    preset: str,
    size_bytes: int | None,
    shard_bytes: int | None,
    file_format: str,
    seed: int,
    overwrite: bool,
) -> None:
    """Write a checkpoint with a real model's tensors and random weights into DIR.

    Names, shapes, order and file sizes are the model's own; the weights are bf16, finite and cannot be
    compressed away. Frameworks load it like a download. It has no tokenizer.
    """
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    from penstock.testing import checkpoint, gguf, shapes

    if file_format == "gguf" and shard_bytes is not None:
        raise click.UsageError("--shard-size is for safetensors; a GGUF is one file")
    shape = shapes.PRESETS[preset]
    if size_bytes is not None:
        shape = shapes.scaled(shape, size_bytes)
        if shape.vocab_size < shapes.PRESETS[preset].vocab_size:
            click.echo(
                f"One layer and the embeddings of {preset} are more than {format_size(size_bytes)}: "
                f"the vocabulary is cut to {shape.vocab_size} tokens.",
                err=True,
            )
    console = Console(stderr=True)
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    try:
        start_s = time.perf_counter()
        with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
            task = bar.add_task("", total=shapes.weight_bytes(shape))

            def advance(written_bytes: int) -> None:
                bar.advance(task, written_bytes)

            if file_format == "safetensors":
                files = checkpoint.generate_checkpoint(
                    directory,
                    shape,
                    shard_bytes=shard_bytes,
                    seed=seed,
                    overwrite=overwrite,
                    progress=advance,
                )
                target = directory
            else:
                target = directory / f"{preset}-BF16.gguf"
                files = [gguf.generate_gguf(target, shape, seed=seed, overwrite=overwrite, progress=advance)]
        elapsed_s = time.perf_counter() - start_s
    except (PenstockError, OSError) as error:
        raise click.ClickException(str(error)) from error
    specs = shapes.tensors(shape) if file_format == "safetensors" else gguf.gguf_tensors(shape)
    total_bytes = sum(file.stat().st_size for file in files)
    click.echo(
        f"{target}: {len(specs)} tensors, {len(files)} {'shard' if len(files) == 1 else 'shards'}, "
        f"{format_size(total_bytes)} in {elapsed_s:.1f} s, {total_bytes / elapsed_s / 1e9:.2f} GB/s"
    )

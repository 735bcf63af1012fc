"""`penstock inspect`: the tensors of a checkpoint, from its headers alone."""

from __future__ import annotations

import json
from pathlib import Path

import click

from penstock.errors import PenstockError
from penstock.units import format_size

_ORDERS = ("file", "name", "size", "dtype")


@click.command(
    epilog="""\b
Examples:
  penstock inspect /models/llama-3b
  penstock inspect --sort size --json model.safetensors"""
)
@click.argument("path", type=click.Path(exists=True, path_type=Path))
@click.option("--sort", type=click.Choice(_ORDERS), default="file", show_default=True, help="file: as they lie there.")
@click.option("--json", "as_json", is_flag=True, help="A list of objects, sizes in bytes.")
def inspect(path: Path, sort: str, as_json: bool) -> None:
    """List the tensors of a checkpoint with their dtypes, shapes and sizes.

    PATH is a safetensors or GGUF file, an index, or a directory with such files. Only headers are read.
    """
    from penstock.checkpoint.files import open_checkpoint

    try:
        checkpoint = open_checkpoint(path)
    except PenstockError as error:
        raise click.ClickException(str(error)) from error
    except OSError as error:
        raise click.ClickException(f"{error.filename or path}: {error.strerror or error}") from error
    tensors = [tensor for header in checkpoint.headers for tensor in header.tensors]
    if sort == "name":
        tensors.sort(key=lambda tensor: tensor.name)
    elif sort == "size":
        tensors.sort(key=lambda tensor: (-tensor.size_bytes, tensor.name))
    elif sort == "dtype":
        tensors.sort(key=lambda tensor: (tensor.dtype, tensor.name))
    if as_json:
        rows = [
            {
                "name": tensor.name,
                "dtype": tensor.dtype,
                "shape": list(tensor.shape),
                "size_bytes": tensor.size_bytes,
                "path": tensor.path,
                "start": tensor.start,
            }
            for tensor in tensors
        ]
        click.echo(json.dumps(rows, indent=2))
        return
    wide = max((len(tensor.name) for tensor in tensors), default=0)
    shapes = [" × ".join(map(str, tensor.shape)) or "scalar" for tensor in tensors]
    tall = max(map(len, shapes), default=0)
    for tensor, shape in zip(tensors, shapes, strict=True):
        where = f"  {Path(tensor.path).name}" if len(checkpoint.headers) > 1 else ""
        click.echo(
            f"{tensor.name:{wide}}  {tensor.dtype:<11}  {shape:>{tall}}  {format_size(tensor.size_bytes):>9}{where}"
        )
    dtypes: dict[str, int] = {}
    for tensor in tensors:
        dtypes[tensor.dtype] = dtypes.get(tensor.dtype, 0) + tensor.size_bytes
    kinds = ", ".join(
        f"{dtype} {format_size(size)}" for dtype, size in sorted(dtypes.items(), key=lambda kind: -kind[1])
    )
    files = len(checkpoint.headers)
    click.echo(
        f"{len(tensors)} tensors in {files} {'file' if files == 1 else 'files'}, "
        f"{format_size(checkpoint.size_bytes)}{': ' + kinds if kinds else ''}"
    )

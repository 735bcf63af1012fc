"""`penstock kv`: what KV caches have left on a device: saved sessions, and regions of caches that were killed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from penstock.units import format_size

if TYPE_CHECKING:
    from penstock.kv.session import SessionReader

_path = click.argument("path", type=click.Path(exists=True, path_type=Path))


@click.group(
    epilog="""\b
Examples:
  penstock kv inspect /nvme/kv
  penstock kv verify /nvme/kv/contract.penstock-session
  penstock kv delete /nvme/kv/contract.penstock-session"""
)
def kv() -> None:
    """Look after the sessions that KV caches have saved."""


@kv.command(
    epilog="""\b
Examples:
  penstock kv inspect /nvme/kv
  penstock kv inspect --json /nvme/kv/contract.penstock-session"""
)
@_path
@click.option("--json", "as_json", is_flag=True, help="One object a session.")
def inspect(path: Path, as_json: bool) -> None:
    """Show which model and how many tokens each session is of.

    PATH is a session, or a directory with some. Only their tables are read: `penstock kv verify` reads everything.
    """
    found = []
    for file in _files(path):
        entry: dict[str, Any] = {"path": str(file), "size_bytes": file.stat().st_size}
        try:
            with _open(file) as reader:
                entry |= reader.facts
                entry["parts"] = len(reader.parts)
        except click.ClickException as error:
            entry["problem"] = error.message
        found.append(entry)
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return
    if not found:
        click.echo(f"{path}: no sessions", err=True)
    for entry in found:
        size = format_size(entry["size_bytes"])
        if "problem" in entry:
            click.echo(f"{entry['path']}  {size}  {entry['problem']}")
        else:
            told = f"{entry['tokens']} tokens  {entry['dtype']}  {entry['model']}"
            click.echo(f"{entry['path']}  {size}  {told}")


@kv.command(
    epilog="""\b
Example:
  penstock kv verify /nvme/kv"""
)
@_path
@click.pass_context
def verify(context: click.Context, path: Path) -> None:
    """Read sessions whole, and compare every checksum.

    PATH is a session, or a directory with some. The exit status is 1 if one is damaged.
    """
    from penstock.errors import SessionError

    files, problems = _files(path), 0
    for file in files:
        try:
            with _open(file) as reader:
                for name in reader.parts:
                    for _ in reader.chunks(name):
                        pass
                size = format_size(reader.size_bytes)
            click.echo(f"{file}: {size}: every checksum is right")
        except (click.ClickException, SessionError, OSError) as error:
            problems += 1
            click.echo(error.message if isinstance(error, click.ClickException) else str(error), err=True)
    if not files:
        click.echo(f"{path}: no sessions", err=True)
    if problems:
        context.exit(1)


@kv.command(
    epilog="""\b
Examples:
  penstock kv delete /nvme/kv/contract.penstock-session
  penstock kv delete --yes /nvme/kv"""
)
@_path
@click.option("--yes", is_flag=True, help="Do not ask before deleting all of a directory.")
def delete(path: Path, yes: bool) -> None:
    """Delete a session, all sessions of a directory, or the region of a cache that was killed.

    Nothing else is deleted: a file that is neither is left as it is.
    """
    from penstock.linux.wholefile import remove_abandoned

    files = list(_files(path))
    if path.is_dir() and files and not yes:
        many = "1 session" if len(files) == 1 else f"{len(files)} sessions"
        click.confirm(f"Delete {many} in {path}?", abort=True)
    for file in files:
        if not path.is_dir():
            _require_ours(file)
        try:
            file.unlink()
        except OSError as error:
            raise click.ClickException(str(error)) from error
        remove_abandoned(file)
        click.echo(f"deleted {file}")
    if not files:
        click.echo(f"{path}: no sessions", err=True)


def _files(path: Path) -> list[Path]:
    from penstock.kv.session import SUFFIX

    return sorted(path.glob(f"*{SUFFIX}")) if path.is_dir() else [path]


def _open(path: Path) -> SessionReader:
    from penstock.errors import SessionError
    from penstock.kv.session import SessionReader

    try:
        return SessionReader(path)
    except (SessionError, OSError) as error:
        raise click.ClickException(str(error)) from error


def _require_ours(path: Path) -> None:
    """Complain unless it is a session, damaged or not, or a region that nobody has open."""
    from penstock.errors import RegionError
    from penstock.kv.cache import OWNER
    from penstock.kv.session import MAGIC
    from penstock.storage.region import Region

    with path.open("rb") as file:
        if file.read(len(MAGIC)) == MAGIC:
            return
    try:
        Region.open(path, owner=OWNER).close()
    except (RegionError, OSError) as error:
        raise click.ClickException(f"{error}; it is left as it is") from error

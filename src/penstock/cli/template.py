"""`penstock template`: the recorded I/O templates."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from penstock.cli.paths import template_directory
from penstock.units import format_size

if TYPE_CHECKING:
    from penstock.pagecache.template import Template, TemplateStore

_templates_option = click.option(
    "--templates",
    "directory",
    metavar="DIR",
    help="Where the templates are.  [default: $PENSTOCK_TEMPLATES, else below the XDG data directory]",
)


@click.group(
    epilog="""\b
Examples:
  penstock template list
  penstock template show serve-llama-3b-1f0c2a9d4e6b
  penstock template delete serve-llama-3b-1f0c2a9d4e6b
"""
)
def template() -> None:
    """Look after I/O templates: what each service reads, in order, as recorded in its first run."""


@template.command(
    "list",
    epilog="""\b
Example:
  penstock template list --templates /shared/templates
""",
)
@_templates_option
def list_templates(directory: str | None) -> None:
    """List all templates, damaged ones too."""
    store = _store(directory)
    rows, damaged = [], []
    for path, found in _entries(store):
        if isinstance(found, Exception):
            damaged.append((_service_of(path), str(found)))
            rows.append((_service_of(path), "damaged", "", "", "", _file_size(path)))
        else:
            rows.append(
                (
                    found.service,
                    found.recorded_at[:19].replace("T", " "),
                    str(len(found.files)),
                    str(len(found.groups)),
                    format_size(found.bytes_read),
                    _file_size(path),
                )
            )
    if not rows:
        click.echo(f"no templates in {store.directory}; `penstock run` records one", err=True)
        return
    _print_table(("service", "recorded (UTC)", "files", "workers", "reads", "template"), rows)
    for service, reason in damaged:
        click.echo(f"{service}: {reason}", err=True)


@template.command(
    epilog="""\b
Examples:
  penstock template show serve-llama-3b-1f0c2a9d4e6b
  penstock template show serve-llama-3b-1f0c2a9d4e6b --json
""",
)
@click.argument("service")
@click.option("--json", "as_json", is_flag=True, help="One object, offsets and sizes in bytes.")
@_templates_option
def show(service: str, as_json: bool, directory: str | None) -> None:
    """Show what each worker of SERVICE reads, in order."""
    from penstock.errors import TemplateFormatError

    store = _store(directory)
    try:
        found = store.load(service)
    except (TemplateFormatError, OSError) as error:
        raise click.ClickException(str(error)) from error
    if found is None:
        raise _unknown(store, service)
    if as_json:
        click.echo(json.dumps(_as_json(found), indent=2))
        return
    click.echo(f"service   {found.service}")
    where = f" at {', '.join(found.root_hints)}" if found.root_hints else ""
    click.echo(f"recorded  {found.recorded_at or 'unknown'}{where}")
    click.echo(f"files     {len(found.files)}, {format_size(sum(file.size_bytes for file in found.files))}")
    width = max((len(part.name) for group in found.groups for part in group), default=0)
    for worker, group in enumerate(found.groups):
        bytes_read = sum(part.stop - part.start for part in group)
        ranges = "1 range" if len(group) == 1 else f"{len(group)} ranges"
        click.echo(f"\nworker {worker}: {ranges}, {format_size(bytes_read)}")
        for part in group:
            size = format_size(part.stop - part.start)
            click.echo(f"  {part.name:{width}}  {size:>9}  [{part.start}, {part.stop})")


@template.command(
    epilog="""\b
Examples:
  penstock template delete serve-llama-3b-1f0c2a9d4e6b
  penstock template delete --all --templates /shared/templates
""",
)
@click.argument("services", metavar="SERVICE...", nargs=-1)
@click.option("--all", "every", is_flag=True, help="Delete all templates, after asking.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@_templates_option
def delete(services: tuple[str, ...], every: bool, yes: bool, directory: str | None) -> None:
    """Delete the templates of services; their next runs record new ones."""
    store = _store(directory)
    if every == bool(services):
        raise click.UsageError("name the services, or give --all")
    if every:
        services = tuple(_service_of(path) for path, _ in _entries(store))
        if not services:
            click.echo(f"no templates in {store.directory}", err=True)
            return
        if not yes:
            many = "1 template" if len(services) == 1 else f"{len(services)} templates"
            click.confirm(f"Delete {many} in {store.directory}?", abort=True)
    for service in services:
        try:
            deleted = store.delete(service)
        except OSError as error:
            raise click.ClickException(str(error)) from error
        if not deleted and not every:
            raise _unknown(store, service)
        click.echo(f"deleted {service}")


def _store(directory: str | None) -> TemplateStore:
    from penstock.pagecache.template import TemplateStore

    return TemplateStore(template_directory(directory))


def _entries(store: TemplateStore) -> list[tuple[Path, Template | Exception]]:
    try:
        return list(store)
    except OSError as error:
        raise click.ClickException(str(error)) from error


def _file_size(path: Path) -> str:
    try:
        return format_size(path.stat().st_size)
    except FileNotFoundError:
        return ""  # deleted by someone else meanwhile


def _service_of(path: Path) -> str:
    """A name by which a store finds this very file, also where its contents cannot be read."""
    from penstock.pagecache.template import SUFFIX

    return path.name.removesuffix(SUFFIX)


def _unknown(store: TemplateStore, service: str) -> click.ClickException:
    known = [_service_of(path) for path, _ in _entries(store)]
    hint = f"there are: {', '.join(known)}" if known else "there are none"
    return click.ClickException(f"no template of {service!r} in {store.directory}; {hint}")


def _as_json(found: Template) -> dict[str, Any]:
    return {
        "service": found.service,
        "recorded_at": found.recorded_at,
        "root_hints": list(found.root_hints),
        "bytes_read": found.bytes_read,
        "files": [
            {"name": file.name, "size_bytes": file.size_bytes, "fingerprint": file.fingerprint} for file in found.files
        ],
        "workers": [
            [{"name": part.name, "start": part.start, "stop": part.stop} for part in group] for group in found.groups
        ],
    }


def _print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    for row in (header, *rows):
        cells = [
            cell.ljust(width) if column < 2 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        click.echo("  ".join(cells).rstrip())

"""`penstock evict`: drops models from the page cache."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import click

from penstock.units import format_size

if TYPE_CHECKING:
    from penstock.pagecache.base import ModelFile
    from penstock.pagecache.evictor import MappedPart

_NAMED_PROCESSES = 4


@dataclass(slots=True)
class _Mappers:
    """Who maps the files, as far as this user may see."""

    parts: dict[ModelFile, list[MappedPart]] = field(default_factory=dict)
    names: dict[int, str] = field(default_factory=dict)  # by pid
    hidden: int = 0  # processes that could not be looked into

    def of(self, file: ModelFile) -> Sequence[MappedPart]:
        return self.parts.get(file, ())


@click.command(
    epilog="""\b
Examples:
  penstock evict /models/llama-3b
  penstock evict /models/a /models/b/model.gguf
"""
)
@click.argument("paths", metavar="PATH...", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
def evict(paths: tuple[Path, ...]) -> None:
    """Drop what the page cache holds of models.

    Of a directory the weight files are dropped, of a file that file; changes not yet written are written first.
    Pages that a running process maps are dropped too where the privileges allow (CAP_SYS_NICE): it reads them
    again when it needs them. Shows for each file what was freed, and what stayed and why.
    """
    from penstock.pagecache.evictor import Evictor
    from penstock.pagecache.files import ModelFiles
    from penstock.pagecache.ledger import Ledger

    files = list(ModelFiles(paths))
    if not files:
        raise click.ClickException(f"no weight files below {', '.join(map(str, paths))}; name a file to drop any other")
    freed_bytes = stayed_bytes = 0
    with contextlib.closing(Ledger()) as ledger, _mappers(files) as mappers:
        evictor = Evictor(ledger, mappers.of)
        for file in files:
            try:
                record = ledger.record(file)
                before = record.residency.resident_bytes(0, file.size_bytes)
                os.fdatasync(record.fd)  # dirty pages cannot be dropped
                evictor.evict(file, 0, file.size_bytes, at_once=True)
                after = record.residency.resident_bytes(0, file.size_bytes)
            except OSError as error:
                raise click.ClickException(f"{file.path}: {error.strerror or error}") from error
            freed_bytes += before - after
            stayed_bytes += after
            click.echo(f"{format_size(before - after):>9} freed of {format_size(before):>9}  {file.path}")
            if after:
                click.echo(f"{format_size(after):>9} stayed: {_why(file, mappers, may_page_out=not evictor.warning)}")
    if len(files) > 1:
        stayed = f", {format_size(stayed_bytes)} stayed" if stayed_bytes else ""
        click.echo(f"{format_size(freed_bytes):>9} freed in all{stayed}")


@contextlib.contextmanager
def _mappers(files: Sequence[ModelFile]) -> Iterator[_Mappers]:
    found = _Mappers()
    with contextlib.ExitStack() as pidfds:
        for name in os.listdir("/proc"):
            if name.isdigit():
                _look_into(int(name), files, found, pidfds)
        yield found


def _look_into(pid: int, files: Sequence[ModelFile], found: _Mappers, pidfds: contextlib.ExitStack) -> None:
    from penstock.linux import process
    from penstock.pagecache.evictor import MappedPart

    by_identity = {(file.device, file.inode): file for file in files}
    inodes = {file.inode for file in files}
    pidfd = None
    try:
        for mapping in process.read_maps(pid):
            if mapping.inode not in inodes:
                continue
            file = by_identity.get((mapping.device, mapping.inode)) or by_identity.get(_identity(mapping.path))
            if file is None:
                continue
            if pidfd is None:
                pidfd = process.open_pidfd(pid)
                pidfds.callback(os.close, pidfd)
                found.names[pid] = os.path.basename((process.command(pid) or ["?"])[0])
            start = mapping.offset_bytes
            part = MappedPart(pid, pidfd, mapping.start, start, start + mapping.stop - mapping.start)
            found.parts.setdefault(file, []).append(part)
    except PermissionError:
        found.hidden += 1
    except ProcessLookupError:
        pass


def _identity(path: str) -> tuple[int, int]:
    """Device and inode by name: btrfs and overlay show another device in a process's mappings."""
    try:
        status = os.stat(path)
    except OSError:
        return -1, -1
    return status.st_dev, status.st_ino


def _why(file: ModelFile, mappers: _Mappers, *, may_page_out: bool) -> str:
    pids = sorted({part.pid for part in mappers.of(file)})
    if pids:
        names = ", ".join(f"{pid} ({mappers.names.get(pid, '?')})" for pid in pids[:_NAMED_PROCESSES])
        more = f" and {len(pids) - _NAMED_PROCESSES} more" if len(pids) > _NAMED_PROCESSES else ""
        who = f"mapped by {'process' if len(pids) == 1 else 'processes'} {names}{more}"
        if not may_page_out:
            return f"{who}, and without CAP_SYS_NICE only unmapped pages can be dropped; end it, or run as root"
        if len(pids) > 1:
            return f"{who}; the kernel keeps a page that several map until all but one have ended"
        return f"{who}, which locks it in memory or is reading it"
    if mappers.hidden:
        return f"in use, perhaps by one of {mappers.hidden} processes that only root may look into"
    return "in use or locked in memory; a file in a memory file system has no other place"

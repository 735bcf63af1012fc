"""I/O templates: what each worker of a service reads, in order, as recorded in one of its runs.

The format is described in docs/templates.md. Files are known by their names below the model's root, their
size and a fingerprint of sampled blocks, never by path or inode, so that nodes which keep the model elsewhere
share one template. Ranges are stored as differences, which makes a sequential reader's template a few numbers
a file.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from penstock.errors import TemplateError, TemplateFormatError
from penstock.linux.wholefile import WholeFile, remove_abandoned
from penstock.linux.window import PAGE_BYTES
from penstock.pagecache.base import Range
from penstock.pagecache.intervals import IntervalSet
from penstock.units import KiB, MiB

FORMAT = "penstock-template"
VERSION = 1
SUFFIX = ".template.json"

_SAMPLES = 16
_SAMPLE_BYTES = 4 * KiB
_MERGE_GAP_BYTES = 4 * MiB  # holes smaller than this are read along: two folios that were touched between polls
_READ_ON_BYTES = 1024 * MiB  # and up to this, if they are read later
# A reader that came this close to the end has read it: its mapping went before the next poll. A quarter of the file at
# the most; 8 ms of a reader of 30 GB/s (touching what is cached already) are 240 MB.
_TAIL_BYTES = 512 * MiB
_OPEN_RUNS = 16  # readers with a thread pool load several tensors at once
_MOST_RUNS = 1 << 16  # the slices of 256 experts in 61 layers are 47,000; more than this has no order to replay


@dataclass(frozen=True, slots=True)
class FileIdentity:
    """What a file must still be for its recorded reads to be worth anything."""

    name: str
    size_bytes: int
    fingerprint: str


@dataclass(frozen=True, slots=True)
class Template:
    """The recorded reads of one service."""

    service: str
    files: tuple[FileIdentity, ...]
    groups: tuple[tuple[Range, ...], ...]  # of each worker, in order
    root_hints: tuple[str, ...] = ()  # where the models were when it was recorded, for a command that names none
    recorded_at: str = ""  # ISO 8601, UTC

    @property
    def bytes_read(self) -> int:
        """Bytes of all ranges of all workers."""
        return sum(part.stop - part.start for group in self.groups for part in group)

    def to_json(self) -> str:
        """The file's text."""
        index = {identity.name: number for number, identity in enumerate(self.files)}
        body = {
            "format": FORMAT,
            "version": VERSION,
            "service": self.service,
            "recorded_at": self.recorded_at,
            "root_hints": list(self.root_hints),
            "page_bytes": PAGE_BYTES,
            "files": [[f.name, f.size_bytes, f.fingerprint] for f in self.files],
            "groups": [list(_pack(group, index)) for group in self.groups],
        }
        body["checksum"] = _checksum(body)
        return json.dumps(body, separators=(",", ":")) + "\n"

    @classmethod
    def from_json(cls, text: str, path: str | os.PathLike[str] = "<text>") -> Template:
        """Parse a template file's text.

        Raises:
            TemplateFormatError: truncated, damaged, or of another version.
        """
        try:
            body = json.loads(text)
        except ValueError as error:
            raise TemplateFormatError(
                f"{path}: not a complete template ({error}); delete it, the next run records a new one"
            ) from error
        if not isinstance(body, dict) or body.get("format") != FORMAT:
            raise TemplateFormatError(f"{path}: not a penstock template")
        if body.get("version") != VERSION:
            raise TemplateFormatError(
                f"{path}: template version {body.get('version')!r}, this penstock reads version {VERSION}; "
                "use the newer penstock or another --templates directory"
            )
        checksum = body.pop("checksum", None)
        if checksum != _checksum(body):
            raise TemplateFormatError(
                f"{path}: checksum {checksum!r} does not match the contents; delete it, the next run records a new one"
            )
        try:
            files = tuple(FileIdentity(str(n), int(s), str(f)) for n, s, f in body["files"])
            groups = tuple(tuple(_unpack(group, files, int(body["page_bytes"]))) for group in body["groups"])
            roots = tuple(str(root) for root in body["root_hints"])
            return cls(body["service"], files, groups, roots, body["recorded_at"])
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise TemplateFormatError(f"{path}: {type(error).__name__}: {error}") from error


def _checksum(body: dict[str, Any]) -> str:
    text = json.dumps(body, separators=(",", ":"), sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _pack(group: Sequence[Range], index: dict[str, int]) -> Iterator[list[int]]:
    """One list a stretch of the same file: [file, gap, pages, gap, pages, …], gaps from the last stop."""
    stretch: list[int] = []
    position = 0
    for part in group:
        number = index[part.name]
        if not stretch or stretch[0] != number:
            if stretch:
                yield stretch
            stretch, position = [number], 0
        start, stop = part.start // PAGE_BYTES, -(-part.stop // PAGE_BYTES)
        stretch += [start - position, stop - start]
        position = stop
    if stretch:
        yield stretch


def _unpack(group: Iterable[Sequence[int]], files: Sequence[FileIdentity], page_bytes: int) -> Iterator[Range]:
    for number, *numbers in group:
        identity = files[number]
        position = 0
        for gap, pages in zip(numbers[::2], numbers[1::2], strict=True):
            start, position = position + gap, position + gap + pages
            stop = min(position * page_bytes, identity.size_bytes)
            if not 0 <= start * page_bytes < stop:
                raise ValueError(f"{identity.name}: pages {start}–{position} lie outside the file")
            yield Range(identity.name, start * page_bytes, stop)


def fingerprint(path: str | os.PathLike[str], size_bytes: int) -> str:
    """A hash over the size and 16 sampled blocks of 4 KiB: first, last and evenly between.

    Reads without read-ahead, so that asking leaves no more than the samples in the page cache. A change that
    leaves all samples alone goes unseen; it costs prefetching of what is no longer read, never wrong data.
    """
    digest = hashlib.blake2b(size_bytes.to_bytes(8, "little"), digest_size=16)
    last = max(0, size_bytes - _SAMPLE_BYTES)
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
        for sample in range(_SAMPLES):
            offset = last * sample // (_SAMPLES - 1) // _SAMPLE_BYTES * _SAMPLE_BYTES
            digest.update(os.pread(fd, _SAMPLE_BYTES, offset))
        digest.update(os.pread(fd, _SAMPLE_BYTES, last))
    finally:
        os.close(fd)
    return digest.hexdigest()


@dataclass(slots=True)
class _Run:
    name: str
    start: int
    stop: int


@dataclass(slots=True)
class GroupRecorder:
    """Merges one worker's accesses into ordered ranges.

    Several runs stay open at once, so that a reader with a pool of threads, each loading a tensor, still gives
    one range a tensor. A range stands where its first byte was read.
    """

    _runs: list[_Run] = field(default_factory=list)
    _open: list[_Run] = field(default_factory=list)

    def record(self, name: str, start: int, stop: int) -> None:
        """Add an access."""
        for run in reversed(self._open):
            if run.name == name and run.start <= start <= run.stop + _MERGE_GAP_BYTES:
                run.stop = max(run.stop, stop)
                return
        if len(self._runs) >= _MOST_RUNS:
            return
        run = _Run(name, start, stop)
        self._runs.append(run)
        self._open.append(run)
        if len(self._open) > _OPEN_RUNS:
            del self._open[0]

    def ranges(self, sizes: Mapping[str, int]) -> tuple[Range, ...]:
        """The ranges so far, each byte once, where it was first read.

        Runs that follow each other in the file are one where what lies between them is small or was read later:
        transformers, for one, touches the beginning of every tensor before it reads any, and reading on is
        cheaper than coming back.

        Args:
            sizes: bytes of each file: a range that ends just before the end is taken to have reached it.
        """
        read: dict[str, IntervalSet] = {}
        for run in self._runs:
            read.setdefault(run.name, IntervalSet()).add(run.start, run.stop)
        for name, parts in read.items():
            end = max(stop for _, stop in parts)
            if sizes[name] - end <= min(_TAIL_BYTES, sizes[name] // 4):
                parts.add(end, sizes[name])
        merged: list[_Run] = []
        for run in self._runs:
            last = merged[-1] if merged else None
            if last is not None and last.name == run.name and last.start <= run.start:
                gap = run.start - last.stop
                if gap <= _MERGE_GAP_BYTES or (
                    gap <= _READ_ON_BYTES and read[run.name].covered_bytes(last.stop, run.start) >= 0.9 * gap
                ):
                    last.stop = max(last.stop, run.stop)
                    continue
            merged.append(_Run(run.name, run.start, run.stop))
        listed: dict[str, IntervalSet] = {}
        ranges = []
        for run in merged:
            done = listed.setdefault(run.name, IntervalSet())
            end = sizes[run.name]
            if run.stop < end <= run.stop + _TAIL_BYTES and read[run.name].covers(run.stop, end):
                run.stop = end
            for start, stop in done.missing(run.start, run.stop):
                ranges.append(Range(run.name, start, stop))
            done.add(run.start, run.stop)
        return tuple(ranges)


class TemplateStore:
    """Templates as files in one directory, which several nodes may share.

    Files are replaced atomically, so a reader sees the old or the new one and concurrent recorders leave the
    last whole one.

    Args:
        directory: made at the first write.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory = Path(directory)

    def path(self, service: str) -> Path:
        """Where a service's template lies; the name is the service's own where a file name can hold it."""
        safe = re.sub(r"[^A-Za-z0-9._-]", "_", service)[:80]
        if safe != service or safe.startswith("."):
            digest = hashlib.blake2b(service.encode("utf-8", "surrogatepass"), digest_size=4).hexdigest()
            safe = f"{safe.lstrip('.')}-{digest}"
        return self.directory / f"{safe}{SUFFIX}"

    def load(self, service: str) -> Template | None:
        """The template of a service; None where there is none.

        Raises:
            TemplateFormatError: there is one that cannot be used.
            OSError: it cannot be read.
        """
        path = self.path(service)
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return None
        except UnicodeDecodeError as error:
            raise TemplateFormatError(
                f"{path}: not text ({error}); delete it, the next run records a new one"
            ) from error
        return Template.from_json(text, path)

    def save(self, template: Template) -> Path:
        """Write a template beside its place and move it there.

        Raises:
            OSError: the disk is full or the directory is not writable; the old template is untouched.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        path = self.path(template.service)
        with WholeFile(path, 0o644) as file:
            file.write(template.to_json().encode())
            file.commit()
        return path

    def delete(self, service: str) -> bool:
        """Delete a service's template; False where there was none."""
        path = self.path(service)
        remove_abandoned(path)
        try:
            path.unlink()
        except FileNotFoundError:
            return False
        return True

    def __iter__(self) -> Iterator[tuple[Path, Template | TemplateError]]:
        """Every template file with its contents, or with why it cannot be read, by name."""
        for path in sorted(self.directory.glob(f"*{SUFFIX}")):
            try:
                yield path, Template.from_json(path.read_text(encoding="utf-8"), path)
            except TemplateFormatError as error:
                yield path, error
            except UnicodeDecodeError as error:
                yield path, TemplateFormatError(f"{path}: not text ({error})")
            except FileNotFoundError:
                continue  # deleted since the listing
            except OSError as error:
                yield path, TemplateError(f"{path}: cannot be read: {error.strerror}")

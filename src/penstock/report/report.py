"""What one run did: the file that `penstock run --report` writes and `penstock plot` reads.

The JSON object has the fields of `Report` as keys, in their order, after ``format`` and ``version``. Unknown
keys are passed over, so that a field may be added without a new version.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

from penstock import __version__
from penstock.errors import ReportError
from penstock.linux.wholefile import WholeFile
from penstock.pagecache.sample import Sample
from penstock.units import format_size

FORMAT = "penstock-report"
VERSION = 1

Mode: TypeAlias = Literal["record", "replay", "observe"]

_PAST: dict[Mode, str] = {"record": "recorded", "replay": "replayed", "observe": "observed"}


@dataclass(frozen=True, slots=True)
class Report:
    """One run of a program under penstock, ended or going on. Times are seconds since the program's start."""

    service: str
    mode: Mode
    policy: str
    observer: str
    exit_code: int | None  # None while the program runs
    wall_s: float
    first_access_s: float | None  # None where no model file was read
    last_access_s: float | None
    bytes_accessed: int
    bytes_prefetched: int
    bytes_prefetched_unused: int
    bytes_evicted: int
    bytes_device_read: int
    peak_resident_bytes: int
    warnings: tuple[str, ...] = ()
    timeline: tuple[Sample, ...] = ()
    command: tuple[str, ...] = ()
    model_bytes: int = 0
    loader_method: str = ""
    residency_method: str = ""  # how it was found out what is cached, "mincore" for one
    memory_source: str = ""  # what bounds the memory: "host", or a cgroup
    budget_bytes: int = 0  # page cache that the model was allowed, as last read
    penstock_version: str = __version__

    def to_json(self) -> str:
        """The file's text."""
        body = {"format": FORMAT, "version": VERSION, **asdict(self)}
        body["wall_s"] = round(self.wall_s, 4)
        for key in ("first_access_s", "last_access_s"):
            if body[key] is not None:
                body[key] = round(body[key], 4)
        for sample in body["timeline"]:
            sample["t_s"] = round(sample["t_s"], 4)
        return json.dumps(body, indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str, path: str | os.PathLike[str] = "<text>") -> Report:
        """Parse a report file's text.

        Raises:
            ReportError: truncated, not a report, or of another version.
        """
        try:
            body = json.loads(text)
        except ValueError as error:
            raise ReportError(f"{path}: not a complete report ({error}); run again with --report") from error
        if not isinstance(body, dict) or body.get("format") != FORMAT:
            raise ReportError(f"{path}: not a penstock report; `penstock run --report FILE.json` writes one")
        if body.get("version") != VERSION:
            raise ReportError(f"{path}: report version {body.get('version')!r}, this penstock reads version {VERSION}")
        values = {}
        for field in fields(cls):
            if field.name not in body:
                raise ReportError(f"{path}: the key {field.name!r} is missing")
            try:
                values[field.name] = _PARSERS[str(field.type)](body[field.name])
            except (TypeError, ValueError, KeyError) as error:
                raise ReportError(
                    f"{path}: {field.name!r} is not {field.type}: {type(error).__name__}: {error}"
                ) from error
        return cls(**values)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Report:
        """Read a report file.

        Raises:
            ReportError: it is not a report that can be read.
            OSError: the file cannot be read.
        """
        try:
            return cls.from_json(Path(path).read_text(encoding="utf-8"), path)
        except UnicodeDecodeError as error:
            raise ReportError(f"{path}: not text ({error})") from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the report beside its place and move it there; into a pipe or a device, as it is.

        Raises:
            OSError: the disk is full or the directory is not writable; what was at the path is untouched.
        """
        target = Path(path)
        if target.exists() and not target.is_file():  # a file in place of /dev/null would be everybody's loss
            target.write_text(self.to_json(), encoding="utf-8")
            return
        with WholeFile(target, 0o666) as file:
            file.write(self.to_json().encode())
            file.commit(is_durable=False)


def summary_lines(report: Report) -> list[str]:
    """What penstock says after a run: one line of figures, and one more where there is something to say."""
    head = f"penstock: {_PAST[report.mode]} {report.service}: "
    if report.last_access_s is None:
        head = head.replace("recorded ", "")
        first = f"no model file was read in {report.wall_s:.1f} s"
    else:
        first = f"{format_size(report.bytes_accessed)} read in {report.last_access_s:.1f} s"
        if report.last_access_s > 0:
            first += f" ({report.bytes_accessed / report.last_access_s / 1e9:.2f} GB/s)"
    if report.bytes_prefetched:
        first += f", {format_size(report.bytes_prefetched)} prefetched"
        first += f", {format_size(report.bytes_prefetched_unused)} unused"
    second = _what_matters(report)
    return [head + first, *([f"penstock: {second}"] if second else [])]


def _what_matters(report: Report) -> str:
    match report.warnings:
        case ():
            pass
        case (only,):
            return f"warning: {only}"
        case (first, *others):
            more = f"{len(others)} more warning{'s' if len(others) > 1 else ''}"
            return f"warning: {first} (and {more}: --report has all)"
    if report.bytes_evicted:
        peak = f", at most {format_size(report.peak_resident_bytes)} of the model cached" if report.timeline else ""
        return f"{format_size(report.bytes_evicted)} evicted behind the readers{peak} ({report.memory_source})"
    if report.mode == "record" and report.bytes_accessed:
        return "the I/O template is stored; the next run prefetches from its start"
    return ""


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"got {value!r}")
    return float(value)


def _integer(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"got {value!r}")
    return value


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"got {value!r}")
    return value


def _mode(value: object) -> Mode:
    found: Mode | None = next((mode for mode in get_args(Mode) if mode == value), None)
    if found is None:
        raise ValueError(f"got {value!r}; it is one of {', '.join(get_args(Mode))}")
    return found


def _list(value: object) -> Iterable[Any]:
    if not isinstance(value, list):
        raise TypeError(f"got {value!r}")
    return value


def _sample(value: Mapping[str, object]) -> Sample:
    return Sample(
        _number(value["t_s"]),
        _integer(value["device_read_bytes"]),
        _integer(value["accessed_bytes"]),
        _integer(value["resident_bytes"]),
    )


# By the annotations of Report's fields: a field of a type without a parser fails in the first test.
_PARSERS: dict[str, Callable[[Any], Any]] = {
    "str": _text,
    "int": _integer,
    "float": _number,
    "int | None": lambda value: None if value is None else _integer(value),
    "float | None": lambda value: None if value is None else _number(value),
    "Mode": _mode,
    "tuple[str, ...]": lambda value: tuple(_text(entry) for entry in _list(value)),
    "tuple[Sample, ...]": lambda value: tuple(_sample(entry) for entry in _list(value)),
}

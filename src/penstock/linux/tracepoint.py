"""Where the fields of a tracepoint's records lie, as the kernel describes it."""

from __future__ import annotations

import re
from dataclasses import dataclass

from penstock.errors import UnsupportedError


@dataclass(frozen=True, slots=True)
class Field:
    """Where one field of a tracepoint's record lies."""

    offset_bytes: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Format:
    """The record of one tracepoint, as its ``format`` file describes it."""

    name: str
    identifier: int
    fields: dict[str, Field]


def parse_format(text: str) -> Format:
    """Read an ``events/…/format`` file.

    Raises:
        UnsupportedError: the text has no name or no ID.
    """
    name = re.search(r"^name: (\w+)$", text, re.MULTILINE)
    identifier = re.search(r"^ID: (\d+)$", text, re.MULTILINE)
    if name is None or identifier is None:
        raise UnsupportedError(
            "a tracepoint's format file lacks its name or ID line; penstock cannot read this kernel's tracefs"
        )
    fields = {
        match[1]: Field(int(match[2]), int(match[3]))
        for match in re.finditer(r"field:[^;]*?(\w+)(?:\[\d*\])?;\s*offset:(\d+);\s*size:(\d+);", text)
    }
    return Format(name[1], int(identifier[1]), fields)

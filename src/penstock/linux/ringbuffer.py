"""The events in a trace ring buffer's pages, decoded in batches.

Source: Documentation/trace/ring-buffer-design.rst; the page layout is that of events/header_page and
events/header_event.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from penstock.linux.tracefs import PADDING, TIME_EXTEND, TIME_STAMP, Page
from penstock.linux.tracepoint import Format
from penstock.linux.window import PAGE_BYTES

EVENT_DTYPE = np.dtype(
    [
        ("time_ns", np.int64),  # of the kernel's local trace clock: for ordering only
        ("thread", np.int32),
        ("kind", np.int32),  # index into the formats decoded with
        ("device", np.int64),  # as os.makedev counts
        ("inode", np.uint64),
        ("start", np.int64),  # bytes, half-open
        ("stop", np.int64),
    ]
)
Events = NDArray[np.void]  # of EVENT_DTYPE, [events]

_RUN = 16  # records of one length that are looked for at once


def decode_pages(pages: Sequence[Page], formats: Sequence[Format]) -> Events:
    """Decode the ring-buffer pages of all CPUs, in any order, into events in the order of their times."""
    if not pages:
        return np.zeros(0, EVENT_DTYPE)
    words_per_page = max(len(data) for _, data in pages) // 4 + 16  # room to gather a record at the end
    words = np.zeros((len(pages), words_per_page), np.uint32)
    ends = np.zeros(len(pages), np.int64)
    clock = np.zeros(len(pages), np.int64)
    for number, (page_header, data) in enumerate(pages):
        length = len(data) // 4
        words[number, :length] = np.frombuffer(data, np.uint32, length)
        ends[number] = length
        clock[number] = struct.unpack_from("<Q", page_header)[0]
    walk = _Walk(words, ends, clock)
    walk.to_the_end()
    row, word, time_ns = walk.found()
    kinds = words[row, word] & 0xFFFF  # common_type
    parts = []
    for index, layout in enumerate(formats):
        chosen = np.flatnonzero(kinds == layout.identifier)
        if len(chosen):
            parts.append(_decode_records(words, row[chosen], word[chosen], time_ns[chosen], index, layout))
    if not parts:
        return np.zeros(0, EVENT_DTYPE)
    events = np.concatenate(parts)
    return events[np.argsort(events["time_ns"], kind="stable")]


class _Walk:
    """Finds the records of many pages, of all pages at once, and several of each that are of one length.

    So the work in Python grows with the changes of length in the page that has most of them, and not with the number of
    records or of pages.

    Args:
        words: of the pages, [pages, words].
        ends: words of each page that are written.
        clock: the time of each page; moved on.
    """

    def __init__(self, words: NDArray[np.uint32], ends: NDArray[np.int64], clock: NDArray[np.int64]) -> None:
        self._words = words
        self._ends = ends
        self._clock = clock
        self._position = np.zeros(len(ends), np.int64)
        self._found: list[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]] = []

    def found(self) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Of each record the page, the word that it begins at, and its time in ns."""
        pages, words, times_ns = (np.concatenate(parts) for parts in zip(*self._found, strict=True))
        return pages, words, times_ns

    def to_the_end(self) -> None:
        """Walk through all pages."""
        nothing = np.zeros(0, np.int64)
        self._found.append((nothing, nothing, nothing))
        rows = np.flatnonzero(self._ends > 0)
        while len(rows):
            kind = self._words[rows, self._position[rows]].astype(np.int64) & 31
            is_short = (kind > 0) & (kind < PADDING)
            if is_short.all():
                self._short(rows, kind)
            else:
                self._short(rows[is_short], kind[is_short])
                self._other(rows[~is_short], kind[~is_short])
            rows = rows[self._position[rows] < self._ends[rows]]

    def _short(self, rows: NDArray[np.int64], kind: NDArray[np.int64]) -> None:
        """Records whose kind says their length: those of the same length that follow too."""
        at = self._position[rows, None] + (1 + kind)[:, None] * np.arange(_RUN)
        header = self._words[rows[:, None], np.minimum(at, self._words.shape[1] - 1)].astype(np.int64)
        run = np.logical_and.accumulate((header & 31 == kind[:, None]) & (at < self._ends[rows, None]), axis=1)
        time_ns = self._clock[rows, None] + np.cumsum(np.where(run, header >> 5, 0), axis=1)
        count = run.sum(axis=1)
        self._found.append((np.repeat(rows, count), at[run] + 1, time_ns[run]))
        self._clock[rows] = time_ns[:, -1]
        self._position[rows] += (1 + kind) * count

    def _other(self, rows: NDArray[np.int64], kind: NDArray[np.int64]) -> None:
        """Long records, padding and times."""
        at = self._position[rows]
        delta = self._words[rows, at].astype(np.int64) >> 5
        following = self._words[rows, at + 1].astype(np.int64)
        stretched = (following << 27) + delta
        # An absolute stamp holds 59 bits; the rest are those of the page's own time.
        stamped = stretched | (self._clock[rows] & (0xF << 59))
        passed = np.where(kind == TIME_EXTEND, stretched, delta)
        self._clock[rows] = np.where(kind == TIME_STAMP, stamped, self._clock[rows] + passed)
        is_time = (kind == TIME_EXTEND) | (kind == TIME_STAMP)
        is_last = ((kind == PADDING) & (delta == 0)) | ((kind == 0) & (following == 0))
        is_record = (kind == 0) & ~is_last
        self._found.append((rows[is_record], at[is_record] + 2, self._clock[rows[is_record]]))
        step = np.where(is_time, 2, 1 + (following + 3) // 4)
        self._position[rows] = np.where(is_last, self._ends[rows], at + step)


def _decode_records(
    words: NDArray[np.uint32],
    row: NDArray[np.int64],
    word: NDArray[np.int64],
    time_ns: NDArray[np.int64],
    index: int,
    layout: Format,
) -> Events:
    def values(name: str) -> NDArray[np.int64]:
        field = layout.fields[name]
        at = word + field.offset_bytes // 4
        low = words[row, at].astype(np.uint64)
        if field.size_bytes == 8:
            low |= words[row, at + 1].astype(np.uint64) << np.uint64(32)
        return low.astype(np.int64)

    events = np.zeros(len(row), EVENT_DTYPE)
    events["time_ns"] = time_ns
    events["thread"] = values("common_pid")
    events["kind"] = index
    device = values("s_dev")
    events["device"] = _user_device(device)
    events["inode"] = values("i_ino").astype(np.uint64)
    start = values("index")
    if "last_index" in layout.fields:
        last = values("last_index")
        stop = np.maximum(last, start) + 1
    else:
        stop = start + 1
    events["start"] = start * PAGE_BYTES
    events["stop"] = stop * PAGE_BYTES
    return events


def _user_device(device: NDArray[np.int64]) -> NDArray[np.int64]:
    major, minor = device >> 20, device & ((1 << 20) - 1)
    return (minor & 0xFF) | (major & 0xFFF) << 8 | (minor & ~0xFF) << 12 | (major & ~0xFFF) << 32

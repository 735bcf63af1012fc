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


def decode_pages(pages: Sequence[Page], formats: Sequence[Format]) -> Events:
    """Decode the ring-buffer pages of all CPUs, in any order, into events in the order of their times.

    All pages are walked in step, one event of each at a time, so that the work in Python grows with the
    events of the fullest page and not with the number of pages.
    """
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

    rows = np.flatnonzero(ends > 0)
    position = np.zeros(len(pages), np.int64)
    found_rows, found_words, found_times = [], [], []
    while len(rows):
        at = position[rows]
        header = words[rows, at].astype(np.int64)
        kind, delta = header & 31, header >> 5
        following = words[rows, at + 1].astype(np.int64)
        extend, stamp = kind == TIME_EXTEND, kind == TIME_STAMP
        stretched = (following << 27) + delta
        # An absolute stamp holds 59 bits; the rest are those of the page's own time.
        clock[rows] = np.where(
            stamp, stretched | (clock[rows] & (0xF << 59)), clock[rows] + np.where(extend, stretched, delta)
        )
        is_data = (kind <= 28) & ~((kind == 0) & (following == 0))
        found_rows.append(rows[is_data])
        found_words.append(at[is_data] + 1 + (kind[is_data] == 0))
        found_times.append(clock[rows][is_data])
        counted = (kind == 0) | (kind == PADDING)
        step = np.where(extend | stamp, 2, np.where(counted, 1 + (following + 3) // 4, 1 + kind))
        over = ((kind == PADDING) & (delta == 0)) | ((kind == 0) & (following == 0))
        position[rows] = at + step
        rows = rows[~over & (position[rows] < ends[rows])]

    row = np.concatenate(found_rows) if found_rows else np.zeros(0, np.int64)
    word = np.concatenate(found_words) if found_words else np.zeros(0, np.int64)
    time_ns = np.concatenate(found_times) if found_times else np.zeros(0, np.int64)
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

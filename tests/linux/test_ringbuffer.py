"""penstock.linux.ringbuffer: pages built by hand, and real ones against a reader of one record at a time."""

from __future__ import annotations

import itertools
import os
import struct
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.examples import examples
from tests.tracing import needs_access_tracepoints

from penstock.linux.ringbuffer import EVENT_DTYPE, decode_pages
from penstock.linux.tracefs import (
    ACCESS_EVENTS,
    PADDING,
    TIME_EXTEND,
    TIME_STAMP,
    Instance,
    Page,
    TraceFs,
    records,
)
from penstock.linux.tracepoint import Field, Format

PAGE = os.sysconf("SC_PAGE_SIZE")
COMMON = {"common_type": Field(0, 2), "common_pid": Field(4, 4)}
RANGE = Format(
    "range",
    599,
    {**COMMON, "i_ino": Field(8, 8), "s_dev": Field(16, 4), "index": Field(24, 8), "last_index": Field(32, 8)},
)
SINGLE = Format("single", 597, {**COMMON, "i_ino": Field(8, 8), "s_dev": Field(16, 4), "index": Field(24, 8)})
FORMATS = [RANGE, SINGLE]


@dataclass(frozen=True)
class Event:
    """What a decoded event should say."""

    time_ns: int
    thread: int
    kind: int
    device: int
    inode: int
    start: int
    stop: int


def record(kind: int, thread: int, device: tuple[int, int], inode: int, index: int, more: int) -> bytes:
    """A tracepoint's record as the formats above lay it out; more is the last index."""
    common = struct.pack("<HBBi", FORMATS[kind].identifier if kind < len(FORMATS) else 5, 1, 2, thread)
    number = device[0] << 20 | device[1]
    return common + struct.pack("<QIxxxxQ", inode, number, index) + (struct.pack("<Q", more) if kind == 0 else b"")


def expected(kind: int, thread: int, device: tuple[int, int], inode: int, index: int, more: int) -> Event:
    last = max(index, more) if kind == 0 else index
    return Event(0, thread, kind, os.makedev(*device), inode, index * PAGE, (last + 1) * PAGE)


contents = st.tuples(
    st.integers(0, 2),  # 2 is another tracepoint's
    st.integers(1, 2**22),
    st.tuples(st.integers(0, 4095), st.integers(0, 2**20 - 1)),
    st.integers(0, 2**63),
    st.integers(0, 2**40),
    st.integers(0, 9),
)
deltas = st.integers(0, 2**27 - 1)
steps = st.one_of(
    st.tuples(st.just("data"), deltas, contents, st.booleans()),
    st.tuples(st.just("extend"), st.integers(0, 2**40)),
    st.tuples(st.just("stamp"), st.integers(0, 2**55)),
    st.tuples(st.just("discarded"), contents),
)


def build(began_ns: int, page_steps: list[tuple[object, ...]], padded: bool) -> tuple[Page, list[Event]]:
    """A ring-buffer page, as Documentation/trace/ring-buffer-design.rst lays it out, and what is in it."""
    data, events, now = b"", [], began_ns
    for verb, *arguments in page_steps:
        if verb == "extend":
            (delta,) = arguments
            assert isinstance(delta, int)
            data += struct.pack("<II", TIME_EXTEND | (delta & (1 << 27) - 1) << 5, delta >> 27)
            now += delta
        elif verb == "stamp":
            (stamp,) = arguments
            assert isinstance(stamp, int)
            data += struct.pack("<II", TIME_STAMP | (stamp & (1 << 27) - 1) << 5, stamp >> 27)
            now = stamp | now >> 59 << 59  # the stamp has 59 bits
        elif verb == "discarded":
            body = record(*arguments[0])  # type: ignore[misc]
            data += struct.pack("<II", PADDING | 1 << 5, 4 + len(body)) + body
            now += 1
        else:
            delta, content, counted = arguments
            body = record(*content)  # type: ignore[misc]
            assert isinstance(delta, int)
            if counted:
                data += struct.pack("<II", delta << 5, 4 + len(body)) + body
            else:
                data += struct.pack("<I", len(body) // 4 | delta << 5) + body
            now += delta
            if content[0] < len(FORMATS):
                event = expected(*content)  # type: ignore[misc]
                events.append(Event(now, *(getattr(event, name) for name in EVENT_DTYPE.names[1:])))
    if padded:
        data += struct.pack("<I", PADDING) + b"\xa5" * 36
    return (struct.pack("<QQ", began_ns, len(data)), data), events


def as_events(decoded: np.ndarray) -> list[Event]:
    return [Event(*(int(value) for value in row)) for row in decoded.tolist()]


class TestByHand:
    @settings(max_examples=examples(150), deadline=None)
    @given(
        st.lists(
            st.tuples(st.integers(0, 2**60), st.lists(steps, max_size=30), st.booleans()),
            max_size=5,
        )
    )
    def test_pages_of_all_kinds_of_entries(self, made: list[tuple[int, list[tuple[object, ...]], bool]]) -> None:
        pages, events = [], []
        for began_ns, page_steps, padded in made:
            page, inside = build(began_ns, page_steps, padded)
            pages.append(page)
            events += inside
        decoded = decode_pages(pages, FORMATS)
        assert decoded.dtype == EVENT_DTYPE
        assert (np.diff(decoded["time_ns"]) >= 0).all()
        assert sorted(map(repr, as_events(decoded))) == sorted(map(repr, events))
        # Of one page, in the order of their places in it, wherever the times do not go back.
        for (began_ns, page_steps, padded), page in zip(made, pages, strict=True):
            inside = build(began_ns, page_steps, padded)[1]
            if all(a.time_ns < b.time_ns for a, b in itertools.pairwise(inside)):
                assert as_events(decode_pages([page], FORMATS)) == inside

    @settings(max_examples=examples(50), deadline=None)
    @given(st.lists(steps, max_size=30), st.booleans())
    def test_the_one_by_one_reader_finds_the_same_records(
        self, page_steps: list[tuple[object, ...]], padded: bool
    ) -> None:
        wanted = [record(*arguments[1]) for verb, *arguments in page_steps if verb == "data"]  # type: ignore[misc]
        (_, data), _ = build(0, page_steps, padded)
        assert list(records(data)) == wanted

    def test_nothing(self) -> None:
        for pages in ([], [(struct.pack("<QQ", 5, 0), b"")]):
            decoded = decode_pages(pages, FORMATS)
            assert (decoded.dtype, len(decoded)) == (EVENT_DTYPE, 0)

    def test_other_tracepoints_are_passed_over(self) -> None:
        page, _ = build(0, [("data", 1, (2, 1, (8, 1), 2, 3, 4), False)], padded=False)
        assert len(decode_pages([page], FORMATS)) == 0

    def test_pages_in_any_order_give_events_in_the_order_of_their_times(self) -> None:
        pages = [
            build(began, [("data", 1, (1, began, (8, 1), 2, 3, 0), False)] * 3, padded=False)[0]
            for began in (100, 50, 200, 10)
        ]
        decoded = decode_pages(pages, FORMATS)
        assert decoded["thread"].tolist() == [10] * 3 + [50] * 3 + [100] * 3 + [200] * 3

    def test_a_full_page(self) -> None:
        """The last record ends where the page does."""
        body = (0, 7, (8, 1), 2, 3, 4)
        size = 4 + len(record(*body))
        page, inside = build(0, [("data", 1, body, False)] * ((PAGE - 16) // size), padded=False)
        assert as_events(decode_pages([page], FORMATS)) == inside


READER = """
import os, random, sys
random.seed(7)
fds = [os.open(path, os.O_RDONLY) for path in sys.argv[1:]]
sys.stdin.readline()
for _ in range(3000):
    fd = random.choice(fds)
    os.pread(fd, random.randrange(1, 40000), random.randrange(64) * 4096)
print("done", flush=True)
sys.stdin.readline()
"""


@pytest.mark.root
@needs_access_tracepoints
def test_real_pages(tmp_path: Path) -> None:
    tracefs = TraceFs()
    paths = [tmp_path / name for name in "ab"]
    for path in paths:
        path.write_bytes(os.urandom(64 * 4096))
    command = [sys.executable, "-c", READER, *map(str, paths)]
    with (
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child,
        Instance(tracefs, ACCESS_EVENTS, child.pid, owns_tracefs=True) as instance,
    ):
        instance.start()
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdin.write("\n")
        child.stdin.flush()
        assert child.stdout.readline() == "done\n"
        pages = instance.read_pages()
        formats = instance.formats
        child.stdin.close()
    assert len(pages) > 10
    one_by_one = []
    for _, data in pages:
        for body in records(data):
            for kind, layout in enumerate(formats):
                if struct.unpack_from("<H", body)[0] == layout.identifier:
                    one_by_one.append(fields_of(body, kind, layout))
    decoded = decode_pages(pages, formats)
    together = [tuple(int(value) for value in row)[1:] for row in decoded.tolist()]
    assert len(together) >= 3000
    assert sorted(together) == sorted(one_by_one)
    status = [path.stat() for path in paths]
    assert {(s.st_dev, s.st_ino) for s in status} <= {(device, inode) for _, _, device, inode, _, _ in together}


def fields_of(body: bytes, kind: int, layout: Format) -> tuple[int, ...]:
    """Thread, kind, device, inode, start and stop of one record, as EVENT_DTYPE orders them."""

    def value(name: str) -> int:
        field = layout.fields[name]
        return int.from_bytes(body[field.offset_bytes : field.offset_bytes + field.size_bytes], "little")

    device = os.makedev(value("s_dev") >> 20, value("s_dev") & (1 << 20) - 1)
    last = value("last_index") if "last_index" in layout.fields else value("index")
    return value("common_pid"), kind, device, value("i_ino"), value("index") * PAGE, (last + 1) * PAGE

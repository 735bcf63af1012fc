"""penstock.pagecache.observers.stretches: nothing that was read is lost, and little is made up."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from penstock.pagecache.intervals import IntervalSet
from penstock.pagecache.observers.stretches import Stretch, stretches
from penstock.units import KiB, MiB

PAGE = 4 * KiB
WINDOW = 16  # pages that the kernel maps around a fault

Event = tuple[int, int, int, int]  # thread, file, first page, pages


def stretches_of(events: list[Event], *, maps: bool = False) -> list[Stretch]:
    thread, file, first, count = np.array(events, np.int64).reshape(-1, 4).T
    marks = np.full(len(events), maps)
    return stretches(thread.astype(np.int32), file, first * PAGE, (first + count) * PAGE, marks)


def pages(found: list[Stretch]) -> list[tuple[int, int, list[tuple[int, int]]]]:
    return [(s.thread, s.file, [(low // PAGE, high // PAGE) for low, high in s.pieces]) for s in found]


def test_nothing() -> None:
    assert stretches_of([]) == []


def test_a_reader_that_goes_forwards_is_one_stretch() -> None:
    assert pages(stretches_of([(7, 0, n * 256, 256) for n in range(100)])) == [(7, 0, [(0, 25600)])]


def test_gaps_stay_and_disorder_does_not() -> None:
    found = stretches_of([(7, 0, 0, 16), (7, 0, 1024, 16), (7, 0, 16, 16), (7, 0, 1040, 16)])
    assert pages(found) == [(7, 0, [(0, 32), (1024, 1056)])]
    assert (found[0].start, found[0].stop) == (0, 1056 * PAGE)


def test_stretches_are_in_the_order_of_their_first_events() -> None:
    far = 32 * MiB // PAGE
    found = stretches_of([(8, 0, far, 16), (7, 1, 0, 16), (7, 0, 0, 16), (8, 0, far + 16, 16), (7, 0, 2 * far, 16)])
    assert pages(found) == [
        (8, 0, [(far, far + 32)]),
        (7, 1, [(0, 16)]),
        (7, 0, [(0, 16)]),
        (7, 0, [(2 * far, 2 * far + 16)]),
    ]


def test_a_reader_that_goes_backwards_is_told_in_its_order() -> None:
    step = 16 * MiB // PAGE
    found = stretches_of([(7, 0, (3 - n) * step, step) for n in range(4)])
    assert [s.start // PAGE for s in found] == [3 * step, 2 * step, step, 0]


def test_an_event_stands_for_the_folio_that_its_pages_are_of() -> None:
    # Folios of 16, 32, 64 and 128 pages, as read-ahead makes them; each is entered whole at its first page's fault.
    faults: list[Event] = [(7, 0, first, WINDOW) for first in (16, 32, 64, 128, 256, 768)]
    assert pages(stretches_of(faults, maps=True)) == [(7, 0, [(16, 256 + WINDOW), (768, 768 + WINDOW)])]
    assert len(pages(stretches_of(faults))[0][2]) == 5
    # A folio begins at a multiple of its size: these pages are left out, whatever their folios are.
    assert len(pages(stretches_of([(7, 0, 16, WINDOW), (7, 0, 48, WINDOW)], maps=True))[0][2]) == 2


@given(
    st.lists(
        st.tuples(st.integers(1, 2), st.integers(0, 1), st.integers(0, 1 << 14), st.integers(1, 600)), max_size=40
    ),
    st.booleans(),
)
def test_all_that_was_read_is_told(events: list[Event], maps: bool) -> None:
    found = stretches_of(events, maps=maps)
    assert all(a[1] < b[0] for s in found for a, b in zip(s.pieces, s.pieces[1:], strict=False))
    for key in {event[:2] for event in events}:
        read = IntervalSet((first * PAGE, (first + count) * PAGE) for *of, first, count in events if tuple(of) == key)
        told = IntervalSet(piece for s in found if (s.thread, s.file) == key for piece in s.pieces)
        assert all(told.covers(start, stop) for start, stop in read)
        if not maps:
            assert list(told) == list(read)
        made_up = [gap for start, stop in told for gap in read.missing(start, stop)]
        assert all(stop - start < 2 * MiB for start, stop in made_up)

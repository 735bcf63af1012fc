"""penstock.pagecache.intervals against sets of integers."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.pagecache.intervals import IntervalSet

bounds = st.tuples(st.integers(-3, 40), st.integers(-3, 40))  # empty and backward ones too
changes = st.lists(st.tuples(st.sampled_from(["add", "remove"]), bounds), max_size=25)


def values(ranges: list[tuple[int, int]]) -> list[int]:
    return [value for start, stop in ranges for value in range(start, stop)]


def is_tidy(ranges: list[tuple[int, int]]) -> bool:
    """Non-empty, ascending, and no two touch."""
    return all(start < stop for start, stop in ranges) and all(a[1] < b[0] for a, b in itertools.pairwise(ranges))


@given(changes, bounds)
def test_it_is_a_set_of_integers(steps: list[tuple[str, tuple[int, int]]], question: tuple[int, int]) -> None:
    intervals, model = IntervalSet(), set[int]()
    for verb, (start, stop) in steps:
        named = set(range(start, stop))
        if verb == "add":
            assert intervals.add(start, stop) == len(named - model)
            model |= named
        else:
            assert intervals.remove(start, stop) == len(named & model)
            model -= named
        assert values(list(intervals)) == sorted(model)
        assert is_tidy(list(intervals))
        assert intervals.total == len(model)
        assert len(intervals) == len(list(intervals))
    asked = set(range(*question))
    inside, outside = intervals.overlap(*question), intervals.missing(*question)
    assert values(inside) == sorted(asked & model)
    assert values(outside) == sorted(asked - model)
    assert is_tidy(inside)
    assert is_tidy(outside)
    assert intervals.covered_bytes(*question) == len(asked & model)
    assert intervals.covers(*question) == (asked <= model)


@given(st.lists(bounds, max_size=10))
def test_made_from_ranges(ranges: list[tuple[int, int]]) -> None:
    assert values(list(IntervalSet(ranges))) == sorted({value for r in ranges for value in range(*r)})


def test_large_offsets() -> None:
    intervals = IntervalSet([(0, 1 << 42)])
    assert intervals.remove(1 << 40, 1 << 41) == 1 << 40
    assert list(intervals) == [(0, 1 << 40), (1 << 41, 1 << 42)]
    assert repr(intervals) == f"IntervalSet([(0, {1 << 40}), ({1 << 41}, {1 << 42})])"


@pytest.mark.parametrize("question", [(5, 5), (9, 2)])
def test_an_empty_range_is_covered_by_anything(question: tuple[int, int]) -> None:
    assert IntervalSet().covers(*question)
    assert IntervalSet([(0, 10)]).missing(*question) == []

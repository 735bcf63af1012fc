"""penstock.kv.fit: plain numbers in, plain numbers out."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.kv.fit import Fit
from penstock.units import KiB, MiB


def measured(
    *, rate: float, copy_rate: float, fixed_s: float, pause_s: float = 0.0, most: int = 16, rounds: int = 200
) -> Fit:
    """After copies of two sizes, on a device and with threads of given rates."""
    fit = Fit(256 * KiB, 4 * MiB, most)
    for number in range(rounds):
        size = 1 * MiB if number % 2 else 4 * MiB
        fit.read(size, size / rate)
        fit.copied(size, fixed_s + size / copy_rate)
    if pause_s:
        fit.paused(pause_s)
    return fit


def test_before_anything_is_measured() -> None:
    fitted = Fit(256 * KiB, 4 * MiB, 16).fitted()
    assert (fitted.chunk_bytes, fitted.depth) == (4 * MiB, 16)


def test_what_was_measured_is_found() -> None:
    fitted = measured(rate=2e9, copy_rate=5e9, fixed_s=50e-6).fitted()
    assert fitted.read_bytes_per_s == pytest.approx(2e9)
    assert fitted.copy_bytes_per_s == pytest.approx(5e9)
    assert fitted.fixed_s == pytest.approx(50e-6)


def test_chunks_are_as_small_as_their_fixed_time_allows() -> None:
    assert measured(rate=2e9, copy_rate=5e9, fixed_s=2e-6).fitted().chunk_bytes == 256 * KiB
    assert measured(rate=2e9, copy_rate=5e9, fixed_s=8e-6).fitted().chunk_bytes == 1 * MiB
    assert measured(rate=2e9, copy_rate=5e9, fixed_s=1e-3).fitted().chunk_bytes == 4 * MiB


def test_passing_on_what_has_landed_counts() -> None:
    fit = measured(rate=2e9, copy_rate=5e9, fixed_s=2e-6)
    for _ in range(200):
        fit.landed(2, 16e-6)
    assert fit.fitted().fixed_s == pytest.approx(10e-6)
    assert fit.fitted().chunk_bytes == 1 * MiB


def test_as_much_is_read_as_the_device_can_in_the_longest_pause() -> None:
    assert measured(rate=2e9, copy_rate=5e9, fixed_s=1e-3).fitted().depth == 3
    assert measured(rate=2e9, copy_rate=5e9, fixed_s=1e-3, pause_s=0.01).fitted().depth == 3 + 5
    assert measured(rate=2e9, copy_rate=5e9, fixed_s=1e-3, pause_s=1.0).fitted().depth == 16


def test_a_device_that_runs_dry_gets_more() -> None:
    fit = measured(rate=2e9, copy_rate=5e9, fixed_s=1e-3)
    depths = []
    for _ in range(6):
        fit.watched(0.1, 0.01)
        depths.append(fit.fitted().depth)
    assert depths == sorted(depths)
    assert (depths[0], depths[-1]) == (5, 16)
    for _ in range(300):
        fit.watched(0.1, 0.0)
        fit.fitted()
    assert fit.fitted().depth == 3


def test_a_pause_is_forgotten() -> None:
    fit = measured(rate=2e9, copy_rate=5e9, fixed_s=1e-3, pause_s=0.02)
    before = fit.fitted().depth
    for _ in range(200):
        fit.paused(0.0)
    assert fit.fitted().depth < before


def test_it_drifts_with_what_is_measured() -> None:
    fit = measured(rate=2e9, copy_rate=5e9, fixed_s=5e-6)
    for _ in range(400):
        fit.read(4 * MiB, 4 * MiB / 0.5e9)
    assert fit.fitted().read_bytes_per_s == pytest.approx(0.5e9, rel=0.05)


@given(
    st.lists(st.tuples(st.integers(0, 1 << 24), st.floats(0, 10)), max_size=30),
    st.lists(st.tuples(st.integers(0, 1 << 24), st.floats(0, 10)), max_size=30),
    st.lists(st.floats(0, 100), max_size=5),
    st.integers(1, 64),
)
def test_within_bounds_whatever_is_measured(
    reads: list[tuple[int, float]], copies: list[tuple[int, float]], pauses: list[float], most: int
) -> None:
    fit = Fit(256 * KiB, 4 * MiB, most)
    for size, taken in reads:
        fit.read(size, taken)
    for size, taken in copies:
        fit.copied(size, taken)
    for pause in pauses:
        fit.paused(pause)
    fitted = fit.fitted()
    assert 256 * KiB <= fitted.chunk_bytes <= 4 * MiB
    assert 1 <= fitted.depth <= most
    assert fitted.fixed_s >= 0

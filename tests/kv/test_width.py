"""How many threads copy at once: whichever gave more."""

from __future__ import annotations

import pytest

from penstock.kv.width import Width
from penstock.units import MiB


def run(width: Width, seconds: dict[int, float], copies: int) -> list[int]:
    """Copies of 1 MiB, each by as many threads as may; what those were."""
    seen = []
    for _ in range(copies):
        seen.append(width.threads)
        width.copied(width.threads, MiB, seconds[width.threads])
    return seen


@pytest.mark.parametrize(
    ("seconds", "best"),
    [({1: 1.0, 2: 1.0}, 2), ({1: 1.0, 2: 2.0}, 1), ({1: 1.0, 2: 1.7}, 1), ({1: 1.0, 2: 1.5}, 2)],
)
def test_the_better_one_is_taken(seconds: dict[int, float], best: int) -> None:
    seen = run(Width(2), seconds, 10_000)
    assert {1, 2} <= set(seen[:20])  # both are tried
    assert seen.count(best) > 0.99 * len(seen)


def test_it_changes_its_mind() -> None:
    width = Width(4)
    assert run(width, {1: 1.0, 4: 1.0}, 100)[-1] == 4
    assert run(width, {1: 1.0, 4: 8.0}, 5000)[-1] == 1


def test_one_thread_is_all() -> None:
    assert set(run(Width(1), {1: 1.0}, 100)) == {1}

"""penstock.kv.residency, with plain values."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.kv.residency import Budget, KVTensor, Path, Reading, first_layers, plan, spread
from penstock.units import GiB, MiB

KINDS = ("keys", "values")


def tensors(layers: int) -> list[KVTensor]:
    return [KVTensor(layer, kind) for layer in range(layers) for kind in KINDS]


def sizes(layers: int, size_bytes: int = 64 * MiB) -> dict[KVTensor, int]:
    return dict.fromkeys(tensors(layers), size_bytes)


@given(st.integers(1, 100))
def test_a_ranking_has_every_tensor_once(layers: int) -> None:
    for ranking in (spread, first_layers):
        assert sorted(ranking(tensors(layers))) == tensors(layers)


@given(st.integers(1, 96), st.data())
def test_cached_tensors_lie_evenly_between_direct_ones(layers: int, data: st.DataObject) -> None:
    order = tensors(layers)
    count = data.draw(st.integers(1, len(order)))
    chosen = sorted(order.index(tensor) for tensor in spread(order)[:count])
    assert len(chosen) == count
    gaps = [right - left for left, right in zip(chosen, [*chosen[1:], chosen[0] + len(order)], strict=True)]
    assert max(gaps) <= 4 * -(-len(order) // count)


@given(
    st.dictionaries(st.builds(KVTensor, st.integers(0, 30), st.sampled_from(KINDS)), st.integers(0, GiB), min_size=1),
    st.integers(0, 8 * GiB),
)
def test_a_plan_keeps_to_its_budget_and_wastes_none(found: dict[KVTensor, int], budget_bytes: int) -> None:
    made = plan(found, budget_bytes)
    cached = [tensor for tensor in found if made.path(tensor) is Path.CACHED]
    assert made.cached_bytes == sum(found[tensor] for tensor in cached) <= budget_bytes
    left_bytes = budget_bytes - made.cached_bytes
    assert all(size > left_bytes for tensor, size in found.items() if tensor not in cached)


@given(
    st.dictionaries(st.builds(KVTensor, st.integers(0, 30), st.sampled_from(KINDS)), st.integers(0, GiB), min_size=1),
    st.integers(0, 8 * GiB),
)
def test_in_part_a_plan_leaves_nothing(found: dict[KVTensor, int], budget_bytes: int) -> None:
    whole, made = plan(found, budget_bytes), plan(found, budget_bytes, in_part=True)
    assert made.moved(whole) == []
    assert made.cached_bytes == min(budget_bytes, sum(found.values()))
    assert made.cached_bytes == sum(decision.cached_bytes for decision in made.decisions.values())
    parts = [decision for decision in made.decisions.values() if 0 < decision.cached_bytes < decision.size_bytes]
    assert len(parts) <= 1


@given(st.integers(1, 64), st.integers(0, 5000), st.integers(0, 5000))
def test_a_larger_budget_moves_nothing_away(layers: int, first_mib: int, second_mib: int) -> None:
    low, high = sorted((first_mib * MiB, second_mib * MiB))
    small, large = plan(sizes(layers), low), plan(sizes(layers), high)
    assert all(decision.path is Path.CACHED for decision in large.moved(small))


def test_nothing_and_everything() -> None:
    none, everything = plan(sizes(4), 0), plan(sizes(4), GiB)
    assert none.cached_bytes == 0
    assert everything.cached_bytes == 8 * 64 * MiB
    assert len(everything.moved(none)) == 8


def test_a_decision_says_why() -> None:
    made = plan(sizes(4), 192 * MiB, ranking=first_layers)
    assert [made.path(tensor).value for tensor in tensors(4)] == ["memory"] * 3 + ["direct"] * 5
    text = str(made.decisions[KVTensor(1, "values")])
    assert text.startswith("layer 1 values: direct, because it takes 64.0 MiB and the budget of 192 MiB has 0 B left")


def test_a_ranking_that_loses_tensors_is_refused() -> None:
    with pytest.raises(ValueError, match="7 tensors for 8"):
        plan(sizes(4), GiB, ranking=lambda found: list(found)[1:])


def test_the_budget_goes_down_at_once_and_up_after_some_steps() -> None:
    budget = Budget(Reading(4 * GiB), reserve_bytes=GiB, patience=3)
    assert budget.bytes == 3 * GiB
    assert budget.update(Reading(2 * GiB)) == GiB
    assert budget.update(Reading(4 * GiB)) == GiB
    assert budget.update(Reading(5 * GiB)) == GiB
    assert budget.update(Reading(4 * GiB)) == 3 * GiB  # the least of what was offered


def test_a_moment_of_more_memory_changes_nothing() -> None:
    budget = Budget(Reading(2 * GiB), patience=3)
    for _ in range(10):
        assert budget.update(Reading(4 * GiB)) == 2 * GiB
        assert budget.update(Reading(4 * GiB)) == 2 * GiB
        assert budget.update(Reading(2 * GiB)) == 2 * GiB


def test_small_changes_do_not_raise_it() -> None:
    budget = Budget(Reading(2 * GiB))
    assert {budget.update(Reading(2 * GiB + 100 * MiB)) for _ in range(20)} == {2 * GiB}


def test_stalls_lower_it_whatever_the_figures_say() -> None:
    budget = Budget(Reading(2 * GiB))
    assert budget.update(Reading(2 * GiB, stalled_share=0.2)) == 1536 * MiB


@given(st.lists(st.integers(0, 8 * GiB), min_size=1))
def test_the_budget_is_never_more_than_what_there_was(offers: list[int]) -> None:
    budget = Budget(Reading(offers[0]))
    for offer in offers:
        assert budget.update(Reading(offer)) <= offer

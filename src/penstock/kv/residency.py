"""Which tensors of a KV cache live in host memory and which on the storage device: pure functions of sizes and budgets.

The unit is one layer's keys or its values, as in DUAL-BLADE (arXiv 2604.26557), which caches the first layers that fit
and decides once. Here the cached ones are spread between the others, so that storage works while they are copied, the
decision is made again as memory comes and goes, and what memory is left holds a part of one more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Literal, TypeAlias

from penstock.units import format_size


class Path(Enum):
    """Where a tensor's blocks are kept."""

    CACHED = "memory"
    DIRECT = "direct"


@dataclass(frozen=True, slots=True, order=True)
class KVTensor:
    """One layer's keys or values.

    Attributes:
        layer: counted from 0, among the layers whose cache is kept here.
        kind: ``keys`` or ``values``.
    """

    layer: int
    kind: Literal["keys", "values"]

    def __str__(self) -> str:
        return f"layer {self.layer} {self.kind}"


_MOST_STALLED = 0.05  # of the time; chosen without measurement, as is what follows
_STALLED_FACTOR = 0.75

Ranking: TypeAlias = Callable[[Sequence[KVTensor]], Sequence[KVTensor]]  # the first ones are cached first


def spread(tensors: Sequence[KVTensor]) -> list[KVTensor]:
    """Spread evenly: however many are taken from the front, about as many others lie between any two of them.

    A longer front holds all of a shorter one, so that a change of the budget moves only what it has to.
    """
    order = sorted(tensors)
    bits = max(1, (len(order) - 1).bit_length())
    place = {tensor: int(f"{index:0{bits}b}"[::-1], 2) for index, tensor in enumerate(order)}  # bits in reverse
    return sorted(tensors, key=place.__getitem__)


def first_layers(tensors: Sequence[KVTensor]) -> list[KVTensor]:
    """The first layers first: what the paper does."""
    return sorted(tensors)


@dataclass(frozen=True, slots=True)
class Decision:
    """Where one tensor goes, and why.

    Attributes:
        tensor: which one.
        path: of its blocks; those on the direct path may begin with some that stay in memory.
        size_bytes: of it.
        cached_bytes: of these, what may stay in memory.
        reason: to be read by a person.
    """

    tensor: KVTensor
    path: Path
    size_bytes: int
    cached_bytes: int
    reason: str

    def __str__(self) -> str:
        return f"{self.tensor}: {self.path.value}, because {self.reason}"


@dataclass(frozen=True, slots=True)
class Plan:
    """Where every tensor goes."""

    budget_bytes: int
    cached_bytes: int
    decisions: Mapping[KVTensor, Decision]

    def path(self, tensor: KVTensor) -> Path:
        """Of one tensor; KeyError for one that is not in the plan."""
        return self.decisions[tensor].path

    def moved(self, before: Plan) -> list[Decision]:
        """Those that another plan had elsewhere."""
        return [
            decision
            for tensor, decision in self.decisions.items()
            if tensor in before.decisions and before.decisions[tensor].path is not decision.path
        ]


def plan(sizes: Mapping[KVTensor, int], budget_bytes: int, ranking: Ranking = spread, *, in_part: bool = False) -> Plan:
    """Cache tensors in the order of a ranking, as many as fit.

    Args:
        sizes: of each tensor, in bytes.
        budget_bytes: what the cached ones may take together.
        ranking: returns the same tensors in the order in which they are worth caching.
        in_part: what is left of the budget goes to the first one that does not fit.

    Raises:
        ValueError: the ranking has lost or invented tensors.
    """
    order = list(ranking(list(sizes)))
    if sorted(order) != sorted(sizes):
        raise ValueError(f"the ranking gave {len(order)} tensors for {len(sizes)}, or others")
    decisions: dict[KVTensor, Decision] = {}
    cached_bytes = 0
    too_large: list[KVTensor] = []
    for number, tensor in enumerate(order, 1):
        size_bytes = sizes[tensor]
        left_bytes = budget_bytes - cached_bytes
        if size_bytes <= left_bytes:
            cached_bytes += size_bytes
            reason = f"it is number {number} of {len(order)} in the ranking and fits into what the budget leaves"
            decisions[tensor] = Decision(tensor, Path.CACHED, size_bytes, size_bytes, reason)
        else:
            reason = (
                f"it takes {format_size(size_bytes)} and the budget of {format_size(budget_bytes)} has "
                f"{format_size(left_bytes)} left after those before it in the ranking"
            )
            decisions[tensor] = Decision(tensor, Path.DIRECT, size_bytes, 0, reason)
            too_large.append(tensor)
    left_bytes = budget_bytes - cached_bytes
    if in_part and too_large and left_bytes > 0:
        whole = decisions[too_large[0]]
        reason = f"{whole.reason}; its first blocks take {format_size(left_bytes)} of that"
        decisions[whole.tensor] = replace(whole, cached_bytes=left_bytes, reason=reason)
        cached_bytes = budget_bytes
    return Plan(budget_bytes, cached_bytes, {tensor: decisions[tensor] for tensor in sorted(decisions)})


@dataclass(frozen=True, slots=True)
class Reading:
    """What a step sees of memory.

    Attributes:
        headroom_bytes: what can still be filled, what the kernel can take back included: the cached tensors are part
            of that.
        stalled_share: of the time, waiting for memory, 0 to 1; 0 where the kernel does not tell.
    """

    headroom_bytes: int
    stalled_share: float = 0.0


class Budget:
    """The budget of the cached tensors, as memory comes and goes.

    It follows memory down at once, and up only when there has been more for some steps in a row: moving a tensor to
    memory costs reading it once, and moving it away again makes that a waste.

    Args:
        reserve_bytes: of the headroom, left to others.
        patience: steps with more memory before the budget grows.
        slack: share of the budget by which memory has to exceed it before it grows.
    """

    def __init__(self, reading: Reading, *, reserve_bytes: int = 0, patience: int = 3, slack: float = 1 / 16) -> None:
        self._reserve_bytes = reserve_bytes
        self._patience = patience
        self._slack = slack
        self._more: list[int] = []  # what the last steps offered, while all of them offered more
        self.bytes = self._offered(reading)

    def _offered(self, reading: Reading) -> int:
        return max(0, reading.headroom_bytes - self._reserve_bytes)

    def update(self, reading: Reading) -> int:
        """The budget for the next step."""
        offered = self._offered(reading)
        if reading.stalled_share > _MOST_STALLED:  # there is less than the figures say
            offered = min(offered, int(self.bytes * _STALLED_FACTOR))
        if offered < self.bytes:
            self.bytes = offered
            self._more.clear()
        elif offered > self.bytes * (1 + self._slack):
            self._more.append(offered)
            if len(self._more) >= self._patience:
                self.bytes = min(self._more)
                self._more.clear()
        else:
            self._more.clear()
        return self.bytes

"""The policies with plain values: what they recommend, and never beyond a file."""

from __future__ import annotations

import itertools
import sys
import tracemalloc
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.examples import examples

from penstock.errors import PolicyError
from penstock.pagecache.base import Access, Context, Evict, ModelFile, Policy, Prefetch, Range
from penstock.pagecache.intervals import IntervalSet
from penstock.pagecache.policies import BUILT_IN, create_policy
from penstock.pagecache.policies.ahead import ReadAhead
from penstock.pagecache.policies.eager import Eager
from penstock.pagecache.policies.maio import Maio
from penstock.pagecache.policies.native import Native
from penstock.pagecache.policies.sequential import Sequential
from penstock.units import GiB, KiB, MiB


def model_file(name: str, size_bytes: int = 2 * GiB) -> ModelFile:
    return ModelFile(name, f"/models/m/{name}", size_bytes, 1, hash(name) & 0xFFFF)


A = model_file("model-00001-of-00003.safetensors")
B = model_file("model-00002-of-00003.safetensors")
C = model_file("model-00003-of-00003.safetensors", GiB + 5)
OTHER = model_file("original.pth")
FILES = (A, B, C)


POLLS = itertools.count()


def access(
    file: ModelFile,
    start: int,
    stop: int | None = None,
    *,
    worker: int = 0,
    miss: bool = True,
    time_s: float | None = None,
) -> Access:
    """Without a time, of a poll of its own, 0.1 s after the last."""
    time_s = next(POLLS) / 10 if time_s is None else time_s
    return Access(file, start, start + MiB if stop is None else stop, worker, time_s, miss)


def started(policy: Policy, *, groups: Sequence[Sequence[Range]] = (), **context: object) -> Policy:
    arguments = {"files": FILES, **context}
    policy.start(Context(groups=tuple(tuple(group) for group in groups), **arguments))  # type: ignore[arg-type]
    return policy


def merged(requests: Iterable[Prefetch | Evict]) -> list[tuple[str, int, int]]:
    """Name and range of each request, with those that follow on one another made one."""
    found: list[tuple[str, int, int]] = []
    for request in requests:
        if found and found[-1][0] == request.file.name and found[-1][2] == request.start:
            found[-1] = (request.file.name, found[-1][1], request.stop)
        else:
            found.append((request.file.name, request.start, request.stop))
    return found


def covered(requests: Iterable[Prefetch | Evict], file: ModelFile) -> list[tuple[int, int]]:
    return list(IntervalSet((r.start, r.stop) for r in requests if r.file == file))


def reading(file: ModelFile, start: int, stop: int, step: int = 8 * MiB, worker: int = 0) -> Iterator[Access]:
    """Misses, one after the other."""
    for at in range(start, stop, step):
        yield access(file, at, min(at + step, stop), worker=worker)


class TestNative:
    def test_it_wants_nothing(self) -> None:
        policy = started(Native())
        assert list(policy.prefetch(None)) == []
        assert list(policy.prefetch(access(A, 0))) == []
        assert list(policy.evict(access(A, 0))) == []
        assert list(policy.evict(None)) == []
        policy.stop()


class TestEager:
    def test_all_files_at_the_first_access(self) -> None:
        policy = started(Eager(), files=(C, B, A))
        assert policy.ignores_memory
        assert list(policy.prefetch(None)) == []
        wanted = policy.prefetch(access(B, 5 * MiB))
        assert merged(wanted) == [(file.name, 0, file.size_bytes) for file in FILES]
        assert list(policy.prefetch(access(A, 0))) == []
        assert list(policy.evict(None)) == []

    def test_a_file_that_nobody_had_named(self) -> None:
        policy = started(Eager())
        policy.prefetch(access(A, 0))
        wanted = policy.prefetch(access(OTHER, 0))
        assert (OTHER.name, 0, OTHER.size_bytes) in merged(wanted)
        # The answer replaces what is still queued, so it names that again.
        assert {request.file for request in wanted} == {*FILES, OTHER}
        assert list(policy.prefetch(access(OTHER, MiB))) == []

    def test_without_known_files(self) -> None:
        policy = started(Eager(), files=())
        assert merged(policy.prefetch(access(A, 0))) == [(A.name, 0, A.size_bytes)]


class TestSequential:
    SEGMENT = Sequential.segment_bytes

    def test_a_segment_ahead(self) -> None:
        policy = started(Sequential())
        assert list(policy.prefetch(None)) == []
        assert merged(policy.prefetch(access(A, 5 * MiB))) == [(A.name, 5 * MiB, 2 * self.SEGMENT)]
        assert list(policy.prefetch(access(A, 6 * MiB))) == []  # still the same segment
        assert merged(policy.prefetch(access(A, self.SEGMENT))) == [(A.name, self.SEGMENT, 3 * self.SEGMENT)]

    def test_up_to_the_end_of_the_file(self) -> None:
        policy = started(Sequential())
        assert merged(policy.prefetch(access(C, GiB))) == [(C.name, GiB, C.size_bytes)]

    def test_a_segment_behind(self) -> None:
        policy = started(Sequential())
        assert list(policy.evict(access(A, self.SEGMENT - 1))) == []
        assert merged(policy.evict(access(A, 3 * self.SEGMENT))) == [(A.name, 2 * self.SEGMENT, 3 * self.SEGMENT)]
        assert list(policy.evict(None)) == []


IN_ORDER = (tuple(Range(file.name, 0, file.size_bytes) for file in FILES),)


class TestMaioPlan:
    def test_the_template_before_the_first_access(self) -> None:
        order = (Range(B.name, GiB, 2 * GiB), Range(A.name, 0, 100 * MiB), Range(B.name, 0, 64 * MiB))
        policy = started(Maio(), groups=[order])
        wanted = policy.prefetch(None)
        assert merged(wanted) == [(part.name, part.start, part.stop) for part in order]
        assert {request.worker for request in wanted} == {0}

    def test_nothing_is_known_before_the_first_run_of_a_command_that_names_no_model(self) -> None:
        assert list(started(Maio(), files=()).prefetch(None)) == []

    def test_a_named_model_is_begun_before_the_first_run(self) -> None:
        other = model_file("consolidated.00.pth", GiB)
        assert merged(started(Maio(), files=(B, other, A)).prefetch(None)) == [(A.name, 0, GiB)]
        ample = started(Maio(), files=(A, B), budget_bytes=12 * GiB)
        assert merged(ample.prefetch(None)) == [(A.name, 0, 2 * GiB), (B.name, 0, GiB)]
        unclear = started(Maio(), files=(B, other, A), budget_bytes=12 * GiB)
        assert merged(unclear.prefetch(None)) == [(A.name, 0, GiB)]
        little = started(Maio(), files=(A, B), budget_bytes=256 * MiB)
        assert merged(little.prefetch(None)) == [(A.name, 0, 64 * MiB)]
        assert merged(started(Maio(), files=[model_file("a.gguf", GiB - 1)]).prefetch(None)) == []
        small = [model_file(f"{number}.safetensors", 300 * MiB) for number in range(9)]
        little = started(Maio(), files=small, budget_bytes=4 * GiB)
        assert sum(stop - start for _, start, stop in merged(little.prefetch(None))) == GiB

    def test_a_file_that_is_not_there_is_left_out(self) -> None:
        policy = started(Maio(), groups=IN_ORDER, files=(A, C))
        assert {request.file for request in policy.prefetch(None)} == {A, C}

    def test_several_workers_are_served_by_how_far_each_will_be(self) -> None:
        long, short = (Range(A.name, 0, 2 * GiB),), (Range(B.name, 0, 512 * MiB),)
        policy = started(Maio(), groups=[long, short])
        wanted = policy.prefetch(None)
        assert covered(wanted, A) == [(0, 2 * GiB)]
        assert covered(wanted, B) == [(0, 512 * MiB)]
        assert [r.start for r in wanted if r.file == A] == sorted(r.start for r in wanted if r.file == A)
        assert {(r.file, r.worker) for r in wanted} == {(A, 0), (B, 1)}
        share = [r.start / (2 * GiB if r.worker == 0 else 512 * MiB) for r in wanted]
        assert share == sorted(share)

    def test_an_access_that_was_foreseen_leaves_all_as_it_is(self) -> None:
        policy = started(Maio(), groups=IN_ORDER)
        policy.prefetch(None)
        for step in reading(A, 0, GiB):
            hit = access(A, step.start, step.stop, miss=False)
            assert list(policy.prefetch(hit)) == []

    def test_a_worker_that_overtakes_is_gone_after(self) -> None:
        policy = started(Maio(), groups=IN_ORDER)
        for step in reading(A, 0, GiB):
            wanted = policy.prefetch(step)
        first = wanted[0]
        assert first.file == A
        assert GiB - 64 * MiB <= first.start <= GiB  # pieces of 64 MiB
        assert covered(wanted, B) == [(0, 2 * GiB)]

    def test_a_worker_that_reads_on_elsewhere_is_followed(self) -> None:
        policy = started(Maio(), groups=IN_ORDER)
        for step in reading(B, GiB, GiB + 256 * MiB):
            wanted = policy.prefetch(step)
        assert wanted[0].file == B
        assert wanted[0].start >= GiB
        assert policy.mismatch == ""
        # What it has left out may still come, but later.
        assert covered(wanted, A) == [(0, 2 * GiB)]
        assert [r.file for r in wanted].index(A) > [r.file for r in wanted].index(C)

    def test_a_glance_elsewhere_is_not_followed(self) -> None:
        """Headers of all shards, the first page of each tensor."""
        policy = started(Maio(), groups=IN_ORDER)
        policy.prefetch(access(A, 0))
        for file in (B, C):
            wanted = policy.prefetch(access(file, 0, 64 * KiB))
            assert wanted[0].file == A

    def test_a_glance_ahead_leaves_nothing_out(self) -> None:
        """A folio of 2 MiB at the edge of what it reads is mapped whole, and may stand anywhere in the template."""
        policy = started(Maio(), groups=IN_ORDER)
        policy.prefetch(access(A, 0, 8 * MiB))
        policy.prefetch(access(A, 200 * MiB, 202 * MiB, miss=False))
        wanted = policy.prefetch(access(A, 8 * MiB, 16 * MiB))
        assert (wanted[0].file, wanted[0].start) == (A, 0)
        assert merged(wanted)[0] == (A.name, 0, 2 * GiB)

    def test_a_pools_slowest_thread_is_waited_for_until_it_reads_elsewhere(self) -> None:
        policy = started(Maio(), groups=IN_ORDER)
        for at in range(0, 40 * MiB, 4 * MiB):
            policy.prefetch(access(A, at, at + 4 * MiB))
            policy.prefetch(access(A, at + 128 * MiB, at + 132 * MiB))
        wanted = policy.prefetch(access(A, 40 * MiB))
        assert (wanted[0].file, wanted[0].start) == (A, 0)  # a piece of 64 MiB
        for step in reading(A, 168 * MiB, 232 * MiB):
            policy.prefetch(step)
        wanted = policy.prefetch(access(A, 232 * MiB))
        assert (wanted[0].file, wanted[0].start) == (A, 192 * MiB)

    def test_the_other_half_of_a_folio_at_the_edge_of_a_slice_is_not_followed(self) -> None:
        """Two workers, each with a half of every tensor."""
        starts = range(0, GiB, 24 * MiB)
        slices = [[Range(A.name, at, at + 24 * MiB) for at in starts[worker::2]] for worker in (0, 1)]
        policy = started(Maio(), groups=slices)
        for part in slices[0]:
            policy.prefetch(access(A, part.start, part.stop, miss=False))
            assert not policy.prefetch(access(A, part.stop, part.stop + 2 * MiB))
        assert policy.mismatch == ""

    def test_what_begins_before_a_slice_is_of_the_slice(self) -> None:
        policy = started(Maio(), groups=[[Range(A.name, 25 * MiB, GiB)]])
        wanted: Sequence[Prefetch] = ()
        for step in reading(A, 24 * MiB, 512 * MiB, step=32 * MiB):
            wanted = policy.prefetch(step) or wanted
        assert wanted[0].start >= 256 * MiB

    def test_only_its_own_worker_moves(self) -> None:
        policy = started(Maio(), groups=[(Range(A.name, 0, 2 * GiB),), (Range(B.name, 0, 2 * GiB),)])
        for step in reading(B, 0, 256 * MiB, worker=1):
            wanted = policy.prefetch(step)
        assert covered(wanted, A) == [(0, 2 * GiB)]
        assert min(r.start for r in wanted if r.file == B) >= 128 * MiB


class TestMaioMismatch:
    def test_another_order(self) -> None:
        policy = started(Maio(), groups=IN_ORDER)
        for start in range(2 * GiB - 256 * MiB, 0, -256 * MiB):
            for step in reading(A, start, start + 128 * MiB):
                wanted = policy.prefetch(step)
        assert "another order" in policy.mismatch
        # From then on it stays ahead of the reader and asks for nothing of the template.
        for step in reading(C, 0, 512 * MiB):
            wanted = [*policy.prefetch(step)] or wanted
        assert wanted[0].file == C

    def test_the_same_order_backwards_by_a_little_is_none(self) -> None:
        """A pool of threads, each with a tensor."""
        policy = started(Maio(), groups=IN_ORDER)
        for at in range(0, GiB, 32 * MiB):
            for step in (at + 16 * MiB, at, at + 24 * MiB, at + 8 * MiB):
                policy.prefetch(access(A, step, step + 8 * MiB))
        assert policy.mismatch == ""

    def test_what_was_prefetched_in_time_is_no_mismatch(self) -> None:
        policy = started(Maio(), groups=IN_ORDER)
        for start in range(2 * GiB - 64 * MiB, 0, -64 * MiB):
            policy.prefetch(access(A, start, start + 64 * MiB, miss=False))
        assert policy.mismatch == ""

    def test_other_files(self) -> None:
        policy = started(Maio(), groups=IN_ORDER)
        wanted: Sequence[Prefetch] = ()
        for step in reading(OTHER, 0, 2 * GiB):
            wanted = policy.prefetch(step) or wanted
        assert "does not name" in policy.mismatch
        assert {request.file for request in wanted} == {OTHER}

    def test_a_small_file_besides_is_none(self) -> None:
        policy = started(Maio(), groups=IN_ORDER)
        for step in reading(model_file("adapter.bin", 32 * MiB), 0, 32 * MiB):
            policy.prefetch(step)
        assert policy.mismatch == ""

    def test_a_worker_that_the_template_does_not_have(self) -> None:
        policy = started(Maio(), groups=IN_ORDER)
        for step in reading(A, 0, 2 * GiB, worker=5):
            policy.prefetch(step)
        assert policy.mismatch
        started(policy, groups=IN_ORDER)
        assert policy.mismatch == ""

    def test_the_recorded_order_is_never_one(self) -> None:
        order = [Range(f.name, at * MiB, (at + 256) * MiB) for at in (512, 0, 768, 256) for f in (C, A, B)]
        policy = started(Maio(), groups=[order])
        files = {file.name: file for file in FILES}
        for part in order:
            for step in reading(files[part.name], part.start, part.stop):
                policy.prefetch(step)
        assert policy.mismatch == ""


class TestMaioLateReports:
    """Pages that are mapped 2 MiB at a time are reported by the next look at the page tables, after younger reads."""

    def test_what_is_reported_late_is_no_jump(self) -> None:
        policy = started(Maio(), groups=IN_ORDER)
        for first in range(0, 2 * GiB, 128 * MiB):
            time_s = first / GiB
            policy.prefetch(access(A, first + 96 * MiB, first + 128 * MiB, time_s=time_s))
            policy.prefetch(access(A, first, first + 48 * MiB, time_s=time_s))
        assert policy.mismatch == ""

    def test_misses_in_quick_succession_are_planned_for_once(self) -> None:
        policy = started(Maio(), groups=IN_ORDER)
        assert policy.prefetch(access(A, 0, time_s=1.0))
        assert not policy.prefetch(access(A, MiB, time_s=1.01))
        assert policy.prefetch(access(A, 2 * MiB, time_s=1.06))


class TestMaioEviction:
    def test_nothing_within_the_keep_distance(self) -> None:
        policy = started(Maio(), keep_bytes=128 * MiB)
        for step in reading(A, 0, 128 * MiB):
            policy.prefetch(step)
            assert list(policy.evict(step)) == []
        assert list(policy.evict(None)) == []

    def test_what_lies_further_behind_is_burnt_once(self) -> None:
        policy = started(Maio(), keep_bytes=128 * MiB)
        burnt: list[Evict] = []
        for step in reading(A, 0, GiB):
            policy.prefetch(step)
            burnt += policy.evict(None)
        burnt += policy.evict(None)
        assert covered(burnt, A) == [(0, GiB - 128 * MiB)]
        assert sum(part.stop - part.start for part in burnt) == GiB - 128 * MiB

    def test_in_the_next_file_too(self) -> None:
        policy = started(Maio(), groups=IN_ORDER, keep_bytes=256 * MiB)
        for step in itertools.chain(reading(A, 0, 2 * GiB), reading(B, 0, 64 * MiB)):
            policy.prefetch(step)
        burnt = policy.evict(None)
        assert merged(burnt) == [(A.name, 0, 2 * GiB - 192 * MiB)]

    def test_hits_are_burnt_as_well(self) -> None:
        policy = started(Maio(), groups=IN_ORDER, keep_bytes=0)
        policy.prefetch(access(A, 0, MiB, miss=False))
        assert merged(policy.evict(None)) == [(A.name, 0, MiB)]

    def test_a_page_that_two_workers_need_waits_for_both(self) -> None:
        both = (Range(A.name, 0, GiB),)
        policy = started(Maio(), groups=[both, both], keep_bytes=64 * MiB)
        burnt: list[Evict] = []
        for step in reading(A, 0, 512 * MiB, worker=0):
            policy.prefetch(step)
            burnt += policy.evict(None)
        assert burnt == []
        for step in reading(A, 0, 256 * MiB, worker=1):
            policy.prefetch(step)
            burnt += policy.evict(None)
        (gone,) = covered(burnt, A)
        assert gone[0] == 0
        # Never what the second worker has not come to; and in the end what both have passed by the keep distance.
        assert 256 * MiB - 64 * MiB <= gone[1] <= 256 * MiB
        for step in reading(A, 256 * MiB, GiB, worker=1):
            policy.prefetch(step)
            burnt += policy.evict(None)
        (gone,) = covered(burnt, A)
        assert gone[0] == 0
        assert gone[1] >= 512 * MiB - 64 * MiB

    def test_slices_of_two_workers(self) -> None:
        """What only one of them reads does not wait for the other."""
        groups = [[Range(A.name, at * MiB, (at + 32) * MiB) for at in range(first, 1024, 64)] for first in (0, 32)]
        policy = started(Maio(), groups=groups, keep_bytes=0)
        for part in groups[0]:
            policy.prefetch(access(A, part.start, part.stop, worker=0))
        assert covered(policy.evict(None), A) == [(part.start, part.stop) for part in groups[0]]

    def test_a_template_that_did_not_fit_holds_nothing_back(self) -> None:
        both = (Range(A.name, 0, 2 * GiB),)
        policy = started(Maio(), groups=[both, both], keep_bytes=0)
        policy.prefetch(access(A, 0, 64 * MiB))
        for step in reading(OTHER, 0, 2 * GiB):
            policy.prefetch(step)
        assert policy.mismatch
        burnt = policy.evict(None)
        assert covered(burnt, A) == [(0, 64 * MiB)]

    def test_reading_for_days_takes_no_more_memory(self) -> None:
        """Nobody asks what to evict while memory is ample."""
        policy = started(Maio(), keep_bytes=GiB)

        def read_again(times: int) -> None:
            for _ in range(times):
                for step in reading(C, 0, GiB, 4 * MiB):
                    policy.prefetch(step)

        read_again(4)
        tracemalloc.start()
        try:
            read_again(10)
            grown_bytes, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert grown_bytes < 256 * KiB


LARGE = model_file("large.gguf", 1 << 40)


class TestReadAhead:
    JUMPS = tuple(jump * 387_420_489 * 4096 % (LARGE.size_bytes - MiB) for jump in range(1, 30))

    @staticmethod
    def window(requests: Sequence[Prefetch]) -> int:
        return sum(request.stop - request.start for request in requests)

    def test_the_first_access_opens_a_window(self) -> None:
        wanted = ReadAhead(FILES).prefetch(access(A, 0))
        assert merged(wanted) == [(A.name, MiB, MiB + 256 * MiB)]
        assert wanted[0].worker == 0

    def test_windows_double_while_they_are_used(self) -> None:
        ahead = ReadAhead([LARGE])
        fronts, windows = [], []
        for step in reading(LARGE, 0, 32 * GiB, 32 * MiB):
            wanted = ahead.prefetch(step)
            if wanted:
                assert wanted[0].start == step.stop
                fronts.append(wanted[0].stop)
                windows.append(self.window(wanted))
        assert fronts == sorted(fronts)
        assert max(windows) > 4 * 256 * MiB
        assert max(windows) <= 2 * 4 * GiB
        assert len(windows) < 32  # it does not ask again at each access

    def test_never_more_than_asked_for(self) -> None:
        ahead = ReadAhead(FILES, 64 * MiB)
        windows = [self.window(ahead.prefetch(step)) for step in reading(A, 0, GiB)]
        assert 0 < max(windows) <= 2 * 64 * MiB

    def test_on_to_the_next_shard(self) -> None:
        ahead = ReadAhead([A, model_file("model-00001-of-00003.txt"), B, C, OTHER])
        wanted = ahead.prefetch(access(A, 2 * GiB - 64 * MiB, 2 * GiB - 32 * MiB))
        assert merged(wanted) == [(A.name, 2 * GiB - 32 * MiB, 2 * GiB), (B.name, 0, 224 * MiB)]

    def test_the_window_goes_on_with_the_next_shard(self) -> None:
        ahead = ReadAhead(FILES)
        before = max(self.window(ahead.prefetch(step)) for step in reading(A, 0, 2 * GiB))
        assert self.window(ahead.prefetch(access(B, 0))) >= before // 2 > 256 * MiB

    def test_nothing_after_the_last(self) -> None:
        assert ReadAhead([A]).prefetch(access(A, 2 * GiB - MiB, 2 * GiB)) == []

    def test_a_file_that_nobody_had_named(self) -> None:
        ahead = ReadAhead([A])
        assert merged(ahead.prefetch(access(OTHER, 0))) == [(OTHER.name, MiB, 257 * MiB)]

    def test_jumps_close_the_window(self) -> None:
        ahead = ReadAhead([LARGE])
        windows = [self.window(ahead.prefetch(access(LARGE, start))) for start in self.JUMPS]
        assert windows[0] == 256 * MiB
        assert windows[10:] == [0] * (len(windows) - 10)
        assert all(later <= earlier for earlier, later in itertools.pairwise(windows))

    def test_reading_in_order_opens_it_again(self) -> None:
        ahead = ReadAhead([LARGE])
        for start in self.JUMPS:
            ahead.prefetch(access(LARGE, start))
        windows = [self.window(ahead.prefetch(step)) for step in reading(LARGE, 0, GiB)]
        assert max(windows) >= 256 * MiB

    def test_readers_side_by_side(self) -> None:
        ahead = ReadAhead(FILES)
        ahead.prefetch(access(A, 0, worker=0))
        wanted = ahead.prefetch(access(B, 0, worker=1))
        assert [(request.file, request.worker) for request in wanted] == [(B, 1), (A, 0)]


steps = st.lists(
    st.tuples(
        st.sampled_from([*FILES, OTHER]),
        st.integers(0, 2047),
        st.integers(1, 200),
        st.integers(0, 2),
        st.booleans(),
    ),
    max_size=60,
)
groups = st.lists(
    st.lists(st.tuples(st.sampled_from(FILES), st.integers(0, 1023), st.integers(1, 900)), max_size=8), max_size=3
)


@pytest.mark.parametrize("name", BUILT_IN)
@settings(max_examples=examples(40), deadline=None)
@given(steps, groups, st.sampled_from([0, 64 * MiB, GiB]))
def test_whatever_is_read_all_answers_lie_inside_their_files(
    name: str,
    accesses: list[tuple[ModelFile, int, int, int, bool]],
    template: list[list[tuple[ModelFile, int, int]]],
    keep_bytes: int,
) -> None:
    policy = create_policy(name)
    recorded = [
        [Range(file.name, at * MiB, min((at + length) * MiB, file.size_bytes)) for file, at, length in group]
        for group in template
    ]
    started(policy, groups=recorded, keep_bytes=keep_bytes, budget_bytes=4 * GiB)
    answers: list[Prefetch | Evict] = [*policy.prefetch(None)]
    for file, at, length, worker, miss in accesses:
        start = min(at * MiB, file.size_bytes - 1)
        step = access(file, start, min(start + length * MiB, file.size_bytes), worker=worker, miss=miss)
        answers += policy.prefetch(step)
        answers += policy.evict(step)
        answers += policy.evict(None)
    policy.stop()
    for answer in answers:
        assert 0 <= answer.start <= answer.stop <= answer.file.size_bytes, answer


USERS = """
from penstock.pagecache.base import Policy
class Mine(Policy):
    pass
class Picky(Policy):
    def __init__(self):
        raise RuntimeError("not today")
class Wanting(Policy):
    def __init__(self, argument):
        pass
class Other:
    pass
function = lambda: 5
"""


class TestCreatePolicy:
    @pytest.mark.parametrize("name", BUILT_IN)
    def test_built_in(self, name: str) -> None:
        policy = create_policy(name)
        assert type(policy).__name__.lower() == name
        assert create_policy(name) is not policy

    @pytest.fixture
    def module(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
        """A module in the working directory, as a user has it."""
        name = f"users_{tmp_path.name}"
        (tmp_path / f"{name}.py").write_text(USERS)
        (tmp_path / f"{name}_broken.py").write_text("import penstock.no_such_thing\n")
        (tmp_path / f"{name}_wrong.py").write_text("class Mine(:\n")
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "path", [*sys.path])
        yield name
        for loaded in [loaded for loaded in sys.modules if loaded.startswith(name)]:
            del sys.modules[loaded]

    def test_a_users_own(self, module: str) -> None:
        policy = create_policy(f"{module}:Mine")
        assert isinstance(policy, Policy)
        assert (type(policy).__name__, type(policy).__module__) == ("Mine", module)

    @pytest.mark.parametrize(
        ("target", "why"),
        [
            (":Picky", "RuntimeError: not today"),
            (":Wanting", "argument"),
            (":Other", "Other is not a penstock.pagecache.base.Policy"),
            (":function", "function is not a penstock.pagecache.base.Policy"),
            (":Missing", "Missing"),
            (":", "cannot be made"),
            ("_broken:Mine", "no_such_thing"),
            ("_wrong:Mine", "SyntaxError"),
            ("_none:Mine", "No module named"),
        ],
    )
    def test_what_is_wrong_is_told(self, module: str, target: str, why: str) -> None:
        with pytest.raises(PolicyError, match=why) as caught:
            create_policy(f"{module}{target}")
        assert f"{module}{target}" in str(caught.value)

    @pytest.mark.parametrize("name", ["", "Maio", "mao", "penstock.pagecache.policies.maio", "a.b"])
    def test_an_unknown_name_shows_the_known(self, name: str) -> None:
        with pytest.raises(PolicyError, match="native, eager, sequential, maio, or write package"):
            create_policy(name)

    @pytest.mark.parametrize("name", [":", ":Mine", "..:Mine", "a b:Mine", ".relative:Mine"])
    def test_names_that_are_none(self, name: str) -> None:
        with pytest.raises(PolicyError, match="cannot be made"):
            create_policy(name)


class TestContext:
    def test_the_models_bytes(self) -> None:
        assert Context().model_bytes == 0
        assert Context(FILES).model_bytes == 5 * GiB + 5

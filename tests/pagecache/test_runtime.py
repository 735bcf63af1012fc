"""penstock.pagecache.runtime with real readers, observers and files: what a policy is told, and what becomes of it."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import pytest
from tests.contents import contents

from penstock.linux.pagecache import drop, mincore
from penstock.pagecache import runtime as runtime_module
from penstock.pagecache.base import Access, Evict, ModelFile, Policy, Prefetch
from penstock.pagecache.files import ModelFiles
from penstock.pagecache.headroom import Headroom
from penstock.pagecache.ledger import Ledger
from penstock.pagecache.observers.base import Observer
from penstock.pagecache.observers.process import ProcessObserver
from penstock.pagecache.recorder import Recorder
from penstock.pagecache.runtime import CacheMode, Outcome, Runtime
from penstock.testing.residency import About
from penstock.units import MiB

SIZE_BYTES = 24 * MiB
DEADLINE_S = 30.0

# Reads the file from its start to byte N at each line "N", and answers.
READER = """
import sys
with open(sys.argv[1], "rb", buffering=0) as file:
    print("ready", flush=True)
    for line in sys.stdin:
        while file.tell() < int(line) and file.read(1 << 20):
            pass
        print("read", flush=True)
"""


@pytest.fixture
def files(tmp_path: Path) -> ModelFiles:
    path = tmp_path / "model" / "model.safetensors"
    path.parent.mkdir()
    with path.open("w+b") as file:
        file.write(contents(SIZE_BYTES))
        file.flush()
        os.fsync(file.fileno())
        drop(file.fileno())
        if mincore(file.fileno(), 0, SIZE_BYTES).any():
            pytest.skip(f"{path} is on a file system that keeps every page in memory")
    return ModelFiles([path.parent])


@pytest.fixture
def file(files: ModelFiles) -> ModelFile:
    [file] = files
    return file


class Reader:
    """A program that reads when it is told to."""

    def __init__(self, file: ModelFile) -> None:
        command = [sys.executable, "-c", READER, file.path]
        self.popen = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._answer()

    def _answer(self) -> None:
        assert self.popen.stdout is not None
        assert self.popen.stdout.readline()

    def read_to(self, stop: int) -> None:
        assert self.popen.stdin is not None
        self.popen.stdin.write(f"{stop}\n")
        self.popen.stdin.flush()
        self._answer()

    def close(self) -> None:
        self.popen.kill()
        self.popen.wait()
        for pipe in (self.popen.stdin, self.popen.stdout):
            assert pipe is not None
            pipe.close()


@pytest.fixture
def reader(file: ModelFile) -> Iterator[Reader]:
    reader = Reader(file)
    yield reader
    reader.close()


class Told(Policy):
    """Notes what it is told, and asks for what the test wants."""

    def __init__(self, prefetch: Sequence[Prefetch] = (), evict: Sequence[Evict] = ()) -> None:
        self.accesses: list[Access] = []
        self.stopped = False
        self._prefetch = prefetch
        self._evict = evict

    def prefetch(self, access: Access | None) -> Sequence[Prefetch]:
        if access is None:
            return self._prefetch
        self.accesses.append(access)
        return ()

    def evict(self, access: Access | None) -> Sequence[Evict]:
        return self._evict if access is not None else ()

    def stop(self) -> None:
        self.stopped = True

    def has_come_to(self, stop: int) -> bool:
        return bool(self.accesses) and self.accesses[-1].stop == stop


class Running:
    """A runtime for a reader, as a session makes it."""

    def __init__(self, files: ModelFiles, ledger: Ledger, reader: Reader, policy: Policy, **options: object) -> None:
        self._headroom = Headroom(reader.popen.pid, options.pop("memory_bytes", None))  # type: ignore[arg-type]
        self._observer = ProcessObserver(files, ledger)
        self._reader = reader
        make_observer = options.pop("make_observer", self._make_observer)
        self.runtime = Runtime(
            policy,
            make_observer,  # type: ignore[arg-type]
            ledger=ledger,
            recorder=Recorder(),
            headroom=self._headroom,
            model_bytes=lambda: SIZE_BYTES,
            **options,  # type: ignore[arg-type]
        )
        self.runtime.start()

    def _make_observer(self) -> Observer:
        self._observer.start(self._reader.popen.pid)
        return self._observer

    def stop(self) -> Outcome:
        outcome = self.runtime.stop()
        self._observer.stop()
        self._headroom.close()
        return outcome


def resident(file: ModelFile) -> int:
    with open(file.path, "rb") as opened:
        return int(mincore(opened.fileno(), 0, SIZE_BYTES).sum()) * os.sysconf("SC_PAGE_SIZE")


def wait_until(condition: Callable[[], bool], otherwise: str) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, otherwise
        time.sleep(0.005)


def test_what_the_policy_wants_is_cached_before_the_first_read(
    files: ModelFiles, file: ModelFile, ledger: Ledger, reader: Reader
) -> None:
    policy = Told([Prefetch(file, 0, 16 * MiB)])
    running = Running(files, ledger, reader, policy)
    wait_until(lambda: resident(file) >= 16 * MiB, "nothing was prefetched")
    assert policy.accesses == []
    reader.read_to(8 * MiB)
    wait_until(lambda: bool(policy.accesses), "the read was not seen")
    outcome = running.stop()
    assert policy.stopped
    assert (outcome.accessed_bytes, outcome.prefetched_unused_bytes) == (8 * MiB, 8 * MiB)
    assert outcome.warnings == ()
    assert not any(access.miss for access in policy.accesses)


def test_the_policy_is_told_of_reads_in_their_order(
    files: ModelFiles, file: ModelFile, ledger: Ledger, reader: Reader
) -> None:
    policy = Told()
    running = Running(files, ledger, reader, policy, clock_start_s=time.monotonic() - 100)
    for stop in (4 * MiB, 12 * MiB, SIZE_BYTES):
        reader.read_to(stop)
        wait_until(partial(policy.has_come_to, stop), "a read was not seen")
    outcome = running.stop()
    assert policy.accesses[0].start == 0
    assert [access.stop for access in policy.accesses] == sorted(access.stop for access in policy.accesses)
    assert policy.accesses[0].miss  # later ones may be told twice, by position and by residency
    assert {(access.file, access.worker) for access in policy.accesses} == {(file, 0)}
    assert all(access.time_s >= 100 for access in policy.accesses)
    assert (outcome.accessed_bytes, outcome.prefetched_bytes) == (SIZE_BYTES, 0)
    assert outcome.first_access_s == policy.accesses[0].time_s
    assert outcome.last_access_s == policy.accesses[-1].time_s


def test_what_it_evicts_goes_where_the_model_does_not_fit(
    files: ModelFiles, file: ModelFile, ledger: Ledger, reader: Reader
) -> None:
    policy = Told(evict=[Evict(file, 0, 4 * MiB)])
    running = Running(files, ledger, reader, policy, memory_bytes=SIZE_BYTES // 2)
    reader.read_to(SIZE_BYTES)
    wait_until(lambda: ledger.totals().accessed_bytes == SIZE_BYTES, "the reads were not seen")
    outcome = running.stop()
    assert outcome.budget.source == "--memory"
    assert outcome.evicted_bytes == About(4 * MiB)
    assert resident(file) == About(SIZE_BYTES - 4 * MiB)


@pytest.mark.parametrize("cache", [CacheMode.AUTO, CacheMode.KEEP])
def test_nothing_is_evicted_where_the_model_fits_or_is_to_be_kept(
    files: ModelFiles, file: ModelFile, ledger: Ledger, reader: Reader, cache: CacheMode
) -> None:
    policy = Told(evict=[Evict(file, 0, 4 * MiB)])
    memory_bytes = SIZE_BYTES // 2 if cache is CacheMode.KEEP else None
    running = Running(files, ledger, reader, policy, cache=cache, memory_bytes=memory_bytes)
    reader.read_to(SIZE_BYTES)
    wait_until(lambda: ledger.totals().accessed_bytes == SIZE_BYTES, "the reads were not seen")
    assert running.stop().evicted_bytes == 0
    assert resident(file) == About(SIZE_BYTES)


def test_burning_leaves_nothing_even_of_what_was_only_prefetched(
    files: ModelFiles, file: ModelFile, ledger: Ledger, reader: Reader
) -> None:
    running = Running(files, ledger, reader, Told([Prefetch(file, 0, SIZE_BYTES)]), cache=CacheMode.BURN)
    wait_until(lambda: resident(file) == About(SIZE_BYTES), "nothing was prefetched")
    reader.read_to(MiB)
    reader.close()
    running.stop()
    assert resident(file) == 0


def test_quiet_is_told_once_until_something_is_read_again(
    files: ModelFiles, ledger: Ledger, reader: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime_module, "_QUIET_S", 0.05)
    told: list[float] = []
    running = Running(files, ledger, reader, Told(), on_quiet=lambda: told.append(time.monotonic()))
    reader.read_to(4 * MiB)
    wait_until(lambda: len(told) == 1, "quiet was not told")
    reader.read_to(8 * MiB)
    wait_until(lambda: len(told) == 2, "quiet was not told again")
    running.stop()
    assert len(told) == 2


@pytest.mark.parametrize("only_observes", [True, False])
def test_an_observer_is_told_that_all_is_seen_where_that_is_all(
    files: ModelFiles, ledger: Ledger, reader: Reader, monkeypatch: pytest.MonkeyPatch, *, only_observes: bool
) -> None:
    told: list[int] = []
    policy = Told()
    policy.only_observes = only_observes
    running = Running(files, ledger, reader, policy)
    monkeypatch.setattr(running._observer, "all_is_seen", lambda: told.append(ledger.totals().accessed_bytes))
    reader.read_to(4 * MiB)
    wait_until(lambda: policy.has_come_to(4 * MiB), "the reads were not seen")
    assert not told
    reader.read_to(SIZE_BYTES)
    if only_observes:
        wait_until(lambda: bool(told), "nobody was told")
    running.stop()
    assert set(told) == ({SIZE_BYTES} if only_observes else set())


def test_a_timeline_ends_with_what_was_read(files: ModelFiles, ledger: Ledger, reader: Reader) -> None:
    policy = Told()
    running = Running(files, ledger, reader, policy, sampling=True)
    reader.read_to(SIZE_BYTES)
    wait_until(lambda: ledger.totals().accessed_bytes == SIZE_BYTES, "the reads were not seen")
    outcome = running.stop()
    times = [sample.t_s for sample in outcome.timeline]
    assert times == sorted(times)
    assert outcome.timeline[-1].accessed_bytes == SIZE_BYTES
    assert outcome.timeline[-1].resident_bytes == About(SIZE_BYTES)


def test_without_an_observer_what_was_asked_for_first_is_still_prefetched(
    files: ModelFiles, file: ModelFile, ledger: Ledger, reader: Reader
) -> None:
    def fail() -> Observer:
        raise RuntimeError("nothing to look at")

    before = set(threading.enumerate())
    running = Running(files, ledger, reader, Told([Prefetch(file, 0, SIZE_BYTES)]), make_observer=fail)
    wait_until(lambda: not running.runtime._thread.is_alive(), "it goes on")
    outcome = running.stop()
    assert outcome.warnings == ("penstock stopped prefetching: RuntimeError: nothing to look at",)
    assert set(threading.enumerate()) <= before


def test_where_nothing_is_urgent_the_program_is_left_alone_at_first(
    files: ModelFiles, ledger: Ledger, reader: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime_module, "_PATIENT_S", 0.3)
    collected: list[float] = []
    observing: list[float] = []

    def make_observer() -> Observer:
        observing.append(time.monotonic())
        return running._make_observer()

    began = time.monotonic()
    running = Running(
        files,
        ledger,
        reader,
        Told(),
        make_observer=make_observer,
        collect=lambda: collected.append(time.monotonic()),
        sampling=True,
    )
    wait_until(lambda: bool(observing), "nobody ever observes")
    assert observing[0] - began >= 0.29
    assert collected
    assert collected[-1] <= observing[0]
    reader.read_to(SIZE_BYTES)
    outcome = running.stop()
    assert outcome.accessed_bytes == SIZE_BYTES
    assert outcome.timeline[0].t_s < 0.2


@pytest.mark.parametrize("ends_early", [True, False])
def test_patience_ends_with_the_program_or_with_something_to_do(
    files: ModelFiles,
    file: ModelFile,
    ledger: Ledger,
    reader: Reader,
    monkeypatch: pytest.MonkeyPatch,
    ends_early: bool,
) -> None:
    monkeypatch.setattr(runtime_module, "_PATIENT_S", DEADLINE_S)
    wanted = [] if ends_early else [Prefetch(file, 0, SIZE_BYTES)]
    running = Running(files, ledger, reader, Told(wanted), collect=lambda: None)
    if not ends_early:
        wait_until(lambda: running.runtime._observer is not None, "it waits although it is needed")
    running.stop()
    assert running.runtime._observer is not None


class Raises(Policy):
    def prefetch(self, access: Access | None) -> Sequence[Prefetch]:
        if access is not None:
            raise ValueError("no idea")
        return ()


class Nonsense(Policy):
    def __init__(self, answer: object) -> None:
        self._answer = answer

    def prefetch(self, access: Access | None) -> Sequence[Prefetch]:
        return [self._answer]  # type: ignore[list-item]


def test_a_policy_that_raises_is_switched_off_and_observing_goes_on(
    files: ModelFiles, ledger: Ledger, reader: Reader
) -> None:
    running = Running(files, ledger, reader, Raises())
    reader.read_to(4 * MiB)
    wait_until(lambda: ledger.totals().accessed_bytes == 4 * MiB, "the reads were not seen")
    reader.read_to(SIZE_BYTES)
    wait_until(lambda: ledger.totals().accessed_bytes == SIZE_BYTES, "observing has ended")
    outcome = running.stop()
    assert outcome.warnings == ("policy Raises is switched off: its prefetch raised ValueError: no idea",)


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ("everything", "'everything', which is neither a Prefetch nor an Evict"),
        (Prefetch("model", 0, 1), "a file of type str"),  # type: ignore[arg-type]
        (Prefetch(ModelFile("m", "/m", 10, 1, 2), 0, 11), "bytes 0–11 of /m, which has 10"),
        (Prefetch(ModelFile("m", "/m", 10, 1, 2), 5, 4), "bytes 5–4 of /m"),
        (Prefetch(ModelFile("m", "/m", 10, 1, 2), -1, 4), "bytes -1–4 of /m"),
    ],
)
def test_nonsense_is_refused(files: ModelFiles, ledger: Ledger, reader: Reader, answer: object, words: str) -> None:
    outcome = Running(files, ledger, reader, Nonsense(answer)).stop()
    [warning] = outcome.warnings
    assert warning.startswith("policy Nonsense is switched off: its prefetch returned ")
    assert words in warning

"""Drives a policy: what the observer sees goes in, what the policy returns is carried out.

Data flow, one way: observer → runtime → policy → loader / evictor → kernel.
"""

from __future__ import annotations

import enum
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from penstock.pagecache.base import Access, Evict, ModelFile, Policy, Prefetch
from penstock.pagecache.evictor import Evictor
from penstock.pagecache.headroom import Budget, DeviceMonitor, Headroom, OwnReads
from penstock.pagecache.ledger import Ledger
from penstock.pagecache.loader import THREADS, Loader
from penstock.pagecache.recorder import Recorder
from penstock.pagecache.sample import ResidencyMeter, Sample
from penstock.units import MiB

if TYPE_CHECKING:  # they import numpy: 0.1 s, in which the loader reads already
    from penstock.pagecache.evictor import MappedPart
    from penstock.pagecache.observers.base import Observed, Observer

_POLL_S = 0.012
_CALM_POLL_S = 0.04  # while there is nothing to be done, and nothing is lost: a poll costs the program, too
_OBSERVING_POLL_S = 0.08  # while there never is: of what is read by mapping it, a ring holds some 0.2 s
_CALM_S = 0.25  # since anything was read in, waited for, or asked for by the policy
_PATIENT_S = 0.2  # from the program's start, where nothing is urgent: by then it has imported what it needs
_IDLE_POLL_S = 0.1  # once nothing was read for _IDLE_S
_IDLE_S = 20.0
_QUIET_S = 2.0
_GOVERN_S = 0.02
_SAMPLE_S = 0.08
_CHARGED_ELSEWHERE_S = 1.0
_THREADS_BESIDE_OWN_READS = 1  # two made transformers import in 2.4 s, eight in 2.3 to 6.4, one in 2.1 (medians)
_READ_AHEAD_BYTES = 16 * MiB  # what the kernel may bring in beyond a range: twice the largest read_ahead_kb in use
_UNEVICTABLE_SHARE = 0.25  # of the budget, ahead of a reader whose pages cannot be evicted


class CacheMode(enum.Enum):
    """What happens to pages that were read."""

    AUTO = "auto"  # burnt when the model does not fit, kept when it does
    KEEP = "keep"
    BURN = "burn"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run did."""

    first_access_s: float | None
    last_access_s: float | None
    accessed_bytes: int
    prefetched_bytes: int
    prefetched_unused_bytes: int
    evicted_bytes: int
    device_read_bytes: int
    peak_resident_bytes: int
    budget: Budget
    loader_method: str
    residency_method: str
    warnings: tuple[str, ...]
    timeline: tuple[Sample, ...]


class Runtime:
    """One program's page cache, driven by one policy, in one thread of its own.

    Whatever goes wrong here ends in a warning, and the program goes on with the kernel's own behaviour.

    Args:
        policy: started already.
        make_observer: returns one that is started; called once, when the first prefetch is under way.
        model_bytes: what the program will read, as far as known: it decides whether memory is ample.
        cached_bytes: of it, in the page cache now, whoever is charged for them.
        collect: given where nothing is urgent, as all of the model is cached or nothing is to be prefetched: called
            for a while, before there is an observer, to keep for it what the kernel records.
        sampling: keep a timeline.
        clock_start_s: time.monotonic() of the program's start.
        on_observing: called once, after the first poll: what the program's open files are read from now on is seen.
        on_quiet: called each time that reading has stopped for a while: a service reads once and then serves for
            days, and may be killed with penstock.
        pids: the program's processes: what they read from the device is not for others.
    """

    def __init__(
        self,
        policy: Policy,
        make_observer: Callable[[], Observer],
        *,
        ledger: Ledger,
        recorder: Recorder,
        headroom: Headroom,
        cache: CacheMode = CacheMode.AUTO,
        model_bytes: Callable[[], int] = lambda: 0,
        cached_bytes: Callable[[], int] = lambda: 0,
        node_of_worker: Callable[[int], int | None] = lambda _: None,
        collect: Callable[[], None] | None = None,
        sampling: bool = False,
        clock_start_s: float | None = None,
        on_observing: Callable[[], None] = lambda: None,
        on_quiet: Callable[[], None] = lambda: None,
        pids: Callable[[], Iterable[int]] = lambda: (),
    ) -> None:
        self._policy: Policy | None = policy
        self._ignores_memory = policy.ignores_memory
        self._only_observes = policy.only_observes
        self._calm_poll_s = _OBSERVING_POLL_S if policy.only_observes else _CALM_POLL_S
        self._make_observer = make_observer
        self._observer: Observer | None = None
        self._ledger = ledger
        self._recorder = recorder
        self._headroom = headroom
        self._cache = cache
        self._model_bytes = model_bytes
        self._cached_bytes = cached_bytes
        self._charged_elsewhere_bytes = 0
        self._next_charged_elsewhere_s = 0.0
        self._collect = collect
        self._sampling = sampling
        self._next_sample_s = 0.0
        self._on_observing = on_observing
        self._on_quiet = on_quiet
        self._pids = pids
        self._began_s = time.monotonic() if clock_start_s is None else clock_start_s
        self._loader = Loader(ledger, node_of_worker)
        self._evictor = Evictor(ledger, self._mapped_parts)
        self._devices = DeviceMonitor()
        self._own_reads = OwnReads()
        self._budget = headroom.read()
        self._limited = False
        self._warnings: list[str] = []
        self._timeline: list[Sample] = []
        self._first_access_s: float | None = None
        self._last_access_s: float | None = None
        self._residency = ResidencyMeter(ledger)
        self._inside_hook_since: tuple[str, float] | None = None
        self._asked_s = 0.0  # when the policy last asked for something
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="penstock-runtime", daemon=True)

    def start(self) -> None:
        """Begin: the first prefetch, then one poll after another."""
        self._thread.start()

    def stop(self, timeout_s: float = 2.0) -> Outcome:
        """The program has ended: see what it read last and take everything back.

        A policy that does not return is left behind in its thread; the outcome then says so.
        """
        self._stopping.set()
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            text = f"penstock was still at work {timeout_s:.0f} s after the program's end; that was left behind"
            if self._inside_hook_since is not None:
                hook, since = self._inside_hook_since
                text = f"the policy's {hook} has not returned for {time.monotonic() - since:.1f} s; it was left behind"
            self._warnings.append(text)
        self._loader.close(0.5)
        return self.outcome()

    def outcome(self) -> Outcome:
        """What the run did so far; while it runs, for `on_observing` and `on_quiet` to ask."""
        loaded = self._loader.statistics()
        totals = self._ledger.totals()
        warnings = [*self._warnings, *loaded.warnings, *(self._observer.warnings if self._observer else ())]
        if self._evictor.warning:
            warnings.append(self._evictor.warning)
        return Outcome(
            self._first_access_s,
            self._last_access_s,
            totals.accessed_bytes,
            totals.prefetched_bytes,
            totals.waiting_bytes,
            totals.evicted_bytes,
            self._devices.read_bytes(),
            self._residency.peak_bytes,
            self._budget,
            loaded.method,
            ", ".join(sorted({record.residency.method.value for record in self._ledger.records()})),
            tuple(warnings),
            tuple(self._timeline),
        )

    def _run(self) -> None:
        try:
            self._submit(self._ask("prefetch", partial(_prefetch, None)))
            if self._collect is not None:
                self._wait_patiently(self._collect)
            self._observer = self._make_observer()
            self._loop(self._observer)
        except Exception as error:  # noqa: BLE001 — the program must not notice
            self._warnings.append(f"penstock stopped prefetching: {type(error).__name__}: {error}")
            self._loader.submit(())

    def _wait_patiently(self, collect: Callable[[], None]) -> None:
        """Leave the CPUs to a program that needs nothing of us while it starts."""
        self._asked_s = 0.0
        while self._loader.idle and not self._stopping.is_set():
            now = time.monotonic()
            left_s = self._began_s + _PATIENT_S - now
            if left_s <= 0:
                break
            collect()
            self._sample_in_time(now)
            self._stopping.wait(min(left_s, _CALM_POLL_S))

    def _loop(self, observer: Observer) -> None:
        next_govern = 0.0
        told_observing = told_quiet = False
        while True:
            ending = self._stopping.is_set()
            now = time.monotonic()
            observed = observer.last_poll() if ending else observer.poll()
            if observed:
                self._handle(observed, now - self._began_s)
                self._loader.nudge()
            if now >= next_govern or ending:
                next_govern = now + _GOVERN_S
                self._govern()
            self._sample_in_time(now, is_last=ending)
            if ending:
                break
            if not told_observing:
                told_observing = True
                self._on_observing()
            quiet_s = now - self._began_s - (self._last_access_s or 0.0)
            if observed:
                told_quiet = False
            elif not told_quiet and self._last_access_s is not None and quiet_s > _QUIET_S:
                told_quiet = True
                self._on_quiet()
            self._stopping.wait(self._poll_interval_s(observer, now, quiet_s))
        self._ask("stop", _stop)
        if self._cache is CacheMode.BURN:
            self._loader.close(0.5)  # what it maps, to read it in or to touch it, could not be dropped
            for record in self._ledger.records():
                # Also what was prefetched: a short program may have read it before anyone looked.
                for start, stop in [*record.accessed, *record.present]:
                    beyond = min(stop + _READ_AHEAD_BYTES, record.file.size_bytes)
                    self._evictor.evict(record.file, start, beyond)
        self._evictor.flush()

    def _poll_interval_s(self, observer: Observer, now: float, quiet_s: float) -> float:
        if quiet_s >= _IDLE_S:
            return _IDLE_POLL_S
        if not self._loader.idle:
            self._asked_s = now
        is_calm = observer.keeps_events and now - self._asked_s >= _CALM_S
        return self._calm_poll_s if is_calm else _POLL_S

    def _mapped_parts(self, file: ModelFile) -> Sequence[MappedPart]:
        return self._observer.mapped_parts(file) if self._observer else ()

    def _handle(self, observed: Sequence[Observed], time_s: float) -> None:
        for part in observed:
            if part.stop <= part.start:
                continue
            try:
                record = self._ledger.record(part.file)
            except OSError as error:
                self._warn(f"{part.file.path}: not followed: {error.strerror}")
                continue
            self._devices.watch(part.file.device)
            worker = self._recorder.record(part.pid, part.file, part.start, part.stop)
            missed = self._ledger.access(record, part.start, part.stop)
            if self._first_access_s is None:
                self._first_access_s = time_s
            self._last_access_s = time_s
            access = Access(part.file, part.start, part.stop, worker, time_s, missed > 0)
            self._submit(self._ask("prefetch", partial(_prefetch, access)))
            if self._burning:
                self._evict(self._ask("evict", partial(_evict, access)))

    @property
    def _burning(self) -> bool:
        return self._cache is CacheMode.BURN or (self._cache is CacheMode.AUTO and self._limited)

    def _govern(self) -> None:
        """Fit the loader to the memory and the device as they are."""
        self._budget = budget = self._headroom.read()
        self._limited = self._is_larger_than(budget)
        allowance = budget.bytes - (budget.keep_bytes if self._burning else 0)
        if self._limited and (self._evictor.warning or not self._burning):
            allowance = int(budget.bytes * _UNEVICTABLE_SHARE)
        if self._ignores_memory:
            allowance = 1 << 62
        pids = list(self._pids())
        threads = THREADS
        if self._own_reads.are_likely(pids, self._ledger.totals().accessed_bytes):
            threads = _THREADS_BESIDE_OWN_READS
        if self._devices.others_are_busy(pids):
            threads = 1
        self._loader.set_limits(allowance, threads)
        if self._burning:
            self._evict(self._ask("evict", partial(_evict, None)))
        if self._only_observes and self._observer is not None:
            model_bytes = self._model_bytes()
            if model_bytes and self._ledger.totals().accessed_bytes >= model_bytes:
                self._observer.all_is_seen()

    def _is_larger_than(self, budget: Budget) -> bool:
        """Whether the model, without what is cached at another cgroup's charge, needs more than the budget.

        Such pages take nothing of ours, and to burn them would slow the next reader for nothing.
        """
        model_bytes = self._model_bytes()
        if model_bytes <= budget.bytes:
            return False
        now = time.monotonic()
        if budget.charged_bytes is not None and now >= self._next_charged_elsewhere_s:
            self._next_charged_elsewhere_s = now + _CHARGED_ELSEWHERE_S
            self._charged_elsewhere_bytes = max(0, self._cached_bytes() - budget.charged_bytes)
        return model_bytes - self._charged_elsewhere_bytes > budget.bytes

    def _sample_in_time(self, now: float, *, is_last: bool = False) -> None:
        if not self._sampling or (now < self._next_sample_s and not is_last):
            return
        self._next_sample_s = now + _SAMPLE_S
        resident = self._residency.read(now)
        accessed = self._ledger.totals().accessed_bytes
        self._timeline.append(Sample(now - self._began_s, self._devices.read_bytes(), accessed, resident))

    def _ask(self, hook: str, call: Callable[[Policy], Sequence[Prefetch | Evict]]) -> Sequence[Prefetch | Evict]:
        """Call a hook; a policy that raises or answers nonsense is not asked again."""
        if self._policy is None:
            return ()
        self._inside_hook_since = (hook, time.monotonic())
        try:
            answer = call(self._policy)
            problem = next((p for p in map(_problem, answer) if p), "")
        except Exception as error:  # noqa: BLE001 — a policy may raise anything
            problem = f"raised {type(error).__name__}: {error}"
        finally:
            self._inside_hook_since = None
        if problem:
            self._warn(f"policy {type(self._policy).__name__} is switched off: its {hook} {problem}")
            self._policy = None
            self._loader.submit(())
            return ()
        if answer:
            self._asked_s = time.monotonic()
        return answer

    def _submit(self, requests: Sequence[Prefetch | Evict]) -> None:
        wanted = [request for request in requests if isinstance(request, Prefetch)]
        if wanted and not self._stopping.is_set():
            for device in {request.file.device for request in wanted}:
                self._devices.watch(device)
            self._loader.submit(wanted)

    def _evict(self, ranges: Sequence[Prefetch | Evict]) -> None:
        for part in ranges:
            if isinstance(part, Evict):
                try:
                    self._evictor.evict(part.file, part.start, part.stop)
                except OSError as error:
                    self._warn(f"{part.file.path}: not evicted: {error.strerror}")

    def _warn(self, text: str) -> None:
        if text not in self._warnings:
            self._warnings.append(text)


def _prefetch(access: Access | None, policy: Policy) -> Sequence[Prefetch | Evict]:
    return policy.prefetch(access)


def _evict(access: Access | None, policy: Policy) -> Sequence[Prefetch | Evict]:
    return policy.evict(access)


def _stop(policy: Policy) -> Sequence[Prefetch | Evict]:
    policy.stop()
    return ()


def _problem(item: object) -> str:
    """What is wrong with something that a hook returned; "" if nothing."""
    if not isinstance(item, Prefetch | Evict):
        return f"returned {item!r}, which is neither a Prefetch nor an Evict"
    file: object = item.file
    if not isinstance(file, ModelFile):
        return f"returned a file of type {type(file).__name__}, not the ModelFile of an access or the context"
    if not 0 <= item.start <= item.stop <= item.file.size_bytes:
        return (
            f"returned bytes {item.start}–{item.stop} of {item.file.path}, which has {item.file.size_bytes}: "
            "ranges must lie inside the file"
        )
    return ""

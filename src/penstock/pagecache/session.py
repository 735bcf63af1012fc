"""One program under penstock: its template, policy, observer and runtime, from its start to its end."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from penstock.errors import ObserverError, TemplateError, TemplateStaleError
from penstock.linux import numa, process
from penstock.pagecache.base import Context, ModelFile, Policy
from penstock.pagecache.files import ModelFiles
from penstock.pagecache.fingerprints import FingerprintCache
from penstock.pagecache.headroom import Headroom
from penstock.pagecache.ledger import Ledger
from penstock.pagecache.placement import accelerator_of, worker_node, worker_rank
from penstock.pagecache.recorder import Recorder
from penstock.pagecache.runtime import CacheMode, Outcome, Runtime
from penstock.pagecache.service import service_id
from penstock.pagecache.template import Template, TemplateStore
from penstock.units import MiB

if TYPE_CHECKING:
    from penstock.linux.tracefs import Instance
    from penstock.pagecache.observers.base import Observer

Mode = Literal["record", "replay", "observe"]

_GROWN_BYTES = 16 * MiB  # with this much, and that share, read beyond what the template says, it is recorded anew
_GROWN_SHARE = 0.02
# So little of a model that is cached takes the program less time to read than it takes penstock to see to it: the
# kernel drops a few pages of what nobody has asked for in a while.
_NEGLIGIBLE_BYTES = 16 * MiB
_NEGLIGIBLE_PART = 256


@dataclass(frozen=True, slots=True)
class SessionOptions:
    """What a run was asked to do."""

    command: tuple[str, ...]
    service: str | None  # None: derived from the command
    models: tuple[Path, ...]  # --model, or found in the command
    models_are_all: bool  # --model was given: nothing else is to be observed
    memory_bytes: int | None
    cache: CacheMode
    templates: Path
    fingerprints: Path
    sampling: bool


class Session:
    """Prefetches for one program.

    Args:
        options: what was asked for.
        policy: not started yet.
        pid: the program, about to run or just started.
        instance: a tracefs instance that follows it already; None observes through /proc.
        environment: the program's.
        started_s: time.monotonic() of its start.
        on_progress: called, in a thread of the session's, once the program is observed and each time that it has
            read something and then stopped for a while: `outcome` may be asked then.
    """

    def __init__(
        self,
        options: SessionOptions,
        policy: Policy,
        pid: int,
        instance: Instance | None,
        environment: Mapping[str, str],
        started_s: float,
        on_progress: Callable[[], None] = lambda: None,
    ) -> None:
        self._options = options
        self._policy = policy
        self._pid = pid
        self._environment = environment
        self._on_progress = on_progress
        self.warnings: list[str] = []
        self.final_model_bytes = 0  # what `model_bytes` was at the end
        self._files = ModelFiles(options.models)
        self.service = options.service or service_id(options.command, self._files.roots, environment, os.getcwd())
        self._store = TemplateStore(options.templates)
        self._fingerprints = FingerprintCache(options.fingerprints)
        self._ledger = Ledger()
        self._template = None if policy.only_observes else self._load_template()
        self.mode: Mode = "observe" if policy.only_observes else "replay" if self._template else "record"
        groups = self._template.groups if self._template else ()
        self._recorder = Recorder(groups, _rank_of)
        self._instance = instance
        self._observer: Observer | None = None
        self._headroom = Headroom(pid, options.memory_bytes)
        budget = self._headroom.read()
        policy.start(Context(tuple(self._files), groups, budget.bytes, budget.keep_bytes))
        self._runtime = Runtime(
            policy,
            self._make_observer,
            ledger=self._ledger,
            recorder=self._recorder,
            headroom=self._headroom,
            cache=options.cache,
            model_bytes=self.model_bytes,
            cached_bytes=self._cached_bytes,
            collect=instance.collect if instance is not None and self._nothing_is_urgent() else None,
            node_of_worker=self._node_finder(),
            sampling=options.sampling,
            clock_start_s=started_s,
            on_observing=on_progress,
            on_quiet=self._quiet,
            pids=self._pids,
        )

    @property
    def files(self) -> tuple[ModelFile, ...]:
        """The model files known so far."""
        return tuple(self._files)

    @property
    def observer(self) -> str:
        """Name of the observer in use; "" before there is one."""
        return self._observer.name if self._observer else ""

    def begin(self) -> None:
        """Start prefetching and observing."""
        self._runtime.start()

    def outcome(self) -> Outcome:
        """What the run did so far; only for `on_progress` to ask."""
        return self._runtime.outcome()

    def _quiet(self) -> None:
        self._store_template()
        self._on_progress()

    def finish(self) -> Outcome:
        """The program has ended: store what was recorded and take everything back."""
        outcome = self._runtime.stop()
        self.final_model_bytes = self.model_bytes()
        self.warnings += outcome.warnings
        if self._policy.mismatch:
            self.warnings.append(f"the template did not fit this run ({self._policy.mismatch}); recorded anew")
        elif self._template_is_short():
            self.warnings.append("the template was of less than this run read; recorded anew")
        self._store_template()
        if self._observer is not None:
            with contextlib.suppress(OSError):
                self._observer.stop()
        self._headroom.close()
        self._ledger.close()
        return outcome

    def _pids(self) -> list[int]:
        try:
            return process.descendants(self._pid)
        except ProcessLookupError:
            return []

    def model_bytes(self) -> int:
        """What the program will read: the template's, or the files that go with those it has read."""
        if self._template is not None:
            files = {identity.name: identity.size_bytes for identity in self._template.files}
            recorded = min(self._template.bytes_read, sum(files.values()))
            return max(recorded, self._ledger.totals().accessed_bytes)
        return sum(file.size_bytes for file in self._files_to_be_read())

    def _files_to_be_read(self) -> list[ModelFile]:
        """The template's, or those that go with what was read so far."""
        if self._template is not None:
            found = (self._files.by_name(identity.name) for identity in self._template.files)
            return [file for file in found if file is not None]
        read = {record.file for record in self._ledger.records() if record.accessed.total}
        suffixes = {os.path.splitext(file.path)[1] for file in read}
        return [file for file in self._files if os.path.splitext(file.path)[1] in suffixes]

    def _cached_bytes(self) -> int:
        """What of the model is in the page cache; 0 where that cannot be asked exactly."""
        total = 0
        for file in self._files_to_be_read():
            with contextlib.suppress(OSError):
                residency = self._ledger.record(file).residency
                total += residency.resident_bytes(0, file.size_bytes) if residency.exact else 0
        return total

    def _nothing_is_urgent(self) -> bool:
        """Nothing is to be prefetched: only to be observed, or all of it is cached, or as good as all."""
        if self.mode != "replay":
            return self.mode == "observe"
        if len(numa.nodes()) > 1:  # what is cached may lie on the wrong node
            return False
        files = self._files_to_be_read()
        total_bytes = sum(file.size_bytes for file in files)
        if total_bytes - self._cached_bytes() > min(_NEGLIGIBLE_BYTES, total_bytes // _NEGLIGIBLE_PART):
            return False
        for file in files:
            with contextlib.suppress(OSError):  # a small one, or it would be missing
                self._ledger.found_cached(self._ledger.record(file))
        return True

    def _load_template(self) -> Template | None:
        """The service's template, if it is whole and its files are the recorded ones."""
        try:
            template = self._store.load(self.service)
            if template is not None:
                self._check(template)
        except TemplateError as error:
            self.warnings.append(f"{error}; recording anew")
            return None
        except OSError as error:
            self.warnings.append(f"the template cannot be read: {error}")
            return None
        return template

    def _check(self, template: Template) -> None:
        """Raises TemplateStaleError unless every file is there and is what was recorded."""
        if not self._files.roots:
            for root in map(Path, template.root_hints):
                if root.is_dir():
                    self._files.add_root(root)
        for identity in template.files:
            file = self._files.by_name(identity.name)
            if file is None:
                raise TemplateStaleError(f"the template is stale: {identity.name} is not there any more")
            if file.size_bytes != identity.size_bytes:
                raise TemplateStaleError(
                    f"the template is stale: {file.path} had {identity.size_bytes} bytes, now {file.size_bytes}"
                )
            if self._fingerprints.get(file) != identity.fingerprint:
                raise TemplateStaleError(f"the template is stale: {file.path} has other contents")

    def _make_observer(self) -> Observer:
        if self._instance is not None:
            from penstock.pagecache.observers.tracefs import TracefsObserver

            observer = TracefsObserver(
                self._files, self._instance, only_known=self._options.models_are_all, keep_instance=True
            )
            self._observer = observer
            try:
                observer.start(self._pid)
            except ObserverError as error:
                self.warnings.append(f"observing through /proc instead: {error}")
            else:
                return observer
        from penstock.pagecache.observers.process import ProcessObserver

        fallback = ProcessObserver(
            self._files,
            self._ledger,
            self._template.groups if self._template else (),
            only_known=self._options.models_are_all,
        )
        self._observer = fallback
        try:
            fallback.start(self._pid)
        except ObserverError as error:
            if not isinstance(error.__cause__, ProcessLookupError):  # else it has ended already: nothing to observe
                self.warnings.append(str(error))
        return fallback

    def _node_finder(self) -> Callable[[int], int | None]:
        """Worker number → NUMA node of its accelerator; None for all where there is but one node."""
        there = numa.nodes()
        if len(there) < 2:
            return lambda _: None
        known: dict[int, int | None] = {}

        def node(worker: int) -> int | None:
            if known.get(worker) is None:
                pid = next((pid for pid, number in self._recorder.pids.items() if number == worker), None)
                try:
                    if pid is None:  # not started yet: the devices are given out in order
                        guess = accelerator_of({**self._environment, "LOCAL_RANK": str(worker)}, [])
                        return online(guess.node() if guess else None)
                    known[worker] = online(worker_node(pid))
                except (OSError, ProcessLookupError):
                    known[worker] = None
            return known[worker]

        def online(found: int | None) -> int | None:  # firmware may name one that has no memory
            return found if found in there else None

        return node

    def _template_is_short(self) -> bool:
        """Whether the program has read notably more than is recorded: that run may have been ended, or not seen."""
        if self._template is None:
            return False
        accessed = self._ledger.totals().accessed_bytes
        return accessed > self._template.bytes_read * (1 + _GROWN_SHARE) + _GROWN_BYTES

    def _store_template(self) -> None:
        """Write the template once reading has stopped for a while, and again at the end if more was read."""
        if self.mode == "observe":
            return
        if self.mode == "replay" and not self._policy.mismatch and not self._template_is_short():
            return
        try:
            roots = [str(root) for root in self._files.roots]
            template = self._recorder.template(self.service, roots, self._fingerprints.get)
            if template is not None:
                self._store.save(template)
        except OSError as error:
            text = f"the template could not be stored in {self._options.templates}: {error.strerror}"
            if text not in self.warnings:
                self.warnings.append(text)


def _rank_of(pid: int) -> int | None:
    try:
        return worker_rank(process.environment(pid))
    except (OSError, ProcessLookupError):
        return None

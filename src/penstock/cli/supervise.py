"""From the start of a program under `penstock run` to its end: what that takes is imported beside it."""

from __future__ import annotations

import contextlib
import gc
import os
import threading
import time
from typing import TYPE_CHECKING

from penstock.cli.launch import Launched, RunOptions, fail, say

if TYPE_CHECKING:
    from typing import NoReturn

    from penstock.pagecache.base import Policy
    from penstock.pagecache.runtime import Outcome
    from penstock.pagecache.session import Session
    from penstock.report.report import Report

# Objects made before Python looks for garbage: of importing, to which looking adds a seventh, there is none.
_COLLECT_AFTER = 50_000


def own_policy(options: RunOptions) -> Policy | None:
    """A policy of the user's own, made before the program is started: ends penstock, with a message, if it cannot be.

    None for one that comes with penstock.
    """
    from penstock.errors import PenstockError
    from penstock.pagecache.policies import BUILT_IN, create_policy

    try:
        return None if options.policy in BUILT_IN else create_policy(options.policy)
    except PenstockError as error:
        fail(str(error))


def supervise(launched: Launched, policy: Policy | None = None) -> NoReturn:
    """Prefetch for the program that was launched, wait for it, and end as it ended.

    Args:
        launched: the program; released here if it was not yet.
        policy: one of the user's own; None for the built-in one that the options name.
    """
    session: Session | None = None
    teller = _Teller(launched)
    try:
        session = _begin(launched, policy, teller)
    except Exception as error:  # noqa: BLE001 — whatever it is, the program goes on without us
        launched.release()
        say(f"penstock: not prefetching: {type(error).__name__}: {error}")
    exit_code = launched.wait()
    teller.program_ended()
    if session is not None:
        try:
            teller.end(session, session.finish(), exit_code)
        except Exception as error:  # noqa: BLE001 — the exit status is the program's
            say(f"penstock: no report: {type(error).__name__}: {error}")
    os._exit(exit_code)  # a policy that never returns may still hold a thread


def _begin(launched: Launched, policy: Policy | None, teller: _Teller) -> Session:
    options = launched.options
    launched.run_ahead()
    gc.set_threshold(_COLLECT_AFTER)
    from pathlib import Path

    from penstock.cli.paths import fingerprint_directory, template_directory
    from penstock.pagecache.files import models_in_command
    from penstock.pagecache.policies import create_policy
    from penstock.pagecache.runtime import CacheMode
    from penstock.pagecache.session import Session, SessionOptions
    from penstock.units import parse_size

    policy = policy or create_policy(options.policy)
    launched.release()
    launched.give_way.end()
    if launched.instance is not None:
        launched.instance.collect()
    session = Session(
        SessionOptions(
            command=options.command,
            service=options.service,
            models=tuple(map(Path, options.models)) or tuple(models_in_command(options.command)),
            models_are_all=bool(options.models),
            memory_bytes=None if options.memory == "auto" else parse_size(options.memory),
            cache=CacheMode(options.cache),
            templates=template_directory(options.templates),
            fingerprints=fingerprint_directory(),
            sampling=options.report is not None or options.plot is not None,
        ),
        policy,
        launched.program.pid,
        launched.instance,
        launched.environment,
        launched.started_s,
        teller.progress,
    )
    teller.session = session
    if launched.reason and options.observer == "auto":
        session.warnings.append(f"observing through /proc, because tracefs is not usable: {launched.reason}")
    session.begin()
    import penstock.report.report  # noqa: F401 — now, not when the program has ended and someone waits for us

    return session


class _Teller:
    """Says what a run did: in its report while it goes on, and everywhere at its end.

    Attributes:
        session: given before it begins.
    """

    def __init__(self, launched: Launched) -> None:
        self.session: Session | None = None
        self._launched = launched
        self._options = launched.options
        self._wall_s: float | None = None
        self._writing = threading.Lock()  # a progress that is left behind must not come after the end
        self._is_told = False

    def program_ended(self) -> None:
        """What happens from now on is the end's to tell."""
        self._wall_s = time.monotonic() - self._launched.started_s

    def progress(self) -> None:
        """Write the report of a run that goes on, in the session's thread; what hinders that is said at the end.

        Not to a pipe or a device: it would be read twice, and a pipe that nobody reads would hold the prefetch up.
        """
        path = self._options.report
        if path is None or self.session is None or self._wall_s is not None:
            return
        if os.path.exists(path) and not os.path.isfile(path):
            return
        with contextlib.suppress(Exception), self._writing:
            report = self._report(self.session, self.session.outcome(), self.session.model_bytes(), None)
            if not self._is_told:
                report.save(path)

    def end(self, session: Session, outcome: Outcome, exit_code: int) -> None:
        """Write the report, say it in two lines and draw it, as far as each is wanted."""
        from penstock.report.report import summary_lines

        options = self._options
        report = self._report(session, outcome, session.final_model_bytes, exit_code)
        with self._writing:
            self._is_told = True
            if options.report is not None:
                report.save(options.report)
        if not options.quiet or session.warnings:
            for line in summary_lines(report):
                say(line)
        if options.plot is not None:
            from pathlib import Path

            from penstock.report.plot import label, plot

            plot([(label(report), report)], Path(options.plot), _device_limit(session))

    def _report(self, session: Session, outcome: Outcome, model_bytes: int, exit_code: int | None) -> Report:
        from penstock.report.report import Report

        wall_s = self._wall_s
        return Report(
            service=session.service,
            mode=session.mode,
            policy=self._options.policy,
            observer=session.observer,
            exit_code=exit_code,
            wall_s=time.monotonic() - self._launched.started_s if wall_s is None else wall_s,
            first_access_s=outcome.first_access_s,
            last_access_s=outcome.last_access_s,
            bytes_accessed=outcome.accessed_bytes,
            bytes_prefetched=outcome.prefetched_bytes,
            bytes_prefetched_unused=outcome.prefetched_unused_bytes,
            bytes_evicted=outcome.evicted_bytes,
            bytes_device_read=outcome.device_read_bytes,
            peak_resident_bytes=outcome.peak_resident_bytes,
            warnings=tuple(dict.fromkeys((*session.warnings, *outcome.warnings))),
            timeline=outcome.timeline,
            command=self._options.command,
            model_bytes=model_bytes,
            loader_method=outcome.loader_method,
            residency_method=outcome.residency_method,
            memory_source=outcome.budget.source,
            budget_bytes=outcome.budget.bytes,
        )


def _device_limit(session: Session) -> float | None:
    """Bytes a second that the device gives without the page cache, measured on the largest model file."""
    from penstock.storage.probe import measure_read_bandwidth

    largest = max(session.files, key=lambda file: file.size_bytes, default=None)
    return measure_read_bandwidth(largest.path) if largest else None

"""One run: prepare memory, start the command, wait for it, check what it did."""

from __future__ import annotations

import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.errors import BenchError, RunError
from bench.memory import Ballast, resident_share
from bench.model import Contents, Model, expected
from bench.page_cache.account import Account, check_files
from bench.page_cache.arms import ARMS, Key
from bench.page_cache.limit import LimitUse, MemoryLimit
from bench.readahead import ReadAhead
from penstock.errors import UnsupportedError
from penstock.linux.process import memory_bytes
from penstock.linux.tracefs import TraceFs
from penstock.units import MiB

REPOSITORY = Path(__file__).resolve().parents[2]
TIMEOUT_S = 900
_SAMPLE_S = 0.05


@dataclass(frozen=True, slots=True)
class Run:
    """What one run took and did.

    Attributes:
        round: 0 is the round of verification, which counts in no figure.
        seconds: wall time of the command, `penstock warm` included where the arm has it.
        warm_s: what of it `penstock warm` took.
        phases: seconds, as the client measured them.
        report: penstock's own report, without its timeline; empty where penstock did not run.
        penstock_peak_bytes: highest resident set of the penstock process, sampled every 50 ms; with a loader it
            includes the pages of the model that the loader maps while it fills them.
        template_bytes: size of the template store after the run.
        cached_share: how much of the model was in the page cache after the run.
    """

    key: Key
    round: int
    seconds: float
    bytes: int
    warm_s: float = 0.0
    phases: dict[str, float] = field(default_factory=dict)
    report: dict[str, Any] = field(default_factory=dict)
    limit: LimitUse | None = None
    penstock_peak_bytes: int = 0
    template_bytes: int = 0
    cached_share: float = 0.0


class Runner:
    """Runs arms one at a time, each from the state of memory that it asks for.

    Args:
        directory: a place for templates, reports and the ordinary user's home, on any file system.
        uid: the ordinary user.
        share_floor_bytes: the least memory that a share of the model is taken as; a tiny model's own share
            would not hold Python.
    """

    def __init__(
        self,
        *,
        model: Model,
        directory: Path,
        ballast: Ballast,
        read_ahead: ReadAhead,
        uid: int,
        share_floor_bytes: int,
    ) -> None:
        self.penstock = Path(sys.executable).with_name("penstock")
        if not self.penstock.exists():
            raise BenchError("penstock is not installed in this environment: pip install -e .")
        self._model = model
        self._directory = directory
        self._ballast = ballast
        self._read_ahead = read_ahead
        self._uid = uid
        self._share_floor_bytes = share_floor_bytes
        self._account: Account | None = None
        self._expected: dict[str, Contents] = {}

    def execute(self, key: Key, round_number: int, *, verify: bool) -> Run:
        """Run one arm.

        Raises:
            RunError: the run is invalid; the message says in what.
        """
        arm, setting = ARMS[key.arm], key.setting
        template = None
        if arm.template in ("file", "reverse"):
            template = self._recorded(key, reverse=arm.template == "reverse")
        files = self._model.files(setting.client)
        if arm.resident:
            self._read_ahead_for_filling()
            self._ballast.make_resident(files)
        else:
            self._ballast.make_cold(files)
        run = self._start(key, round_number, verify=verify, template=template)
        if arm.mode is not None and run.report.get("mode") != arm.mode:
            raise RunError(f"penstock's mode was {run.report.get('mode')!r}, not {arm.mode!r}: {run.report}")
        return run

    def _read_ahead_for_filling(self) -> None:
        # How the cache was filled decides how fast it is read; L is to be the best case.
        if self._read_ahead.may_set():
            self._read_ahead.set(None)

    def _recorded(self, key: Key, *, reverse: bool) -> Path:
        """The template of the client, recorded in a cold run before its first use.

        Raises:
            RunError: that run is invalid, or recorded nothing.
        """
        setting = key.setting
        name = f"{setting.client}-{setting.user}-{'reverse' if reverse else 'file'}"
        store = self._directory / "templates" / name
        if not store.exists():
            self._ballast.make_cold(self._model.files(setting.client))
            run = self._start(Key(setting, "first"), 0, verify=False, template=None, reverse=reverse, keep=store)
            if run.template_bytes == 0:
                shutil.rmtree(store)
                raise RunError(f"the recording run stored no template: {run.report}")
        return store

    def _start(
        self,
        key: Key,
        round_number: int,
        *,
        verify: bool,
        template: Path | None,
        reverse: bool = False,
        keep: Path | None = None,
    ) -> Run:
        arm, setting = ARMS[key.arm], key.setting
        read_ahead_kib = None if setting.read_ahead == "machine" else int(setting.read_ahead)
        with self._scratch(setting.user) as scratch:
            if template is not None:
                shutil.copytree(template, scratch, dirs_exist_ok=True)
                self._own(scratch, setting.user)
            passes = 1 if verify else setting.passes
            command = self._client(setting.client, verify=verify, reverse=reverse, passes=passes)
            report_path = scratch / "report.json"
            if arm.policy is not None:
                command = [
                    str(self.penstock), "run", "--service", f"bench-{setting.client}", "--policy", arm.policy,
                    "--model", str(self._model.path(setting.client)), *arm.options,
                    "--templates", str(scratch / "templates"), "--report", str(report_path), "--", *command,
                ]  # fmt: skip
            environment = self._environment(scratch)
            instances = _tracefs_instances()
            if self._ballast.holds:
                self._warm_libraries(setting.client, environment, scratch)
                _wait_for_no_more_than(instances)  # to make another waits until the last is removed, 0.1 s
            self._ballast.fill()
            self._ballast.freshen()
            self._read_ahead.set(read_ahead_kib)
            limit = self._limit(key)
            warm_s = 0.0
            try:
                enter = self._enter(setting.user, limit)
                if arm.warm:
                    warm = [str(self.penstock), "warm", str(self._model.path(setting.client))]
                    warm_s = _spawn(warm, environment, enter, scratch, sample=False).seconds
                ended = _spawn(command, environment, enter, scratch, sample=arm.policy is not None)
                use = limit.use() if limit else None
            finally:
                if limit:
                    limit.remove()
            if use is not None and (use.oom_kills or (use.peak_bytes or 0) > use.limit_bytes):
                raise RunError(f"the run did not stay within its memory: {use}")
            _wait_for_no_more_than(instances)
            cached_share = resident_share(self._model.files(setting.client))
            report = {}
            if arm.policy is not None:
                report = self._report(report_path)
            store_bytes = sum(path.stat().st_size for path in (scratch / "templates").rglob("*") if path.is_file())
            if keep is not None:
                # the home too: penstock keeps fingerprints of files in the user's cache directory
                for name in ("templates", "home"):
                    shutil.copytree(scratch / name, keep / name)
        client = _last_line(ended.output)
        if not reverse:
            self._check(setting.client, client, verify=verify, passes=passes)
        return Run(
            key=key,
            round=round_number,
            seconds=warm_s + ended.seconds,
            bytes=client["bytes"],
            warm_s=warm_s,
            phases=client["phases"],
            report=report,
            limit=use,
            penstock_peak_bytes=ended.peak_bytes,
            template_bytes=store_bytes,
            cached_share=cached_share,
        )

    @contextmanager
    def _scratch(self, user: str) -> Iterator[Path]:
        """A directory of the run's own, the user's, with nothing of earlier runs."""
        with tempfile.TemporaryDirectory(prefix="run-", dir=self._directory) as name:
            scratch = Path(name)
            for child in ("templates", "home", "tmp"):
                (scratch / child).mkdir()
            self._own(scratch, user)
            yield scratch

    def _own(self, directory: Path, user: str) -> None:
        if user == "user":
            for path in (directory, *directory.rglob("*")):
                os.chown(path, self._uid, self._uid)

    def _warm_libraries(self, client: str, environment: dict[str, str], scratch: Path) -> None:
        """Import what the client and penstock import, so that it is cached in every arm alike.

        Old page cache may have been reclaimed since the last run, by DAMON for one, libraries with it; then a run
        would wait for more than its model.
        """
        modules = [f"bench.page_cache.clients.{client}"]
        if client == "hf":
            modules.append("transformers.models.llama.modeling_llama")
        imports = [sys.executable, "-c", f"import {', '.join(modules)}"]
        command = [str(self.penstock), "run", "--quiet", "--policy", "native", "--", *imports]
        _spawn(command, environment, None, scratch, sample=False)

    def _client(self, client: str, *, verify: bool, reverse: bool, passes: int) -> list[str]:
        command = [sys.executable, "-m", f"bench.page_cache.clients.{client}", str(self._model.path(client))]
        ring_bytes = max(8 * MiB, min(256 * MiB, self._model.bytes(client) // 16))
        command += ["--ring-bytes", str(ring_bytes)]
        command += ["--passes", str(passes)]
        command += ["--verify"] * verify
        command += ["--order", "reverse"] * reverse
        return command

    def _environment(self, scratch: Path) -> dict[str, str]:
        dropped = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "CUDA_VISIBLE_DEVICES")
        kept = {
            name: value
            for name, value in os.environ.items()
            if name not in dropped and not name.startswith(("XDG_", "PENSTOCK_"))
        }
        home = str(scratch / "home")
        return kept | {
            "HOME": home,
            "HF_HOME": home,
            "HF_HUB_OFFLINE": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "TRANSFORMERS_VERBOSITY": "error",
            "TMPDIR": str(scratch / "tmp"),
            "PYTHONPATH": str(REPOSITORY),
            "PYTHONDONTWRITEBYTECODE": "1",
        }

    def _limit(self, key: Key) -> MemoryLimit | None:
        if key.setting.memory == "ample":
            return None
        share = float(key.setting.memory.removesuffix("%")) / 100
        return MemoryLimit(self.limit_bytes(key.setting.client, share))

    def limit_bytes(self, client: str, share: float) -> int:
        """The memory limit that is a share of the model."""
        return max(self._share_floor_bytes, int(self._model.bytes(client) * share)) // 4096 * 4096

    def _enter(self, user: str, limit: MemoryLimit | None) -> Callable[[], None] | None:
        account = self._user() if user == "user" else None
        if account is None:
            return limit.enter if limit else None

        def enter() -> None:
            if limit:
                limit.enter()
            account.enter()

        return enter

    def _user(self) -> Account:
        if self._account is None:
            check_files([Path(sys.executable).resolve(), *self._model.files("mmap")], self._uid)
            needed = [
                Path(sys.base_prefix), Path(sys.prefix), REPOSITORY, self._model.directory, self._directory,
            ]  # fmt: skip
            self._account = Account(self._uid, needed)
        return self._account

    def _check(self, client: str, found: dict[str, Any], *, verify: bool, passes: int) -> None:
        """Compare what the client read with what the independent reader read."""
        if client not in self._expected:
            self._expected[client] = expected(self._model, client)
        wanted = self._expected[client]
        if verify:
            wrong = sorted(
                name
                for name in wanted.crcs.keys() | found["pieces"].keys()
                if wanted.crcs.get(name) != found["pieces"].get(name)
            )
            if wrong:
                raise RunError(f"wrong bytes in {len(wrong)} of {len(wanted.crcs)} pieces: {wrong[:3]} …")
        size_bytes, samples = wanted.bytes * passes, wanted.samples * passes % (1 << 64)
        if (found["bytes"], found["samples"]) != (size_bytes, samples):
            raise RunError(
                f"the client read {found['bytes']} bytes with samples {found['samples']:#x}; "
                f"the files have {size_bytes} with {samples:#x}"
            )

    def _report(self, path: Path) -> dict[str, Any]:
        try:
            report = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise RunError(f"penstock wrote no readable --report: {error}") from error
        return {name: value for name, value in report.items() if name != "timeline"}


@dataclass(frozen=True, slots=True)
class _Ended:
    seconds: float
    output: str
    peak_bytes: int


def _spawn(
    command: list[str],
    environment: dict[str, str],
    enter: Callable[[], None] | None,
    scratch: Path,
    *,
    sample: bool,
) -> _Ended:
    """Run a command to its end; wall seconds from spawn to exit.

    The peak is VmHWM of the process that was started, not of its children; wait4's would mix both.
    """
    peak_bytes = 0
    with (scratch / "stdout").open("w+") as output, (scratch / "stderr").open("w+") as errors:
        start = time.perf_counter()
        process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=errors,
            cwd=REPOSITORY,
            preexec_fn=enter,
        )
        try:
            pidfd = os.pidfd_open(process.pid)
            try:
                poller = select.poll()
                poller.register(pidfd, select.POLLIN)
                while not poller.poll((_SAMPLE_S if sample else TIMEOUT_S) * 1000):
                    if time.perf_counter() - start > TIMEOUT_S:
                        raise RunError(f"not finished after {TIMEOUT_S} s: {' '.join(command)}")
                    sizes = memory_bytes(process.pid)
                    peak_bytes = sizes.get("VmHWM", peak_bytes)  # it only grows; not there at the exit
            finally:
                os.close(pidfd)
            seconds = time.perf_counter() - start
            status = process.wait()
        except BaseException:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            raise
        for file in (output, errors):
            file.seek(0)
        if status:
            tail = "\n".join(errors.read().splitlines()[-15:])
            raise RunError(f"status {status} of: {' '.join(command)}\n{tail}")
        return _Ended(seconds, output.read(), peak_bytes)


def _last_line(output: str) -> dict[str, Any]:
    try:
        found = json.loads(output.splitlines()[-1])
    except (IndexError, ValueError) as error:
        raise RunError(f"the client's last line is not JSON: {output[-200:]!r}") from error
    if not isinstance(found, dict):
        raise RunError(f"the client's last line is not a JSON object: {output[-200:]!r}")
    return found


def _wait_for_no_more_than(instances: set[str]) -> None:
    """Wait until penstock's tracefs instances are removed, which a process of its own does after its exit.

    Raises:
        RunError: one is there after 5 s.
    """
    deadline = time.monotonic() + 5
    while left := _tracefs_instances() - instances:
        if time.monotonic() > deadline:
            raise RunError(f"tracefs instances are left: {', '.join(sorted(left))}")
        time.sleep(0.01)


def _tracefs_instances() -> set[str]:
    try:
        tracefs = TraceFs()  # where it is not mounted, penstock uses a mount of its own, and so must we
    except UnsupportedError:
        return set()
    try:
        return tracefs.instances()
    finally:
        tracefs.close()

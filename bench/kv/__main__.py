"""The command line of the benchmark; the package's docstring has the method."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from bench.direct import bandwidth, fio_bandwidth
from bench.errors import BenchError, RunError
from bench.kv.arms import ARMS
from bench.kv.family import FAMILIES
from bench.kv.models import real_model
from bench.kv.workload import Device, Workload
from bench.machine import describe
from bench.page_cache.limit import LimitUse, MemoryLimit, may_limit
from bench.readahead import ReadAhead
from penstock.units import MiB, format_size, parse_size

_BUDGETS = (10, 25, 50, 75, 100, 150)
_NARROW_KIB = 128
_SETTLED_STEPS = 1  # the first step of a run is not counted: tensors are on their way into memory


@dataclass(frozen=True, slots=True)
class Run:
    """What one run of an arm took."""

    prefill_s: float
    step_s: float  # median
    first_step_s: float
    read_bytes_per_s: float  # from the device, in the steps that count
    cpu_s: float
    own_bytes: int  # of the process, before there was a cache
    peak_rss_bytes: int
    use: LimitUse
    figures: dict[str, Any]
    steps_s: list[float]


@click.command(
    epilog="""\b
Examples:
  python -m bench.kv --dir /mnt/nvme
  python -m bench.kv --budgets 50 --rounds 3 --arms memmap,penstock
  python -m bench.kv --quick
"""
)
@click.option("--size", default="4.5GB", show_default=True, help="Of the cache.")
@click.option("--layers", default=32, show_default=True, type=click.IntRange(min=1))
@click.option("--prompt", default=512, show_default=True, type=click.IntRange(min=1), help="Tokens.")
@click.option("--steps", default=8, show_default=True, type=click.IntRange(min=3), help="Tokens to decode.")
@click.option(
    "--budgets", default=",".join(map(str, _BUDGETS)), show_default=True, help="Memory, percent of the cache."
)
@click.option("--arms", default=",".join(ARMS), show_default=True)
@click.option("--halving", is_flag=True, help="Instead: halve the limit in the middle of a decode, and restore it.")
@click.option("--model", "family", type=click.Choice(list(FAMILIES)), help="Instead: a real model.")
@click.option("--device", default="cpu", show_default=True, help="That is copied to and computed with, such as cuda.")
@click.option("--rounds", default=5, show_default=True, type=click.IntRange(min=1))
@click.option(
    "--dir",
    "directory",
    default=".",
    show_default=True,
    type=click.Path(path_type=Path, file_okay=False, exists=True),
    help="On the disk to measure; everything is removed afterwards.",
)
@click.option("--json", "json_path", type=click.Path(path_type=Path, dir_okay=False), help="Every figure.")
@click.option("--quick", is_flag=True, help="A small cache, one round, one budget, no bars.")
def main(
    size: str,
    layers: int,
    prompt: int,
    steps: int,
    budgets: str,
    arms: str,
    halving: bool,
    family: str | None,
    device: str,
    rounds: int,
    directory: Path,
    json_path: Path | None,
    quick: bool,
) -> None:
    """What a decode step takes when its KV cache is larger than memory."""
    console = Console() if sys.stdout.isatty() else Console(width=132)
    if quick:
        size, layers, prompt, steps, budgets, rounds = "24MiB", 4, 64, 4, "1500", 1
    row_bytes = parse_size(size) // (2 * layers * (prompt + steps))
    workload = Workload(layers, row_bytes, prompt, steps, device)
    names = arms.split(",")
    if unknown := [name for name in names if name not in ARMS]:
        raise click.ClickException(f"--arms: no arm is called {unknown[0]!r}; there are {', '.join(ARMS)}")
    reason = may_limit()
    if reason:
        console.print(f"without memory limits: {reason}", style="yellow", highlight=False)
    try:
        with ExitStack() as stack:
            scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-kv-", dir=directory)))
            read_ahead = ReadAhead(directory)
            stack.callback(read_ahead.restore)
            floor = _Floor.measure(scratch, workload)
            console.print(floor.line(), highlight=False)
            if halving:
                if reason:
                    raise BenchError(reason)
                sys.exit(not _halving(console, workload, scratch, rounds))
            if family:
                sys.exit(not real_model(console, family, device, scratch, rounds, limited=not reason))
            found: dict[int, dict[str, list[Run]]] = {}
            for percent in map(int, budgets.split(",")):
                runs = found[percent] = {name: [] for name in names}
                limit_bytes = workload.kv_bytes * percent // 100
                for number in range(rounds):
                    first = number % len(names)
                    for name in names[first:] + names[:first]:
                        if read_ahead.may_set():
                            read_ahead.set(_NARROW_KIB if name.endswith("-128") else None)
                        runs[name].append(_run(name, workload, scratch, None if reason else limit_bytes))
                        console.print(_line(percent, number, rounds, name, runs[name][-1]), highlight=False)
            floor = floor.better(_Floor.measure(scratch, workload))
    except (BenchError, RunError) as error:
        raise click.ClickException(str(error)) from error
    machine = describe(directory)
    for name, value in machine.lines():
        console.print(f"{name:12} {value}", highlight=False)
    console.print(floor.line(), highlight=False)
    for percent, runs in found.items():
        console.print(_table(percent, workload, runs, floor))
    passed = quick or _verdicts(console, workload, found, floor)
    if json_path is not None:
        rows = [
            {"percent": percent, "arm": arm, "runs": [asdict(run) for run in values]}
            for percent, runs in found.items()
            for arm, values in runs.items()
        ]
        document = {"machine": asdict(machine), "workload": asdict(workload), "floor": asdict(floor), "rows": rows}
        json_path.write_text(json.dumps(document, indent=1) + "\n")
    sys.exit(not passed)


@dataclass(frozen=True, slots=True)
class _Floor:
    """What no arm can be faster than."""

    disk_bytes_per_s: float
    fio_bytes_per_s: float | None
    copy_bytes_per_s: float

    @classmethod
    def measure(cls, directory: Path, workload: Workload) -> _Floor:
        path = directory / "floor"
        size_bytes = min(2048 * MiB, max(16 * MiB, workload.kv_bytes))
        block = os.urandom(16 * MiB)
        with path.open("wb") as file:
            for _ in range(size_bytes // len(block)):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
        try:
            disk = max(bandwidth([path]) for _ in range(3))
            fio = fio_bandwidth(path)
        finally:
            path.unlink()
        return cls(disk, fio, Device(workload.device).bandwidth())

    def better(self, other: _Floor) -> _Floor:
        """The faster of two measurements."""
        return _Floor(
            max(self.disk_bytes_per_s, other.disk_bytes_per_s),
            max(self.fio_bytes_per_s or 0, other.fio_bytes_per_s or 0) or None,
            max(self.copy_bytes_per_s, other.copy_bytes_per_s),
        )

    def line(self) -> str:
        fio = "" if self.fio_bytes_per_s is None else f" (fio {self.fio_bytes_per_s / 1e9:.2f})"
        return f"disk {self.disk_bytes_per_s / 1e9:.2f} GB/s{fio}, one copy {self.copy_bytes_per_s / 1e9:.2f} GB/s"

    def step_s(self, workload: Workload, percent: int, own_bytes: int) -> float:
        """Of a decode step: what the memory beside the benchmark's own does not hold is read, and all is copied."""
        read_bytes = max(0, workload.kv_bytes - max(0, workload.kv_bytes * percent // 100 - own_bytes))
        return max(read_bytes / self.disk_bytes_per_s, workload.kv_bytes / self.copy_bytes_per_s)


def _run(
    name: str, workload: Workload, directory: Path, limit_bytes: int | None, changes: dict[int, int] | None = None
) -> Run:
    command = [sys.executable, "-m", "bench.kv.replay", name, str(directory), json.dumps(asdict(workload))]
    limit = None if limit_bytes is None else MemoryLimit(limit_bytes)
    if limit and changes:
        command += [str(limit.limit_path), json.dumps(changes)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, preexec_fn=limit.enter if limit else None
        )
        use = limit.use() if limit else LimitUse(0, None, 0, 0)
    finally:
        if limit:
            limit.remove()
        for path in directory.iterdir():
            path.unlink()
    if done.returncode:
        raise RunError(f"{name}: exit status {done.returncode}, OOM kills {use.oom_kills}: {done.stderr[-2000:]}")
    told = json.loads(done.stdout.splitlines()[-1])
    counted = told["steps_s"][_SETTLED_STEPS:]
    return Run(
        prefill_s=told["prefill_s"],
        step_s=median(counted),
        first_step_s=told["steps_s"][0],
        read_bytes_per_s=sum(told["read_bytes"][_SETTLED_STEPS:]) / sum(counted),
        cpu_s=told["cpu_s"],
        own_bytes=told["own_bytes"],
        peak_rss_bytes=told["peak_rss_bytes"],
        use=use,
        figures=told["figures"],
        steps_s=told["steps_s"],
    )


def _line(percent: int, number: int, rounds: int, name: str, run: Run) -> str:
    return (
        f"{percent} %, round {number + 1}/{rounds}, {name}: prefill {run.prefill_s:.2f} s, step {run.step_s:.2f} s "
        f"(first {run.first_step_s:.2f}), device {run.read_bytes_per_s / 1e9:.2f} GB/s, CPU {run.cpu_s:.1f} s"
    )


def _table(percent: int, workload: Workload, runs: dict[str, list[Run]], floor: _Floor) -> Table:
    title = f"memory {percent} % of {format_size(workload.kv_bytes)}: {format_size(workload.kv_bytes * percent / 100)}"
    table = Table(title=title, title_justify="left", title_style="bold")
    for column in ("arm", "prefill s", "step s", "of the floor", "first step s", "device GB/s", "CPU s", "peak"):
        table.add_column(column, justify="left" if column == "arm" else "right")
    for name, values in runs.items():
        peaks = [run.use.peak_bytes for run in values if run.use.peak_bytes is not None]
        table.add_row(
            name,
            f"{median(run.prefill_s for run in values):.2f}",
            f"{median(run.step_s for run in values):.2f}",
            f"{median(run.step_s for run in values) / floor.step_s(workload, percent, values[0].own_bytes):.2f}",
            f"{median(run.first_step_s for run in values):.2f}",
            f"{median(run.read_bytes_per_s for run in values) / 1e9:.2f}",
            f"{median(run.cpu_s for run in values):.1f}",
            format_size(max(peaks)) if peaks else "–",
        )
    return table


def _verdicts(console: Console, workload: Workload, found: dict[int, dict[str, list[Run]]], floor: _Floor) -> bool:
    passed = True

    def verdict(good: bool, text: str) -> None:
        nonlocal passed
        passed = passed and good
        console.print(f"{'PASS' if good else 'FAIL'}  {text}", highlight=False)

    for percent, runs in found.items():
        ours = runs.get("penstock")
        others = {name: values for name, values in runs.items() if name != "penstock"}
        if not ours or not others:
            continue

        def ratio(name: str, what: str, ours: list[Run] = ours, others: dict[str, list[Run]] = others) -> float:
            return median(getattr(a, what) / getattr(b, what) for a, b in zip(ours, others[name], strict=True))

        best = max(others, key=lambda name: ratio(name, "step_s"))
        most = 0.6 if percent == 50 else 1.05
        value = ratio(best, "step_s")
        verdict(value <= most, f"{percent} %: step / {best} {value:.2f} ≤ {most}")
        of_floor = median(run.step_s for run in ours) / floor.step_s(workload, percent, ours[0].own_bytes)
        verdict(of_floor <= 1.3, f"{percent} %: step / floor {of_floor:.2f} ≤ 1.3")
        if percent <= 50 and "memmap" in others:
            value = ratio("memmap", "prefill_s")
            verdict(value <= 0.35, f"{percent} %: prefill / memmap {value:.2f} ≤ 0.35")
        if percent < 100 and floor.fio_bytes_per_s:
            share = median(run.read_bytes_per_s for run in ours) / floor.fio_bytes_per_s
            verdict(share >= 0.9, f"{percent} %: device {share:.2f} ≥ 0.9 of fio")
        kills = sum(run.use.oom_kills for run in ours)
        over = [run for run in ours if (run.use.peak_bytes or 0) > run.use.limit_bytes]
        verdict(not kills and not over, f"{percent} %: {kills} OOM kills, {len(over)} runs over the limit")
    return passed


_PHASE_STEPS = 12
_FOLLOWING_STEPS = 5
_MOST_SLOWER = 1.3


def _halving(console: Console, workload: Workload, directory: Path, rounds: int) -> bool:
    """A run whose limit is halved and restored, beside runs that have either limit from the start."""
    whole_bytes, half_bytes = workload.kv_bytes, workload.kv_bytes // 2
    longer = Workload(workload.layers, workload.row_bytes, workload.prompt, 3 * _PHASE_STEPS + 1, workload.device)
    # As many tokens as the first has got by then.
    half = replace(longer, prompt=workload.prompt + _PHASE_STEPS, steps=_PHASE_STEPS + 1)
    whole = replace(longer, prompt=workload.prompt + 2 * _PHASE_STEPS, steps=_PHASE_STEPS + 1)
    runs: dict[str, list[list[float]]] = {"changing": [], "whole": [], "half": []}
    for number in range(rounds):
        changes = {_PHASE_STEPS: half_bytes, 2 * _PHASE_STEPS: whole_bytes}
        runs["changing"].append(_run("penstock", longer, directory, whole_bytes, changes).steps_s)
        runs["whole"].append(_run("penstock", whole, directory, whole_bytes).steps_s)
        runs["half"].append(_run("penstock", half, directory, half_bytes).steps_s)
        for name, values in runs.items():
            console.print(f"round {number + 1}/{rounds}, {name}: {' '.join(f'{s:.2f}' for s in values[-1])}")
    passed = True
    for name, first in (("half", _PHASE_STEPS), ("whole", 2 * _PHASE_STEPS)):
        low, high = first + _FOLLOWING_STEPS, first + _PHASE_STEPS
        settled = [median(steps[low:high]) for steps in runs["changing"]]
        start = [median(steps[_FOLLOWING_STEPS:]) for steps in runs[name]]  # the same tokens
        ratio = median(a / b for a, b in zip(settled, start, strict=True))
        passed = passed and ratio <= _MOST_SLOWER
        text = f"{_FOLLOWING_STEPS} steps after the change to {name}: {ratio:.2f} of a run that had it from the start"
        console.print(f"{'PASS' if ratio <= _MOST_SLOWER else 'FAIL'}  {text} ≤ {_MOST_SLOWER}", highlight=False)
    return passed


if __name__ == "__main__":
    main()

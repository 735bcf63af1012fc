"""The command line of the benchmark; the package's docstring has the method."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any

import click
from rich.console import Console

from bench.errors import BenchError, RunError
from bench.kv.arms import ARMS, region_bytes
from bench.kv.family import FAMILIES
from bench.kv.models import real_model
from bench.kv.results import FloorFile, Found, Run, table, verdicts
from bench.kv.workload import Workload
from bench.machine import describe
from bench.output import write_json
from bench.page_cache.limit import LimitUse, MemoryLimit, may_limit
from bench.readahead import ReadAhead
from bench.space import require_space
from bench.termination import terminated_as_interrupted
from penstock.units import parse_size

_BUDGETS = (10, 25, 50, 75, 100, 150)
_NARROW_KIB = 128
_SETTLED_STEPS = 1  # the first step of a run is not counted: tensors are on their way into memory


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
@click.option(
    "--plot",
    "plot_path",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Draw the steps over the budgets: .png, .svg or .pdf.",
)
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
    plot_path: Path | None,
    quick: bool,
) -> None:
    """What a decode step takes when its KV cache is larger than memory."""
    console = Console() if sys.stdout.isatty() else Console(width=132)
    if quick:
        size, layers, prompt, steps, budgets, rounds = "24MiB", 4, 64, 4, "1500", 1
    row_bytes = parse_size(size) // (2 * layers * (prompt + steps))
    row_bytes -= row_bytes % _PAGE_BYTES if row_bytes > _PAGE_BYTES else 0  # as any model's for a batch of eight is
    workload = Workload(layers, row_bytes, prompt, steps, device)
    names = arms.split(",")
    if unknown := [name for name in names if name not in ARMS]:
        raise click.ClickException(f"--arms: no arm is called {unknown[0]!r}; there are {', '.join(ARMS)}")
    reason = may_limit()
    if reason:
        console.print(f"without memory limits: {reason}", style="yellow", highlight=False)
    try:
        with terminated_as_interrupted(), ExitStack() as stack:
            scratch, floor_place = (
                Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-kv-", dir=directory)))
                for _ in range(2)
            )
            machine = describe(directory)
            read_ahead = ReadAhead(directory)
            stack.callback(read_ahead.restore)
            if halving:
                if reason:
                    raise BenchError(reason)
                sys.exit(not _halving(console, workload, scratch, rounds))
            if family:
                sys.exit(not real_model(console, family, device, scratch, rounds, limited=not reason))
            floor_file = stack.enter_context(FloorFile(floor_place / "floor", workload))
            found: Found = {}
            for percent in map(int, budgets.split(",")):
                runs = found[percent] = {name: [] for name in names}
                limit_bytes = workload.kv_bytes * percent // 100
                for number in range(rounds):
                    floor = floor_file.measure()
                    console.print(f"{percent} %, round {number + 1}/{rounds}: {floor.line()}", highlight=False)
                    first = number % len(names)
                    for name in names[first:] + names[:first]:
                        if read_ahead.may_set():
                            read_ahead.set(_NARROW_KIB if name.endswith("-128") else None)
                        told = _run(name, workload, scratch, None if reason else limit_bytes)
                        floor_s = floor.step_s(workload, percent, told["own_bytes"])
                        runs[name].append(Run(**told, floor=floor, floor_s=floor_s))
                        console.print(_line(percent, number, rounds, name, runs[name][-1]), highlight=False)
    except (BenchError, RunError) as error:
        raise click.ClickException(str(error)) from error
    for name, value in machine.lines():
        console.print(f"{name:12} {value}", highlight=False)
    for percent, runs in found.items():
        console.print(table(percent, workload, runs))
    passed = quick or verdicts(console, found)
    if json_path is not None:
        rows = [
            {"percent": percent, "arm": arm, "runs": [asdict(run) for run in values]}
            for percent, runs in found.items()
            for arm, values in runs.items()
        ]
        document = {"machine": asdict(machine), "workload": asdict(workload), "rows": rows}
        write_json(json_path, document)
    if plot_path is not None:
        from bench.kv.plot import plot

        plot(plot_path, workload, found)
    sys.exit(not passed)


def _run(
    name: str, workload: Workload, directory: Path, limit_bytes: int | None, changes: dict[int, int] | None = None
) -> dict[str, Any]:
    """Run an arm; what it took, as `Run` has it but for the floor."""
    require_space(directory, region_bytes(workload))
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
    read_bytes = told.pop("read_bytes")
    return {
        **told,
        "step_s": median(counted),
        "first_step_s": told["steps_s"][0],
        "read_bytes_per_s": sum(read_bytes[_SETTLED_STEPS:]) / sum(counted),
        "use": use,
    }


def _line(percent: int, number: int, rounds: int, name: str, run: Run) -> str:
    return (
        f"{percent} %, round {number + 1}/{rounds}, {name}: prefill {run.prefill_s:.2f} s, step {run.step_s:.2f} s "
        f"(first {run.first_step_s:.2f}), device {run.read_bytes_per_s / 1e9:.2f} GB/s, CPU {run.cpu_s:.1f} s"
    )


_PAGE_BYTES = 4096
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
        runs["changing"].append(_run("penstock", longer, directory, whole_bytes, changes)["steps_s"])
        runs["whole"].append(_run("penstock", whole, directory, whole_bytes)["steps_s"])
        runs["half"].append(_run("penstock", half, directory, half_bytes)["steps_s"])
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

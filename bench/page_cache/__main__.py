"""The command line of the benchmark; the package's docstring has the method."""

from __future__ import annotations

import compileall
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import reduce
from importlib.util import find_spec
from operator import add
from pathlib import Path
from statistics import median

import click
from rich.console import Console

import penstock
from bench.direct import bandwidth, fio_bandwidth
from bench.errors import BenchError, RunError
from bench.machine import describe
from bench.memory import Ballast
from bench.model import generate
from bench.output import write_json
from bench.page_cache.arms import ARMS, CLIENTS, Key
from bench.page_cache.limit import may_limit
from bench.page_cache.results import Results
from bench.page_cache.run import Run, Runner
from bench.page_cache.suites import SUITES, Suite, chosen, estimate_s, quick, without
from bench.page_cache.table import print_machine, print_setting, print_verdicts
from bench.readahead import ReadAhead
from bench.termination import terminated_as_interrupted
from penstock.units import MiB, format_size, parse_size

_DEFAULT_ARMS = "native,first,maio,resident"
_SHARE_FLOOR_BYTES = 192 * MiB


def _names(allowed: Sequence[str] | None) -> Callable[[click.Context, click.Parameter, str], list[str]]:
    def split(_context: click.Context, parameter: click.Parameter, text: str) -> list[str]:
        names = [name.strip() for name in text.split(",") if name.strip()]
        for name in names:
            if allowed is not None and name not in allowed:
                raise click.BadParameter(f"{name!r} is none of {', '.join(allowed)}")
        if not names:
            raise click.BadParameter(f"{parameter.name} names nothing")
        return names

    return split


@click.command(
    epilog="""\b
Examples:
  python -m bench.page_cache --suite ample-128 --json ample.json
  python -m bench.page_cache --clients mmap,read --arms native,eager,maio --memory ample,45%
  python -m bench.page_cache --quick
"""
)
@click.option("--size", default="6GiB", show_default=True, help="Size of the model.")
@click.option("--preset", default="llama-3.2-3b", show_default=True, help="Its names and shapes.")
@click.option("--rounds", type=click.IntRange(min=1), help="Timed rounds.  [default: 5, observe 9]")
@click.option(
    "--suite",
    "suites",
    multiple=True,
    type=click.Choice([*SUITES, "all"]),
    help="Settings, arms and bars of an acceptance line; again for more than one.",
)
@click.option("--clients", default="hf,mmap", show_default=True, callback=_names(CLIENTS))
@click.option("--arms", default=_DEFAULT_ARMS, show_default=True, callback=_names(list(ARMS)))
@click.option(
    "--memory",
    default="ample",
    show_default=True,
    callback=_names(None),
    help="ample, or shares of the model such as 45%.",
)
@click.option(
    "--read-ahead",
    default="128,machine",
    show_default=True,
    callback=_names(None),
    help="KiB, or machine for what is set now.",
)
@click.option(
    "--user",
    "users",
    default="root",
    show_default=True,
    callback=_names(["root", "user"]),
    help="root: as started. user: no capabilities (takes root to start).",
)
@click.option("--uid", default=65534, show_default=True, help="The ordinary user.")
@click.option(
    "--dir",
    "directory",
    type=click.Path(path_type=Path, file_okay=False),
    help="For the model and ballast; on the disk to measure.  [default: the user's cache]",
)
@click.option(
    "--json", "json_path", type=click.Path(path_type=Path, dir_okay=False), help="Every run, with penstock's reports."
)
@click.option("--quick", "is_quick", is_flag=True, help="A tiny model, one round, no ballast, no bars.")
@click.option(
    "--ballast/--no-ballast",
    default=True,
    show_default=True,
    help="Keep memory full of old page cache, as on a server that has been up for a while, or free.",
)
@click.option("--clean", is_flag=True, help="Remove the model afterwards.")
def main(
    *,
    size: str,
    preset: str,
    rounds: int | None,
    suites: tuple[str, ...],
    clients: list[str],
    arms: list[str],
    memory: list[str],
    read_ahead: list[str],
    users: list[str],
    uid: int,
    directory: Path | None,
    json_path: Path | None,
    is_quick: bool,
    ballast: bool,
    clean: bool,
) -> None:
    """How fast an unmodified program loads its model, with penstock and without."""
    console = Console() if sys.stdout.isatty() else Console(width=132)
    if is_quick:
        size, preset, ballast = "48MiB", "tiny-llama", False
        suite = quick()
    elif suites:
        names = list(SUITES) if "all" in suites else suites
        suite = reduce(add, (SUITES[name] for name in names))
    else:
        suite = chosen(clients, arms, memory, read_ahead, users)
    rounds = rounds or suite.least_rounds
    with terminated_as_interrupted():
        try:
            size_bytes = parse_size(size)
            failed = _run(
                console, suite, rounds, preset=preset, size_bytes=size_bytes, uid=uid,
                directory=directory or _default_directory(), json_path=json_path,
                is_quick=is_quick, ballast=ballast, clean=clean,
            )  # fmt: skip
        except (BenchError, ValueError) as error:
            raise click.ClickException(str(error)) from error
    sys.exit(1 if failed else 0)


def _run(
    console: Console,
    suite: Suite,
    rounds: int,
    *,
    preset: str,
    size_bytes: int,
    uid: int,
    directory: Path,
    json_path: Path | None,
    is_quick: bool,
    ballast: bool,
    clean: bool,
) -> bool:
    """Run a suite and print it; whether anything failed."""
    directory.mkdir(parents=True, exist_ok=True)
    read_ahead = ReadAhead(directory)
    suite, skipped = without(suite, _missing(read_ahead))
    for reason in skipped:
        console.print(f"skipped: {reason}", style="yellow", highlight=False)
    if not suite.arms:
        raise BenchError("nothing is left to run")
    # Not by the first arm that imports; and penstock's as pip does it, which an editable installation lacks.
    for directory_of_code in (Path(__file__).parent, Path(penstock.__file__).parent):
        compileall.compile_dir(str(directory_of_code), quiet=2)
    model = generate(directory, preset=preset, size_bytes=size_bytes, gguf=any(s.client == "gguf" for s in suite.arms))
    machine = describe(directory)
    if machine.load > 0.7 and not is_quick:
        console.print(f"the machine is busy (load {machine.load:.1f}); figures may be wrong", style="yellow")
    seconds = estimate_s(suite, rounds, size_bytes)
    console.print(
        f"{suite.name}: {sum(map(len, suite.arms.values()))} arms, 1 round of verification and {rounds} timed; "
        f"about {max(1, round(seconds / 60))} minutes",
        highlight=False,
    )
    runs: list[Run] = []
    bandwidths: list[float] = []
    failures: list[tuple[Key, str]] = []
    files = model.files("mmap")
    with (
        Ballast(directory / "ballast" if ballast else None) as memory,
        tempfile.TemporaryDirectory(prefix="bench-", dir=directory) as scratch,
    ):
        os.chmod(scratch, 0o755)  # noqa: S103 - the ordinary user's files are below it
        runner = Runner(
            model=model, directory=Path(scratch), ballast=memory, read_ahead=read_ahead, uid=uid,
            share_floor_bytes=_SHARE_FLOOR_BYTES,
        )  # fmt: skip
        try:
            for number in range(1 if is_quick else 0, rounds + 1):
                if number:
                    memory.make_cold(files)
                    bandwidths.append(bandwidth(files))
                for setting, names in suite.arms.items():
                    first = number % len(names)
                    for name in names[first:] + names[:first]:
                        key = Key(setting, name)
                        words = f"round {number}/{rounds}" if number else "verifying"
                        try:
                            run = runner.execute(key, number, verify=is_quick or number == 0)
                        except RunError as error:
                            failures.append((key, str(error)))
                            console.print(f"{words}  {setting}  {name}  FAILED: {error}", style="red", markup=False)
                            continue
                        if number:
                            runs.append(run)
                        console.print(f"{words}  {setting}  {name}  {run.seconds:.2f} s", highlight=False)
            fio = None if is_quick else fio_bandwidth(files[0])
        finally:
            read_ahead.restore()
    results = Results(runs, bandwidths, {key for key, _ in failures})
    verdicts = [] if is_quick else [results.verdict(bar) for bar in suite.bars]
    disk = f"{median(bandwidths) / 1e9:.2f} GB/s with O_DIRECT, 8 threads × 4 MiB"
    if fio:
        disk += f"; fio, 1 MiB × 32: {fio / 1e9:.2f} GB/s"
    words = f"{preset} of {format_size(model.bytes('mmap'))} in {len(files)} files, every byte verified"
    console.print()
    print_machine(console, machine, words + ("; memory full of page cache" if ballast else "; memory free"), disk)
    for setting, names in suite.arms.items():
        print_setting(console, results, setting, names)
    print_verdicts(console, verdicts)
    for key, message in failures:
        console.print(f"FAIL  {key.setting}  {key.arm}: {message}", style="bold red", markup=False)
    if json_path is not None:
        write_json(
            json_path,
            {
                "machine": asdict(machine),
                "suite": suite.name,
                "size_bytes": size_bytes,
                "ballast": ballast,
                "disk_bytes_per_s": bandwidths,
                "fio_bytes_per_s": fio,
                "runs": [asdict(run) for run in runs],
                "verdicts": [
                    {"bar": str(v.bar), "most": v.bar.most, "value": v.value, "floor": v.floor, "passed": v.passed}
                    for v in verdicts
                ],
                "failures": [{"key": asdict(key), "message": message} for key, message in failures],
                "skipped": skipped,
            },
        )
    if clean:
        shutil.rmtree(model.directory.parent)
    return bool(failures) or not all(verdict.passed for verdict in verdicts)


def _missing(read_ahead: ReadAhead) -> dict[str, str]:
    """What cannot be measured here, and why."""
    reasons: dict[str, str] = {}
    for client, modules in (("hf", ("torch", "transformers", "safetensors")), ("gguf", ("gguf",))):
        missing = [module for module in modules if find_spec(module) is None]
        if missing:
            reasons[client] = f"{', '.join(missing)} not installed (pip install 'penstock[bench]')"
    if reason := may_limit():
        reasons["limit"] = reason
    if not read_ahead.may_set():
        reasons["read-ahead"] = f"{read_ahead.path} takes root to write"
    if os.geteuid() != 0:
        reasons["user"] = "becoming another user takes root"
    return reasons


def _default_directory() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "penstock-bench"


if __name__ == "__main__":
    main()

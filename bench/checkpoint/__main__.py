"""The command line of the benchmark; the package's docstring has the method."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from bench.checkpoint.loaders import ARMS, MODEL_ARMS, NEEDS
from bench.direct import bandwidth, fio_bandwidth
from bench.errors import BenchError, RunError
from bench.machine import describe
from bench.memory import Ballast, resident_share
from bench.model import generate
from bench.output import write_json
from bench.readahead import ReadAhead
from bench.termination import terminated_as_interrupted
from penstock.testing.checkpoint import safetensors_header, write_file
from penstock.testing.residency import kept_cached
from penstock.testing.shapes import TensorSpec
from penstock.units import MiB, format_size, parse_size

_OURS = "penstock"
_NOT_PEERS = {"penstock", "penstock-threads", "readinto", *MODEL_ARMS}
_MOST_OF_TRANSFORMERS = 0.5
_EXPERTS = 20_000
_LEAST_OF_LIMIT = {"model": 0.95, "experts": 0.8}
_SLACK_BYTES = 256 * MiB
_MOST_CACHED = 0.01
_TIMEOUT_S = 300


@dataclass(frozen=True, slots=True)
class Run:
    """One load."""

    seconds: float
    cpu_s: float
    peak_bytes: int
    cached_share: float  # of the files, in the page cache afterwards


@dataclass(frozen=True, slots=True)
class Limit:
    """Bytes a second that the disk gives."""

    fio: float | None  # None where it is not installed
    threads: float  # what plain threads read, which is more on some disks

    @property
    def bar(self) -> float:
        """What loads are held to."""
        return self.fio or self.threads


@click.command(
    epilog="""\b
Examples:
  python -m bench.checkpoint --size 6GiB --dir /mnt/nvme
  python -m bench.checkpoint --arms penstock,safetensors --states warm
  python -m bench.checkpoint --arms adapter,transformers --models model --states cold --read-ahead 128
  python -m bench.checkpoint --quick
"""
)
@click.option("--size", default="6GiB", show_default=True, help="Of the model; a third of it in 20,000 small tensors.")
@click.option("--rounds", default=5, show_default=True, type=click.IntRange(min=1))
@click.option("--arms", default=",".join(ARMS), show_default=True, help="Which loaders.")
@click.option("--states", default="cold,warm", show_default=True, help="cold: none of it cached; warm: all of it.")
@click.option(
    "--models",
    default="model,experts",
    show_default=True,
    help="model: large tensors; experts: 20,000 small ones.",
)
@click.option(
    "--read-ahead",
    type=click.IntRange(min=0),
    help="KiB that the kernel reads ahead, such as 128, which most servers have; takes root.  [default: as it is]",
)
@click.option("--device", default="cpu", show_default=True, help="Where the tensors are wanted, such as cuda.")
@click.option(
    "--ballast/--no-ballast", default=True, show_default=True, help="Fill memory with page cache; see bench.memory."
)
@click.option(
    "--dir",
    "directory",
    type=click.Path(path_type=Path, file_okay=False),
    help="For the models and ballast; on the disk to measure.  [default: the user's cache]",
)
@click.option("--json", "json_path", type=click.Path(path_type=Path, dir_okay=False), help="Every run.")
@click.option("--quick", is_flag=True, help="Tiny models, one round, no ballast, no bars.")
def main(
    size: str,
    rounds: int,
    arms: str,
    states: str,
    models: str,
    read_ahead: int | None,
    device: str,
    ballast: bool,
    directory: Path | None,
    json_path: Path | None,
    quick: bool,
) -> None:
    """How fast a checkpoint gets into memory, by penstock and by others."""
    console = Console() if sys.stdout.isatty() else Console(width=132)
    if quick:
        size, rounds = "24MiB", 1
    names = arms.split(",")
    if unknown := [name for name in names if name not in ARMS]:
        raise click.ClickException(f"--arms: {unknown[0]!r} is none of {', '.join(ARMS)}")
    wanted_states, wanted_models = states.split(","), models.split(",")
    for option, wanted, known in (
        ("--states", wanted_states, ("cold", "warm")),
        ("--models", wanted_models, ("model", "experts")),
    ):
        if unknown := [word for word in wanted if word not in known]:
            raise click.ClickException(f"{option}: {unknown[0]!r} is neither {' nor '.join(known)}")
    for name in list(names):
        if find_spec(NEEDS[name]) is None:
            console.print(f"skipped: {name}: {NEEDS[name]} is not installed", style="yellow", highlight=False)
            names.remove(name)
    asked = _Asked(
        parse_size(size), rounds, names, wanted_states, wanted_models, read_ahead, device, ballast and not quick, quick
    )
    try:
        failed = _bench(console, asked, directory or _default_directory(), json_path)
    except (BenchError, RunError) as error:
        raise click.ClickException(str(error)) from error
    sys.exit(failed)


@dataclass(frozen=True, slots=True)
class _Asked:
    """What the command line says."""

    size_bytes: int
    rounds: int
    names: list[str]  # of arms
    states: list[str]
    models: list[str]
    read_ahead_kib: int | None  # None: as the machine has it
    device: str
    has_ballast: bool
    quick: bool


def _bench(console: Console, asked: _Asked, directory: Path, json_path: Path | None) -> bool:
    size_bytes, names, states, quick = asked.size_bytes, asked.names, asked.states, asked.quick
    directory.mkdir(parents=True, exist_ok=True)
    machine = describe(directory)
    preset = "tiny-llama" if quick else "llama-3.2-3b"
    makers = {
        "model": lambda: generate(directory, preset=preset, size_bytes=size_bytes, gguf=False).directory,
        "experts": lambda: _experts(directory, size_bytes // 3, 200 if quick else _EXPERTS),
    }
    models = {model: makers[model]() for model in asked.models if _able(names, model)}
    runs: dict[tuple[str, str, str], list[Run]] = {}
    limits: dict[str, list[Limit]] = {model: [] for model in models}
    with (
        terminated_as_interrupted(),
        _read_ahead(directory, asked.read_ahead_kib),
        Ballast(directory / "ballast" if asked.has_ballast else None) as memory,
    ):
        for number in [0] if quick else range(asked.rounds + 1):
            for model, place in models.items():
                files = sorted(place.glob("*.safetensors"))
                if number or quick:
                    memory.make_cold(files)
                    limits[model].append(_limit(files, quick))
                for state in states:
                    found = _round(console, memory, (model, place, files), state, asked, number)
                    if number or quick:
                        for name, run in found.items():
                            runs.setdefault((model, state, name), []).append(run)
    if not quick:
        for name, value in machine.lines():
            console.print(f"{name:12} {value}", highlight=False)
        if asked.read_ahead_kib is not None:
            console.print(f"{'':12} {asked.read_ahead_kib} KiB of read-ahead while this ran", highlight=False)
    for model in models:
        for state in states:
            console.print(_table(model, state, runs, names, limits[model]))
    good = quick or _verdicts(console, runs, asked, models, limits)
    if json_path is not None:
        rows = [
            {"model": model, "state": state, "arm": arm, "runs": [asdict(run) for run in values]}
            for (model, state, arm), values in runs.items()
        ]
        answer = {
            "machine": asdict(machine),
            "device": asked.device,
            "read_ahead_kib": asked.read_ahead_kib,
            "limits_bytes_per_s": {model: [asdict(limit) for limit in values] for model, values in limits.items()},
            "rows": rows,
        }
        write_json(json_path, answer)
    return not good


@contextmanager
def _read_ahead(directory: Path, kib: int | None) -> Iterator[None]:
    """Have the kernel read ahead by so much, and then as before; nothing is touched for None."""
    if kib is None:
        yield
        return
    read_ahead = ReadAhead(directory)
    if not read_ahead.may_set():
        raise BenchError(f"--read-ahead: {read_ahead.path} takes root to write")
    read_ahead.set(kib)
    try:
        yield
    finally:
        read_ahead.restore()


def _round(
    console: Console,
    memory: Ballast,
    model: tuple[str, Path, list[Path]],
    state: str,
    asked: _Asked,
    number: int,
) -> dict[str, Run]:
    """Each arm once; in round 0 what they loaded is compared."""
    title, place, files = model
    runs: dict[str, Run] = {}
    names = _able(asked.names, title)
    first = number % max(1, len(names))
    hashes: dict[str, dict[str, str]] = {}
    for name in [*names[first:], *names[:first]]:
        answer = _run(memory, name, place, files, state, asked.device, hashing=number == 0)
        run = runs[name] = Run(answer["seconds"], answer["cpu_s"], answer["peak_bytes"], answer["cached_share"])
        if number == 0 and answer["tensors"]:
            hashes[name] = answer["hashes"]
        words = f"round {number}" if number else "verifying"
        console.print(f"{words}  {title}  {state}  {name}  {run.seconds:.2f} s", highlight=False)
    if number == 0:
        for kind in (MODEL_ARMS, hashes.keys() - MODEL_ARMS):
            compared = {name: found for name, found in hashes.items() if name in kind}
            for (one, ones), (other, others) in itertools.pairwise(compared.items()):
                if ones != others:
                    wrong = [key for key in ones if ones[key] != others.get(key)]
                    raise RunError(f"{one} and {other} differ in {wrong[:3] or 'their names'}")
    return runs


def _able(names: Sequence[str], model: str) -> list[str]:
    """The arms that can load it: not every checkpoint is a model."""
    return [name for name in names if model == "model" or name not in MODEL_ARMS]


def _run(
    memory: Ballast, name: str, place: Path, files: list[Path], state: str, device: str, *, hashing: bool
) -> dict[str, Any]:
    command = [sys.executable, "-m", "bench.checkpoint.loaders", name, str(place), device, *["--hash"] * hashing]
    with tempfile.TemporaryFile("w+") as errors, ExitStack() as kept:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            cwd=Path(__file__).parents[2],
        )
        try:
            assert process.stdin is not None
            assert process.stdout is not None
            ready = process.stdout.readline()
            if ready == "ready\n":
                if state == "cold":
                    memory.make_cold(files)
                else:
                    memory.make_resident(files)
                    for path in files:  # else DAMON, where it runs, takes some back before they are read
                        kept.enter_context(kept_cached(path, 0, path.stat().st_size))
                memory.fill()
                memory.freshen()
                process.stdin.write("go\n")
                process.stdin.flush()
            text = process.stdout.read()
            process.wait(_TIMEOUT_S)
        finally:
            process.kill()
            process.wait()
        if process.returncode:
            errors.seek(0)
            raise RunError(f"{name} ended with {process.returncode}: {errors.read().strip()[-2000:]}")
    answer: dict[str, Any] = json.loads(text.strip().splitlines()[-1])
    answer["cached_share"] = resident_share(files)
    return answer


def _experts(directory: Path, size_bytes: int, count: int) -> Path:
    """A checkpoint of many small tensors, as a mixture of experts has them."""
    place = directory / f"experts-{count}-{size_bytes}"
    path = place / "model.safetensors"
    if not path.exists():
        place.mkdir(exist_ok=True)
        rows = max(1, size_bytes // count // 2 // 256)
        kinds = ("gate", "up", "down")
        names = [
            f"model.layers.{number // 384}.mlp.experts.{number % 384 // 3}.{kinds[number % 3]}_proj.weight"
            for number in range(count)
        ]
        specs = [TensorSpec(name, "BF16", (rows, 256)) for name in names]
        partial = path.with_suffix(".partial")
        write_file(partial, safetensors_header(specs), specs, seed=0, progress=None)
        partial.rename(path)
    return place


def _limit(files: list[Path], quick: bool) -> Limit:
    fio = None if quick else fio_bandwidth(max(files, key=lambda path: path.stat().st_size))
    return Limit(fio, bandwidth(files))


def _table(
    model: str, state: str, runs: dict[tuple[str, str, str], list[Run]], names: Sequence[str], limits: list[Limit]
) -> Table:
    title = f"{'20,000 small tensors' if model == 'experts' else 'a model'}, {state}"
    if state == "cold":
        fios = [limit.fio for limit in limits if limit.fio is not None]
        by_fio = f", {median(fios) / 1e9:.2f} by fio" if fios else ""
        title += f"; the disk: {median(limit.threads for limit in limits) / 1e9:.2f} GB/s by plain threads{by_fio}"
    table = Table(title=title, title_justify="left", title_style="bold")
    for column in ("arm", "seconds", "least–most", "CPU s", "peak", "cached after"):
        table.add_column(column, justify="left" if column == "arm" else "right")
    for name in _able(names, model):
        values = runs[model, state, name]
        seconds = [value.seconds for value in values]
        table.add_row(
            name,
            f"{median(seconds):.2f}",
            f"{min(seconds):.2f}–{max(seconds):.2f}",
            f"{median(value.cpu_s for value in values):.2f}",
            format_size(median(value.peak_bytes for value in values)),
            f"{median(value.cached_share for value in values):.1%}",
        )
    return table


def _verdicts(
    console: Console,
    runs: dict[tuple[str, str, str], list[Run]],
    asked: _Asked,
    models: dict[str, Path],
    limits: dict[str, list[Limit]],
) -> bool:
    names, states = asked.names, asked.states
    passed = True

    def verdict(text: str, value: float, least: float | None = None, most: float | None = None) -> None:
        nonlocal passed
        good = (least is None or value >= least) and (most is None or value <= most)
        passed = passed and good
        bar = f"≥ {least}" if least is not None else f"≤ {most}"
        console.print(f"{'PASS' if good else 'FAIL'}  {text}: {value:.3f} {bar}", highlight=False)

    if set(names) >= MODEL_ARMS and "cold" in states:
        pairs = zip(runs["model", "cold", "adapter"], runs["model", "cold", "transformers"], strict=True)
        share = median(mine.seconds / theirs.seconds for mine, theirs in pairs)
        verdict("model, cold: the adapter's time, of transformers' own", share, most=_MOST_OF_TRANSFORMERS)
    if _OURS not in names:
        return passed
    peers = [name for name in names if name not in _NOT_PEERS]
    for model, place in models.items():
        size_bytes = sum(path.stat().st_size for path in place.glob("*.safetensors"))
        for state in states:
            ours = runs[model, state, _OURS]
            best = {}
            for peer in peers:
                times = zip(runs[model, state, peer], ours, strict=True)
                best[peer] = median(theirs.seconds / mine.seconds for theirs, mine in times)
            if state == "cold":
                rates = [size_bytes / mine.seconds for mine in ours]
                share = median(rate / limit.bar for rate, limit in zip(rates, limits[model], strict=True))
                verdict(f"{model}, cold: share of the disk's rate", share, least=_LEAST_OF_LIMIT[model])
                share = median(rate / limit.threads for rate, limit in zip(rates, limits[model], strict=True))
                console.print(f"      {model}, cold: share of what plain threads read: {share:.3f}", highlight=False)
                cached = median(mine.cached_share for mine in ours)
                verdict(f"{model}, cold: share of the files cached afterwards", cached, most=_MOST_CACHED)
            if best:
                peer = min(best, key=lambda name: best[name])
                least = 1.2 if state == "cold" and model == "model" else 1.0
                verdict(f"{model}, {state}: times as fast as {peer}, the best peer", best[peer], least=least)
            own_bytes = size_bytes if asked.device == "cpu" else 0
            over = median(mine.peak_bytes for mine in ours) - own_bytes
            verdict(f"{model}, {state}: MiB of host memory beside the tensors", over / MiB, most=_SLACK_BYTES / MiB)
    return passed


def _default_directory() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "penstock-bench"


if __name__ == "__main__":
    main()

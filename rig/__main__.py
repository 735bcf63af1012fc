"""The command line of the rig."""

from __future__ import annotations

import shlex
import shutil
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from rig.cuts import CutResult
from rig.errors import RigError
from rig.plan import jobs
from rig.runner import Result, Rig

_LANES = 3  # machines at once: with two, two CPUs are idle a third of the time; four took longer

_CUTS = 12  # machines, of each of which five moments are looked at: 60 cuts


@click.command(
    epilog="""\b
Examples:
  python -m rig
  python -m rig --job nvme --cuts 0
  python -m rig --job numa-old -- -x -k moved
  python -m rig --job nvme-new --run "ls -l /dev/ng0n1"
"""
)
@click.option("--job", "names", multiple=True, help="Only jobs of this name, or NAME-old, NAME-new; then no cuts.")
@click.option("--cuts", type=click.IntRange(min=0), help=f"How many machines lose their power.  [default: {_CUTS}]")
@click.option("--run", "command", help="Boot the one job, run this instead of its tests, and print what it prints.")
@click.option("--keep", type=click.Path(path_type=Path), help="Leave images and results in this directory.")
@click.argument("arguments", nargs=-1)
def main(
    names: tuple[str, ...], cuts: int | None, command: str | None, keep: Path | None, arguments: tuple[str, ...]
) -> None:
    """Run the rig's jobs and power cuts; ARGUMENTS go to pytest."""
    chosen = [job for job in jobs() if not names or job.name in names or f"{job.name}-{job.age}" in names]
    if not chosen:
        known = ", ".join(dict.fromkeys(job.name for job in jobs()))
        raise click.BadParameter(f"{', '.join(names)}: there is {known}, each with -old or -new", param_hint="--job")
    if cuts is None:
        cuts = 0 if names else _CUTS
    directory = keep or Path(tempfile.mkdtemp(prefix="penstock-rig-"))
    directory.mkdir(parents=True, exist_ok=True)
    try:
        try:
            rig = Rig(directory)
        except RigError as error:
            print(f"skipped, nothing was run: the rig cannot run here: {error}")
            return
        if command is not None:
            boot = rig.boot(chosen[0], shlex.split(command))
            status = boot.wait(chosen[0].timeout_s)
            print(boot.tail(10_000))
            sys.exit(status)
        began = time.monotonic()
        with ThreadPoolExecutor(_LANES) as pool:
            running = [pool.submit(partial(rig.run, job, arguments)) for job in chosen]
            cutting = [pool.submit(partial(rig.cut, number)) for number in range(cuts)]
            for future in as_completed(running):
                _tell(future.result())
            results = [future.result() for future in running]
            cut = [future.result() for future in cutting]
        is_good = _print(results, cut, time.monotonic() - began)
    finally:
        if keep is None:
            shutil.rmtree(directory, ignore_errors=True)
    sys.exit(0 if is_good else 1)


def _tell(result: Result) -> None:
    state = "good" if result.is_good else "FAILED"
    print(f"{result.job} ({result.kernel}): {state}, {result.passed} passed, {result.seconds:.0f} s", flush=True)


def _print(results: list[Result], cuts: list[CutResult], seconds: float) -> bool:
    """What ran where, and what it came to; True if all is good."""
    table = Table("job", "kernel", "nodes", "drives", "passed", "failed", "skipped", "seconds")
    for result in results:
        drives = "\n".join(map(str, result.job.drives)) or "–"
        counts = [str(number) for number in (result.passed, result.failed, result.skipped)]
        table.add_row(result.job.name, result.kernel, "2", drives, *counts, f"{result.seconds:.0f}")
    for kernel in dict.fromkeys(cut.kernel for cut in cuts):
        of_kernel = [cut for cut in cuts if cut.kernel == kernel]
        failed = sum(bool(cut.wrong) for cut in of_kernel)
        table.add_row("power cuts", kernel, "1", "virtio", str(len(of_kernel) - failed), str(failed), "0", "")
    Console(width=120).print(table)
    for result in results:
        for note in result.notes:
            print(f"{result.job}: {note}")
        if not result.is_good:
            print(f"{result.job}: {result.trouble or 'tests failed, or none was run'}")
    if cuts:
        disks, lost = sum(cut.disks for cut in cuts), sum(cut.lost for cut in cuts)
        torn = sum(cut.torn for cut in cuts)
        print(
            f"power cuts: {len(cuts)} machines killed, {disks} disks read back, {lost} writes lost, "
            f"{torn} torn blocks found by their checksums, {sum(len(cut.wrong) for cut in cuts)} wrong"
        )
        for text in [text for cut in cuts for text in cut.wrong]:
            print(f"power cut: {text}")
    is_good = all(result.is_good for result in results) and not any(cut.wrong for cut in cuts)
    passed = sum(result.passed for result in results) + sum(not cut.wrong for cut in cuts)
    failed = sum(result.failed or not result.is_good for result in results) + sum(bool(cut.wrong) for cut in cuts)
    for result in results:  # once more, where logs are cut to their end
        if not result.is_good:
            print(f"{result.job}: {(result.trouble or f'{result.failed} tests failed').splitlines()[0]}")
    print(f"rig: {seconds:.0f} s, {'good' if is_good else 'FAILED'}")
    print(f"{passed} passed, {failed} failed, {sum(result.skipped for result in results)} skipped")
    return is_good


if __name__ == "__main__":
    main()

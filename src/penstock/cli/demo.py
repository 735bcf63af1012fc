"""`penstock demo`: one reader and one model, cold each time: without penstock, recording, replaying."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import NoReturn

import click

from penstock.cli.scratch import choose_place, fitting_size, is_cached, make_cold, scratch_directory, use_memory
from penstock.errors import PenstockError
from penstock.units import MiB, format_size, parse_size

_PLOT = "demo.png"
_SMALL_BYTES = 512 * MiB  # penstock is ready after some 0.2 s
_WORTH_TELLING = 0.95  # of the native time; runs differ by a few percent
_NEAR = 0.75  # of the device's bandwidth, or of the time: that much explains the rest
_PROBE_S = 0.5
_REST_BYTES_PER_S = 1e9  # a rented disk is fast for some GB only: whichever run came last was slow without a rest
_LONGEST_REST_S = 5.0
_STOP_S = 5.0

# What a loader does, without a framework: the mapping's pages are copied into memory that stands in for pinned
# buffers on the way to a device, and the host keeps nothing. It knows nothing of penstock.
_READER = '''\
"""Copies every tensor of a safetensors checkpoint through a ring, and sums up all of it."""
import json, mmap, resource, struct, sys, zlib
from pathlib import Path

import numpy as np

CHUNK = 4 << 20
ring = np.ones(16 * CHUNK, np.uint8)
slot = checksum = total = 0
for path in sorted(Path(sys.argv[1]).glob("*.safetensors")):
    with path.open("rb") as file:
        data = np.frombuffer(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ), np.uint8)
    (length,) = struct.unpack("<Q", data[:8].tobytes())
    header = json.loads(data[8 : 8 + length].tobytes())
    header.pop("__metadata__", None)
    for name, tensor in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        start, stop = (8 + length + offset for offset in tensor["data_offsets"])
        for first in range(start, stop, CHUNK):
            count = min(CHUNK, stop - first)
            copy = ring[slot * CHUNK : slot * CHUNK + count]
            np.copyto(copy, data[first : first + count])
            words = int(copy[: count // 8 * 8].view(np.uint64).sum()) + int(copy[count // 8 * 8 :].sum())
            checksum = zlib.crc32(f"{name} {first} {words}".encode(), checksum)
            slot, total = (slot + 1) % 16, total + count
    del data
disk = resource.getrusage(resource.RUSAGE_SELF).ru_inblock * 512
print(json.dumps({"bytes": total, "checksum": f"{checksum:08x}", "disk_bytes": disk}))
'''


@dataclass(frozen=True, slots=True)
class _Run:
    """One run of the reader, seen from outside."""

    name: str
    seconds: float  # of the whole command
    bytes: int
    checksum: str
    disk_bytes: int  # that the reader waited for itself


@dataclass(frozen=True, slots=True)
class _Disk:
    """What the model lies on; None and "" where that is not known."""

    name: str
    read_ahead_kib: int | None
    bytes_per_s: float | None


def _size(_context: click.Context, _parameter: click.Parameter, text: str) -> int:
    try:
        size_bytes = parse_size(text)
    except ValueError as error:
        raise click.BadParameter(str(error)) from error
    if size_bytes <= 0:
        raise click.BadParameter(f"{text!r} is nothing; ask for some hundred MiB at least")
    return size_bytes


@click.command(
    epilog="""\b
Examples:
  penstock demo
  penstock demo --size 8GiB --dir /models
"""
)
@click.option(
    "--size",
    "size_bytes",
    metavar="SIZE",
    default="2GiB",
    show_default=True,
    callback=_size,
    help="Of the model; less where room or memory want it.",
)
@click.option(
    "--dir",
    "directory",
    metavar="DIR",
    type=click.Path(exists=True, file_okay=False, writable=True, path_type=Path),
    help="Generate the model below this, on the disk to see.  [default: here, else in the user's cache]",
)
@click.option("--keep", is_flag=True, help="Leave the model, the reader and the reports there.")
@click.pass_context
def demo(context: click.Context, size_bytes: int, directory: Path | None, keep: bool) -> None:
    """Load a generated model cold: without penstock, recording, and replaying.

    The reader is a small program that maps the model's files and copies every tensor; the time is that of the
    whole command. Before each cold run the files are dropped from the page cache, and as much memory is used
    once: a host that has taken it back would make the first run to need it pay. The disk rests for a moment, too.
    Nothing on the machine is changed, and what was generated is removed at the end. Draws demo.png into the
    current directory where matplotlib is installed.
    """
    with _stopping_on_signals():
        try:
            parent = choose_place(directory)
            fitting_bytes, why = fitting_size(size_bytes, parent)
            if why:
                click.echo(f"{format_size(size_bytes)} is too much here: {why}. Going on with less.", err=True)
            with scratch_directory(parent, keep=keep) as scratch:
                _show(scratch, fitting_bytes)
                if keep:
                    click.echo(f"Kept in {scratch}: {', '.join(sorted(os.listdir(scratch)))}")
        except (PenstockError, OSError) as error:
            raise click.ClickException(str(error)) from error
        except KeyboardInterrupt:
            click.echo("Interrupted.", err=True)
            context.exit(130)


@contextlib.contextmanager
def _stopping_on_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP unwind as Ctrl-C does, so that everything is taken back.

    What a handler raises in the middle of an import Python may print and forget; then the end is the time to stop.
    """
    stopped = []

    def stop(number: int, _frame: FrameType | None) -> NoReturn:
        stopped.append(number)
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        sys.exit(128 + number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
        if stopped:
            sys.exit(128 + stopped[0])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _show(scratch: Path, size_bytes: int) -> None:
    """Generate, run, print."""
    import penstock.pagecache.session  # compiled now, not on the first measured run's account
    import penstock.report.report  # noqa: F401

    files = _generate(scratch / "model", size_bytes)
    reader = scratch / "reader.py"
    reader.write_text(_READER, encoding="utf-8")
    command = [sys.executable, str(reader), str(scratch / "model")]
    environment = {
        **os.environ,
        "XDG_CACHE_HOME": str(scratch / "cache"),
        "PENSTOCK_TEMPLATES": str(scratch / "templates"),
    }
    reports = [scratch / "recording.json", scratch / "replaying.json"]
    before = _look_at_disk(files)
    runs = [_measure("native", command, files, environment)]
    for name, report in zip(("penstock, recording", "penstock, replaying"), reports, strict=True):
        runs.append(_measure(name, [*_penstock(), "--report", str(report), "--", *command], files, environment))
    cached = _measure("native, model in memory", command, (), environment) if is_cached(files) else None
    disk = max(before, _look_at_disk(files), key=lambda found: found.bytes_per_s or 0)  # others may use it too
    every = [*runs, cached] if cached else runs
    _print_table(every)
    _check(every)
    click.echo(f"\n{_about(disk, len(every), runs[0])}\n\n{_verdict(runs[0], runs[-1], cached, disk)}")
    fastest = max(run.bytes / run.seconds for run in runs)
    _draw(reports, disk.bytes_per_s if disk.bytes_per_s and disk.bytes_per_s > fastest else None)


def _penstock() -> list[str]:
    return [sys.executable, "-c", "from penstock.cli.entry import main; main()", "run", "--service", "demo"]


def _generate(directory: Path, size_bytes: int) -> list[Path]:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TransferSpeedColumn

    from penstock.testing import checkpoint, shapes

    # The largest of these models that still has several layers in that size.
    preset = next(
        (name for name, least_bytes in _PRESETS.items() if size_bytes >= least_bytes), next(reversed(_PRESETS))
    )
    shape = shapes.scaled(shapes.PRESETS[preset], size_bytes)
    total_bytes = shapes.weight_bytes(shape)
    click.echo(f"Generating {format_size(total_bytes)} shaped like {preset} in {directory}", err=True)
    console = Console(stderr=True)
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=total_bytes)

        def advance(written_bytes: int) -> None:
            bar.advance(task, written_bytes)

        shard_bytes = max(total_bytes // 3, 8 * MiB)
        return checkpoint.generate_checkpoint(directory, shape, shard_bytes=shard_bytes, progress=advance)


_PRESETS = {"llama-3.2-3b": 1536 * MiB, "llama-3.2-1b": 768 * MiB, "tiny-llama": 0}


def _measure(name: str, command: Sequence[str], cold: Sequence[Path], environment: Mapping[str, str]) -> _Run:
    """Run a command with these files out of the page cache.

    Raises:
        click.ClickException: the files cannot be dropped, or the command failed.
    """
    if cold:
        make_cold(cold)
        size_bytes = sum(path.stat().st_size for path in cold)
        use_memory(size_bytes)
        time.sleep(min(size_bytes / _REST_BYTES_PER_S, _LONGEST_REST_S))
    click.echo(f"{name}, cold" if cold else name, err=True)
    began_s = time.monotonic()
    # In a session of its own: Ctrl-C is ours, and then all of it ends with us.
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    )
    try:
        output, messages = process.communicate()
        seconds = time.monotonic() - began_s
    except BaseException:
        _end(process)
        raise
    if process.returncode != 0:
        raise click.ClickException(f"{name}: the reader ended with {process.returncode}: {messages.strip()}")
    for line in messages.splitlines():
        click.echo(f"  {line}", err=True)
    said = json.loads(output)
    return _Run(name, seconds, int(said["bytes"]), str(said["checksum"]), int(said["disk_bytes"]))


def _end(process: subprocess.Popen[str]) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_STOP_S)
            return


def _look_at_disk(files: Sequence[Path]) -> _Disk:
    from penstock.linux.blockdevice import BlockDevice
    from penstock.storage.probe import measure_read_bandwidth

    make_cold(files)
    largest = max(files, key=lambda path: path.stat().st_size)
    with contextlib.closing(BlockDevice(largest.stat().st_dev)) as device:
        setting = device.setting("read_ahead_kb") if device.exists else None
        name = device.path.resolve().name if device.exists else ""
    return _Disk(name, int(setting) if setting else None, measure_read_bandwidth(largest, _PROBE_S))


def _print_table(runs: Sequence[_Run]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    table.add_column("run")
    for heading in ("seconds", "GB/s", "from cache", "speed-up"):
        table.add_column(heading, justify="right", no_wrap=True)
    native = runs[0]
    for run in runs:
        # Where the kernel keeps no account of a task's I/O, the native run counts nothing, though it was cold.
        from_cache = f"{max(0.0, 1 - run.disk_bytes / run.bytes):.0%}" if native.disk_bytes else "?"
        speed_up = "" if run is native else f"{native.seconds / run.seconds:.2f} ×"
        table.add_row(run.name, f"{run.seconds:.2f}", f"{run.bytes / run.seconds / 1e9:.2f}", from_cache, speed_up)
    click.echo()
    Console(highlight=False).print(table)


def _check(runs: Sequence[_Run]) -> None:
    """Raises click.ClickException unless all runs have read the same bytes."""
    if len({(run.bytes, run.checksum) for run in runs}) > 1:
        found = "; ".join(f"{run.name}: {run.bytes} bytes, {run.checksum}" for run in runs)
        raise click.ClickException(f"the runs did not read the same bytes ({found}); please report this")


def _about(disk: _Disk, runs: int, native: _Run) -> str:
    lines = [f"All {runs} runs read the same {native.bytes} bytes (checksum {native.checksum})."]
    facts = []
    if disk.read_ahead_kib is not None:
        facts.append(f"read_ahead_kb is {disk.read_ahead_kib}")
    if disk.bytes_per_s:
        facts.append(f"direct reads reach {disk.bytes_per_s / 1e9:.2f} GB/s")
    if facts:
        lines.append(f"The disk{f' ({disk.name})' if disk.name else ''}: {', '.join(facts)}.")
    lines.append("From cache: what the reader did not have to read from the disk itself.")
    return "\n".join(lines)


def _verdict(native: _Run, replay: _Run, cached: _Run | None, disk: _Disk) -> str:
    """What the figures say, and if penstock was of no use, why that may be."""
    disk_s = native.bytes / disk.bytes_per_s if disk.bytes_per_s else 0.0
    cached_s = cached.seconds if cached else 0.0
    if replay.seconds < _WORTH_TELLING * native.seconds:
        text = f"Replaying took {replay.seconds / native.seconds:.0%} of the native time."
        limits = [f"direct reads of as much take {disk_s:.2f} s"] if disk_s else []
        limits += [f"the reader takes {cached_s:.2f} s with the model in memory"] if cached_s else []
        if limits:
            text += f" The limits: {', and '.join(limits)}."
        return text
    text = f"Replaying was not faster here: {replay.seconds:.2f} s, native {native.seconds:.2f} s."
    if disk_s and disk_s >= _NEAR * native.seconds:
        text += f" The native run has {disk_s / native.seconds:.0%} of the disk's bandwidth by itself"
        if disk.read_ahead_kib is not None and disk.read_ahead_kib > 128:
            text += f": with read_ahead_kb at {disk.read_ahead_kib} (Linux's default is 128) the kernel reads far ahead"
        return f"{text}. There is little left to gain."
    if cached_s >= _NEAR * native.seconds:
        return f"{text} The reader takes {cached_s:.2f} s with the model in memory, so it hardly waits for the disk."
    if native.bytes < _SMALL_BYTES:
        return f"{text} A model this small is read before penstock is ready; try --size 2GiB."
    return (
        f"{text} Neither the disk nor the reader explains it. Other programs may be busy on this machine; in a virtual "
        "machine whose freed memory goes back to its host, the first use of memory is slow; and `penstock doctor` "
        "shows what is missing."
    )


def _draw(reports: Sequence[Path], limit_bytes_per_s: float | None) -> None:
    from penstock.errors import UnsupportedError
    from penstock.report.plot import label, plot
    from penstock.report.report import Report

    loaded = [Report.load(path) for path in reports]
    try:
        plot([(label(report), report) for report in loaded], Path(_PLOT), limit_bytes_per_s)
    except UnsupportedError as error:
        click.echo(f"\nNo picture: {error}")
    except OSError as error:
        click.echo(f"\nNo picture: {_PLOT}: {error.strerror}")
    else:
        click.echo(f"\n{_PLOT} shows the two runs with penstock over time.")

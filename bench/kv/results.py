"""What a run took, what nothing can be faster than, and the bars that one is held against the other by."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Self

from rich.console import Console
from rich.table import Table

from bench.direct import bandwidth, fio_bandwidth
from bench.kv.workload import Device, Workload
from bench.page_cache.limit import LimitUse
from bench.space import require_space
from penstock.units import MiB, format_size

Found = dict[int, dict[str, list["Run"]]]  # by the memory, percent of the cache, and the arm


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
    floor: Floor  # of the same round
    floor_s: float  # of a step, by that


@dataclass(frozen=True, slots=True)
class Floor:
    """What no arm can be faster than, at the time."""

    disk_bytes_per_s: float
    fio_bytes_per_s: float | None
    copy_bytes_per_s: float

    def line(self) -> str:
        fio = "" if self.fio_bytes_per_s is None else f" (fio {self.fio_bytes_per_s / 1e9:.2f})"
        return f"disk {self.disk_bytes_per_s / 1e9:.2f} GB/s{fio}, one copy {self.copy_bytes_per_s / 1e9:.2f} GB/s"

    def step_s(self, workload: Workload, percent: int, own_bytes: int) -> float:
        """Of a decode step: what the memory beside the benchmark's own does not hold is read, and all is copied."""
        read_bytes = max(0, workload.kv_bytes - max(0, workload.kv_bytes * percent // 100 - own_bytes))
        return max(read_bytes / self.disk_bytes_per_s, workload.kv_bytes / self.copy_bytes_per_s)


class FloorFile:
    """A file on the disk, to measure it with as often as there are rounds."""

    def __init__(self, path: Path, workload: Workload) -> None:
        self._path = path
        self._device = workload.device
        size_bytes = min(2048 * MiB, max(16 * MiB, workload.kv_bytes))
        require_space(path.parent, size_bytes)
        block = os.urandom(16 * MiB)
        with path.open("wb") as file:
            for _ in range(size_bytes // len(block)):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())

    def measure(self) -> Floor:
        """What disk and copies give now, the best of three readings."""
        disk = max(bandwidth([self._path]) for _ in range(3))
        return Floor(disk, fio_bandwidth(self._path), Device(self._device).bandwidth())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._path.unlink()


def table(percent: int, workload: Workload, runs: dict[str, list[Run]]) -> Table:
    title = f"memory {percent} % of {format_size(workload.kv_bytes)}: {format_size(workload.kv_bytes * percent / 100)}"
    drawn = Table(title=title, title_justify="left", title_style="bold")
    for column in ("arm", "prefill s", "step s", "of the floor", "first step s", "device GB/s", "CPU s", "peak"):
        drawn.add_column(column, justify="left" if column == "arm" else "right")
    for name, values in runs.items():
        peaks = [run.use.peak_bytes for run in values if run.use.peak_bytes is not None]
        drawn.add_row(
            name,
            f"{median(run.prefill_s for run in values):.2f}",
            f"{median(run.step_s for run in values):.2f}",
            f"{median(run.step_s / run.floor_s for run in values):.2f}",
            f"{median(run.first_step_s for run in values):.2f}",
            f"{median(run.read_bytes_per_s for run in values) / 1e9:.2f}",
            f"{median(run.cpu_s for run in values):.1f}",
            format_size(max(peaks)) if peaks else "–",
        )
    return drawn


def verdicts(console: Console, found: Found) -> bool:
    """Print how each budget stands against its bars; whether all are met. Ratios are of runs of the same round."""
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
        of_floor = median(run.step_s / run.floor_s for run in ours)
        verdict(of_floor <= 1.3, f"{percent} %: step / floor {of_floor:.2f} ≤ 1.3")
        if percent <= 50 and "memmap" in others:
            value = ratio("memmap", "prefill_s")
            verdict(value <= 0.35, f"{percent} %: prefill / memmap {value:.2f} ≤ 0.35")
        shares = [run.read_bytes_per_s / run.floor.fio_bytes_per_s for run in ours if run.floor.fio_bytes_per_s]
        if percent < 100 and shares:
            share = median(shares)
            verdict(share >= 0.9, f"{percent} %: device {share:.2f} ≥ 0.9 of fio")
        kills = sum(run.use.oom_kills for run in ours)
        over = [run for run in ours if (run.use.peak_bytes or 0) > run.use.limit_bytes]
        verdict(not kills and not over, f"{percent} %: {kills} OOM kills, {len(over)} runs over the limit")
    return passed

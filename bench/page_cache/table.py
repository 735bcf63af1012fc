"""The figures as a person reads them."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from rich.console import Console
from rich.table import Table

from bench.machine import Machine
from bench.page_cache.arms import ARMS, Key, Setting
from bench.page_cache.results import Results, Verdict
from bench.page_cache.run import Run
from penstock.units import format_size


def print_machine(console: Console, machine: Machine, model: str, limit: str) -> None:
    """The head: what the figures belong to."""
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for name, value in [*machine.lines(), ("model", model), ("disk alone", limit)]:
        table.add_row(name, value)
    console.print(table)


def print_setting(console: Console, results: Results, setting: Setting, arms: Sequence[str]) -> None:
    """One table for a client under a setting."""
    limit_s = results.limit_s(setting)
    title = f"{setting}" + (f"; L = {limit_s:.2f} s" if limit_s else "")
    table = Table(title=title, title_justify="left", title_style="bold")
    for name in ("arm", "cache before", "seconds", "min–max", "GB/s", "/ native", "/ L"):
        table.add_column(name, justify="left" if name in ("arm", "cache before") else "right")
    for arm in arms:
        key = Key(setting, arm)
        runs = results.runs(key)
        if not runs:
            table.add_row(arm, "", "failed" if key in results.failed else "–", "", "", "", "")
            continue
        seconds = [run.seconds for run in runs]
        native = results.ratio(key, Key(setting, "native"))
        table.add_row(
            arm,
            "resident" if ARMS[arm].resident else "cold",
            f"{median(seconds):.2f}",
            f"{min(seconds):.2f}–{max(seconds):.2f}",
            f"{runs[0].bytes / median(seconds) / 1e9:.2f}",
            f"{native:.2f}" if native else "",
            f"{median(seconds) / limit_s:.2f}" if limit_s else "",
        )
    console.print(table)
    for arm in arms:
        if runs := results.runs(Key(setting, arm)):
            console.print(f"  {arm}: {_how(runs)}", style="dim", highlight=False)


def _how(runs: Sequence[Run]) -> str:
    """What was in use, from penstock's report and the counters of the run."""
    last = runs[-1]
    words = [ARMS[last.key.arm].text]
    if ARMS[last.key.arm].warm:
        words.append(f"warm {median(run.warm_s for run in runs):.2f} s of it")
    for name in ("mode", "observer", "loader_method"):
        used = dict.fromkeys(str(run.report[name]) for run in runs if run.report.get(name))
        words += [" and ".join(used)] * bool(used)
    for name, text in (
        ("bytes_prefetched", "prefetched"),
        ("bytes_evicted", "evicted"),
        ("peak_resident_bytes", "peak cache"),
    ):
        if last.report.get(name):
            words.append(f"{text} {format_size(median(run.report.get(name, 0) for run in runs))}")
    if last.penstock_peak_bytes:
        words.append(f"own {format_size(max(run.penstock_peak_bytes for run in runs))}")
    words.append(f"left {median(run.cached_share for run in runs):.0%} of the model cached")
    if last.limit is not None:
        peak = format_size(last.limit.peak_bytes) if last.limit.peak_bytes is not None else "unknown"
        words.append(f"charged {peak} of {format_size(last.limit.limit_bytes)}")
    if warnings := dict.fromkeys(text for run in runs for text in run.report.get("warnings", [])):
        words.append(f"warned: {'; '.join(warnings)}")
    return ", ".join(words)


def print_verdicts(console: Console, verdicts: Sequence[Verdict]) -> None:
    """The bars, one a line."""
    for verdict in verdicts:
        console.print(str(verdict), style=None if verdict.passed else "bold red", highlight=False)

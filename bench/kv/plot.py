"""Draws a decode step's time against memory: ``python -m bench.kv.plot RESULTS.json PICTURE.svg``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import median

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from bench.kv.results import Floor, Found, Run
from bench.kv.workload import Workload
from bench.page_cache.limit import LimitUse
from penstock.units import format_size

_INK, _GRID = "#333333", "#e4e4e4"
# Okabe and Ito, "Color Universal Design", 2008; penstock's own line is the widest.
_COLOURS = {
    "memmap": "#D55E00", "memmap-128": "#E69F00", "buffered": "#CC79A7", "direct": "#009E73", "penstock": "#0072B2",
}  # fmt: skip
_NAMES = {
    "memmap": "np.memmap",
    "memmap-128": "np.memmap, read-ahead of 128 KiB",
    "buffered": "page cache only",
    "direct": "direct only",
    "penstock": "penstock: both paths",
}


def plot(out: Path, workload: Workload, found: Found) -> None:
    """Draw each arm's median step with its least and most, and the floor, over the memory there was.

    Raises:
        OSError: the file cannot be written.
    """
    figure = Figure(figsize=(8.4, 4.2), dpi=150, layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.08))  # inches
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=_INK, labelsize=9)
    axes.grid(color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    percents = sorted(found)
    for name in dict.fromkeys(name for runs in found.values() for name in runs):
        steps = [[run.step_s for run in found[percent][name]] for percent in percents]
        colour = _COLOURS.get(name, _INK)
        axes.fill_between(percents, [min(s) for s in steps], [max(s) for s in steps], color=colour, alpha=0.15, lw=0)
        width = 2.4 if name == "penstock" else 1.4
        axes.plot(
            percents, [median(s) for s in steps], color=colour, marker="o", markersize=4, linewidth=width,
            label=_NAMES.get(name, name), zorder=3 if name == "penstock" else 2,
        )  # fmt: skip
    least = [median(run.floor_s for runs in found[percent].values() for run in runs) for percent in percents]
    axes.plot(percents, least, color=_INK, linewidth=1.1, linestyle=(0, (5, 3)), label="floor: disk or copy")
    axes.set_xticks(percents)
    axes.set_xlim(0, max(percents) * 1.02)
    axes.set_ylim(bottom=0)
    size = format_size(workload.kv_bytes)
    axes.set_xlabel(f"memory, percent of {size} of keys and values", fontsize=9, color=_INK)
    axes.set_title("a decode step, seconds", loc="left", fontsize=9.5, color=_INK)
    axes.legend(frameon=False, fontsize=8.5, labelcolor=_INK)
    out.parent.mkdir(parents=True, exist_ok=True)
    canvas.print_figure(out, format=out.suffix[1:], facecolor="white")


def load(path: Path) -> tuple[Workload, Found]:
    """What ``python -m bench.kv --json`` wrote."""
    document = json.loads(path.read_text())
    found: Found = {}
    for row in document["rows"]:
        runs = [Run(**{**run, "use": LimitUse(**run["use"]), "floor": Floor(**run["floor"])}) for run in row["runs"]]
        found.setdefault(row["percent"], {})[row["arm"]] = runs
    return Workload(**document["workload"]), found


if __name__ == "__main__":
    plot(Path(sys.argv[2]), *load(Path(sys.argv[1])))

"""Runs over time: the device's bandwidth and the model's bytes, several runs over one another."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from penstock.errors import ReportError, UnsupportedError
from penstock.linux.wholefile import WholeFile
from penstock.report.report import Report
from penstock.units import GiB, MiB

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from numpy.typing import NDArray

FORMATS = (".pdf", ".png", ".svg")

# Okabe and Ito, "Color Universal Design", 2008; without yellow, which is too pale for a line on white.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_INK, _GRID = "#333333", "#e4e4e4"
_BIN_S = 0.1
_MOST_BINS = 400  # about what the width can show
_ROW_INCHES = 0.4
_BANDWIDTH_INCHES, _BYTES_INCHES = 2.6, 1.9
_WIDTH_INCHES = 8.4
# A thin line on a wide pale one: both show where the two are equal.
_CACHED: dict[str, Any] = {"linewidth": 4.5, "alpha": 0.38, "solid_capstyle": "butt"}
_ACCESSED: dict[str, Any] = {"linewidth": 1.4}
_DOTS: dict[str, Any] = {"linewidth": 1.1, "linestyle": (0, (1, 1.6))}


def label(report: Report) -> str:
    """How a plot names a run: ``replay · maio · 4.1 s``, with the time from its start to its last access."""
    seconds = report.wall_s if report.last_access_s is None else report.last_access_s
    return f"{report.mode} · {report.policy} · {seconds:.1f} s"


def plot(reports: Sequence[tuple[str, Report]], out: Path, device_limit_bytes_per_s: float | None = None) -> None:
    """Draw runs, each with its label, into a PNG, SVG or PDF.

    Three panels share the time since the programs' starts: a row for each run with its start, first access,
    last access and end; the bandwidth of the device in GB/s, over bins of 100 ms; what of the model was
    cached and what the program had accessed, in GiB (MiB for less than one).

    Raises:
        UnsupportedError: matplotlib is not installed.
        ReportError: there is no run, or the file's suffix is none of `FORMATS`.
        OSError: the file cannot be written.
    """
    if not reports:
        raise ReportError(f"{out}: nothing to plot; give at least one report")
    if out.suffix.lower() not in FORMATS:
        raise ReportError(f"{out}: cannot tell the picture's format from {out.suffix!r}; use {', '.join(FORMATS)}")
    try:
        # Figures made directly, without pyplot, leave no state behind and need no display.
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
    except ImportError as error:
        raise UnsupportedError(
            f"plots need matplotlib ({error}); install it with: pip install 'penstock[plot]'"
        ) from error
    heights = (0.1 + _ROW_INCHES * len(reports), _BANDWIDTH_INCHES, _BYTES_INCHES)
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.06)  # inches
    figure = Figure(figsize=(_WIDTH_INCHES, sum(heights) + 0.9), dpi=150, layout=layout)
    canvas = FigureCanvasAgg(figure)
    rows, bandwidth, cached = figure.subplots(3, 1, sharex=True, height_ratios=heights)
    for axes in (rows, bandwidth, cached):
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(colors=_INK, labelsize=9)
        axes.grid(axis="x", color=_GRID, linewidth=0.8)
        axes.set_axisbelow(True)
    end_s = max(_end_s(report) for _, report in reports)
    _draw_rows(rows, reports, end_s)
    _draw_bandwidth(bandwidth, reports, device_limit_bytes_per_s)
    _draw_bytes(cached, reports)
    cached.set_xlabel("seconds since the program's start", fontsize=9, color=_INK)
    cached.set_xlim(0, end_s * 1.01)

    picture = io.BytesIO()
    canvas.print_figure(picture, format=out.suffix[1:].lower(), facecolor="white")
    with WholeFile(out, 0o666) as file:
        file.write(picture.getbuffer())
        file.commit(is_durable=False)


def bandwidth_bins(report: Report) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The device's bandwidth over a run: bin edges in s, shape [n + 1], and bytes/s in each bin, shape [n].

    Samples come when the observer had time, so the sums are interpolated at the edges.
    """
    import numpy as np

    end_s = _end_s(report)
    count = int(max(1, min(_MOST_BINS, round(end_s / _BIN_S))))
    edges = np.linspace(0.0, end_s, count + 1)
    times, read_bytes = _series(report, "device_read_bytes")
    return edges, np.diff(np.interp(edges, times, read_bytes)) / np.diff(edges)


def _series(report: Report, name: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Times and values of the samples. The sums start at nothing; what was cached is known from the first on."""
    import numpy as np

    points = [(sample.t_s, float(getattr(sample, name))) for sample in report.timeline]
    first_s = points[0][0] if points else 0.0
    if name == "accessed_bytes" and report.first_access_s is not None and report.first_access_s < first_s:
        points.insert(0, (report.first_access_s, 0.0))
    if name != "resident_bytes" or not points:
        points.insert(0, (0.0, 0.0))
    points.sort(key=lambda point: point[0])
    return np.array([t_s for t_s, _ in points]), np.array([value for _, value in points])


def _end_s(report: Report) -> float:
    last_sample_s = max((sample.t_s for sample in report.timeline), default=0.0)
    return max(report.wall_s, report.last_access_s or 0.0, last_sample_s, 1e-3)


def _colour(number: int) -> str:
    return _COLOURS[number % len(_COLOURS)]


def _draw_rows(axes: Axes, reports: Sequence[tuple[str, Report]], end_s: float) -> None:
    """One row a run: a thin line while it ran, a bar from its first to its last access. Also the legend."""
    for number, (name, report) in enumerate(reports):
        colour = _colour(number)
        wall_s = _end_s(report)
        axes.plot([0, wall_s], [number, number], color=colour, linewidth=1.2, solid_capstyle="butt")
        axes.plot([0, wall_s], [number, number], "|", color=colour, markersize=8, markeredgewidth=1.4)
        if report.first_access_s is not None and report.last_access_s is not None:
            length_s = max(report.last_access_s - report.first_access_s, end_s / 400)
            axes.barh(number, length_s, left=report.first_access_s, height=0.3, color=colour)
        # Above its bar and not beside the axis: a long label takes nothing from the width of the panels.
        axes.annotate(
            name, (0, number), (4, 7.5), textcoords="offset points", fontsize=9, color=_INK, fontweight="bold"
        )
    axes.set_yticks([])
    axes.grid(visible=False)
    axes.set_ylim(len(reports) - 0.6, -0.8)
    axes.tick_params(axis="x", length=0)
    axes.spines[["left", "bottom"]].set_visible(False)
    _title(axes, "", _row_keys())


def _draw_bandwidth(axes: Axes, reports: Sequence[tuple[str, Report]], limit: float | None) -> None:
    peak = 0.0
    for number, (_, report) in enumerate(reports):
        edges, values = bandwidth_bins(report)
        axes.stairs(values / 1e9, edges, color=_colour(number), fill=True, alpha=0.12)
        axes.stairs(values / 1e9, edges, color=_colour(number), linewidth=1.4, baseline=None)
        peak = max(peak, float(values.max()) / 1e9)
    _mark_accesses(axes, reports)
    if limit is not None:
        axes.axhline(limit / 1e9, color=_INK, linewidth=1.1, linestyle=(0, (5, 3)))
        axes.text(
            1.008,
            limit / 1e9,
            f"device's\nmaximum\n{limit / 1e9:.2f}",
            transform=axes.get_yaxis_transform(),
            va="center",
            fontsize=8.5,
            color=_INK,
        )
        peak = max(peak, limit / 1e9)
    axes.set_ylim(0, peak * 1.12 or 1)
    _title(axes, "read from the device, GB/s", _dotted_key())


def _draw_bytes(axes: Axes, reports: Sequence[tuple[str, Report]]) -> None:
    from matplotlib.lines import Line2D

    peak_bytes = max((s.resident_bytes for _, report in reports for s in report.timeline), default=0)
    peak_bytes = max(peak_bytes, max(report.bytes_accessed for _, report in reports))
    unit, unit_bytes = ("GiB", GiB) if peak_bytes >= GiB else ("MiB", MiB)
    for number, (_, report) in enumerate(reports):
        for name, style in (("resident_bytes", _CACHED), ("accessed_bytes", _ACCESSED)):
            times, values = _series(report, name)
            axes.plot(times, values / unit_bytes, color=_colour(number), **style)
    axes.set_ylim(bottom=0)
    axes.margins(y=0.1)
    keys = [
        Line2D([], [], color=_INK, label="cached", **_CACHED),
        Line2D([], [], color=_INK, label="accessed", **_ACCESSED),
    ]
    _title(axes, f"of the model, {unit}", keys)


def _mark_accesses(axes: Axes, reports: Sequence[tuple[str, Report]]) -> None:
    for number, (_, report) in enumerate(reports):
        for at_s in (report.first_access_s, report.last_access_s):
            if at_s is not None:
                axes.axvline(at_s, color=_colour(number), **_DOTS)


def _row_keys() -> list[Any]:
    from matplotlib.lines import Line2D

    return [
        Line2D([], [], color=_INK, marker="|", markersize=8, linewidth=1.2, label="start to end of the program"),
        Line2D([], [], color=_INK, linewidth=7, label="first to last access"),
    ]


def _dotted_key() -> list[Any]:
    from matplotlib.lines import Line2D

    return [Line2D([], [], color=_INK, label="first and last access", **_DOTS)]


def _title(axes: Axes, text: str, keys: Sequence[Any] = ()) -> None:
    """A heading at the left, and the keys at the right of it: above the data, never on it."""
    axes.set_title(text, loc="left", fontsize=9.5, color=_INK)
    if keys:
        axes.legend(
            handles=list(keys),
            loc="lower right",
            bbox_to_anchor=(1.0, 1.0),
            ncols=len(keys),
            frameon=False,
            fontsize=8.5,
            labelcolor=_INK,
            borderaxespad=0.1,
        )

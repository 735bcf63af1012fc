"""The plot: what it is drawn from, and that a picture comes out."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from penstock.errors import ReportError
from penstock.report.plot import bandwidth_bins, label, plot
from penstock.report.report import Report, Sample
from penstock.units import GiB

pytest.importorskip("matplotlib", reason="needs the plot extra: matplotlib is not installed")

SLOW = Report(
    service="llama-3b",
    mode="observe",
    policy="native",
    observer="tracefs",
    exit_code=0,
    wall_s=2.0,
    first_access_s=0.5,
    last_access_s=1.75,
    bytes_accessed=2 * GiB,
    bytes_prefetched=0,
    bytes_prefetched_unused=0,
    bytes_evicted=0,
    bytes_device_read=2 * GiB,
    peak_resident_bytes=2 * GiB,
    timeline=tuple(
        Sample(0.05 * step, min(step, 32) * 64 << 20, min(step, 32) * 64 << 20, 2 * GiB) for step in range(1, 41)
    ),
)
FAST = replace(SLOW, mode="replay", policy="maio", wall_s=1.0, last_access_s=0.9)
NOTHING = replace(SLOW, first_access_s=None, last_access_s=None, timeline=(), wall_s=0.02)


def test_labels_name_mode_policy_and_load_time() -> None:
    assert label(FAST) == "replay · maio · 0.9 s"
    assert label(NOTHING) == "observe · native · 0.0 s"


def test_bins_are_100_ms_and_lose_no_byte() -> None:
    edges, values = bandwidth_bins(SLOW)
    assert np.allclose(np.diff(edges), 0.1)
    assert np.isclose((values * np.diff(edges)).sum(), 2 * GiB)
    assert np.allclose(values[:15], 128 * (1 << 20) / 0.1)
    assert not values[17:].any()


def test_a_long_run_has_no_more_bins_than_the_picture_can_show() -> None:
    edges, values = bandwidth_bins(replace(SLOW, wall_s=3600.0))
    assert len(values) == len(edges) - 1 == 400


@pytest.mark.parametrize(("suffix", "magic"), [(".png", b"\x89PNG\r\n"), (".svg", b"<?xml"), (".pdf", b"%PDF-")])
def test_runs_are_drawn_over_one_another(suffix: str, magic: bytes, tmp_path: Path) -> None:
    out = tmp_path / f"runs{suffix}"
    plot([(label(report), report) for report in (SLOW, FAST, NOTHING)], out, 2.1e9)
    assert out.read_bytes().startswith(magic)
    assert list(tmp_path.iterdir()) == [out]


def test_what_cannot_be_drawn_is_told_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match="nothing to plot"):
        plot([], tmp_path / "a.png")
    with pytest.raises(ReportError, match=r"use \.pdf, \.png, \.svg"):
        plot([("a", FAST)], tmp_path / "a.docx")
    with pytest.raises(FileNotFoundError):
        plot([("a", FAST)], tmp_path / "missing" / "a.png")
    assert list(tmp_path.iterdir()) == []


def test_without_matplotlib_the_extra_is_named() -> None:
    code = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "from pathlib import Path; from penstock.report.plot import plot\n"
        "try: plot([('a', None)], Path('a.png'))\n"
        "except Exception as error: print(type(error).__name__, error)"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert output.stdout.startswith("UnsupportedError")
    assert "pip install 'penstock[plot]'" in output.stdout


def test_importing_the_plot_imports_neither_numpy_nor_matplotlib() -> None:
    code = "import sys, penstock.report.plot; print({'numpy', 'matplotlib'} & set(sys.modules))"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert output.stdout.strip() == "set()"

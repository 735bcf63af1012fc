"""`penstock plot`, through click's own runner."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from penstock.cli.plot import plot
from penstock.report.report import Report, Sample
from penstock.units import GiB

REPORT = Report(
    service="llama-3b",
    mode="observe",
    policy="native",
    observer="process",
    exit_code=0,
    wall_s=1.0,
    first_access_s=0.2,
    last_access_s=0.9,
    bytes_accessed=GiB,
    bytes_prefetched=0,
    bytes_prefetched_unused=0,
    bytes_evicted=0,
    bytes_device_read=GiB,
    peak_resident_bytes=GiB,
    timeline=tuple(Sample(step / 10, step * 100 << 20, step * 100 << 20, step * 100 << 20) for step in range(11)),
)


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(plot, [str(argument) for argument in arguments])


def test_two_reports_make_one_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs the plot extra: matplotlib is not installed")
    paths = [tmp_path / "a.json", tmp_path / "b.json"]
    REPORT.save(paths[0])
    replace(REPORT, mode="replay", policy="maio").save(paths[1])
    out = tmp_path / "out.png"
    result = run(*paths, "-o", out, "--limit", "2.1")
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{out}: 2 runs\n"
    assert out.read_bytes().startswith(b"\x89PNG")


def test_runs_of_the_same_label_are_told_apart_by_their_files(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs the plot extra: matplotlib is not installed")
    paths = [tmp_path / "first.json", tmp_path / "second.json"]
    for path in paths:
        REPORT.save(path)
    out = tmp_path / "out.svg"
    result = run(*paths, "-o", out)
    assert result.exit_code == 0, result.output
    text = out.read_text(encoding="utf-8")  # matplotlib keeps each text in a comment beside its glyphs
    assert "first · observe · native · 0.9 s" in text
    assert "second · observe · native · 0.9 s" in text


def test_a_damaged_report_is_told_without_a_traceback(tmp_path: Path) -> None:
    path = tmp_path / "half.json"
    path.write_text(REPORT.to_json()[:100])
    result = run(path, "-o", tmp_path / "out.png")
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit)
    assert f"{path}: not a complete report" in result.stderr
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("arguments", [["-o", "x.png"], ["none.json", "-o", "x.png"], [__file__], ["--limit", "0"]])
def test_unusable_arguments_are_usage_errors(arguments: list[str]) -> None:
    assert run(*arguments).exit_code == 2


def test_help_has_an_example() -> None:
    assert "penstock plot native.json maio.json -o load.png" in run("--help").stdout


def test_importing_the_command_imports_no_heavy_module() -> None:
    code = "import sys, penstock.cli.plot; print({'numpy', 'rich', 'matplotlib'} & set(sys.modules))"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert output.stdout.strip() == "set()"

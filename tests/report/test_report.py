"""Reports: the JSON's keys, reading it back, and the lines said after a run."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from penstock.errors import PenstockError, ReportError
from penstock.report.report import Report, Sample, summary_lines
from penstock.units import GiB, MiB

REPORT = Report(
    service="llama-3b",
    mode="replay",
    policy="maio",
    observer="tracefs",
    exit_code=0,
    wall_s=6.25,
    first_access_s=1.5,
    last_access_s=4.1,
    bytes_accessed=6 * GiB,
    bytes_prefetched=6 * GiB - 100 * MiB,
    bytes_prefetched_unused=0,
    bytes_evicted=0,
    bytes_device_read=6 * GiB,
    peak_resident_bytes=6 * GiB,
    warnings=(),
    timeline=(Sample(0.0, 0, 0, 0), Sample(0.1, 200 * MiB, 0, 190 * MiB)),
    command=("python", "serve.py", "--model", "/models/llama-3b"),
    model_bytes=6 * GiB,
    loader_method="populate",
    residency_method="cachestat",
    memory_source="host",
    budget_bytes=12 * GiB,
)


def test_json_has_the_documented_keys() -> None:
    body = json.loads(REPORT.to_json())
    assert set(body) == {
        *("format", "version", "penstock_version", "service", "mode", "policy", "observer", "exit_code"),
        *("wall_s", "first_access_s", "last_access_s", "bytes_accessed", "bytes_prefetched"),
        *("bytes_prefetched_unused", "bytes_evicted", "bytes_device_read", "peak_resident_bytes"),
        *("warnings", "timeline", "command", "model_bytes", "loader_method", "memory_source"),
        *("budget_bytes", "residency_method"),
    }
    assert body["format"] == "penstock-report"
    assert body["version"] == 1
    assert body["warnings"] == []
    assert body["timeline"][1] == {
        "t_s": 0.1,
        "device_read_bytes": 200 * MiB,
        "accessed_bytes": 0,
        "resident_bytes": 190 * MiB,
    }


@pytest.mark.parametrize(
    "report",
    [
        REPORT,
        replace(REPORT, mode="observe", first_access_s=None, last_access_s=None, bytes_accessed=0),
        replace(REPORT, exit_code=None),
        replace(REPORT, warnings=("größer als gedacht", "second"), timeline=()),
    ],
)
def test_reads_back_what_it_wrote(report: Report, tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    report.save(path)
    assert Report.load(path) == report
    assert list(tmp_path.iterdir()) == [path]


def test_a_device_stays_one(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        replace(REPORT, timeline=()).save(path)
        assert path.is_fifo()
        assert Report.from_json(os.read(reader, 65536).decode()) == replace(REPORT, timeline=())
    finally:
        os.close(reader)
    assert os.listdir(tmp_path) == ["pipe"]


def test_keys_of_a_later_penstock_are_passed_over() -> None:
    body = json.loads(REPORT.to_json())
    assert Report.from_json(json.dumps({**body, "colour": "blue"})) == REPORT


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, "not a penstock report"),
        ({"version": 2}, "report version 2"),
        ({"wall_s": "long"}, "'wall_s' is not float"),
        ({"bytes_accessed": 1.5}, "'bytes_accessed' is not int"),
        ({"exit_code": True}, "'exit_code' is not int | None"),
        ({"mode": "guess"}, "'mode' is not Mode: ValueError: got 'guess'"),
        ({"warnings": "none"}, "'warnings' is not"),
        ({"timeline": [{"t_s": 0}]}, "'timeline' is not"),
        ({"timeline": [1]}, "'timeline' is not"),
    ],
)
def test_a_damaged_report_says_what_is_wrong(change: dict[str, object], message: str) -> None:
    body = {**json.loads(REPORT.to_json()), **change}
    with pytest.raises(ReportError, match=r"^/r\.json: ") as caught:
        Report.from_json(json.dumps(body), "/r.json")
    assert message in str(caught.value)
    assert isinstance(caught.value, PenstockError)


def test_a_missing_key_and_a_truncated_file_are_told(tmp_path: Path) -> None:
    body = json.loads(REPORT.to_json())
    del body["policy"]
    with pytest.raises(ReportError, match="key 'policy' is missing"):
        Report.from_json(json.dumps(body))
    with pytest.raises(ReportError, match="not a complete report"):
        Report.from_json(REPORT.to_json()[:-20])
    path = tmp_path / "binary.json"
    path.write_bytes(b"\xff\xfe\0")
    with pytest.raises(ReportError, match="not text"):
        Report.load(path)


def test_a_failed_save_leaves_the_old_report(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.mkdir()  # cannot be replaced by a file
    with pytest.raises(OSError, match=r"run\.json"):
        REPORT.save(path)
    assert list(tmp_path.iterdir()) == [path]


def test_the_first_line_has_the_figures() -> None:
    assert summary_lines(REPORT) == [
        "penstock: replayed llama-3b: 6.0 GiB read in 4.1 s (1.57 GB/s), 5.9 GiB prefetched, 0 B unused"
    ]


@pytest.mark.parametrize(
    ("report", "second"),
    [
        (
            replace(REPORT, mode="record"),
            "penstock: the I/O template is stored; the next run prefetches from its start",
        ),
        (replace(REPORT, mode="record", warnings=("w",)), "penstock: warning: w"),
        (
            replace(REPORT, warnings=("w", "x", "y")),
            "penstock: warning: w (and 2 more warnings: --report has all)",
        ),
        (
            replace(REPORT, bytes_evicted=4 * GiB, peak_resident_bytes=2 * GiB),
            "penstock: 4.0 GiB evicted behind the readers, at most 2.0 GiB of the model cached (host)",
        ),
        (  # nobody has counted what is cached
            replace(REPORT, bytes_evicted=4 * GiB, peak_resident_bytes=0, timeline=()),
            "penstock: 4.0 GiB evicted behind the readers (host)",
        ),
    ],
)
def test_the_second_line_says_what_matters(report: Report, second: str) -> None:
    lines = summary_lines(report)
    assert len(lines) == 2
    assert lines[1] == second


def test_a_run_that_read_nothing_says_so() -> None:
    nothing = replace(
        REPORT,
        mode="observe",
        first_access_s=None,
        last_access_s=None,
        bytes_accessed=0,
        bytes_prefetched=0,
    )
    assert summary_lines(nothing) == ["penstock: observed llama-3b: no model file was read in 6.2 s"]

"""`penstock doctor` on this machine: it answers everywhere and leaves nothing behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from tests.tracing import open_tracefs

from penstock.cli.doctor import Check, _mount_of, _observer, checks, doctor
from penstock.linux.tracefs import INSTANCE_PREFIX

NAMES = {
    *("kernel", "observer", "tracefs", "pagemap", "child processes", "cachestat", "preadv2 RWF_NOWAIT"),
    *("MADV_POPULATE_READ", "process_madvise", "fanotify", "numa", "memory limit", "memory headroom", "pressure"),
    *("io_uring", "huge pages", "file system"),
}


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(doctor, [str(argument) for argument in arguments])


def test_json_has_every_capability(tmp_path: Path) -> None:
    result = run("--json", tmp_path)
    rows = json.loads(result.stdout)
    assert {row["name"] for row in rows} >= NAMES
    assert len({row["name"] for row in rows}) == len(rows)
    for row in rows:
        assert set(row) == {"name", "state", "detail", "instead"}
        assert row["state"] in {"ok", "degraded", "missing"}
        assert row["detail"]
        assert bool(row["instead"]) == (row["state"] != "ok"), row
    observer = next(row for row in rows if row["name"] == "observer")
    assert result.exit_code == (1 if observer["state"] == "missing" else 0)
    assert list(tmp_path.iterdir()) == []


def test_the_table_says_what_is_done_instead(tmp_path: Path) -> None:
    found = checks(tmp_path)
    lines = run(tmp_path).stdout.splitlines()
    assert len(lines) == len(found) + sum(bool(check.instead) for check in found)
    width = max(len(check.name) for check in found)
    for check in found:
        mark = {"ok": "✓", "degraded": "~", "missing": "–"}[check.state]
        assert any(line.startswith(f"{mark} {check.name:{width}}  ") for line in lines)
        assert not check.instead or any(line.strip() == f"→ {check.instead}" for line in lines)


@pytest.mark.root
def test_the_trace_instance_is_removed_again(tmp_path: Path) -> None:
    tracefs = open_tracefs()
    try:
        states = {check.name: check.state for check in checks(tmp_path)}
        assert states["tracefs"] == "ok"
        assert "trace instance" in states
        directory = os.open("instances", os.O_RDONLY, dir_fd=tracefs.fd)
        try:
            own = f"{INSTANCE_PREFIX}{os.getpid()}-"
            assert not [name for name in os.listdir(directory) if name.startswith(own)]
        finally:
            os.close(directory)
    finally:
        tracefs.close()


@pytest.mark.root
def test_an_ordinary_user_gets_the_whole_table() -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root, to become somebody else (as anybody else the tests above say the same)")
    # Everything is imported first: the interpreter's own files may be closed to others.
    code = (
        "import ctypes, json, os, tempfile\n"
        "from pathlib import Path\n"
        "from penstock.cli import doctor\n"
        "doctor.checks(Path('/'))\n"
        "os.setgroups([]); os.setresgid(65534, 65534, 65534); os.setresuid(65534, 65534, 65534)\n"
        "ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)\n"  # PR_SET_DUMPABLE, as after an exec
        "doctor.doctor(['--json', '/'])\n"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd="/")
    assert output.returncode == 0, output.stderr
    rows = {row["name"]: row for row in json.loads(output.stdout)}
    assert set(rows) >= NAMES
    assert "uid 65534, not root" in rows["kernel"]["detail"]
    assert rows["observer"]["state"] == "degraded"
    assert rows["process_madvise"]["state"] == "missing"
    assert rows["pagemap"]["state"] != "missing"


OK, BAD = Check("one", "ok", "there"), Check("two", "missing", "not there", "something else")
PARTLY = Check("three", "degraded", "in parts", "something else")


@pytest.mark.parametrize(
    ("may_trace", "tracing", "processes", "state"),
    [
        (True, [OK], [OK], "ok"),
        (True, [OK, PARTLY], [OK], "degraded"),
        (True, [BAD], [OK], "degraded"),
        (True, [OK], [BAD], "ok"),
        (True, [BAD], [BAD], "missing"),
        (False, [OK], [OK], "degraded"),
        (False, [OK], [BAD], "missing"),
    ],
)
def test_what_can_observe(may_trace: bool, tracing: list[Check], processes: list[Check], state: str) -> None:
    assert _observer(tracing, processes, may_trace=may_trace).state == state


def test_the_mount_is_the_innermost(tmp_path: Path) -> None:
    assert _mount_of(Path("/proc/self/status")).kind == "proc"
    assert _mount_of(Path("/proc/self/status")).point == "/proc"
    mount = _mount_of(tmp_path)
    assert tmp_path.resolve().is_relative_to(mount.point)
    assert mount.device == tmp_path.stat().st_dev


def test_a_memory_file_system_is_told() -> None:
    if not os.path.ismount("/dev/shm"):
        pytest.skip("there is no /dev/shm")
    check = next(check for check in checks(Path("/dev/shm")) if check.name == "file system")
    assert check.state == "degraded"
    assert "in memory already" in check.detail


def test_help_has_an_example() -> None:
    result = run("--help")
    assert "penstock doctor /models" in result.stdout
    assert run("/no/such/place").exit_code == 2


@pytest.mark.root
def test_a_raw_block_device(loop_device: Path) -> None:
    rows = {check.name: check for check in checks(loop_device)}
    assert rows["file system"] == Check("file system", "ok", "none: a raw block device")
    assert rows["block device"].detail.startswith(f"{loop_device.name}, read_ahead_kb ")
    assert "nvme passthrough" not in rows


def test_importing_the_command_imports_no_heavy_module() -> None:
    code = "import sys, penstock.cli.doctor; print({'numpy', 'rich'} & set(sys.modules))"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert output.stdout.strip() == "set()"

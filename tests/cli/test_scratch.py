"""penstock.cli.scratch."""

from __future__ import annotations

import fcntl
import os
import shutil
from pathlib import Path

import click
import pytest

from penstock.cli import scratch
from penstock.units import GiB, MiB


def test_sweeps_up_after_a_killed_demo_but_not_a_running_one(disk: Path) -> None:
    killed, running = disk / "penstock-demo-killed", disk / "penstock-demo-running"
    for directory in (killed, running):
        directory.mkdir()
        (directory / "model").touch()
    descriptor = os.open(running, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        with scratch.scratch_directory(disk, keep=False) as made:
            assert sorted(disk.iterdir()) == sorted([running, made])
    finally:
        os.close(descriptor)
    assert list(disk.iterdir()) == [running]


def test_goes_on_with_less_where_the_room_is_short(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(disk)._replace(free=200 * MiB)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    assert scratch.fitting_size(2 * GiB, disk) == (128 * MiB, f"200 MiB are free in {disk}")
    assert scratch.fitting_size(100 * MiB, disk) == (100 * MiB, "")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10 * MiB))
    with pytest.raises(click.ClickException, match="too little for a demo"):
        scratch.fitting_size(2 * GiB, disk)


def test_looks_for_another_disk_where_the_working_directory_has_none(
    disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(disk))
    assert scratch.choose_place(None) == Path.cwd()
    cold = scratch.can_be_cold
    monkeypatch.setattr(scratch, "can_be_cold", lambda path: path != Path.cwd() and cold(path))
    assert scratch.choose_place(None) == disk / "penstock"

"""penstock.linux.blockdevice: on a tree of plain files, and the device under a real one."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from penstock.linux.blockdevice import BlockDevice
from penstock.units import MiB

DISK, PARTITION = os.makedev(259, 0), os.makedev(259, 1)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A disk with one partition, as sysfs shows them."""
    disk = tmp_path / "sys/devices/pci0000:00/block/nvme0n1"
    (disk / "nvme0n1p1").mkdir(parents=True)
    (disk / "queue").mkdir()
    (disk / "queue/read_ahead_kb").write_text("128\n")
    (disk / "stat").write_text("  10  2  4096  5  6  7  8  9  0  1  2\n")
    (disk / "nvme0n1p1/stat").write_text("  10  2  2048  5  6  7  8  9  0  1  2\n")
    links = tmp_path / "sys/dev/block"
    links.mkdir(parents=True)
    (links / "259:0").symlink_to(disk)
    (links / "259:1").symlink_to(disk / "nvme0n1p1")
    return tmp_path


@pytest.fixture
def disk(root: Path) -> Iterator[BlockDevice]:
    disk = BlockDevice(DISK, root)
    yield disk
    disk.close()


def test_sectors_are_of_512_bytes(disk: BlockDevice) -> None:
    assert disk.exists
    assert disk.read_bytes() == 4096 * 512


def test_the_counter_is_read_anew(disk: BlockDevice, root: Path) -> None:
    with (disk.path / "stat").open("r+") as file:
        file.write("  10  2  8192")
    assert disk.read_bytes() == 8192 * 512


def test_a_partition_has_its_own_counter_and_its_disks_settings(root: Path) -> None:
    partition = BlockDevice(PARTITION, root)
    try:
        assert partition.read_bytes() == 2048 * 512
        assert partition.setting("read_ahead_kb") == "128"
    finally:
        partition.close()


def test_a_setting_that_is_not_there(disk: BlockDevice) -> None:
    assert disk.setting("read_ahead_kb") == "128"
    assert disk.setting("no_such_setting") is None


def test_a_file_system_without_a_device(root: Path) -> None:
    device = BlockDevice(os.makedev(0, 43), root)
    assert not device.exists
    assert device.read_bytes() == 0
    assert device.setting("read_ahead_kb") is None
    device.close()


def test_close_twice(disk: BlockDevice) -> None:
    before = len(os.listdir("/proc/self/fd"))
    disk.close()
    disk.close()
    assert len(os.listdir("/proc/self/fd")) == before - 1
    assert disk.read_bytes() == 0


def test_the_device_under_a_real_file(tmp_path: Path) -> None:
    device = BlockDevice(tmp_path.stat().st_dev)
    try:
        if not device.exists:
            pytest.skip(f"{tmp_path} is on a file system without a block device of its own")
        path = tmp_path / "file"
        with path.open("wb") as file:
            file.write(os.urandom(MiB))
            file.flush()
            os.fsync(file.fileno())
        before = device.read_bytes()
        fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
        try:
            with mmap.mmap(-1, MiB) as buffer:
                assert os.preadv(fd, [buffer], 0) == MiB
        finally:
            os.close(fd)
        assert device.read_bytes() >= before + MiB
        assert int(device.setting("read_ahead_kb") or "-1") >= 0
    finally:
        device.close()

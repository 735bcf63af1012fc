"""penstock.linux.nvme: structures and statuses anywhere, and what drives say of themselves in the rig."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from tests.drives import Drive, drives

from penstock.errors import UnsupportedError
from penstock.linux import nvme
from penstock.linux.uring import CQE32_DTYPE, SQE_DTYPE


def test_structures_are_laid_out_as_in_the_kernels_headers() -> None:
    fields = nvme.COMMAND_DTYPE.fields
    assert fields is not None
    offsets = {name: fields[name][1] for name in ("namespace", "metadata", "address", "length", "cdw10", "timeout_ms")}
    assert offsets == {"namespace": 4, "metadata": 16, "address": 24, "length": 36, "cdw10": 40, "timeout_ms": 64}
    assert nvme.COMMAND_DTYPE.itemsize == 72
    entry, small = nvme.SQE_DTYPE.fields, SQE_DTYPE.fields
    assert entry is not None
    assert small is not None
    assert (nvme.SQE_DTYPE.itemsize, SQE_DTYPE.itemsize, CQE32_DTYPE.itemsize) == (128, 64, 32)
    assert (entry["offset"][1], entry["user_data"][1], entry["command"][1]) == (8, 32, 48)
    assert (small["user_data"][1], small["buffer"][1], small["address3"][1]) == (32, 40, 48)


@pytest.mark.parametrize(
    ("status", "name", "number"),
    [
        (0x4080, "LBA Out of Range", errno.EINVAL),  # with the bit that forbids to try again
        (0x002, "Invalid Field in Command", errno.EINVAL),
        (0x081, "Capacity Exceeded", errno.ENOSPC),
        (0x281, "Unrecovered Read Error", errno.EIO),
        (0x280, "Write Fault", errno.EIO),
        (0x282, "End-to-end Guard Check Error", errno.EILSEQ),
        (0x083, "Reservation Conflict", errno.EBADE),
        (0x001, "Invalid Command Opcode", errno.EOPNOTSUPP),
        (0x7C2, "status 0x7c2", errno.EIO),  # a vendor's own
        (0, "Successful Completion", 0),
    ],
)
def test_statuses(status: int, name: str, number: int) -> None:
    assert (nvme.status_name(status), nvme.status_errno(status)) == (name, number)


@pytest.mark.parametrize(("formatted", "lba_bytes", "metadata_bytes"), [(0, 512, 0), (1, 4096, 8), (0x20, 4096, 64)])
def test_a_namespace_has_one_of_several_formats(formatted: int, lba_bytes: int, metadata_bytes: int) -> None:
    data = bytearray(4096)
    data[:8] = (1000).to_bytes(8, "little")
    data[26] = formatted
    data[128:132] = bytes([0, 0, 9, 0])
    data[132:136] = bytes([8, 0, 12, 0])
    data[128 + 64 : 132 + 64] = bytes([64, 0, 12, 0])  # number 16
    assert nvme.parse_namespace(7, bytes(data)) == nvme.Namespace(7, lba_bytes, 1000 * lba_bytes, metadata_bytes)


def test_what_is_no_namespace_is_refused_by_name(tmp_path: Path, loop_device: Path) -> None:
    with (tmp_path / "file").open("wb") as file, pytest.raises(UnsupportedError, match="is no NVMe namespace"):
        nvme.queue_limits(file.fileno())
    with open("/dev/null", "rb") as file, pytest.raises(UnsupportedError, match="null is no NVMe namespace"):
        nvme.queue_limits(file.fileno())
    with pytest.raises(UnsupportedError, match="no block device"):
        nvme.character_device(tmp_path / "file")
    with pytest.raises(UnsupportedError, match=f"{loop_device} is {loop_device.name}, not one"):
        nvme.character_device(loop_device)


def test_where_a_block_device_has_its_character_device(tmp_path: Path, loop_device: Path) -> None:
    """A tree of sysfs in which the loop device is a namespace, or a partition of one."""
    number = os.stat(loop_device).st_rdev
    link = tmp_path / "sys/dev/block" / f"{os.major(number)}:{os.minor(number)}"
    link.parent.mkdir(parents=True)
    (tmp_path / "nvme3n2p1").mkdir()
    link.symlink_to(tmp_path / "nvme3n2p1")
    with pytest.raises(UnsupportedError, match="a partition of one"):
        nvme.character_device(loop_device, tmp_path)
    link.unlink()
    (tmp_path / "nvme3n2").mkdir()
    link.symlink_to(tmp_path / "nvme3n2")
    with pytest.raises(UnsupportedError, match=r"gives .* no character device"):
        nvme.character_device(loop_device, tmp_path)
    generic = tmp_path / "sys/class/nvme-generic/ng3n2"
    generic.mkdir(parents=True)
    (generic / "dev").write_text("1:3\n")
    (tmp_path / "dev").mkdir()
    with pytest.raises(UnsupportedError, match="ng3n2 is not there; it is the character device 1:3"):
        nvme.character_device(loop_device, tmp_path)
    (tmp_path / "dev/ng3n2").touch()
    with pytest.raises(UnsupportedError, match="is not the character device 1:3"):
        nvme.character_device(loop_device, tmp_path)
    (tmp_path / "dev/ng3n2").unlink()
    (tmp_path / "dev/ng3n2").symlink_to("/dev/null")
    assert nvme.character_device(loop_device, tmp_path) == tmp_path / "dev/ng3n2"


@pytest.mark.rig
@pytest.mark.parametrize("drive", drives(), ids=str)
def test_drives_are_what_the_rig_says(drive: Drive) -> None:
    path = nvme.character_device(drive.block_device)
    assert path == drive.character_device
    with open(path, "rb") as file:
        controller = nvme.identify_controller(file.fileno())
        assert (controller.serial, controller.largest_transfer_bytes) == (drive.serial, drive.transfer_bytes)
        assert controller.model == "QEMU NVMe Ctrl"
        namespace = nvme.identify_namespace(file.fileno())
        assert namespace == nvme.Namespace(1, drive.lba_bytes, drive.size_bytes, 0)
        queue = nvme.queue_limits(file.fileno())
        assert queue.transfer_bytes <= drive.transfer_bytes
        assert queue.segments > 1
        assert not queue.is_zoned
    with open(drive.block_device, "rb") as file, pytest.raises(UnsupportedError, match="is no NVMe namespace"):
        nvme.queue_limits(file.fileno())

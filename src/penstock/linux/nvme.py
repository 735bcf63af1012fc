"""NVMe namespaces by their character devices (/dev/ng0n1): what they are, commands, and what a status means.

Facts:

- The kernel does not cut a command that is passed through. One that moves more than the drive takes at once (MDTS), or
  than the queue takes (max_hw_sectors_kb, and max_segments pieces of memory), is refused with EINVAL.
- Linux 6.1 permits such commands with CAP_SYS_ADMIN alone; since 6.2 reading, writing and identifying need no more than
  the device opened for it. With the capability a descriptor opened for reading can write.
- The kernel does not repeat a command that has failed, as it does for requests of a file system.

Sources: linux/nvme_ioctl.h; NVM Express Base Specification 2.0 (status codes: 3.3.3.2.1, Identify Controller: figure
275); NVM Command Set Specification 1.0 (Identify Namespace: figure 97); drivers/nvme/host/core.c.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from penstock.errors import UnsupportedError
from penstock.linux.uring import SQE_HEAD

_ROOT = Path("/")
_IOCTL_ID = 0x4E40  # _IO('N', 0x40)
_IOCTL_ADMIN_CMD = 0xC0484E41  # _IOWR('N', 0x41, struct nvme_passthru_cmd)
URING_CMD_IO = 0xC0484E80  # _IOWR('N', 0x80, struct nvme_uring_cmd)
WRITE, READ = 0x01, 0x02  # opcodes of the NVM command set
_IDENTIFY, _CNS_NAMESPACE, _CNS_CONTROLLER = 0x06, 0, 1
_IDENTIFY_BYTES = 4096
# MDTS counts pages of the smallest size that the controller knows (CAP.MPSMIN), which only the driver can read: 4 KiB
# on every drive that Linux on x86 can use.
PAGE_BYTES = 4096
LARGEST_BLOCKS = 1 << 16  # of a command: a field of 16 bits, and 0 is one

DO_NOT_RETRY = 0x4000  # of a status
_STATUS_MASK = 0x7FF  # its type and code

COMMAND_DTYPE = np.dtype(
    [
        ("opcode", np.uint8),
        ("flags", np.uint8),
        ("reserved", np.uint16),
        ("namespace", np.uint32),
        ("cdw2", np.uint32),
        ("cdw3", np.uint32),
        ("metadata", np.uint64),
        ("address", np.uint64),
        ("metadata_length", np.uint32),
        ("length", np.uint32),  # bytes
        ("cdw10", np.uint32),  # of a read or write: its first block, lower half
        ("cdw11", np.uint32),  # upper half
        ("cdw12", np.uint32),  # blocks, less one
        ("cdw13", np.uint32),
        ("cdw14", np.uint32),
        ("cdw15", np.uint32),
        ("timeout_ms", np.uint32),  # 0: the kernel's own, 30 s
        ("result", np.uint32),  # not in a ring
    ]
)  # struct nvme_passthru_cmd and struct nvme_uring_cmd
SQE_DTYPE = np.dtype([*SQE_HEAD, ("command", COMMAND_DTYPE), ("pad", np.uint64)])  # of 128 bytes

# Status → its name in the specification, and errno. That is what Linux makes of it for its own requests
# (nvme_error_status, blk_errors), except that what the medium has lost is EIO, as the readers of files know it, and not
# ENODATA, and that what the drive calls invalid is EINVAL.
_STATUSES = {
    0x000: ("Successful Completion", 0),
    0x001: ("Invalid Command Opcode", errno.EOPNOTSUPP),
    0x002: ("Invalid Field in Command", errno.EINVAL),
    0x003: ("Command ID Conflict", errno.EIO),
    0x004: ("Data Transfer Error", errno.EIO),
    0x005: ("Commands Aborted due to Power Loss Notification", errno.EIO),
    0x006: ("Internal Error", errno.EIO),
    0x007: ("Command Abort Requested", errno.EIO),
    0x008: ("Command Aborted due to SQ Deletion", errno.EIO),
    0x00B: ("Invalid Namespace or Format", errno.EINVAL),
    0x00C: ("Command Sequence Error", errno.EIO),
    0x012: ("Controller Memory Buffer Invalid Use", errno.EINVAL),
    0x013: ("PRP Offset Invalid", errno.EINVAL),
    0x01C: ("Sanitize Failed", errno.EIO),
    0x01D: ("Sanitize In Progress", errno.EIO),
    0x020: ("Namespace is Write Protected", errno.EROFS),
    0x021: ("Command Interrupted", errno.EREMOTEIO),
    0x022: ("Transient Transport Error", errno.EIO),
    0x080: ("LBA Out of Range", errno.EINVAL),
    0x081: ("Capacity Exceeded", errno.ENOSPC),
    0x082: ("Namespace Not Ready", errno.EREMOTEIO),
    0x083: ("Reservation Conflict", errno.EBADE),
    0x084: ("Format In Progress", errno.EIO),
    0x180: ("Conflicting Attributes", errno.EOPNOTSUPP),
    0x181: ("Invalid Protection Information", errno.EILSEQ),
    0x182: ("Attempted Write to Read Only Range", errno.EROFS),
    0x280: ("Write Fault", errno.EIO),
    0x281: ("Unrecovered Read Error", errno.EIO),
    0x282: ("End-to-end Guard Check Error", errno.EILSEQ),
    0x283: ("End-to-end Application Tag Check Error", errno.EILSEQ),
    0x284: ("End-to-end Reference Tag Check Error", errno.EILSEQ),
    0x286: ("Access Denied", errno.EACCES),
    0x287: ("Deallocated or Unwritten Logical Block", errno.EIO),
    0x300: ("Internal Path Error", errno.EIO),
    0x301: ("Asymmetric Access Persistent Loss", errno.EIO),
    0x302: ("Asymmetric Access Inaccessible", errno.EIO),
    0x303: ("Asymmetric Access Transition", errno.EIO),
    0x360: ("Controller Pathing Error", errno.EIO),
    0x370: ("Host Pathing Error", errno.ENOLINK),
    0x371: ("Command Aborted By Host", errno.EIO),
}


@dataclass(frozen=True, slots=True)
class Controller:
    """What a controller says of itself.

    Attributes:
        largest_transfer_bytes: of one command (MDTS); None where it names no limit.
    """

    serial: str
    model: str
    firmware: str
    largest_transfer_bytes: int | None


@dataclass(frozen=True, slots=True)
class Namespace:
    """What a controller says of one of its namespaces.

    Attributes:
        number: NSID.
        lba_bytes: of a logical block.
        size_bytes: of all of them.
        metadata_bytes: beside each block; 0 but on drives that were formatted so.
    """

    number: int
    lba_bytes: int
    size_bytes: int
    metadata_bytes: int


@dataclass(frozen=True, slots=True)
class QueueLimits:
    """What the kernel takes in one command for a namespace.

    Attributes:
        transfer_bytes: max_hw_sectors_kb.
        segments: pieces of memory, max_segments.
        is_zoned: its blocks can be written in order only.
    """

    transfer_bytes: int
    segments: int
    is_zoned: bool


def identify_controller(fd: int) -> Controller:
    """Ask the controller of a namespace that is open.

    Raises:
        OSError: EACCES where that is not permitted, ENOTTY where it is no NVMe device, or what the drive says.
    """
    data = _identify(fd, 0, _CNS_CONTROLLER)
    shift = data[77]
    return Controller(
        serial=_text(data[4:24]),
        model=_text(data[24:64]),
        firmware=_text(data[64:72]),
        largest_transfer_bytes=PAGE_BYTES << shift if shift else None,
    )


def identify_namespace(fd: int) -> Namespace:
    """Ask for the namespace that is open.

    Raises:
        OSError: as `identify_controller` does.
    """
    number = fcntl.ioctl(fd, _IOCTL_ID)
    return parse_namespace(number, _identify(fd, number, _CNS_NAMESPACE))


def parse_namespace(number: int, data: bytes) -> Namespace:
    """A namespace from its Identify Namespace data structure."""
    blocks = int.from_bytes(data[:8], "little")
    formatted = data[26]
    at = 128 + 4 * (formatted & 0xF | (formatted & 0x60) >> 1)
    lba_bytes = 1 << data[at + 2]
    return Namespace(number, lba_bytes, blocks * lba_bytes, int.from_bytes(data[at : at + 2], "little"))


def queue_limits(fd: int, root: Path = _ROOT) -> QueueLimits:
    """The kernel's limits for a namespace that is open as a character device.

    Raises:
        UnsupportedError: it is none, or has no block device beside it, as those of other command sets have none.
    """
    name = _character_name(os.fstat(fd), root)
    if not re.fullmatch(r"ng\d+n\d+", name):
        raise UnsupportedError(f"nvme: {name or 'a file'} is no NVMe namespace's character device, such as /dev/ng0n1")
    queue = root / "sys/class/block" / f"nvme{name[2:]}" / "queue"
    try:
        values = {
            key: (queue / key).read_text(encoding="ascii").strip() for key in ("max_hw_sectors_kb", "max_segments")
        }
    except OSError as error:
        raise UnsupportedError(f"nvme: the limits of {name} are not to be had: {error}") from error
    try:
        zoned = (queue / "zoned").read_text(encoding="ascii").strip()
    except FileNotFoundError:  # a kernel without zones
        zoned = "none"
    return QueueLimits(int(values["max_hw_sectors_kb"]) << 10, int(values["max_segments"]), zoned != "none")


def character_device(path: str | os.PathLike[str], root: Path = _ROOT) -> Path:
    """The character device of the namespace that a block device is: /dev/ng0n1 for /dev/nvme0n1.

    An offset on the one is the same offset on the other. What is written to the one is not seen through the page cache
    of the other, if that has the old contents.

    Raises:
        UnsupportedError: it is not a whole NVMe namespace, or has no character device: that needs Linux 5.13, and in a
            container the device passed into it.
        OSError: there is nothing at path.
    """
    status = os.stat(path)
    if not stat.S_ISBLK(status.st_mode):
        raise UnsupportedError(f"nvme: {path} is no block device")
    device = f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}"
    name = (root / "sys/dev/block" / device).resolve().name
    if not re.fullmatch(r"nvme\d+n\d+", name):
        what = "a partition of one" if re.fullmatch(r"nvme\d+n\d+p\d+", name) else f"{name}, not one"
        raise UnsupportedError(f"nvme: whole NVMe namespaces can be passed commands, and {path} is {what}")
    generic = f"ng{name.removeprefix('nvme')}"
    try:
        wanted = (root / "sys/class/nvme-generic" / generic / "dev").read_text(encoding="ascii").strip()
    except OSError as error:
        raise UnsupportedError(f"nvme: this kernel gives {path} no character device; Linux 5.13 does") from error
    found = root / "dev" / generic
    try:
        status = os.stat(found)
    except OSError as error:
        raise UnsupportedError(f"nvme: {found} is not there; it is the character device {wanted}") from error
    if not stat.S_ISCHR(status.st_mode) or f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}" != wanted:
        raise UnsupportedError(f"nvme: {found} is not the character device {wanted} that it has to be")
    return found


def status_name(status: int) -> str:
    """A status in the specification's words."""
    known = _STATUSES.get(status & _STATUS_MASK)
    return known[0] if known else f"status {status & _STATUS_MASK:#05x}"


def status_errno(status: int) -> int:
    """The errno of a status; EIO where nothing else fits, and 0 where nothing has failed."""
    known = _STATUSES.get(status & _STATUS_MASK)
    return known[1] if known else errno.EIO


def _identify(fd: int, namespace: int, structure: int) -> bytes:
    data = np.zeros(_IDENTIFY_BYTES, np.uint8)
    command = np.zeros(1, COMMAND_DTYPE)
    command["opcode"] = _IDENTIFY
    command["namespace"] = namespace
    command["address"] = data.ctypes.data
    command["length"] = _IDENTIFY_BYTES
    command["cdw10"] = structure
    status = fcntl.ioctl(fd, _IOCTL_ADMIN_CMD, bytearray(command.tobytes()))
    if status:
        raise OSError(status_errno(status), f"Identify: {status_name(status)}")
    return data.tobytes()


def _character_name(status: os.stat_result, root: Path) -> str:
    """As sysfs calls it; "" for what is no character device."""
    if not stat.S_ISCHR(status.st_mode):
        return ""
    return (root / f"sys/dev/char/{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}").resolve().name


def _text(data: bytes) -> str:
    return data.decode("ascii", "replace").strip(" \0")

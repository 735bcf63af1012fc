"""What a block device carries, by the magic numbers that file systems, volume managers and partition tables leave."""

from __future__ import annotations

import os

from penstock.units import KiB, MiB

_HEAD_BYTES = 1 * MiB
_TAIL_BYTES = 128 * KiB

# (offset from the start, bytes, name); as blkid knows them.
_AT_HEAD = (
    (0x438, b"\x53\xef", "ext2, ext3 or ext4"),
    (0, b"XFSB", "xfs"),
    (0x10040, b"_BHRfS_M", "btrfs"),
    (0x400, b"\x10\x20\xf5\xf2", "f2fs"),
    (4086, b"SWAPSPACE2", "swap"),
    (4086, b"SWAP-SPACE", "swap"),
    (0, b"LUKS\xba\xbe", "LUKS"),
    (0x218, b"LVM2 001", "LVM"),
    (0x018, b"LVM2 001", "LVM"),
    (0x1000, b"\xfc\x4e\x2b\xa9", "md RAID"),
    (0, b"\xfc\x4e\x2b\xa9", "md RAID"),
    (0x8001, b"CD001", "iso9660"),
    (0, b"hsqs", "squashfs"),
    (3, b"NTFS    ", "ntfs"),
    (3, b"EXFAT   ", "exfat"),
    (0x52, b"FAT32   ", "vfat"),
    (0x36, b"FAT16   ", "vfat"),
    (0x400, b"\xe2\xe1\xf5\xe0", "erofs"),
    (512, b"EFI PART", "a GPT partition table"),
    (4096, b"EFI PART", "a GPT partition table"),
    (0x10030, b"bcachefs", "bcachefs"),
    (0x18, b"\xc6\x85\x73\xf6\x4e\x1a\x45\xca\x82\x65\xf5\x7f\x48\xba\x6d\x81", "bcache"),
    (510, b"\x55\xaa", "a partition table or boot sector"),  # last: vfat and others have it as well
)
# (offset from the end, bytes, name)
_AT_TAIL = (
    (512, b"EFI PART", "a GPT partition table"),
    (4096, b"EFI PART", "a GPT partition table"),
    (64 * KiB, b"\xfc\x4e\x2b\xa9", "md RAID"),
    (8 * KiB, b"\xfc\x4e\x2b\xa9", "md RAID"),
)


def signature(fd: int, size_bytes: int) -> str:
    """What a device carries: a name, "data of unknown kind", or "" where its first MiB is empty and nothing is known.

    Args:
        fd: readable at any offset (not O_DIRECT).
        size_bytes: of the device.
    """
    head = os.pread(fd, min(_HEAD_BYTES, size_bytes), 0)
    tail = os.pread(fd, _TAIL_BYTES, max(0, size_bytes - _TAIL_BYTES))
    for offset, magic, name in _AT_HEAD:
        if head[offset : offset + len(magic)] == magic:
            return name
    for offset, magic, name in _AT_TAIL:
        at = len(tail) - offset
        if at >= 0 and tail[at : at + len(magic)] == magic:
            return name
    return "data of unknown kind" if any(head) else ""

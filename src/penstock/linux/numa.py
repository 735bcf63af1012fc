"""NUMA nodes: which there are, which one a device sits on, and where a thread runs and allocates.

Page-cache pages are placed by the memory policy of the thread that reads them, so a thread bound to a node
is the tool for placing a file. Policy and affinity belong to the calling thread; other threads keep theirs.
"""

from __future__ import annotations

import ctypes
import enum
import errno
import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from penstock.linux.libc import syscall

_ROOT = Path("/")
_MAX_NODES = 1024  # MAX_NUMNODES of the largest kernel configuration
_MBIND, _SET_MEMPOLICY, _GET_MEMPOLICY = (237, 238, 239) if os.uname().machine == "x86_64" else (235, 237, 236)
_MPOL_MF_MOVE = 2
_MODE_MASK = 0xFFF  # above it are MPOL_F_* flags


class MemoryPolicy(enum.IntEnum):
    """MPOL_* of linux/mempolicy.h."""

    DEFAULT = 0
    PREFERRED = 1
    BIND = 2
    INTERLEAVE = 3
    LOCAL = 4
    PREFERRED_MANY = 5
    WEIGHTED_INTERLEAVE = 6


@dataclass(frozen=True, slots=True)
class Binding:
    """What became of binding a thread to a node.

    Attributes:
        node: the node asked for.
        cpus: where the thread runs now.
        refused: why the memory policy is not in force, or None. Docker's default seccomp profile refuses it,
            and a node outside the cpuset or without memory cannot be preferred. The thread then still
            allocates from the node it runs on.
    """

    node: int
    cpus: frozenset[int]
    refused: str | None


def nodes(root: Path = _ROOT) -> list[int]:
    """The nodes online; ``[0]`` on a kernel without NUMA."""
    try:
        return sorted(_parse_list((root / "sys/devices/system/node/online").read_text()))
    except FileNotFoundError:
        return [0]


def node_cpus(node: int, root: Path = _ROOT) -> set[int]:
    """CPUs of a node; empty for one that only has memory.

    Raises:
        ValueError: there is no such node.
    """
    _check_nodes([node], root)
    try:
        return _parse_list((root / f"sys/devices/system/node/node{node}/cpulist").read_text())
    except FileNotFoundError:
        return _parse_list((root / "sys/devices/system/cpu/online").read_text())


def pci_device_node(address: str, root: Path = _ROOT) -> int | None:
    """Node of a PCI device such as ``0000:3b:00.0``; None where the firmware does not say or it is absent."""
    domain, _, rest = address.lower().partition(":")
    # Drivers' tools print domains with eight digits, sysfs with four.
    name = f"{int(domain, 16):04x}:{rest}"
    return _node_of(root / "sys/bus/pci/devices" / name)


def device_node(path: str | os.PathLike[str], root: Path = _ROOT) -> int | None:
    """Node of the hardware behind a character or block device; None where there is none or it is unknown.

    Raises:
        OSError: the path cannot be read.
        ValueError: it is not a device.
    """
    facts = os.stat(path)
    if not (stat.S_ISCHR(facts.st_mode) or stat.S_ISBLK(facts.st_mode)):
        raise ValueError(f"{os.fspath(path)} is not a character or block device")
    kind = "char" if stat.S_ISCHR(facts.st_mode) else "block"
    number = f"{os.major(facts.st_rdev)}:{os.minor(facts.st_rdev)}"
    devices = (root / "sys/devices").resolve()
    directory = (root / "sys/dev" / kind / number).resolve()
    # The number sits on the bus device, some levels above the class device: nvme0 below its PCI function.
    while directory.is_relative_to(devices) and directory != devices:
        if (directory / "numa_node").exists():
            return _node_of(directory)
        directory = directory.parent
    return None


def set_memory_policy(mode: MemoryPolicy, nodes: Iterable[int] = ()) -> None:
    """Where the calling thread's next pages, those of the page cache included, are taken from.

    Raises:
        ValueError: there is no such node.
        OSError: EPERM in a container that filters the call, EINVAL for a node without memory or outside the
            cpuset, ENOSYS on a kernel without NUMA.
    """
    wanted = sorted(set(nodes))
    _check_nodes(wanted, _ROOT)
    _set_raw(mode, _mask_of(wanted))


def get_memory_policy() -> tuple[MemoryPolicy, frozenset[int]]:
    """Mode and nodes of the calling thread's policy."""
    mode, mask = _get_raw()
    found = (node for node in range(_MAX_NODES) if mask[node // 64] >> node % 64 & 1)
    return MemoryPolicy(mode & _MODE_MASK), frozenset(found)


def bind_thread(node: int, mode: MemoryPolicy = MemoryPolicy.PREFERRED) -> Binding:
    """Run the calling thread on the node's CPUs and take its memory from there.

    CPUs the thread may not use are left out; where none would remain, it stays where it is. A policy that
    is refused is told in the result.

    Raises:
        ValueError: there is no such node.
    """
    cpus = node_cpus(node) & os.sched_getaffinity(0)
    if cpus:
        os.sched_setaffinity(0, cpus)
    refused = None
    try:
        set_memory_policy(mode, [node])
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EACCES, errno.EINVAL, errno.ENOSYS):
            raise
        refused = str(error)
    return Binding(node, frozenset(os.sched_getaffinity(0)), refused)


@contextmanager
def bound_to(node: int, mode: MemoryPolicy = MemoryPolicy.PREFERRED) -> Iterator[Binding]:
    """`bind_thread` for a while; affinity and policy of the calling thread are as before afterwards.

    Raises:
        ValueError: there is no such node.
    """
    cpus = os.sched_getaffinity(0)
    try:
        policy = _get_raw()
    except OSError:
        policy = None  # what cannot be read was never set: the same filter refuses both calls
    try:
        yield bind_thread(node, mode)
    finally:
        os.sched_setaffinity(0, cpus)
        if policy is not None:
            _set_raw(*policy)


def move_pages_to(node: int, address: int, length: int) -> None:
    """Move the pages mapped at ``[address, address + length)`` of this process to a node, those of a file included.

    Those that another process maps too stay where they are, and nothing is read: it is a copy in memory.

    Raises:
        ValueError: there is no such node.
        OSError: EPERM in a container that filters the call, EIO where pages could not be moved, ENOSYS without NUMA.
    """
    _check_nodes([node], _ROOT)
    mask = _mask_of([node])
    syscall(
        _MBIND, "mbind", address, length, int(MemoryPolicy.PREFERRED), ctypes.addressof(mask), _MAX_NODES + 1,
        _MPOL_MF_MOVE,
    )  # fmt: skip


_Mask = ctypes.c_uint64 * (_MAX_NODES // 64)


def _mask_of(wanted: Iterable[int]) -> ctypes.Array[ctypes.c_uint64]:
    mask = _Mask()
    for node in wanted:
        mask[node // 64] |= 1 << node % 64
    return mask


def _set_raw(mode: int, mask: ctypes.Array[ctypes.c_uint64]) -> None:
    # The kernel takes one bit less than maxnode says (get_nodes in mm/mempolicy.c). DEFAULT and LOCAL must
    # come with an empty mask, which this is for them.
    syscall(_SET_MEMPOLICY, "set_mempolicy", int(mode), ctypes.addressof(mask), _MAX_NODES + 1)


def _get_raw() -> tuple[int, ctypes.Array[ctypes.c_uint64]]:
    """The mode with its flags, and the nodes."""
    mode, mask = ctypes.c_int(), _Mask()
    address = ctypes.addressof
    syscall(_GET_MEMPOLICY, "get_mempolicy", address(mode), address(mask), _MAX_NODES + 1, 0, 0)
    return mode.value, mask


def _check_nodes(wanted: Iterable[int], root: Path) -> None:
    there = nodes(root)
    for node in wanted:
        if node not in there:
            raise ValueError(f"there is no NUMA node {node}; online here: {', '.join(map(str, there))}")


def _node_of(device: Path) -> int | None:
    try:
        node = int((device / "numa_node").read_text())
    except FileNotFoundError:
        return None
    return node if node >= 0 else None


def _parse_list(text: str) -> set[int]:
    """``0-3,8`` as {0, 1, 2, 3, 8}."""
    found: set[int] = set()
    for part in text.strip().split(","):
        if part:
            first, _, last = part.partition("-")
            found.update(range(int(first), int(last or first) + 1))
    return found

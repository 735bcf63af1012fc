"""Which NUMA node a worker's share of the model belongs on: worker → XPU → PCI device → node.

What a worker uses is known from two sides. Its open device files are facts, but come late, and a driver may
open every device it is shown. Its environment is there from the first instruction, but only says something
when the launcher spelt it out. So exactly one open accelerator decides; else the environment does; and where
neither is clear there is no answer, and nothing is placed.

Index ``n`` in an environment variable is taken as:

- NVIDIA: the n-th GPU by PCI address. That is CUDA's order with CUDA_DEVICE_ORDER=PCI_BUS_ID; its default,
  FASTEST_FIRST, is the same wherever all GPUs are of one model. The minor number of /dev/nvidiaN is looked
  up, not assumed.
- AMD: the n-th GPU in the KFD topology, which is ROCm's order; by PCI address where there is no KFD.
  ROCR_VISIBLE_DEVICES is applied first, and HIP_VISIBLE_DEVICES counts within what it leaves.
- Ascend: /dev/davinciN, the n-th by PCI address.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from penstock.linux.numa import pci_device_node
from penstock.linux.process import environment, open_device_paths

Kind: TypeAlias = Literal["nvidia", "amd", "ascend"]

_ROOT = Path("/")
_RANKS = ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "SLURM_LOCALID", "RANK")
_VISIBLE: dict[str, tuple[Kind, ...]] = {
    "CUDA_VISIBLE_DEVICES": ("nvidia", "amd"),  # HIP obeys it too
    "HIP_VISIBLE_DEVICES": ("amd",),
    "ROCR_VISIBLE_DEVICES": ("amd",),
    "ASCEND_RT_VISIBLE_DEVICES": ("ascend",),
}
_VENDOR_AMD = "0x1002"
_VENDOR_HUAWEI = "0x19e5"
_CLASS_ACCELERATOR = "0x1200"


@dataclass(frozen=True, slots=True)
class Accelerator:
    """One XPU.

    Attributes:
        kind: who made it.
        index: its number in its runtime's order, nothing hidden.
        pci_address: ``0000:3b:00.0``.
        device_path: the device file that its users open, or None where it is not known.
        uuid: ``GPU-…`` as visible-device lists name it, or None.
    """

    kind: Kind
    index: int
    pci_address: str
    device_path: str | None = None
    uuid: str | None = None

    def node(self, root: Path = _ROOT) -> int | None:
        """Its NUMA node; None where the firmware does not say."""
        return pci_device_node(self.pci_address, root)


def worker_rank(environ: Mapping[str, str]) -> int | None:
    """The worker's number on this machine, from the variables of torchrun, Open MPI and Slurm.

    RANK counts over all machines, and is used only where nothing else is set.
    """
    for name in _RANKS:
        if environ.get(name, "").isdecimal():
            return int(environ[name])
    return None


def visible_devices(environ: Mapping[str, str], kind: Kind | None = None) -> list[str] | None:
    """Entries of the first visible-devices variable that is set: indices, ``GPU-…`` or ``MIG-…`` names.

    As in CUDA, -1 hides what follows it. An empty list hides everything; None means that nothing is said.

    Args:
        environ: the worker's environment.
        kind: only variables that apply to this kind.
    """
    for name, kinds in _VISIBLE.items():
        if name in environ and (kind is None or kind in kinds):
            return _entries(environ[name])
    return None


def accelerators(root: Path = _ROOT) -> list[Accelerator]:
    """Every XPU of this machine, each kind in its runtime's order."""
    return [*_nvidia(root), *_amd(root), *_ascend(root)]


def accelerator_of(
    environ: Mapping[str, str], open_device_paths: Collection[str], root: Path = _ROOT
) -> Accelerator | None:
    """The XPU that a worker uses, or None where that is not clear.

    Args:
        environ: the worker's environment.
        open_device_paths: device files that it has open; none of them need be an XPU.
        root: where proc and sys are.
    """
    present = accelerators(root)
    opened = [device for device in present if device.device_path in open_device_paths]
    if len(opened) == 1:
        return opened[0]
    kinds = list(dict.fromkeys(device.kind for device in present))
    # On a machine with two kinds, the one that the environment names; else the first, as in the order above.
    kinds.sort(key=lambda kind: visible_devices(environ, kind) is None)
    if not kinds:
        return None
    candidates = _visible([device for device in present if device.kind == kinds[0]], kinds[0], environ)
    rank = worker_rank(environ)
    if len(candidates) == 1:
        return candidates[0]
    return candidates[rank] if rank is not None and rank < len(candidates) else None


def worker_node(pid: int, root: Path = _ROOT) -> int | None:
    """The NUMA node of the XPU that a process uses, or None where either is not known.

    Raises:
        ProcessLookupError: the process has ended.
        PermissionError: it is another user's.
    """
    accelerator = accelerator_of(environment(pid), open_device_paths(pid), root)
    return accelerator.node(root) if accelerator else None


def _entries(text: str) -> list[str]:
    entries = [entry.strip() for entry in text.split(",")]
    stop = next((at for at, entry in enumerate(entries) if entry in ("", "-1")), len(entries))
    return entries[:stop]


def _visible(devices: Sequence[Accelerator], kind: Kind, environ: Mapping[str, str]) -> list[Accelerator | None]:
    """The devices as the worker numbers them; None stands for an entry that is not understood."""
    if kind != "amd":
        return _select(devices, visible_devices(environ, kind))
    rocr = environ.get("ROCR_VISIBLE_DEVICES")
    hip = environ.get("HIP_VISIBLE_DEVICES", environ.get("CUDA_VISIBLE_DEVICES"))
    left = _select(devices, None if rocr is None else _entries(rocr))
    return _select(left, None if hip is None else _entries(hip))


def _select(devices: Sequence[Accelerator | None], entries: Sequence[str] | None) -> list[Accelerator | None]:
    if entries is None:
        return list(devices)
    return [_named(devices, entry) for entry in entries]


def _named(devices: Sequence[Accelerator | None], entry: str) -> Accelerator | None:
    if entry.isdecimal():
        return devices[int(entry)] if int(entry) < len(devices) else None
    # MIG-GPU-<uuid>/<instance> names its GPU; MIG-<uuid> of newer drivers does not, and stays unknown.
    prefix = entry.removeprefix("MIG-").partition("/")[0]
    # An abbreviated name will do, as for CUDA, if it fits one device only.
    found = [device for device in devices if device and device.uuid and device.uuid.startswith(prefix)]
    return found[0] if len(found) == 1 and prefix.startswith("GPU-") else None


def _nvidia(root: Path) -> list[Accelerator]:
    found = []
    for index, directory in enumerate(sorted(root.glob("proc/driver/nvidia/gpus/*"))):
        facts = _properties((directory / "information").read_text(), ":")
        minor = facts.get("Device Minor")
        path = None if minor is None else f"/dev/nvidia{minor}"
        found.append(Accelerator("nvidia", index, directory.name, path, facts.get("GPU UUID")))
    return found


def _amd(root: Path) -> list[Accelerator]:
    render = {
        directory.name: (directory / "device").resolve().name
        for directory in root.glob("sys/class/drm/renderD*")
        if _text(directory / "device/vendor") == _VENDOR_AMD
    }
    nodes = sorted(root.glob("sys/class/kfd/kfd/topology/nodes/*/properties"), key=lambda p: int(p.parent.name))
    topology = [_properties(path.read_text(), " ") for path in nodes]
    ordered = [
        (f"renderD{facts['drm_render_minor']}", int(facts.get("unique_id", "0")))
        for facts in topology
        if f"renderD{facts.get('drm_render_minor')}" in render
    ]
    if not ordered:
        ordered = [(name, 0) for name in sorted(render, key=lambda name: render[name])]
    return [
        Accelerator("amd", index, render[name], f"/dev/dri/{name}", f"GPU-{unique:016x}" if unique else None)
        for index, (name, unique) in enumerate(ordered)
    ]


def _ascend(root: Path) -> list[Accelerator]:
    addresses = sorted(
        directory.name
        for directory in root.glob("sys/bus/pci/devices/*")
        if _text(directory / "vendor") == _VENDOR_HUAWEI and _text(directory / "class").startswith(_CLASS_ACCELERATOR)
    )
    return [Accelerator("ascend", index, address, f"/dev/davinci{index}") for index, address in enumerate(addresses)]


def _properties(text: str, separator: str) -> dict[str, str]:
    """``name<separator> value`` of each line; an address in a value may hold the separator again."""
    matches = re.findall(rf"^([^{separator}\n]+){separator}\s*(.*?)\s*$", text, re.MULTILINE)
    return dict(matches)


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:  # not there, or a function that went away
        return ""

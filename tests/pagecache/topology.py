"""Trees of proc and sys as the three vendors' drivers make them, below a root of a test's own."""

from __future__ import annotations

from pathlib import Path

INFORMATION = """\
Model: \t\t NVIDIA H100 80GB HBM3
IRQ:   \t\t 18
GPU UUID: \t {uuid}
Video BIOS: \t 96.00.74.00.1a
Bus Type: \t PCIe
Bus Location: \t {address}
Device Minor: \t {minor}
GPU Excluded:\t No
"""
UUIDS = [
    "GPU-11111111-aaaa-0000-0000-000000000000",
    "GPU-22222222-bbbb-0000-0000-000000000000",
    "GPU-2222cccc-dddd-0000-0000-000000000000",
]


def write(path: Path, text: str) -> None:
    """A file of one line, as those in sysfs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n")


def make_function(root: Path, address: str, node: int, vendor: str, kind: str) -> Path:
    """A PCI function with what placement looks at."""
    function = root / "sys/devices/pci0000:00" / address
    for name, text in (("numa_node", str(node)), ("vendor", vendor), ("class", kind)):
        write(function / name, text)
    link = root / "sys/bus/pci/devices" / address
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(function)
    return function


def make_nvidia(root: Path) -> Path:
    """Minor numbers that do not follow the PCI order."""
    places = [("0000:3b:00.0", 2, 0), ("0000:86:00.0", 0, 1), ("0000:af:00.0", 1, 1)]
    for uuid, (address, minor, node) in zip(UUIDS, places, strict=True):
        make_function(root, address, node, "0x10de", "0x030200")
        text = INFORMATION.format(uuid=uuid, address=address, minor=minor)
        write(root / f"proc/driver/nvidia/gpus/{address}/information", text.rstrip("\n"))
    return root


def make_amd(root: Path) -> Path:
    """Two GPUs that KFD numbers against the PCI order, and the CPU's node; another vendor's render node."""
    for name, address, node, vendor in (
        ("renderD128", "0000:03:00.0", 0, "0x1002"),
        ("renderD129", "0000:c3:00.0", 1, "0x1002"),
        ("renderD130", "0000:e3:00.0", 1, "0x8086"),
    ):
        function = make_function(root, address, node, vendor, "0x038000")
        directory = root / "sys/class/drm" / name
        directory.mkdir(parents=True)
        (directory / "device").symlink_to(function)
    nodes = root / "sys/class/kfd/kfd/topology/nodes"
    write(nodes / "0/properties", "cpu_cores_count 64\nsimd_count 0\ndrm_render_minor 0")
    write(nodes / "1/properties", "simd_count 256\ndrm_render_minor 129\nunique_id 255")
    write(nodes / "10/properties", "simd_count 256\ndrm_render_minor 128\nunique_id 4096")
    return root


def make_ascend(root: Path) -> Path:
    """Three NPUs against the order of their nodes, and a network card of the same vendor."""
    for address, node in (("0000:c1:00.0", 1), ("0000:01:00.0", 0), ("0000:81:00.0", 1)):
        make_function(root, address, node, "0x19e5", "0x120000")
    make_function(root, "0000:7d:00.0", 0, "0x19e5", "0x020000")  # Huawei's network card
    return root

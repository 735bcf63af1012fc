"""The machine that figures belong to, in words."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from bench.memory import meminfo
from bench.readahead import block_device
from penstock.units import format_size


@dataclass(frozen=True, slots=True)
class Machine:
    """Where a benchmark ran."""

    processor: str
    accelerator: str
    memory: str
    kernel: str
    file_system: str
    device: str
    read_ahead_kib: int
    software: str
    load: float

    def lines(self) -> list[tuple[str, str]]:
        """Names and values for a table's head."""
        return [
            ("processor", self.processor),
            *([("accelerator", self.accelerator)] if self.accelerator else []),
            ("memory", self.memory),
            ("kernel", self.kernel),
            ("file system", self.file_system),
            ("device", self.device),
            ("read-ahead", f"{self.read_ahead_kib} KiB is the machine's own"),
            ("software", self.software),
        ]


def describe(directory: Path) -> Machine:
    """The machine, with the file system and disk that hold a directory."""
    device = block_device(directory)
    queue = device / "queue"
    return Machine(
        processor=f"{os.cpu_count()} × {_processor()}",
        accelerator=_accelerator(),
        memory=f"{format_size(meminfo('MemTotal'))}, swap {format_size(meminfo('SwapTotal'))}, "
        f"transparent huge pages {_selected(Path('/sys/kernel/mm/transparent_hugepage/enabled'))}",
        kernel=platform.release(),
        file_system=_file_system(directory),
        device=f"{device.name} {_text(device / 'device' / 'model')}, "
        f"rotational {_text(queue / 'rotational')}, scheduler {_selected(queue / 'scheduler')}",
        read_ahead_kib=int(_text(queue / "read_ahead_kb")),
        software=f"Python {platform.python_version()}, "
        + ", ".join(
            f"{name} {_version(name)}" for name in ("penstock", "numpy", "torch", "transformers", "safetensors")
        ),
        load=os.getloadavg()[0],
    )


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _accelerator() -> str:
    """NVIDIA's first, with its driver; "" where there is none."""
    if shutil.which("nvidia-smi") is None:
        return ""
    command = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    lines = subprocess.run(command, capture_output=True, text=True, check=False).stdout.splitlines()
    return lines[0] if lines else ""


def _file_system(directory: Path) -> str:
    found = ("", "unknown", "")
    place = str(directory.resolve())
    for line in Path("/proc/mounts").read_text().splitlines():
        _, mount, kind, options, *_ = line.split()
        inside = place == mount or place.startswith(mount.rstrip("/") + "/")
        if inside and len(mount) >= len(found[0]):
            found = (mount, kind, options)
    return f"{found[1]} on {found[0]} ({found[2]})"


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return "(no model name)" if path.name == "model" else "unknown"


def _selected(path: Path) -> str:
    text = _text(path)
    return text.partition("[")[2].partition("]")[0] or text


def _version(name: str) -> str:
    if name == "python":
        return sys.version
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "missing"

"""What the rig needs on this machine: QEMU and tools from the distribution, and its kernels, unpacked in the cache."""

from __future__ import annotations

import lzma
import os
import platform
import re
import shutil
import struct
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import platformdirs

from rig.errors import RigError

# Program → its package in Debian.
_TOOLS = {
    "qemu-system-x86_64": "qemu-system-x86",
    "busybox": "busybox-static",
    "depmod": "kmod",
    "mke2fs": "e2fsprogs",
    "dpkg": "dpkg",
}
_PATH = os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"))
_KERNEL = re.compile(r"^linux-image-(\d+\.\d+(?:\.\d+)?)\S*-amd64$")
_OTHER_KERNELS = ("-cloud-", "-rt-", "-unsigned", "-dbg")


@dataclass(frozen=True, slots=True)
class Kernel:
    """A distribution's kernel, unpacked.

    Attributes:
        release: as ``uname -r`` prints it.
        image: the bootable file.
    """

    release: str
    image: Path


def tool(name: str) -> str:
    """The path of a program, /usr/sbin included.

    Raises:
        RigError: it is not installed.
    """
    found = shutil.which(name, path=_PATH)
    if found is None:
        raise RigError(f"{name} is not installed (Debian: {_TOOLS.get(name, name)})")
    return found


def cache_directory() -> Path:
    """Where kernels lie: the user's cache."""
    return platformdirs.user_cache_path("penstock-rig")


def provide_tools() -> None:
    """Install what is missing.

    Raises:
        RigError: it cannot be installed here.
    """
    if sys.platform != "linux" or platform.machine() != "x86_64":
        raise RigError(f"the rig emulates x86_64 on Linux of the same; this is {platform.machine()} {sys.platform}")
    if find_spec("virtme") is None:
        raise RigError("virtme-ng is not installed; `make rig` does that")
    missing = [package for name, package in _TOOLS.items() if shutil.which(name, path=_PATH) is None]
    if missing:
        _apt("install", "--yes", "--no-install-recommends", *missing)
    for name in _TOOLS:
        tool(name)


def provide_kernels() -> tuple[Kernel, Kernel]:
    """The oldest and the newest kernel that the distribution has, which may be one; fetched and unpacked if need be.

    Raises:
        RigError: there is none to be had.
    """
    known = _available()
    if not known:
        _apt("update")
        known = _available()
    if not known:
        raise RigError("the distribution offers no kernel package (linux-image-*-amd64)")
    oldest, newest = known[0], known[-1]
    return _unpacked(oldest), _unpacked(newest)


def _available() -> list[str]:
    """Kernel packages by version."""
    done = subprocess.run(
        ["apt-cache", "pkgnames", "linux-image-"], capture_output=True, text=True, check=False
    )  # fmt: skip
    found = []
    for name in done.stdout.split():
        match = _KERNEL.match(name)
        if match and match[1].count(".") == 2 and not any(word in name for word in _OTHER_KERNELS):
            numbers = [int(number) for number in re.findall(r"\d+", name.removesuffix("-amd64"))]
            found.append((numbers, name))
    return [name for _, name in sorted(found)]


def _unpacked(package: str) -> Kernel:
    directory = cache_directory() / package
    if not (directory / "complete").exists():
        shutil.rmtree(directory, ignore_errors=True)
        directory.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=directory.parent) as name:
            work = Path(name)
            work.chmod(0o755)  # apt downloads as another user
            _apt("download", package, directory=work)
            archives = list(work.glob("*.deb"))
            if len(archives) != 1:
                raise RigError(f"{package} could not be downloaded")
            root = work / "root"
            _call([tool("dpkg"), "--extract", str(archives[0]), str(root)])
            release = next((root / "boot").glob("vmlinuz-*")).name.removeprefix("vmlinuz-")
            _call([tool("depmod"), "--basedir", str(root), release])
            _unpack_image(root / "boot" / f"vmlinuz-{release}", root / "boot" / f"vmlinux-{release}")
            (root / "complete").touch()
            root.rename(directory)
    image = min((directory / "boot").glob("vmlinu[xz]-*"))  # x, where there is one
    return Kernel(image.name.partition("-")[2], image)


def _unpack_image(packed: Path, unpacked: Path) -> None:
    """Write the ELF image inside a bzImage, where it is packed with xz: under emulation that takes seconds a boot.

    Source: Documentation/arch/x86/boot.rst (setup_sects, payload_offset, payload_length).
    """
    data = packed.read_bytes()
    offset, length = struct.unpack_from("<II", data, 0x248)
    start = (data[0x1F1] + 1) * 512 + offset
    payload = data[start : start + length]
    if payload.startswith(b"\xfd7zXZ\0"):
        unpacked.write_bytes(lzma.LZMADecompressor().decompress(payload))


def _apt(*words: str, directory: Path | None = None) -> None:
    if shutil.which("apt-get") is None:
        raise RigError("packages are missing, and there is no apt-get to install them by")
    if words[0] in ("install", "update") and os.geteuid() != 0:
        raise RigError(f"packages are missing, and `apt-get {' '.join(words)}` needs root")
    if words[0] == "install" and not list(Path("/var/lib/apt/lists").glob("*Packages*")):
        _apt("update")
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    _call(["apt-get", "--quiet", *words], environment, directory)


def _call(command: list[str], environment: dict[str, str] | None = None, directory: Path | None = None) -> None:
    done = subprocess.run(
        command, env=environment, cwd=directory, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False
    )
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines()
        raise RigError(f"{' '.join(command[:4])} failed: {lines[-1] if lines else done.returncode}")

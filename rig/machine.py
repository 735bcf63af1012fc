"""One boot of a virtual machine: its nodes, drives and disks, and the command that it runs."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from penstock.units import MiB
from rig.errors import RigError
from rig.image import HYPOTHESIS, REPOSITORY
from rig.provision import Kernel, tool

_BOOT_S = 120  # until the machine says that it runs
# Waits until the rig closes its input, which its end does too, and kills a process group then.
_TETHER = 'read -r; kill -KILL -- "-$0"'


@dataclass(frozen=True, slots=True)
class Drive:
    """An emulated NVMe drive.

    Attributes:
        lba_bytes: of a logical block.
        mdts: the largest transfer is 2**mdts pages of 4 KiB.
        size_bytes: of the namespace.
    """

    lba_bytes: int = 512
    mdts: int = 7
    size_bytes: int = 64 * MiB

    @property
    def transfer_bytes(self) -> int:
        """The most that one command may move."""
        return 4096 << self.mdts

    def __str__(self) -> str:
        return f"LBA {self.lba_bytes}, MDTS {self.transfer_bytes >> 10} KiB"


@dataclass(frozen=True, slots=True)
class Machine:
    """What is booted.

    Attributes:
        kernel: which.
        image: see `rig.image.make_image`.
        over: what of it goes over the machine's own directories.
        nodes: NUMA nodes, each with one CPU and its share of memory.
        drives: in the order of their serial numbers, ``rig0`` and so on.
        disk: an ext4 file system for temporary files, kept afterwards.
        log: where all that the disk is told is written down; see `rig.writelog`.
        memory_mib: in all.
    """

    kernel: Kernel
    image: Path
    over: tuple[Path, ...]
    nodes: int = 2
    drives: tuple[Drive, ...] = ()
    disk: Path | None = None
    log: Path | None = None
    memory_mib: int = 2048


class Boot:
    """A running machine. Its output is in ``log``, its command's exit status in ``status``, both below `directory`.

    Args:
        machine: what to boot.
        command: words, run in the checkout.
        directory: of the boot's own; the machine sees it under the same path and may write to it.
        environment: for the command.
    """

    def __init__(
        self, machine: Machine, command: list[str], directory: Path, environment: dict[str, str] | None = None
    ) -> None:
        self.machine = machine
        self.directory = directory
        shutil.rmtree(directory, ignore_errors=True)
        self.shared = directory / "shared"
        self.shared.mkdir(parents=True)
        script = self.shared / "run.sh"
        script.write_text(self._script(command, environment or {}))
        self._began_s = time.monotonic()
        own, theirs = pty.openpty()  # virtme-ng wants a terminal
        self._console = (directory / "console").open("wb")
        self._drain = threading.Thread(target=self._read_console, args=(own,), daemon=True)
        self._popen = subprocess.Popen(
            self._command(script), stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True, cwd=REPOSITORY,
            env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin:/sbin"},
        )  # fmt: skip
        os.close(theirs)
        self._tether = subprocess.Popen(
            ["bash", "-c", _TETHER, str(self._popen.pid)],
            stdin=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        self._drain.start()

    def wait(self, timeout_s: float) -> int:
        """The command's exit status.

        Raises:
            RigError: the machine did not come up, did not end in time, or ended before its command did.
        """
        deadline = self._began_s + timeout_s
        while self._popen.poll() is None:
            now = time.monotonic()
            if now > deadline or (now > self._began_s + _BOOT_S and not (self.shared / "log").exists()):
                self.kill()
                what = "did not end in" if now > deadline else "did not come up in"
                raise RigError(f"the machine {what} {now - self._began_s:.0f} s:\n{self.tail()}")
            time.sleep(0.05)
        self._close()
        try:
            return int((self.shared / "status").read_text())
        except (OSError, ValueError):
            what = f"the machine ended before its command did: {self._last_words()}"
            raise RigError(f"{what}\n{self.tail()}\n{self.console()}") from None

    @property
    def is_running(self) -> bool:
        """The emulator has not ended."""
        return self._popen.poll() is None

    def kill(self) -> None:
        """Cut its power: the emulator is killed wherever it is."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._popen.pid, signal.SIGKILL)
        self._popen.wait()
        self._close()

    def tail(self, lines: int = 30) -> str:
        """The last lines of what its command printed, or else of its console."""
        for path in (self.shared / "log", self.directory / "console"):
            if path.exists() and path.stat().st_size:
                return "\n".join(path.read_text(errors="replace").splitlines()[-lines:])
        return "(it printed nothing)"

    def console(self, lines: int = 60) -> str:
        """The last lines of what its kernel and its emulator said."""
        return "\n".join(f"console: {line}" for line in self._console_lines()[-lines:])

    def _console_lines(self) -> list[str]:
        text = (self.directory / "console").read_text(errors="replace")
        return [line for line in text.splitlines() if line.strip()]

    def _last_words(self) -> str:
        """What its kernel ended of, and its emulator's status."""
        deaths = [line for line in self._console_lines() if re.search(r"Oops|Kernel panic|BUG:|Out of memory", line)]
        return "; ".join([*deaths, f"its emulator ended with {self._popen.returncode}"])

    def _close(self) -> None:
        self._tether.kill()
        self._tether.communicate()
        self._drain.join(5)
        self._console.close()

    def _read_console(self, fd: int) -> None:
        try:
            while data := os.read(fd, 65536):
                self._console.write(data)
        except (OSError, ValueError):  # the other end was closed
            pass
        finally:
            os.close(fd)

    def _command(self, script: Path) -> list[str]:
        machine = self.machine
        command = [str(Path(sys.executable).with_name("vng")), "--run", str(machine.kernel.image)]
        command += ["--force-9p", "--disable-kvm", "--cpus", str(machine.nodes), "--memory", f"{machine.memory_mib}M"]
        if machine.nodes > 1:
            for node in range(machine.nodes):
                command += ["--numa", f"{machine.memory_mib // machine.nodes}M,cpus={node}"]
        command += [f"--rwdir={self.shared}"]
        command += ["--verbose", "--append", "loglevel=5"]  # warnings and worse, a panic among them, to the console
        command += ["--qemu", tool("qemu-system-x86_64"), f"--qemu-opts={shlex.join(self._options())}"]
        return [*command, "--exec", f"bash {shlex.quote(str(script))}"]

    def _options(self) -> list[str]:
        # With a thread for each processor, one may still run code that another has patched: Linux then panics at an
        # int3 that is gone (once in 150 times that tracing begins, on busy processors).
        words = ["-accel", "tcg,thread=single"]
        words += ["-drive", f"file={self.machine.image},if=none,id=image,format=raw,readonly=on"]
        disks = ["image"]
        if self.machine.disk is not None:
            disks.append("disk")
            last = "node-name=disk"
            if self.machine.log is not None:
                self.machine.log.touch()
                words += ["-blockdev", f"driver=file,node-name=log,filename={self.machine.log}"]
                words += ["-blockdev", "driver=blklogwrites,node-name=disk,file=under,log=log,log-sector-size=512"]
                last = "node-name=under"
            words = ["-blockdev", f"driver=file,{last},filename={self.machine.disk}", *words]
        for name in disks:
            words += ["-device", f"virtio-blk-pci,drive={name},serial={name}"]
        for number, drive in enumerate(self.machine.drives):
            path = self.directory / f"drive{number}"
            with path.open("wb") as file:
                file.truncate(drive.size_bytes)
            words += ["-drive", f"file={path},if=none,id=d{number},format=raw"]
            words += ["-device", f"nvme,id=c{number},serial=rig{number},mdts={drive.mdts}"]
            size = f"logical_block_size={drive.lba_bytes},physical_block_size={drive.lba_bytes}"
            words += ["-device", f"nvme-ns,drive=d{number},bus=c{number},{size}"]
        if self.machine.drives:
            for event in ("read", "write", "err_mdts"):
                words += ["-trace", f"pci_nvme_{event}"]
            words += ["-D", str(self.directory / "trace")]
        return words

    def _script(self, command: list[str], environment: dict[str, str]) -> str:
        facts = [
            {"serial": f"rig{number}", "lba_bytes": drive.lba_bytes, "transfer_bytes": drive.transfer_bytes}
            for number, drive in enumerate(self.machine.drives)
        ]
        values = {
            "HOME": "/run/home",
            "TMPDIR": "/run/disk/tmp" if self.machine.disk else "/run",
            "PATH": f"{Path(sys.executable).parent}:/usr/sbin:/usr/bin:/sbin:/bin",
            "PYTHONDONTWRITEBYTECODE": "1",
            "HYPOTHESIS_STORAGE_DIRECTORY": "/run/hypothesis",  # the checkout is read-only
            "OPENBLAS_NUM_THREADS": "1",
            "PENSTOCK_RIG": json.dumps({"nodes": self.machine.nodes, "drives": facts}),
            "PENSTOCK_RIG_SHARED": str(self.shared),
            **environment,
        }
        modules = ["virtio_blk", "ext4"]  # each takes a tenth of a second and more
        modules += ["nvme"] if self.machine.drives else []
        modules += ["loop"] if self.machine.log is None else []
        binds = "\n".join(
            f"mount --bind /run/image{shlex.quote(str(path))} {shlex.quote(str(path))}" for path in self.machine.over
        )
        exports = "\n".join(f"export {name}={shlex.quote(value)}" for name, value in values.items())
        shared = shlex.quote(str(self.shared))
        return f"""\
cd /
exec > {shared}/log 2>&1 < /dev/null
modprobe -a {" ".join(modules)}
disk() {{ for d in /sys/block/vd*; do [ "$(cat $d/serial)" = "$1" ] && echo /dev/${{d##*/}}; done; }}
mkdir -p /run/image /run/disk /run/home
mount -o ro "$(disk image)" /run/image
{binds}
cp -r {shlex.quote(str(HYPOTHESIS))} /run/hypothesis
[ -z "$(disk disk)" ] || {{ mount "$(disk disk)" /run/disk && mkdir -p -m 1777 /run/disk/tmp; }}
mountpoint -q /sys/kernel/tracing || mount -t tracefs tracefs /sys/kernel/tracing
[ ! -e /sys/fs/cgroup/cgroup.subtree_control ] || echo +memory +cpuset > /sys/fs/cgroup/cgroup.subtree_control
{exports}
cd {shlex.quote(str(REPOSITORY))}
uname -r > {shared}/kernel
{shlex.join(command)}
echo $? > {shared}/status
sync
"""

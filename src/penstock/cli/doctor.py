"""`penstock doctor`: what this machine allows, what is missing, and what penstock does instead.

Each answer comes from trying the thing itself, never from a version number.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import stat
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

import click

from penstock.units import format_size

if TYPE_CHECKING:
    from penstock.linux.blockdevice import BlockDevice

State: TypeAlias = Literal["ok", "degraded", "missing"]


@dataclass(frozen=True, slots=True)
class Check:
    """One capability.

    Attributes:
        name: stable, for the JSON's readers.
        state: ``degraded`` works with a restriction, which ``detail`` names.
        detail: what was found.
        instead: what penstock does without it; empty where it is there.
    """

    name: str
    state: State
    detail: str
    instead: str = ""


_MARKS: dict[State, tuple[str, str]] = {"ok": ("✓", "green"), "degraded": ("~", "yellow"), "missing": ("–", "red")}
_NETWORK_FILE_SYSTEMS = frozenset(("nfs", "nfs4", "cifs", "smb3", "ceph", "lustre", "9p", "virtiofs", "afs", "gpfs"))
_MEMORY_FILE_SYSTEMS = frozenset(("tmpfs", "ramfs", "hugetlbfs", "devtmpfs"))


@click.command(
    epilog="""\b
Examples:
  penstock doctor /models
  penstock doctor /dev/nvme0n1
  penstock doctor --json
"""
)
@click.argument("path", default=".", type=click.Path(exists=True, path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="A list of objects: name, state, detail, instead.")
@click.pass_context
def doctor(context: click.Context, path: Path, as_json: bool) -> None:
    """Show what this machine allows, and what penstock does where something is missing.

    PATH is where the models lie (the working directory, unless given), or a raw block device for a KV cache: its
    file system and its disk are looked at. The exit status is 1 only where penstock cannot observe a program at all.
    """
    found = checks(path)
    if as_json:
        click.echo(json.dumps([asdict(check) for check in found], indent=2, ensure_ascii=False))
    else:
        _print(found)
    if next(check for check in found if check.name == "observer").state == "missing":
        context.exit(1)


def checks(path: Path) -> list[Check]:
    """All of them, for models at a path. Leaves nothing behind."""
    tracing = list(_tracing())
    processes = list(_attempt("processes", _processes, "no observation through /proc"))
    return [
        Check("kernel", "ok", f"{platform.system()} {platform.release()}, {platform.machine()}, {_who()}"),
        _observer(tracing, processes, may_trace=os.geteuid() == 0),
        *tracing,
        *processes,
        *_attempt("page cache", lambda: _page_cache(path), "nothing is prefetched"),
        *_attempt("fanotify", _fanotify, "open files are found by looking through /proc"),
        *_attempt("numa", _numa, "pages fall where the kernel puts them"),
        *_attempt("memory", _memory, "give --memory"),
        *_attempt("pressure", _pressure, "memory is judged by the headroom alone"),
        *_attempt("io_uring", _io_uring, "direct transfers use threads"),
        *_attempt("huge pages", _huge_pages, "prefetching fills the cache with small pages"),
        *_attempt("storage", lambda: _storage(path), "the device's settings are not taken into account"),
    ]


def _print(found: list[Check]) -> None:
    width = max(len(check.name) for check in found)
    for check in found:
        mark, colour = _MARKS[check.state]
        click.echo(f"{click.style(mark, fg=colour)} {check.name:{width}}  {check.detail}")
        if check.instead:
            click.echo(f"  {'':{width}}  → {check.instead}")


def _attempt(name: str, probe: Callable[[], Iterator[Check]], instead: str) -> Iterator[Check]:
    """A probe's checks; what it could not find out is missing, and the other probes go on."""
    from penstock.errors import PenstockError

    try:
        yield from probe()
    except (OSError, ValueError, PenstockError) as error:
        yield Check(name, "missing", _reason(error), instead)


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error)


def _who() -> str:
    return "as root" if os.geteuid() == 0 else f"as uid {os.geteuid()}, not root"


def _observer(tracing: list[Check], processes: list[Check], *, may_trace: bool) -> Check:
    """What `penstock run --observer auto` will use."""
    if may_trace and all(check.state == "ok" for check in tracing):
        return Check("observer", "ok", "tracefs: every read and every page fault, with its range")
    if all(check.state == "missing" for check in processes):
        return Check("observer", "missing", "neither tracefs nor /proc", "`penstock warm` ahead of the start works")
    why = "tracefs needs root"
    if may_trace:
        lacking = next(check for check in tracing if check.state != "ok")
        why = f"not by tracefs ({lacking.name}: {lacking.detail})"
    by_proc = "/proc: pages of mappings as they are touched; of read() the positions and counts"
    return Check("observer", "degraded", why, by_proc)


def _tracing() -> Iterator[Check]:
    from penstock.errors import UnsupportedError
    from penstock.linux.tracefs import ACCESS_EVENTS, TraceFs

    instead = "programs are observed through /proc"
    try:
        tracefs = TraceFs()
    except (UnsupportedError, OSError) as error:
        yield Check("tracefs", "missing", _reason(error).removeprefix("no tracefs: "), instead)
        return
    with contextlib.closing(tracefs):
        own = "mounted for this run only" if tracefs.source == "detached mount" else f"at {tracefs.source}"
        yield Check("tracefs", "ok", own)
        there = tracefs.available_events(ACCESS_EVENTS)
        for name in ACCESS_EVENTS:
            if name in there:
                yield Check(f"tracepoint {name}", "ok", "there")
            else:
                yield Check(f"tracepoint {name}", "missing", "not in this kernel", instead)
        yield _trace_instance(tracefs, there, instead)


def _trace_instance(tracefs: object, events: list[str], instead: str) -> Check:
    """Make an instance, see whether its process ids are ours, and remove it."""
    from penstock.errors import UnsupportedError
    from penstock.linux.tracefs import Instance, TraceFs

    assert isinstance(tracefs, TraceFs)
    try:
        with Instance(tracefs, events, os.getpid()):
            pass
    except (UnsupportedError, OSError) as error:
        return Check("trace instance", "missing", _reason(error), instead)
    return Check("trace instance", "ok", "made and removed; process ids are those of this pid namespace")


def _processes() -> Iterator[Check]:
    from penstock.linux import pagemap, process

    if pagemap.best_method() == "pagemap_scan":
        yield Check("pagemap", "ok", "PAGEMAP_SCAN: the kernel skips what was never touched")
    else:
        yield Check("pagemap", "degraded", "no PAGEMAP_SCAN", "every page's word of /proc/PID/pagemap is read")
    if process.children_method() == "children":
        yield Check("child processes", "ok", "/proc/PID/task/TID/children")
    else:
        yield Check("child processes", "degraded", "no list of children", "all of /proc is looked through")


def _page_cache(path: Path) -> Iterator[Check]:
    from penstock.linux import pagecache

    directory = path if path.is_dir() else path.parent
    try:
        support, where = pagecache.probe(directory), ""
    except OSError:  # not writable: the same calls on another file system say almost the same
        other = tempfile.gettempdir()
        support, where = pagecache.probe(other), f", tried in {other}"
    if support.cachestat:
        yield Check("cachestat", "ok", f"cached pages are counted{where}")
    else:
        yield Check("cachestat", "degraded", "not in this kernel, or filtered", "mincore, one byte a page")
    if support.nowait_read:
        yield Check("preadv2 RWF_NOWAIT", "ok", f"other users' files can be sampled{where}")
    else:
        yield Check(
            "preadv2 RWF_NOWAIT",
            "degraded",
            f"not on this file system{where}",
            "files of other users count as cached",
        )
    if support.populate_read:
        yield Check("MADV_POPULATE_READ", "ok", f"prefetching copies nothing{where}")
    else:
        yield Check("MADV_POPULATE_READ", "degraded", f"refused{where}", "prefetching reads into a buffer")
    if support.process_madvise:
        yield Check("process_madvise", "ok", "pages that a program maps can be evicted behind it (CAP_SYS_NICE)")
    else:
        yield Check(
            "process_madvise",
            "missing",
            "needs CAP_SYS_NICE",
            "pages that a program maps stay; prefetching keeps within the headroom",
        )


def _fanotify() -> Iterator[Check]:
    from penstock.linux import fanotify

    found = fanotify.probe()
    if found.method is None:
        yield Check("fanotify", "missing", found.reason, "open files are found by looking through /proc")
    else:
        state: State = "ok" if found.method == "fd" else "degraded"
        instead = "" if state == "ok" else "who opened a file is found by looking through /proc"
        yield Check("fanotify", state, found.reason, instead)


def _numa() -> Iterator[Check]:
    from penstock.linux import numa

    nodes = numa.nodes()
    if len(nodes) == 1:
        yield Check("numa", "ok", "one node: nothing to place")
        return
    names = f"{len(nodes)} nodes ({', '.join(map(str, nodes))})"
    with numa.bound_to(nodes[0]) as binding:
        refused = binding.refused
    if refused is None:
        yield Check("numa", "ok", f"{names}; threads and their memory can be bound")
    else:
        yield Check("numa", "degraded", f"{names}; set_mempolicy: {refused}", "threads are bound to a node's CPUs only")


def _memory() -> Iterator[Check]:
    from penstock.linux.memory import read_memory

    state = read_memory()
    if state.source == "host":
        yield Check("memory limit", "ok", f"no tighter cgroup; the host has {format_size(state.limit_bytes)}")
    else:
        yield Check("memory limit", "ok", f"{format_size(state.limit_bytes)}, {state.source}")
    yield Check(
        "memory headroom",
        "ok",
        f"{format_size(state.headroom_bytes)}: free, or files in the cache that can go",
    )


def _pressure() -> Iterator[Check]:
    from penstock.linux.memory import read_pressure

    memory, storage = read_pressure("memory"), read_pressure("io")
    if memory is None or storage is None:
        yield Check("pressure", "missing", "no PSI in this kernel", "memory is judged by the headroom alone")
    else:
        yield Check(
            "pressure",
            "ok",
            f"some tasks waited {memory.some_avg10:.1f} % of the last 10 s for memory, {storage.some_avg10:.1f} % "
            f"for I/O ({memory.source})",
        )


def _io_uring() -> Iterator[Check]:
    from penstock.linux import uring

    reason = uring.probe()
    if reason:
        yield Check("io_uring", "missing", reason, "direct transfers use threads")
    else:
        yield Check("io_uring", "ok", "a ring can be made")


def _huge_pages() -> Iterator[Check]:
    text = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text(encoding="ascii")
    chosen = text.partition("[")[2].partition("]")[0]
    if chosen == "never":
        yield Check("huge pages", "degraded", "transparent huge pages: never", "small pages, cut at read_ahead_kb")
    else:
        yield Check("huge pages", "ok", f"transparent huge pages: {chosen}")


@dataclass(frozen=True, slots=True)
class _Mount:
    device: int
    kind: str
    source: str
    point: str


def _storage(path: Path) -> Iterator[Check]:
    from penstock.linux.blockdevice import BlockDevice

    status = os.stat(path)
    if stat.S_ISBLK(status.st_mode):
        yield Check("file system", "ok", "none: a raw block device")
        device = BlockDevice(status.st_rdev)
        yield from _device(device, str(path))
        if device.path.resolve().name.startswith("nvme"):
            yield from _passthrough(path)
        return
    mount = _mount_of(path)
    where = f"{mount.kind} at {mount.point}" if mount.kind else "unknown"
    if mount.kind in _MEMORY_FILE_SYSTEMS:
        yield Check("file system", "degraded", f"{where}: in memory already", "there is nothing to prefetch")
        return
    if mount.kind in _NETWORK_FILE_SYSTEMS or mount.kind.startswith("fuse"):
        yield Check("file system", "degraded", f"{where}: behind a server", "reads of others there are not seen")
        return
    yield Check("file system", "ok", where)
    device = BlockDevice(mount.device)
    if not device.exists:  # btrfs and overlay have no device of their own; the mount may name one
        device.close()
        with contextlib.suppress(OSError):
            device = BlockDevice(os.stat(mount.source).st_rdev)
    yield from _device(device, where)


def _device(device: BlockDevice, where: str) -> Iterator[Check]:
    """What a block device is set to; closes it."""
    with contextlib.closing(device):
        if not device.exists:
            yield Check("block device", "missing", f"none is known under {where}", "others' use of it is not seen")
            return
        name = device.path.resolve().name
        settings = {key: device.setting(key) for key in ("read_ahead_kb", "max_sectors_kb", "scheduler")}
        scheduler = (settings.pop("scheduler") or "").partition("[")[2].partition("]")[0]
        words = [f"{key} {value}" for key, value in settings.items() if value is not None]
        words += [f"scheduler {scheduler}"] if scheduler else []
        words += ["rotational"] if device.setting("rotational") == "1" else []
        yield Check("block device", "ok", ", ".join([name, *words]))


def _passthrough(path: Path) -> Iterator[Check]:
    """Whether commands can be passed to the NVMe namespace that a block device is, and how large."""
    from penstock.errors import UnsupportedError
    from penstock.linux.nvme import character_device
    from penstock.storage.nvme import NvmeEngine

    try:
        character = character_device(path)
        fd = os.open(character, os.O_RDONLY | os.O_CLOEXEC)
        try:
            with NvmeEngine() as engine:
                most = engine.limits(engine.add_file(fd)).aligned
        finally:
            os.close(fd)
    except (UnsupportedError, OSError) as error:
        reason = _reason(error).removeprefix("nvme: ")
        yield Check("nvme passthrough", "degraded", reason, "io_uring or threads on the block device")
    else:
        yield Check("nvme passthrough", "ok", f"{character} takes commands of up to {format_size(most)} (NvmeEngine)")


def _mount_of(path: Path) -> _Mount:
    """The mount that a path lies on: the last one over the longest leading part of its name."""
    resolved = path.resolve()
    device = resolved.stat().st_dev
    best = _Mount(device, "", "", "")
    for line in Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape").splitlines():
        before, _, after = line.partition(" - ")
        point = _unescape(before.split(" ")[4])
        kind, source, _ = after.split(" ", 2)
        if resolved.is_relative_to(point) and len(point) >= len(best.point):
            best = _Mount(device, kind, _unescape(source), point)
    return best


def _unescape(text: str) -> str:
    r"""mountinfo writes space, tab, newline and backslash as \040, \011, \012 and \134."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)

"""Page-cache tracepoints through an own tracefs instance, read as binary ring-buffer pages.

Facts, each seen on 6.18:

- An instance (a directory made under ``instances/``) has rings, filters and switches of its own and leaves
  every other user of ftrace alone. It outlives the process that made it, so its name carries the maker's pid
  and start time, and anyone may remove those whose maker is gone (`remove_stale_instances`).
- tracefs need not be mounted: fsopen + fsmount give a detached mount that only this descriptor reaches and
  that goes away with it.
- ``set_event_pid`` with the option ``event-fork`` follows a process tree from before its first instruction.
- ``common_pid`` is a thread id as the initial pid namespace numbers it. In a container with a pid namespace of
  its own those numbers mean nothing, which is checked by reading back one own event.
- A mapping of whole 2 MiB folios is entered without an event: filemap_map_pages returns before its tracepoint
  once a page-table entry of that size fits. Whoever needs every mapped page reads /proc/PID/pagemap as well.
- Choosing another trace clock or ring size costs 10-20 ms each and removing an instance 100 ms (RCU grace
  periods), so the defaults stay (the local clock orders events of one CPU, and across CPUs as well as the TSC).

Sources: Documentation/trace/{ftrace,events,ring-buffer-map}.rst; the page layout is that of events/header_page
and header_event.
"""

from __future__ import annotations

import os

from penstock.errors import UnsupportedError

TYPE_CHECKING = False  # typing's own takes 8 ms to import, and a program waits for this module
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from penstock.linux.tracepoint import Format

INSTANCE_PREFIX = "penstock-"

_NR_FSOPEN, _NR_FSCONFIG, _NR_FSMOUNT = 430, 431, 432
_FSCONFIG_CMD_CREATE = 6
_FSOPEN_CLOEXEC = _FSMOUNT_CLOEXEC = 1
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_KNOWN_MOUNTS = ("/sys/kernel/tracing", "/sys/kernel/debug/tracing")

PADDING, TIME_EXTEND, TIME_STAMP = 29, 30, 31  # event types that carry no record
_COMMIT_MASK = (1 << 20) - 1
_MISSED_EVENTS = 1 << 31
_DEFAULT_RING_KIB = 1408  # what the kernel gives a CPU of a new instance: 32,000 events of 44 bytes
_RINGS_KIB = 96 << 10  # of all CPUs together

READ = "mm_filemap_get_pages"
FAULT = "mm_filemap_fault"
MAP = "mm_filemap_map_pages"
ACCESS_EVENTS = (READ, FAULT, MAP)

Page = tuple[bytes, bytes]  # of a ring: header (time stamp, commit) and the events' bytes


class TraceFs:
    """A descriptor of a tracefs root: the machine's mount, or a detached one of our own.

    Raises:
        UnsupportedError: tracefs can be neither found nor mounted here.
    """

    def __init__(self) -> None:
        self.fd, self.source = self._open()

    @staticmethod
    def _open() -> tuple[int, str]:
        reasons = []
        for mount in _KNOWN_MOUNTS:
            try:
                fd = os.open(mount, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                try:
                    os.stat("instances", dir_fd=fd)
                    if os.access("instances", os.W_OK, dir_fd=fd):
                        return fd, mount
                    reasons.append(f"{mount}: not writable")
                except OSError as error:
                    reasons.append(f"{mount}: {error.strerror}")
                os.close(fd)
            except OSError as error:
                reasons.append(f"{mount}: {error.strerror}")
        try:
            return _detached_mount(), "detached mount"
        except OSError as error:
            reasons.append(f"mounting it: {error.strerror}")
        raise UnsupportedError("no tracefs: " + "; ".join(reasons))

    def read(self, path: str) -> str:
        """The text of a file below the root."""
        with open(os.open(path, os.O_RDONLY | os.O_CLOEXEC, dir_fd=self.fd), encoding="utf-8", errors="replace") as f:
            return f.read()

    def write(self, path: str, text: str) -> None:
        """Write a file below the root in one call, as tracefs wants it."""
        fd = os.open(path, os.O_WRONLY | os.O_TRUNC | os.O_CLOEXEC, dir_fd=self.fd)
        try:
            os.write(fd, text.encode())
        finally:
            os.close(fd)

    def available_events(self, names: Iterable[str]) -> list[str]:
        """Those of the filemap tracepoints that this kernel has."""
        return [name for name in names if os.access(f"events/filemap/{name}", os.F_OK, dir_fd=self.fd)]

    def instances(self) -> set[str]:
        """The names of all instances, whoever made them."""
        directory = os.open("instances", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=self.fd)
        try:
            return set(os.listdir(directory))
        finally:
            os.close(directory)

    def close(self) -> None:
        """Close the descriptor; a detached mount is gone with the last one. A second time does nothing."""
        if self.fd >= 0:
            fd, self.fd = self.fd, -1
            os.close(fd)


def _detached_mount() -> int:
    import ctypes

    from penstock.linux.libc import syscall

    name = ctypes.cast(ctypes.create_string_buffer(b"tracefs"), ctypes.POINTER(ctypes.c_char))
    context = syscall(_NR_FSOPEN, "fsopen", name, _FSOPEN_CLOEXEC)
    try:
        syscall(_NR_FSCONFIG, "fsconfig", context, _FSCONFIG_CMD_CREATE, None, None, 0)
        return syscall(_NR_FSMOUNT, "fsmount", context, _FSMOUNT_CLOEXEC, 0)
    finally:
        os.close(context)


def instance_name(pid: int) -> str:
    """The name of a process's instance: it tells whether the maker is still alive."""
    return f"{INSTANCE_PREFIX}{pid}-{_start_time(pid)}"


def _start_time(pid: int) -> str | None:
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            return file.read().rpartition(")")[2].split()[19]
    except OSError:
        return None


def remove_stale_instances(tracefs: TraceFs) -> list[str]:
    """Remove the instances whose makers are gone (killed before they could); returns their names."""
    removed = []
    for name in tracefs.instances():
        maker, dash, start_time = name.removeprefix(INSTANCE_PREFIX).partition("-")
        if not name.startswith(INSTANCE_PREFIX) or not maker.isdecimal() or not dash:
            continue
        if _start_time(int(maker)) != start_time:
            try:
                os.rmdir(f"instances/{name}", dir_fd=tracefs.fd)
                removed.append(name)
            except OSError:  # someone else was quicker, or it is in use
                pass
    return removed


class Instance:
    """An own tracefs instance that records page-cache events of chosen processes and files.

    Args:
        tracefs: where to make it.
        events: tracepoints of the ``filemap`` system, such as `ACCESS_EVENTS`.
        pid: the process whose tree is followed; None records everyone.
        owns_tracefs: close tracefs with the instance.

    Raises:
        UnsupportedError: a tracepoint is missing, or thread ids are not those of this pid namespace.
        OSError: the kernel refused a step.
    """

    def __init__(
        self,
        tracefs: TraceFs,
        events: Sequence[str] = ACCESS_EVENTS,
        pid: int | None = None,
        *,
        owns_tracefs: bool = False,
    ) -> None:
        self._tracefs = tracefs
        self._owns_tracefs = owns_tracefs
        self.name = instance_name(os.getpid())
        self._path = f"instances/{self.name}"
        self.events = tuple(events)
        self._rings: list[int] = []
        self.missed_pages = 0  # ring-buffer pages that were overwritten before they were read
        self._formats: list[Format] = []
        self._collected: list[Page] = []
        missing = set(events) - set(tracefs.available_events(events))
        if missing:
            raise UnsupportedError(f"this kernel lacks page-cache tracepoints: {', '.join(sorted(missing))}")
        os.mkdir(self._path, dir_fd=tracefs.fd)
        try:
            self._configure(pid)
        except BaseException:
            self.close()
            raise

    def _configure(self, pid: int | None) -> None:
        cpus = os.cpu_count() or 1
        if cpus * _DEFAULT_RING_KIB > _RINGS_KIB:
            self._write("buffer_size_kb", str(max(256, _RINGS_KIB // cpus)))
        if pid is not None:
            self._write("options/event-fork", "1")
            self._write("set_event_pid", str(pid))
        per_cpu = os.open(f"{self._path}/per_cpu", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=self._tracefs.fd)
        try:
            for cpu in sorted(os.listdir(per_cpu)):
                self._rings.append(
                    os.open(f"{cpu}/trace_pipe_raw", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=per_cpu)
                )
        finally:
            os.close(per_cpu)
        self._check_pid_namespace()

    def _check_pid_namespace(self) -> None:
        self._write("trace_marker", "penstock")
        for _, data in self._pages():  # nothing else is recorded yet
            # A record starts with the event's type, flags and preempt count, and then the writer's pid.
            if any(_u32(record, 4) == os.getpid() for record in records(data)):
                return
        raise UnsupportedError(
            "tracefs numbers processes of another pid namespace; start the container in the host's to use it"
        )

    @property
    def formats(self) -> list[Format]:
        """The record of each of the events."""
        if not self._formats:
            from penstock.linux.tracepoint import parse_format

            self._formats = [parse_format(self._tracefs.read(f"events/filemap/{name}/format")) for name in self.events]
        return self._formats

    def _write(self, name: str, text: str) -> None:
        self._tracefs.write(f"{self._path}/{name}", text)

    def watch(self, files: Iterable[tuple[int, int]]) -> None:
        """Record only these files, given as (device, inode); an empty list records every file."""
        clauses = [f"(s_dev == {_kernel_device(device)} && i_ino == {inode})" for device, inode in files]
        text = " || ".join(clauses)
        if len(text) > 4000 or not text:  # the kernel takes one page; the reader sorts out the rest
            text = "0"
        for name in self.events:
            self._write(f"events/filemap/{name}/filter", text)

    def start(self) -> None:
        """Switch the tracepoints on."""
        for name in self.events:
            self._write(f"events/filemap/{name}/enable", "1")

    def stop_recording(self, event: str) -> None:
        """Switch one of the tracepoints off; what it has told already can still be read."""
        self._write(f"events/filemap/{event}/enable", "0")

    def read_pages(self) -> list[Page]:
        """The ring-buffer pages of all CPUs that were written since the last call: see `ringbuffer`."""
        self.collect()
        pages, self._collected = self._collected, []
        return pages

    def collect(self) -> None:
        """Make room in the rings; what was in them is in the next `read_pages`."""
        self._collected += self._pages()

    def _pages(self) -> Iterator[Page]:
        for ring in self._rings:
            while True:
                try:
                    page = os.read(ring, _PAGE_BYTES)
                except BlockingIOError:
                    break
                if len(page) < 16:
                    break
                commit = int.from_bytes(page[8:16], "little")
                if commit & _MISSED_EVENTS:
                    self.missed_pages += 1
                yield page[:16], page[16 : 16 + (commit & _COMMIT_MASK)]

    def detach(self) -> None:
        """Stop reading and leave the instance to `janitor`: removing one takes the kernel 0.1 s."""
        self._close_rings()
        if self._owns_tracefs:
            self._tracefs.close()

    def close(self) -> None:
        """Stop recording and remove the instance."""
        self._close_rings()
        if self._tracefs.fd >= 0:
            try:
                os.rmdir(self._path, dir_fd=self._tracefs.fd)
            except FileNotFoundError:
                pass
        if self._owns_tracefs:
            self._tracefs.close()

    def _close_rings(self) -> None:
        for ring in self._rings:
            os.close(ring)
        self._rings = []

    def __enter__(self) -> Instance:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _kernel_device(device: int) -> int:
    return os.major(device) << 20 | os.minor(device)


def _u32(data: bytes, position: int) -> int:
    return int.from_bytes(data[position : position + 4], "little")  # struct is a library of its own to load: 0.4 ms


def records(data: bytes) -> Iterator[bytes]:
    """The records of one page, one by one: for a handful of events; `ringbuffer` decodes many at once."""
    position = 0
    while position + 4 <= len(data):
        header = _u32(data, position)
        kind = header & 31
        if kind in (TIME_EXTEND, TIME_STAMP):
            position += 8
        elif kind == PADDING or kind == 0:
            if kind == PADDING and header >> 5 == 0:
                return
            length = _u32(data, position + 4)
            if kind == 0:
                yield data[position + 8 : position + 4 + length]
            position += 4 + length
        else:
            yield data[position + 4 : position + 4 + 4 * kind]
            position += 4 + 4 * kind


def follow(pid: int, announce: Callable[[str], None] | None = None) -> Instance:
    """Record a process tree's page-cache accesses from now on, in an own instance.

    Args:
        pid: the root of the tree.
        announce: told the instance's name before it is made, so that someone can remove it if we are killed.

    Raises:
        UnsupportedError: no tracefs, not all of the access tracepoints (6.1 has none), or another pid namespace.
        OSError: the kernel refused a step.
    """
    tracefs = TraceFs()
    try:
        remove_stale_instances(tracefs)
        if announce is not None:
            announce(instance_name(os.getpid()))
        instance = Instance(tracefs, ACCESS_EVENTS, pid, owns_tracefs=True)
        try:
            instance.start()
        except BaseException:
            instance.close()
            raise
        return instance
    except BaseException:
        tracefs.close()
        raise

"""penstock.linux.memory on this machine, on a real limited cgroup, and on trees of plain files."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from penstock.linux.memory import MemoryReader, MemoryState, Pressure, read_memory, read_pressure
from penstock.units import GiB, MiB

MEMINFO = """\
MemTotal:       16777216 kB
MemFree:         2097152 kB
MemAvailable:    8388608 kB
Active(file):    1048576 kB
Inactive(file):  3145728 kB
Dirty:             10240 kB
Writeback:         10240 kB
AnonPages:       4194304 kB
"""
HOST_FILE_BYTES = 4 * GiB - 20 * MiB
UNLIMITED_V1 = 9223372036854771712


def tree(root: Path, files: dict[str, str | int]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{content}" if str(content).endswith("\n") else f"{content}\n")
    return root


def host(*, cgroup: str, mountinfo: str) -> dict[str, str | int]:
    return {
        "proc/meminfo": MEMINFO,
        "proc/self/cgroup": cgroup,
        "proc/self/mountinfo": "22 27 0:21 / /proc rw,relatime - proc proc rw\n" + mountinfo,
    }


V1_MOUNT = "35 31 0:32 / /sys/fs/cgroup/memory rw,relatime shared:9 - cgroup cgroup rw,memory\n"
V2_MOUNT = "41 31 0:38 / /sys/fs/cgroup rw,relatime - cgroup2 cgroup2 rw,nsdelegate\n"


def v1(directory: str, limit: int, usage: int, *, file: int = 0, dirty: int = 0) -> dict[str, str | int]:
    return {
        f"{directory}/memory.limit_in_bytes": limit,
        f"{directory}/memory.usage_in_bytes": usage,
        f"{directory}/memory.stat": (
            f"cache {file}\ndirty 1\nactive_file 1\ninactive_file 1\n"
            f"total_rss {usage - file}\ntotal_dirty {dirty}\ntotal_writeback 0\n"
            f"total_inactive_file {file - MiB}\ntotal_active_file {MiB}\n"
        ),
    }


def v2(directory: str, limit: int | str, high: int | str, usage: int, *, file: int = 0) -> dict[str, str | int]:
    return {
        f"{directory}/memory.max": limit,
        f"{directory}/memory.high": high,
        f"{directory}/memory.current": usage,
        f"{directory}/memory.stat": (
            f"anon {usage - file}\nfile {file}\nshmem 0\nfile_mapped 7\nfile_dirty {MiB}\n"
            f"file_writeback {MiB}\ninactive_file {file}\nactive_file 0\n"
        ),
    }


class TestHost:
    def test_headroom_is_what_the_kernel_calls_available(self, tmp_path: Path) -> None:
        root = tree(tmp_path, host(cgroup="0::/\n", mountinfo=""))
        state = read_memory(root=root)
        assert state == MemoryState(16 * GiB, 8 * GiB + HOST_FILE_BYTES, HOST_FILE_BYTES, 4 * GiB, "host")
        assert state.headroom_bytes == 8 * GiB

    def test_a_process_that_is_gone(self, tmp_path: Path) -> None:
        root = tree(tmp_path, host(cgroup="0::/\n", mountinfo=""))
        with pytest.raises(ProcessLookupError):
            MemoryReader(4242, root)


class TestV1:
    MEMORY = "sys/fs/cgroup/memory"

    def test_the_tightest_ancestor_counts(self, tmp_path: Path) -> None:
        root = tree(
            tmp_path,
            host(cgroup="9:cpu:/\n4:memory:/pods/one\n0::/\n", mountinfo=V1_MOUNT)
            | v1(self.MEMORY, UNLIMITED_V1, 9 * GiB)
            | v1(f"{self.MEMORY}/pods", 4 * GiB, 3 * GiB, file=512 * MiB, dirty=100 * MiB)
            | v1(f"{self.MEMORY}/pods/one", 3 * GiB, GiB),
        )
        state = read_memory(root=root)
        assert state == MemoryState(4 * GiB, 3 * GiB, 412 * MiB, 3 * GiB - 512 * MiB, "cgroup v1 /pods")
        assert state.headroom_bytes == GiB + 412 * MiB

    def test_without_a_limit_it_is_the_host(self, tmp_path: Path) -> None:
        root = tree(
            tmp_path,
            host(cgroup="4:memory:/one\n", mountinfo=V1_MOUNT) | v1(f"{self.MEMORY}/one", UNLIMITED_V1, GiB),
        )
        assert read_memory(root=root).source == "host"

    def test_a_mount_of_the_containers_own_subtree(self, tmp_path: Path) -> None:
        mount = "35 31 0:32 /docker/abc /sys/fs/cgroup/memory ro,relatime - cgroup cgroup rw,memory\n"
        root = tree(
            tmp_path,
            host(cgroup="4:memory:/docker/abc/inner\n", mountinfo=mount)
            | v1(self.MEMORY, 4 * GiB, GiB)
            | v1(f"{self.MEMORY}/inner", 2 * GiB, GiB),
        )
        state = read_memory(root=root)
        assert (state.source, state.headroom_bytes) == ("cgroup v1 /inner", GiB)

    @pytest.mark.parametrize("path", ["/docker/not/shown/here", "/../other"])
    def test_a_path_that_the_mount_does_not_show(self, tmp_path: Path, path: str) -> None:
        root = tree(
            tmp_path,
            host(cgroup=f"4:memory:{path}\n", mountinfo=V1_MOUNT) | v1(self.MEMORY, 4 * GiB, GiB),
        )
        state = read_memory(root=root)
        assert (state.source, state.headroom_bytes) == ("cgroup v1 /", 3 * GiB)

    def test_the_mount_that_shows_the_path_wins(self, tmp_path: Path) -> None:
        other = "34 31 0:32 /elsewhere /mnt/a\\040mount rw,relatime - cgroup cgroup rw,memory\n"
        root = tree(
            tmp_path,
            host(cgroup="4:memory:/one\n", mountinfo=other + V1_MOUNT)
            | v1("mnt/a mount", GiB, GiB)
            | v1(f"{self.MEMORY}/one", 4 * GiB, GiB),
        )
        assert read_memory(root=root).source == "cgroup v1 /one"


class TestV2:
    def test_high_and_max(self, tmp_path: Path) -> None:
        cgroup = "sys/fs/cgroup"
        files = host(cgroup="0::/service/worker\n", mountinfo=V2_MOUNT)
        files |= v2(f"{cgroup}/service", 6 * GiB, 5 * GiB, 4 * GiB, file=GiB)
        files |= v2(f"{cgroup}/service/worker", "max", "max", 2 * GiB)
        state = read_memory(root=tree(tmp_path, files))
        expected = MemoryState(5 * GiB, 4 * GiB, GiB - 2 * MiB, 3 * GiB, "cgroup v2 /service")
        assert state == expected

    def test_over_the_limit_there_is_no_headroom(self, tmp_path: Path) -> None:
        files = host(cgroup="0::/\n", mountinfo=V2_MOUNT) | v2("sys/fs/cgroup", "max", GiB, 2 * GiB)
        assert read_memory(root=tree(tmp_path, files)).headroom_bytes == 0

    def test_the_inner_name_space_root_has_its_own_limit(self, tmp_path: Path) -> None:
        files = host(cgroup="0::/\n", mountinfo=V2_MOUNT) | v2("sys/fs/cgroup", 2 * GiB, "max", GiB)
        assert read_memory(root=tree(tmp_path, files)).source == "cgroup v2 /"

    def test_both_versions_at_once(self, tmp_path: Path) -> None:
        unified = "41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n"
        files = host(cgroup="4:memory:/one\n0::/two\n", mountinfo=V1_MOUNT + unified)
        files |= v1("sys/fs/cgroup/memory/one", 2 * GiB, GiB)
        files |= {"sys/fs/cgroup/unified/two/cgroup.procs": ""}
        assert read_memory(root=tree(tmp_path, files)).source == "cgroup v1 /one"


class TestReader:
    def test_a_changed_limit_is_seen(self, tmp_path: Path) -> None:
        files = host(cgroup="0::/\n", mountinfo=V2_MOUNT) | v2("sys/fs/cgroup", "max", "max", GiB)
        root = tree(tmp_path, files)
        with MemoryReader(root=root) as reader:
            assert reader.read().source == "host"
            (root / "sys/fs/cgroup/memory.max").write_text(f"{2 * GiB}\n")
            assert reader.read().limit_bytes == 2 * GiB

    def test_close_twice(self) -> None:
        reader = MemoryReader()
        reader.close()
        reader.close()

    def test_closes_what_it_opened(self) -> None:
        before = os.listdir("/proc/self/fd")
        with MemoryReader() as reader:
            reader.read()
        assert os.listdir("/proc/self/fd") == before

    def test_this_machine(self) -> None:
        state = read_memory()
        assert 0 < state.headroom_bytes <= state.limit_bytes
        assert 0 <= state.file_bytes <= state.usage_bytes
        assert state.anon_bytes > 0


def memory_cgroup_parent() -> Path | None:
    for parent in (Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")):
        if (parent / "memory.limit_in_bytes").exists():
            return parent
        if "memory" in (
            (parent / "cgroup.subtree_control").read_text() if (parent / "cgroup.subtree_control").exists() else ""
        ):
            return parent
    return None


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to make a cgroup")
class TestRealCgroup:
    @pytest.fixture
    def cgroup(self) -> Iterator[Path]:
        parent = memory_cgroup_parent()
        if parent is None:
            pytest.skip("no cgroup with a memory controller is mounted")
        path = parent / f"penstock-test-{os.getpid()}"
        path.mkdir()
        limit = "memory.limit_in_bytes" if (path / "memory.limit_in_bytes").exists() else "memory.max"
        (path / limit).write_text(str(64 * MiB))
        yield path
        if path.exists():
            path.rmdir()

    @pytest.fixture
    def child(self, cgroup: Path) -> Iterator[subprocess.Popen[bytes]]:
        with subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
            (cgroup / "cgroup.procs").write_text(str(child.pid))
            yield child
            if child.stdin is not None and not child.stdin.closed:
                child.communicate()

    def test_a_childs_limit(self, cgroup: Path, child: subprocess.Popen[bytes]) -> None:
        state = read_memory(child.pid)
        assert state.limit_bytes == 64 * MiB
        assert state.source.endswith(f"/{cgroup.name}")
        assert 0 < state.headroom_bytes <= 64 * MiB

    def test_clean_file_pages_leave_the_headroom(self, cgroup: Path, tmp_path: Path) -> None:
        path = tmp_path / "file"
        path.write_bytes(os.urandom(MiB) * 16)
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        script = "import sys; input(); open(sys.argv[1], 'rb').read(); print('read', flush=True); input()"
        with subprocess.Popen(
            [sys.executable, "-c", script, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as child:
            assert child.stdin is not None
            assert child.stdout is not None
            (cgroup / "cgroup.procs").write_text(str(child.pid))
            with MemoryReader(child.pid) as reader:
                before = reader.read()
                child.stdin.write(b"\n")
                child.stdin.flush()
                assert child.stdout.readline() == b"read\n"
                after = reader.read()
            child.communicate(b"\n")
        # The kernel's statistics lag by some pages for each CPU.
        assert after.file_bytes - before.file_bytes > 14 * MiB
        assert after.usage_bytes - before.usage_bytes > 14 * MiB
        assert after.headroom_bytes > before.headroom_bytes - 8 * MiB

    def test_a_cgroup_that_is_removed(self, cgroup: Path, child: subprocess.Popen[bytes]) -> None:
        with MemoryReader(child.pid) as reader:
            assert reader.read().limit_bytes == 64 * MiB
            (cgroup.parent / "cgroup.procs").write_text(str(child.pid))
            cgroup.rmdir()
            assert reader.read().limit_bytes != 64 * MiB


class TestPressure:
    LINES = (
        "some avg10=1.25 avg60=0.02 avg300=0.17 total=1619619\nfull avg10=0.50 avg60=0.01 avg300=0.12 total=1321817\n"
    )

    def test_the_host(self, tmp_path: Path) -> None:
        files = host(cgroup="0::/\n", mountinfo="") | {"proc/pressure/io": self.LINES}
        root = tree(tmp_path, files)
        assert read_pressure("io", root=root) == Pressure(1.25, 0.5, 1619619, 1321817, "host")
        assert read_pressure("memory", root=root) is None

    def test_the_cgroup_comes_first(self, tmp_path: Path) -> None:
        files = host(cgroup="0::/one\n", mountinfo=V2_MOUNT) | {
            "proc/pressure/memory": self.LINES.replace("1.25", "99.00"),
            "sys/fs/cgroup/one/memory.pressure": self.LINES,
        }
        pressure = read_pressure(root=tree(tmp_path, files))
        assert pressure == Pressure(1.25, 0.5, 1619619, 1321817, "cgroup v2 /one")

    def test_this_machine(self) -> None:
        if not Path("/proc/pressure/memory").exists():
            pytest.skip("this kernel has no pressure stall information")
        pressure = read_pressure()
        assert pressure is not None
        assert pressure.some_total_us >= pressure.full_total_us >= 0

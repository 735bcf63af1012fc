"""Where page-cache pages lie once they were prefetched for a worker: on real nodes, read back from numa_maps."""

from __future__ import annotations

import json
import mmap
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tests.contents import contents
from tests.observed import wait_until_cached, wait_until_observed
from tests.pagecache.topology import make_amd, make_ascend, make_nvidia

from penstock.linux import numa
from penstock.linux.pagecache import drop
from penstock.linux.window import FileWindow
from penstock.pagecache.base import Prefetch
from penstock.pagecache.files import ModelFiles
from penstock.pagecache.ledger import Ledger
from penstock.pagecache.loader import Loader
from penstock.pagecache.placement import worker_node
from penstock.units import MiB

pytestmark = pytest.mark.rig

SIZE_BYTES = 24 * MiB
DEADLINE_S = 120.0
PENSTOCK = str(Path(sys.executable).with_name("penstock"))

# Waits with its accelerator's device file open, if one is named.
WORKER = """
import sys
held = [open(path, "rb") for path in sys.argv[1:]]
print("ready", flush=True)
sys.stdin.read()
"""
# Two workers, each of which reads a file of its own, once there is a file named "go".
LAUNCHER = """
import os, subprocess, sys, time
code = '''
import os, sys, time
while not os.path.exists(sys.argv[1]):
    time.sleep(0.05)
with open(sys.argv[2], "rb", buffering=0) as file:
    while file.read(1 << 20):
        pass
    while os.path.exists(sys.argv[1]):  # it serves
        time.sleep(0.05)
'''
workers = [
    subprocess.Popen([sys.executable, "-S", "-c", code, sys.argv[1], path], env={**os.environ, "LOCAL_RANK": str(rank)})
    for rank, path in enumerate(sys.argv[2:])
]
sys.exit(max(worker.wait() for worker in workers))
"""
# Where each vendor's tree has a device on node 0 and one on node 1: what names them, and their device files.
NAMED: dict[str, tuple[Callable[[Path], Path], list[dict[str, str]], list[str]]] = {
    "nvidia": (
        make_nvidia,
        [{"CUDA_VISIBLE_DEVICES": "0"}, {"CUDA_VISIBLE_DEVICES": "0,1", "LOCAL_RANK": "1"}],
        ["/dev/nvidia2", "/dev/nvidia0"],
    ),
    "amd": (
        make_amd,
        [{"HIP_VISIBLE_DEVICES": "1"}, {"ROCR_VISIBLE_DEVICES": "0"}],
        ["/dev/dri/renderD128", "/dev/dri/renderD129"],
    ),
    "ascend": (
        make_ascend,
        [{"ASCEND_RT_VISIBLE_DEVICES": "0"}, {"ASCEND_RT_VISIBLE_DEVICES": "0,1,2", "LOCAL_RANK": "2"}],
        ["/dev/davinci0", "/dev/davinci2"],
    ),
}


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / "model" / f"model-{number}.safetensors" for number in range(2)]
    paths[0].parent.mkdir()
    for path in paths:
        with path.open("wb") as file:
            file.write(contents(SIZE_BYTES))
            os.fsync(file.fileno())
    make_cold(paths)
    return paths


def make_cold(paths: list[Path]) -> None:
    for path in paths:
        with path.open("rb") as file:
            drop(file.fileno())
        assert sum(pages_by_node(path, populate=False).values()) == 0


def pages_by_node(path: Path, *, populate: bool = True) -> dict[int, int]:
    """How many of a file's pages lie on each node, as the kernel tells of a mapping of them."""
    with path.open("rb") as file:
        mapping = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
    mapping.madvise(mmap.MADV_RANDOM)
    if populate:
        mapping.madvise(22)  # MADV_POPULATE_READ
    counts: dict[int, int] = {}
    kib = mmap.PAGESIZE // 1024
    for line in Path("/proc/self/numa_maps").read_text().splitlines():
        if f"file={path} " in f"{line} ":
            size = re.search(r"kernelpagesize_kB=(\d+)", line)
            assert size is None or int(size[1]) == kib
            for node, pages in re.findall(r"\bN(\d+)=(\d+)", line):
                counts[int(node)] = counts.get(int(node), 0) + int(pages)
    mapping.close()
    return counts


def share_on(path: Path, node: int) -> float:
    counts = pages_by_node(path)
    assert sum(counts.values()) == SIZE_BYTES // mmap.PAGESIZE, counts
    return counts.get(node, 0) / sum(counts.values())


@contextmanager
def workers(environments: list[dict[str, str]], opened: list[list[str]]) -> Iterator[list[int]]:
    """Real processes; yields their pids."""
    plain = {name: value for name, value in os.environ.items() if "DEVICES" not in name and "RANK" not in name}
    running = []
    try:
        for environment, paths in zip(environments, opened, strict=True):
            worker = subprocess.Popen(
                [sys.executable, "-S", "-c", WORKER, *paths],
                env={**plain, **environment},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            running.append(worker)
            assert worker.stdout is not None
            assert worker.stdout.readline() == "ready\n"
        yield [worker.pid for worker in running]
    finally:
        for worker in running:
            worker.communicate("")


@pytest.fixture
def device_files() -> Iterator[Callable[[str], str]]:
    """Makes character devices under /dev, as a driver would; they are /dev/null's."""
    made: list[str] = []

    def make(path: str) -> str:
        Path(path).parent.mkdir(exist_ok=True)
        os.mknod(path, 0o20666, os.makedev(1, 3))
        made.append(path)
        return path

    yield make
    for path in made:
        os.unlink(path)


def prefetch_for(paths: list[Path], node_of_worker: Callable[[int], int | None], *, ledger: Ledger) -> None:
    """Prefetch the n-th file for the n-th worker, the files in turns."""
    known = ModelFiles(paths)
    models = [known.by_name(path.name) for path in paths]
    loader = Loader(ledger, node_of_worker)
    try:
        requests = [
            Prefetch(model, start, start + 4 * MiB, worker)
            for start in range(0, SIZE_BYTES, 4 * MiB)
            for worker, model in enumerate(models)
            if model is not None
        ]
        loader.submit(requests)
        assert loader.wait_idle(DEADLINE_S)
        assert not loader.statistics().warnings
    finally:
        loader.close()


@pytest.mark.parametrize("way", ["environment", "device files"])
@pytest.mark.parametrize("vendor", list(NAMED))
def test_pages_lie_on_the_node_of_the_workers_accelerator(
    files: list[Path],
    ledger: Ledger,
    tmp_path: Path,
    device_files: Callable[[str], str],
    record_property: Callable[[str, object], None],
    vendor: str,
    way: str,
) -> None:
    make_tree, environments, paths = NAMED[vendor]
    root = make_tree(tmp_path / "root")
    if way == "environment":
        named, opened = environments, [[], []]
    else:
        named, opened = [{}, {}], [[device_files(path)] for path in paths]
    with workers(named, opened) as pids:
        assert [worker_node(pid, root) for pid in pids] == [0, 1]
        prefetch_for(files, lambda worker: worker_node(pids[worker], root), ledger=ledger)
    assert ledger.totals().prefetched_bytes == 2 * SIZE_BYTES
    shares = [share_on(path, node) for node, path in enumerate(files)]
    for node, share in enumerate(shares):
        record_property(f"share of the pages prefetched for a worker on node {node} that lie there", share)
    assert min(shares) >= 0.99


def test_without_placement_they_do_not(
    files: list[Path], ledger: Ledger, record_property: Callable[[str, object], None]
) -> None:
    with numa.bound_to(0):  # threads begin where the one that makes them is
        prefetch_for(files, lambda _: None, ledger=ledger)
    share = share_on(files[1], 1)
    record_property("the same without placement, node 1", share)
    assert share < 0.99


def test_what_is_cached_on_the_wrong_node_is_moved(files: list[Path], ledger: Ledger) -> None:
    with numa.bound_to(1):
        fill(files[0])
    with numa.bound_to(0):
        fill(files[1])
    assert share_on(files[0], 1) >= 0.99
    prefetch_for(files, lambda worker: worker, ledger=ledger)
    assert ledger.totals().prefetched_bytes == 0  # nothing was read again
    assert share_on(files[0], 0) >= 0.99
    assert share_on(files[1], 1) >= 0.99


def test_what_somebody_maps_stays_where_it_is(files: list[Path], ledger: Ledger) -> None:
    with numa.bound_to(1):
        fill(files[0])
    code = "import mmap, sys\nwith open(sys.argv[1], 'rb') as f: m = mmap.mmap(f.fileno(), 0, prot=1)\n"
    code += "m.madvise(22)\nprint('mapped', flush=True)\nsys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-S", "-c", code, files[0]], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "mapped\n"
        prefetch_for(files[:1], lambda _: 0, ledger=ledger)
        assert share_on(files[0], 1) >= 0.99
        holder.communicate("")


def fill(path: Path) -> None:
    with path.open("rb") as file, FileWindow(file.fileno(), 0, SIZE_BYTES) as window:
        window.populate()


@contextmanager
def mounted(tree: Path, place: str) -> Iterator[None]:
    subprocess.run(["mount", "--bind", str(tree), place], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", place], check=True)


def test_penstock_run_places_for_each_worker(files: list[Path], tmp_path: Path) -> None:
    """The trees stand where the driver's would, so that the command finds them by itself."""
    root = make_nvidia(tmp_path / "root")
    launcher, go = tmp_path / "launcher.py", tmp_path / "go"
    launcher.write_text(LAUNCHER)
    report = tmp_path / "report.json"
    command = [PENSTOCK, "run", "--templates", str(tmp_path / "templates"), "--report", str(report)]
    command += ["--", sys.executable, "-S", str(launcher), str(go), *map(str, files)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "0,1", "HOME": str(tmp_path)}
    with mounted(root / "proc/driver", "/proc/driver"), mounted(root / "sys/bus/pci/devices", "/sys/bus/pci/devices"):
        for mode in ("record", "replay"):
            make_cold(files)
            with subprocess.Popen(command, env=environment) as running:
                if mode == "replay":
                    wait_until_cached(files)  # before they are read
                assert wait_until_observed(str(report))
                go.touch()
                assert wait_until_observed(str(report), bytes_accessed=len(files) * SIZE_BYTES)
                go.unlink()
                assert running.wait(DEADLINE_S) == 0
            assert json.loads(report.read_text())["mode"] == mode
    shares = [share_on(path, node) for node, path in enumerate(files)]
    assert min(shares) >= 0.99, (shares, [path.read_text() for path in (tmp_path / "templates").iterdir()])

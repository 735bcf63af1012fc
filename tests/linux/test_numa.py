"""penstock.linux.numa: this machine's nodes, and sysfs trees of larger ones."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from penstock.linux import numa
from penstock.linux.numa import MemoryPolicy


def write(root: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content + "\n")
    return root


@pytest.fixture
def two_nodes(tmp_path: Path) -> Path:
    node = "sys/devices/system/node"
    pci = "sys/bus/pci/devices"
    return write(
        tmp_path,
        {
            f"{node}/online": "0-1,4",
            f"{node}/node0/cpulist": "0-3,8-11",
            f"{node}/node1/cpulist": "4-7",
            f"{node}/node4/cpulist": "",
            f"{pci}/0000:3b:00.0/numa_node": "1",
            f"{pci}/0000:5e:00.0/numa_node": "-1",
        },
    )


class TestTopology:
    def test_nodes_and_their_cpus(self, two_nodes: Path) -> None:
        assert numa.nodes(two_nodes) == [0, 1, 4]
        assert numa.node_cpus(0, two_nodes) == {0, 1, 2, 3, 8, 9, 10, 11}
        assert numa.node_cpus(1, two_nodes) == {4, 5, 6, 7}
        assert numa.node_cpus(4, two_nodes) == set()

    def test_a_kernel_without_numa(self, tmp_path: Path) -> None:
        root = write(tmp_path, {"sys/devices/system/cpu/online": "0-1"})
        assert numa.nodes(root) == [0]
        assert numa.node_cpus(0, root) == {0, 1}

    def test_a_node_that_is_not_there(self, two_nodes: Path) -> None:
        with pytest.raises(ValueError, match=r"no NUMA node 2; online here: 0, 1, 4"):
            numa.node_cpus(2, two_nodes)

    @pytest.mark.parametrize(
        ("address", "node"),
        [
            ("0000:3b:00.0", 1),
            ("00000000:3B:00.0", 1),
            ("0000:5e:00.0", None),
            ("0000:99:00.0", None),
        ],
    )
    def test_the_node_of_a_pci_device(self, two_nodes: Path, address: str, node: int | None) -> None:
        assert numa.pci_device_node(address, two_nodes) == node

    def test_the_node_of_a_device_file(self, tmp_path: Path) -> None:
        facts = os.stat("/dev/null")
        function = tmp_path / "sys/devices/pci0000:3a/0000:3b:00.0"
        write(function, {"numa_node": "1", "drm/null/dev": "1:3"})
        link = tmp_path / f"sys/dev/char/{os.major(facts.st_rdev)}:{os.minor(facts.st_rdev)}"
        link.parent.mkdir(parents=True)
        link.symlink_to(function / "drm/null")
        assert numa.device_node("/dev/null", tmp_path) == 1

    def test_a_device_without_hardware(self) -> None:
        assert numa.device_node("/dev/null") is None

    def test_a_file_is_no_device(self, tmp_path: Path) -> None:
        path = tmp_path / "file"
        path.touch()
        with pytest.raises(ValueError, match="not a character or block device"):
            numa.device_node(path)

    def test_this_machine(self) -> None:
        there = numa.nodes()
        assert there
        assert set().union(*(numa.node_cpus(node) for node in there)) >= os.sched_getaffinity(0)


@pytest.fixture
def in_thread() -> Callable[[Callable[[], None]], None]:
    """Runs a function in a thread of its own, so that no test leaves a policy to the next."""

    def run(body: Callable[[], None]) -> None:
        with ThreadPoolExecutor(1) as thread:
            thread.submit(body).result()

    return run


def needs_policy() -> None:
    try:
        numa.get_memory_policy()
        numa.set_memory_policy(*numa.get_memory_policy())
    except OSError as error:
        pytest.skip(f"the memory policy is refused here: {error}")


class TestPolicy:
    @pytest.mark.parametrize("mode", [MemoryPolicy.PREFERRED, MemoryPolicy.BIND, MemoryPolicy.INTERLEAVE])
    def test_set_and_get(self, in_thread: Callable[..., None], mode: MemoryPolicy) -> None:
        needs_policy()
        node = numa.nodes()[0]

        def body() -> None:
            numa.set_memory_policy(mode, [node])
            assert numa.get_memory_policy() == (mode, {node})
            numa.set_memory_policy(MemoryPolicy.DEFAULT)
            assert numa.get_memory_policy() == (MemoryPolicy.DEFAULT, frozenset())

        in_thread(body)

    def test_only_the_calling_thread(self, in_thread: Callable[..., None]) -> None:
        needs_policy()
        before = numa.get_memory_policy()
        in_thread(lambda: numa.set_memory_policy(MemoryPolicy.BIND, [numa.nodes()[0]]))
        assert numa.get_memory_policy() == before

    def test_a_node_that_is_not_there(self) -> None:
        with pytest.raises(ValueError, match="no NUMA node 1023; online here: "):
            numa.set_memory_policy(MemoryPolicy.BIND, [1023])


class TestBinding:
    def test_binds_and_restores(self, in_thread: Callable[..., None]) -> None:
        needs_policy()
        node = numa.nodes()[0]

        def body() -> None:
            one = {min(os.sched_getaffinity(0))}
            os.sched_setaffinity(0, one)
            numa.set_memory_policy(MemoryPolicy.INTERLEAVE, [node])
            with numa.bound_to(node) as binding:
                assert (binding.node, binding.refused) == (node, None)
                assert binding.cpus == os.sched_getaffinity(0)
                assert numa.get_memory_policy() == (MemoryPolicy.PREFERRED, {node})
            assert os.sched_getaffinity(0) == one
            assert numa.get_memory_policy() == (MemoryPolicy.INTERLEAVE, {node})

        in_thread(body)

    def test_restores_after_an_error(self, in_thread: Callable[..., None]) -> None:
        def body() -> None:
            before = os.sched_getaffinity(0)
            with pytest.raises(ZeroDivisionError), numa.bound_to(numa.nodes()[0]):
                raise ZeroDivisionError
            assert os.sched_getaffinity(0) == before

        in_thread(body)

    def test_a_node_that_is_not_there(self) -> None:
        with pytest.raises(ValueError, match="no NUMA node 99"), numa.bound_to(99):
            pass

"""penstock.pagecache.placement on the trees that the three vendors' drivers make."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.pagecache.topology import UUIDS, make_amd, make_ascend, make_nvidia, write

from penstock.pagecache.placement import (
    accelerator_of,
    accelerators,
    visible_devices,
    worker_node,
    worker_rank,
)


@pytest.fixture
def nvidia(tmp_path: Path) -> Path:
    return make_nvidia(tmp_path)


@pytest.fixture
def amd(tmp_path: Path) -> Path:
    return make_amd(tmp_path)


@pytest.fixture
def ascend(tmp_path: Path) -> Path:
    return make_ascend(tmp_path)


class TestEnvironment:
    @pytest.mark.parametrize(
        ("environ", "rank"),
        [
            ({"LOCAL_RANK": "3", "RANK": "11"}, 3),
            ({"OMPI_COMM_WORLD_LOCAL_RANK": "2", "RANK": "10"}, 2),
            ({"SLURM_LOCALID": "1", "RANK": "9"}, 1),
            ({"RANK": "0"}, 0),
            ({"LOCAL_RANK": "none", "RANK": "1"}, 1),
            ({}, None),
        ],
    )
    def test_rank(self, environ: dict[str, str], rank: int | None) -> None:
        assert worker_rank(environ) == rank

    @pytest.mark.parametrize(
        ("environ", "devices"),
        [
            ({}, None),
            ({"CUDA_VISIBLE_DEVICES": ""}, []),
            ({"CUDA_VISIBLE_DEVICES": "2, 0"}, ["2", "0"]),
            ({"CUDA_VISIBLE_DEVICES": "1,-1,0"}, ["1"]),
            ({"HIP_VISIBLE_DEVICES": "1"}, ["1"]),
            ({"ROCR_VISIBLE_DEVICES": "GPU-ff"}, ["GPU-ff"]),
            ({"ASCEND_RT_VISIBLE_DEVICES": "4,5"}, ["4", "5"]),
            ({"CUDA_VISIBLE_DEVICES": "MIG-GPU-1/0/0,GPU-2"}, ["MIG-GPU-1/0/0", "GPU-2"]),
        ],
    )
    def test_visible_devices(self, environ: dict[str, str], devices: list[str] | None) -> None:
        assert visible_devices(environ) == devices

    def test_a_variable_of_another_kind(self) -> None:
        assert visible_devices({"CUDA_VISIBLE_DEVICES": "0"}, "ascend") is None


class TestNvidia:
    def test_in_pci_order_with_their_minors(self, nvidia: Path) -> None:
        found = accelerators(nvidia)
        assert [(a.kind, a.index, a.pci_address, a.device_path) for a in found] == [
            ("nvidia", 0, "0000:3b:00.0", "/dev/nvidia2"),
            ("nvidia", 1, "0000:86:00.0", "/dev/nvidia0"),
            ("nvidia", 2, "0000:af:00.0", "/dev/nvidia1"),
        ]
        assert [a.uuid for a in found] == UUIDS
        assert [a.node(nvidia) for a in found] == [0, 1, 1]

    @pytest.mark.parametrize(
        ("environ", "index"),
        [
            ({"LOCAL_RANK": "1"}, 1),
            ({"LOCAL_RANK": "1", "CUDA_VISIBLE_DEVICES": "2,0"}, 0),
            ({"CUDA_VISIBLE_DEVICES": "2"}, 2),
            ({"LOCAL_RANK": "5", "CUDA_VISIBLE_DEVICES": "2"}, 2),
            ({"CUDA_VISIBLE_DEVICES": UUIDS[1]}, 1),
            ({"CUDA_VISIBLE_DEVICES": "GPU-2222c"}, 2),
            ({"CUDA_VISIBLE_DEVICES": "GPU-2222"}, None),
            ({"CUDA_VISIBLE_DEVICES": f"MIG-{UUIDS[0]}/1/0"}, 0),
            ({"CUDA_VISIBLE_DEVICES": "MIG-6e3e6f3c-0000-0000-0000-000000000000"}, None),
            ({"CUDA_VISIBLE_DEVICES": ""}, None),
            ({"CUDA_VISIBLE_DEVICES": "7"}, None),
            ({"LOCAL_RANK": "3"}, None),
            ({}, None),
        ],
    )
    def test_by_environment(self, nvidia: Path, environ: dict[str, str], index: int | None) -> None:
        found = accelerator_of(environ, [], nvidia)
        assert (found.index if found else None) == index

    def test_one_open_device_decides(self, nvidia: Path) -> None:
        opened = ["/dev/nvidiactl", "/dev/nvidia-uvm", "/dev/nvidia0"]
        found = accelerator_of({"LOCAL_RANK": "0"}, opened, nvidia)
        assert found is not None
        assert found.pci_address == "0000:86:00.0"

    def test_several_open_devices_leave_it_to_the_environment(self, nvidia: Path) -> None:
        opened = ["/dev/nvidia0", "/dev/nvidia1", "/dev/nvidia2"]
        found = accelerator_of({"LOCAL_RANK": "2"}, opened, nvidia)
        assert found is not None
        assert found.index == 2
        assert accelerator_of({}, opened, nvidia) is None


class TestAmd:
    def test_in_kfd_order(self, amd: Path) -> None:
        assert [(a.index, a.pci_address, a.device_path, a.uuid) for a in accelerators(amd)] == [
            (0, "0000:c3:00.0", "/dev/dri/renderD129", "GPU-00000000000000ff"),
            (1, "0000:03:00.0", "/dev/dri/renderD128", "GPU-0000000000001000"),
        ]

    def test_in_pci_order_without_kfd(self, amd: Path) -> None:
        for path in amd.glob("sys/class/kfd/kfd/topology/nodes/*/properties"):
            path.unlink()
        assert [a.pci_address for a in accelerators(amd)] == ["0000:03:00.0", "0000:c3:00.0"]

    @pytest.mark.parametrize(
        ("environ", "node"),
        [
            ({"LOCAL_RANK": "0"}, 1),
            ({"HIP_VISIBLE_DEVICES": "1"}, 0),
            ({"CUDA_VISIBLE_DEVICES": "1"}, 0),
            ({"ROCR_VISIBLE_DEVICES": "1", "HIP_VISIBLE_DEVICES": "0"}, 0),
            ({"ROCR_VISIBLE_DEVICES": "1,0", "LOCAL_RANK": "1"}, 1),
            ({"ROCR_VISIBLE_DEVICES": "GPU-0000000000001000"}, 0),
            ({}, None),
        ],
    )
    def test_by_environment(self, amd: Path, environ: dict[str, str], node: int | None) -> None:
        found = accelerator_of(environ, ["/dev/kfd"], amd)
        assert (found.node(amd) if found else None) == node

    def test_by_open_device(self, amd: Path) -> None:
        found = accelerator_of({}, ["/dev/kfd", "/dev/dri/renderD128"], amd)
        assert found is not None
        assert found.node(amd) == 0


class TestAscend:
    def test_in_pci_order(self, ascend: Path) -> None:
        assert [(a.index, a.pci_address, a.device_path) for a in accelerators(ascend)] == [
            (0, "0000:01:00.0", "/dev/davinci0"),
            (1, "0000:81:00.0", "/dev/davinci1"),
            (2, "0000:c1:00.0", "/dev/davinci2"),
        ]

    @pytest.mark.parametrize(
        ("environ", "opened", "node"),
        [
            ({"ASCEND_RT_VISIBLE_DEVICES": "1,2", "RANK": "0"}, [], 1),
            ({"RANK": "0"}, [], 0),
            ({}, ["/dev/davinci_manager", "/dev/davinci0"], 0),
            ({}, ["/dev/davinci_manager"], None),
        ],
    )
    def test_worker(self, ascend: Path, environ: dict[str, str], opened: list[str], node: int | None) -> None:
        found = accelerator_of(environ, opened, ascend)
        assert (found.node(ascend) if found else None) == node


class TestMachines:
    def test_two_kinds_the_environment_names_one(self, nvidia: Path, ascend: Path) -> None:
        assert nvidia == ascend
        found = accelerator_of({"ASCEND_RT_VISIBLE_DEVICES": "2"}, [], ascend)
        assert found is not None
        assert (found.kind, found.index) == ("ascend", 2)
        first = accelerator_of({"LOCAL_RANK": "2"}, [], ascend)
        assert first is not None
        assert first.kind == "nvidia"

    def test_none_at_all(self, tmp_path: Path) -> None:
        assert accelerators(tmp_path) == []
        assert accelerator_of({"LOCAL_RANK": "0", "CUDA_VISIBLE_DEVICES": "0"}, [], tmp_path) is None

    def test_a_node_that_the_firmware_does_not_tell(self, ascend: Path) -> None:
        write(ascend / "sys/devices/pci0000:00/0000:01:00.0/numa_node", "-1")
        found = accelerator_of({"RANK": "0"}, [], ascend)
        assert found is not None
        assert found.node(ascend) is None

    def test_a_real_process(self, nvidia: Path) -> None:
        environ = {**os.environ, "CUDA_VISIBLE_DEVICES": "0,2", "LOCAL_RANK": "1"}
        with subprocess.Popen(
            [sys.executable, "-c", "print(flush=True); input()"],
            env=environ,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        ) as child:
            assert child.stdout is not None
            child.stdout.readline()
            assert worker_node(child.pid, nvidia) == 1
            child.communicate(b"\n")
        with pytest.raises(ProcessLookupError):
            worker_node(child.pid, nvidia)

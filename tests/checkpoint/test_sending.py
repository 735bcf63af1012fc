"""penstock.checkpoint.sending, on devices that are the CPU: their copies take as long as a test wants."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.checkpoint.test_load import MIXED, write

from penstock.checkpoint import load as load_module
from penstock.checkpoint import reading, sending
from penstock.checkpoint.load import load_checkpoint, stream_checkpoint
from penstock.checkpoint.plan import Slice
from penstock.device.base import Transfer
from penstock.device.plain import PlainDevice
from penstock.errors import UnsupportedError
from penstock.storage.threads import ThreadEngine
from penstock.testing.faults import FaultyEngine, fail_at

torch = pytest.importorskip("torch", reason="needs torch")


class _Later(Transfer):
    """Copies only when it has been asked for several times whether it is done, as late as a device may."""

    def __init__(self, copy: Callable[[], object], patience: int) -> None:
        self._copy: Callable[[], object] | None = copy
        self._patience = patience

    @property
    def is_done(self) -> bool:
        self._patience -= 1
        if self._patience < 0:
            self.wait()
        return self._copy is None

    def wait(self) -> None:
        if self._copy is not None:
            copy, self._copy = self._copy, None
            copy()


class Slow(PlainDevice):
    """Its copies happen when nobody can put them off any longer."""

    def __init__(self, patience: int = 3) -> None:
        super().__init__("cpu")
        self.patience = patience
        self.under_way: list[_Later] = []
        self.pinned_bytes = 0
        self.closed = False

    def pin(self, memory: memoryview) -> Callable[[], None]:
        self.pinned_bytes += len(memory)

        def unpin() -> None:
            assert self.closed, "unpinned while copies may be under way"
            self.pinned_bytes -= len(memory)

        return unpin

    def copy(self, target: Any, offset: int, source: memoryview) -> Transfer:
        copy = super().copy
        transfer = _Later(lambda: copy(target, offset, source), self.patience)
        self.under_way.append(transfer)
        return transfer

    def close(self) -> None:
        for transfer in self.under_way:
            transfer.wait()
        self.closed = True


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Slow:
    device = Slow()
    monkeypatch.setattr(load_module, "open_device", lambda name: None if name == "cpu" else device)
    for module in (reading, sending):
        monkeypatch.setattr(module, "READ_BYTES", 64 * 1024)
    monkeypatch.setattr(sending, "POOL_BYTES", 4 * 64 * 1024)
    return device


@pytest.fixture
def left_nothing(device: Slow) -> Iterator[None]:
    descriptors, threads = os.listdir("/proc/self/fd"), threading.active_count()
    yield
    assert os.listdir("/proc/self/fd") == descriptors
    assert threading.active_count() == threads
    assert device.pinned_bytes == 0


def content(tensor: Any) -> bytes:
    return bytes(tensor.reshape(-1).view(torch.uint8).numpy()) if tensor.numel() else b""


@pytest.mark.parametrize("patience", [0, 3, 1 << 30])
@pytest.mark.parametrize("engine", ["threads", "auto"])
def test_every_byte_arrives(tmp_path: Path, device: Slow, left_nothing: None, patience: int, engine: str) -> None:
    device.patience = patience
    write(tmp_path / "one.safetensors", MIXED, seed=1)
    path = tmp_path / "two.safetensors"
    contents = write(path, [(f"two.{name}", dtype, shape) for name, dtype, shape in MIXED], seed=2)
    contents |= write(tmp_path / "one.safetensors", MIXED, seed=1)
    found = load_checkpoint(tmp_path, device="slow", engine=engine)
    assert {name: content(tensor) for name, tensor in found.items()} == contents
    dtypes = {
        "F32": torch.float32,
        "BF16": torch.bfloat16,
        "F64": torch.float64,
        "F16": torch.float16,
        "U8": torch.uint8,
    }
    for name, dtype, shape in MIXED:
        assert tuple(found[name].shape) == shape
        if dtype in dtypes:
            assert found[name].dtype == dtypes[dtype]
    assert found.statistics.bytes_read >= sum(map(len, contents.values()))


def test_names_and_slices(tmp_path: Path, device: Slow, left_nothing: None) -> None:
    path = tmp_path / "model.safetensors"
    contents = write(path, MIXED)
    slices = {"big": Slice(1, 10, 20), "weight": Slice(0, 100, 300)}
    found = load_checkpoint(path, device="slow", names=["big", "weight", "empty", "flag"], slices=slices)
    big = torch.frombuffer(bytearray(contents["big"]), dtype=torch.float16).reshape(3000, 999)
    weight = torch.frombuffer(bytearray(contents["weight"]), dtype=torch.float32).reshape(700, 1000)
    assert torch.equal(found["big"].view(torch.int16), big[:, 10:20].contiguous().view(torch.int16))
    assert torch.equal(found["weight"].view(torch.int32), weight[100:300].view(torch.int32))
    assert found["empty"].shape == (0, 4)
    assert content(found["flag"]) == contents["flag"]


def test_leaving_early(tmp_path: Path, device: Slow, left_nothing: None) -> None:
    path = tmp_path / "model.safetensors"
    contents = write(path, MIXED)
    for name, tensor in stream_checkpoint(path, device="slow"):
        if name == "half":
            kept = tensor
            break
    device.close()
    assert content(kept) == contents["half"]


@pytest.mark.parametrize("number", [0, 5, 50])
def test_a_read_that_fails(tmp_path: Path, device: Slow, left_nothing: None, number: int) -> None:
    path = tmp_path / "model.safetensors"
    contents = write(path, MIXED)
    with ThreadEngine(2) as engine:
        with pytest.raises(OSError, match="Input/output error") as caught:
            load_checkpoint(path, device="slow", engine=FaultyEngine(engine, fail_at(number)))
        assert caught.value.errno == errno.EIO
        assert engine.in_flight == 0
        found = load_checkpoint(path, device="slow", engine=engine)
    assert content(found["big"]) == contents["big"]


def test_a_device_that_is_full(
    tmp_path: Path, device: Slow, left_nothing: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.safetensors"
    write(path, MIXED)
    monkeypatch.setattr(device, "allocate", lambda size_bytes: (_ for _ in ()).throw(MemoryError("full")))
    with pytest.raises(MemoryError, match="full"):
        load_checkpoint(path, device="slow", names=["big"])


def test_only_torch_has_tensors_there(tmp_path: Path, device: Slow) -> None:
    path = tmp_path / "model.safetensors"
    write(path, MIXED)
    with pytest.raises(UnsupportedError, match="framework must be 'torch'"):
        load_checkpoint(path, device="slow", framework="numpy")

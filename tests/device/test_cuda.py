"""penstock.device.cuda on a real GPU."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from tests.checkpoint.test_load import MIXED, write

from penstock.checkpoint.load import load_checkpoint, stream_checkpoint
from penstock.checkpoint.plan import Slice
from penstock.device.choose import open_device
from penstock.errors import UnsupportedError
from penstock.storage.buffers import huge_buffer
from penstock.units import MiB

torch = pytest.importorskip("torch", reason="needs torch")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_copies_from_pinned_memory() -> None:
    device = open_device("cuda")
    assert device is not None
    memory = huge_buffer(8 * MiB)
    memory[:] = os.urandom(8 * MiB)
    with device:
        unpin = device.pin(memory)
        assert torch.frombuffer(memory, dtype=torch.uint8).is_pinned()
        target = device.allocate(8 * MiB)
        transfers = [device.copy(target, at, memory[at : at + MiB]) for at in range(0, 8 * MiB, MiB)]
        device.publish([target])
        doubled = target.to(torch.int16) * 2  # on the caller's stream
        for transfer in transfers:
            transfer.wait()
            assert transfer.is_done
        unpin()
    expected = torch.frombuffer(memory, dtype=torch.uint8)
    assert torch.equal(target.cpu(), expected)
    assert torch.equal(doubled.cpu(), expected.to(torch.int16) * 2)


def test_no_such_gpu() -> None:
    with pytest.raises(UnsupportedError, match="device 'cuda:99': there are"):
        open_device("cuda:99")


@pytest.mark.parametrize("engine", ["threads", "auto"])
def test_the_same_as_safetensors(tmp_path: Path, engine: str) -> None:
    import safetensors.torch

    path = tmp_path / "model.safetensors"
    write(path, [*MIXED, ("large", "BF16", (20_000, 8_000))])
    theirs = safetensors.torch.load_file(path, device="cuda")
    ours = load_checkpoint(path, device="cuda", engine=engine)
    assert sorted(ours) == sorted(theirs)
    for name, tensor in theirs.items():
        assert ours[name].device == tensor.device
        assert ours[name].dtype == tensor.dtype
        assert ours[name].shape == tensor.shape
        if tensor.numel():
            assert torch.equal(ours[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))
    part = load_checkpoint(path, device="cuda", names=["large"], slices={"large": Slice(1, 100, 4100)})
    assert torch.equal(part["large"].view(torch.int16), theirs["large"][:, 100:4100].contiguous().view(torch.int16))


def test_computing_while_it_loads(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    contents = write(path, [(str(number), "U8", (16 * MiB,)) for number in range(8)])
    sums = {
        name: tensor.to(torch.int64).sum() for name, tensor in stream_checkpoint(path, device="cuda")
    }  # each at once, without waiting
    for name, total in sums.items():
        assert int(total) == sum(contents[name])

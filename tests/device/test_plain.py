"""penstock.device: devices by name, and copies."""

from __future__ import annotations

import os

import pytest

from penstock.device.choose import open_device
from penstock.device.plain import PlainDevice
from penstock.errors import UnsupportedError

torch = pytest.importorskip("torch", reason="needs torch")


def test_a_copy() -> None:
    source = bytearray(os.urandom(1000))
    with PlainDevice("cpu") as device:
        target = device.allocate(3000)
        unpin = device.pin(memoryview(source))
        transfer = device.copy(target, 500, memoryview(source)[100:900])
        transfer.wait()
        assert transfer.is_done
        device.publish([target])
        unpin()
    assert bytes(target[500:1300].numpy()) == bytes(source[100:900])


def test_by_name() -> None:
    assert open_device("cpu") is None
    assert open_device("cpu:0") is None
    with pytest.raises(ValueError, match="device 'gpu'"):
        open_device("gpu")
    meta = open_device("meta")
    assert meta is not None
    assert meta.name == "meta"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there() -> None:
    for name in ("cuda", "cuda:3"):
        with pytest.raises(UnsupportedError, match=rf"device '{name}': this torch has no CUDA, or there is no GPU"):
            open_device(name)

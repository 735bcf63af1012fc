"""Which device a name stands for."""

from __future__ import annotations

from penstock.device.base import Device
from penstock.errors import UnsupportedError


def open_device(name: str) -> Device | None:
    """A device by torch's name for it; None for the CPU, into whose memory files are read directly.

    Raises:
        UnsupportedError: torch is not installed, or there is no such device.
        ValueError: no device is called that.
    """
    kind = name.partition(":")[0]
    if kind == "cpu":
        return None
    try:
        import torch
    except ImportError as error:
        raise UnsupportedError(f"device {name!r} takes torch, which is not installed") from error
    if kind == "cuda":
        from penstock.device.cuda import CudaDevice

        return CudaDevice(name)
    from penstock.device.plain import PlainDevice

    try:
        device = PlainDevice(name)
        device.allocate(1)
    except (RuntimeError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        if not hasattr(torch, kind):
            raise ValueError(f"device {name!r}: {reason}") from error
        raise UnsupportedError(f"device {name!r}: {reason}") from error
    return device

"""Any device of torch, by copies that are over when they return."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

from penstock.device.base import Device, Transfer


class _Over(Transfer):
    @property
    def is_done(self) -> bool:
        return True

    def wait(self) -> None:
        return


class PlainDevice(Device):
    """Copies as ``tensor.copy_`` does them.

    Args:
        name: of a device that torch knows.
    """

    def __init__(self, name: str) -> None:
        import torch

        self._torch = torch
        self._device = torch.device(name)
        self.name = str(self._device)

    def allocate(self, size_bytes: int) -> Any:
        return self._torch.empty(size_bytes, dtype=self._torch.uint8, device=self._device)

    def pin(self, memory: memoryview) -> Callable[[], None]:
        del memory
        return lambda: None

    def copy(self, target: Any, offset: int, source: memoryview) -> Transfer:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that a source may be read-only: it is only read
            bytes_ = self._torch.frombuffer(source, dtype=self._torch.uint8)
        target[offset : offset + len(source)].copy_(bytes_)
        return _Over()

    def publish(self, memory: Sequence[Any]) -> None:
        del memory

    def close(self) -> None:
        return

"""Any device of torch, by copies that are over when they return."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
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
        self._streams: Any = getattr(torch, self._device.type, None)  # torch.xpu, say
        self._callers: Any = None  # stream

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

    def follow(self, memory: Sequence[Any]) -> None:
        """There is one order of everything: that of the stream which is the caller's now."""
        del memory
        if hasattr(self._streams, "stream") and hasattr(self._streams, "current_stream"):
            self._callers = self._streams.current_stream(self._device)

    def beside(self) -> AbstractContextManager[object]:
        if self._callers is None:
            return contextlib.nullcontext()
        context: AbstractContextManager[object] = self._streams.stream(self._callers)
        return context

    def publish(self, memory: Sequence[Any]) -> None:
        del memory

    def close(self) -> None:
        return

"""CUDA devices: copies from pinned memory on a stream of their own, beside what the caller computes.

Facts, from CUDA's and torch's documentation:

- A copy from memory that is not pinned goes through a buffer of the driver's and blocks the caller.
- torch's allocator reuses memory by the stream it was allocated on: what another stream writes to must be told to it
  (record_stream), and that stream must not begin before the memory's last user has ended (wait_stream).
- Host memory that cudaHostRegister has pinned counts as pinned in torch, whoever allocated it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

from penstock.device.base import Device, Transfer
from penstock.errors import UnsupportedError
from penstock.units import format_size


class _Copy(Transfer):
    def __init__(self, event: Any, source: Any) -> None:
        self._event = event
        self._source: Any = source  # keeps the memory while the device reads it

    @property
    def is_done(self) -> bool:
        if self._source is not None and self._event.query():
            self._source = None
        return self._source is None

    def wait(self) -> None:
        self._event.synchronize()
        self._source = None


class CudaDevice(Device):
    """One GPU.

    Args:
        name: ``cuda`` for the current one, or ``cuda:1``.

    Raises:
        UnsupportedError: torch has no CUDA, or there is no such device.
    """

    def __init__(self, name: str) -> None:
        import torch

        if not torch.cuda.is_available():
            raise UnsupportedError(f"device {name!r}: this torch has no CUDA, or there is no GPU")
        self._torch: Any = torch  # parts of torch.cuda have no types
        try:
            device = torch.device(name)
        except RuntimeError as error:
            raise ValueError(f"device {name!r}: {str(error).splitlines()[0]}") from error
        index = torch.cuda.current_device() if device.index is None else device.index
        if index >= torch.cuda.device_count():
            raise UnsupportedError(f"device {name!r}: there are {torch.cuda.device_count()}")
        self._device = torch.device("cuda", index)
        self.name = str(self._device)
        self._stream = self._torch.cuda.Stream(self._device)

    def allocate(self, size_bytes: int) -> Any:
        try:
            memory = self._torch.empty(size_bytes, dtype=self._torch.uint8, device=self._device)
        except self._torch.cuda.OutOfMemoryError as error:
            raise MemoryError(f"{self.name}: no {format_size(size_bytes)} for a tensor: {error}") from error
        if self._torch.cuda.current_stream(self._device) != self._stream:
            self.follow([memory])
        return memory

    def pin(self, memory: memoryview) -> Callable[[], None]:
        runtime = self._torch.cuda.cudart()
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        self._check(runtime.cudaHostRegister(address, len(memory), 0), f"pinning {format_size(len(memory))}")

        def unpin() -> None:
            self._stream.synchronize()
            self._check(runtime.cudaHostUnregister(address), "unpinning")

        return unpin

    def copy(self, target: Any, offset: int, source: memoryview) -> Transfer:
        bytes_ = self._torch.frombuffer(source, dtype=self._torch.uint8)
        event = self._torch.cuda.Event()
        with self._torch.cuda.stream(self._stream):
            target[offset : offset + len(source)].copy_(bytes_, non_blocking=True)
            event.record(self._stream)
        return _Copy(event, bytes_)

    def follow(self, memory: Sequence[Any]) -> None:
        self._stream.wait_stream(self._torch.cuda.current_stream(self._device))
        for part in memory:
            part.record_stream(self._stream)

    def beside(self) -> AbstractContextManager[object]:
        context: AbstractContextManager[object] = self._torch.cuda.stream(self._stream)
        return context

    def publish(self, memory: Sequence[Any]) -> None:
        current = self._torch.cuda.current_stream(self._device)
        current.wait_stream(self._stream)
        for part in memory:  # allocated, maybe, while another stream was the current one
            part.record_stream(current)

    def close(self) -> None:
        self._stream.synchronize()

    def _check(self, answer: Any, what: str) -> None:
        code = int(answer)
        if code:
            raise OSError(f"{self.name}: {what} failed with CUDA error {code}")

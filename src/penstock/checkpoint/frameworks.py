"""Tensors of torch and arrays of numpy over memory that is there already."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from penstock.checkpoint.base import Shape, TensorInfo
from penstock.errors import UnsupportedError

FrameworkName: TypeAlias = Literal["torch", "numpy"]

_NUMPY = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "U16": "uint16", "I16": "int16", "F16": "float16",
    "U32": "uint32", "I32": "int32", "F32": "float32", "U64": "uint64", "I64": "int64", "F64": "float64",
    "C64": "complex64",
}  # fmt: skip
_ML_DTYPES = {
    "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz",
}  # fmt: skip
_TORCH = {**_NUMPY, **_ML_DTYPES, "F4": "float4_e2m1fn_x2"}


class Framework(ABC):
    """Makes tensors."""

    @abstractmethod
    def check(self, tensor: TensorInfo) -> None:
        """Whether such a tensor can be made.

        Raises:
            UnsupportedError: the framework has no such dtype.
        """

    @abstractmethod
    def tensor(self, tensor: TensorInfo, memory: NDArray[np.uint8]) -> Any:
        """A tensor over its bytes, which stay where they are if the framework can use them there."""


class Torch(Framework):
    """torch.Tensor on the CPU."""

    def __init__(self) -> None:
        import torch

        self._torch = torch

    def _dtype(self, tensor: TensorInfo) -> Any:
        name = "uint8" if tensor.is_quantised else _TORCH.get(tensor.dtype, "")
        dtype = getattr(self._torch, name, None)
        if dtype is None:
            raise UnsupportedError(f"{tensor.path}: tensor {tensor.name!r}: this torch has no dtype for {tensor.dtype}")
        return dtype

    def check(self, tensor: TensorInfo) -> None:
        self._dtype(tensor)
        if tensor.dtype == "F4" and (not tensor.shape or tensor.shape[-1] % 2):
            raise UnsupportedError(
                f"{tensor.path}: tensor {tensor.name!r}: torch holds two F4 in a byte, and the last of the "
                f"dimensions {list(tensor.shape)} is not even"
            )

    def tensor(self, tensor: TensorInfo, memory: NDArray[np.uint8]) -> Any:
        dtype, shape = self._dtype(tensor), _stored_shape(tensor)
        if not len(memory):
            return self._torch.empty(shape, dtype=dtype)
        return self._torch.frombuffer(_aligned(tensor, memory), dtype=dtype).reshape(shape)

    def on_device(self, tensor: TensorInfo, memory: Any) -> Any:
        """A tensor over its bytes on a device, a torch tensor of uint8 of their number."""
        return memory.view(self._dtype(tensor)).reshape(_stored_shape(tensor))


class Numpy(Framework):
    """numpy.ndarray. What numpy itself has no dtype for takes the package ml_dtypes."""

    def _dtype(self, tensor: TensorInfo) -> Any:
        if tensor.is_quantised:
            return np.dtype(np.uint8)
        if tensor.dtype in _NUMPY:
            return np.dtype(_NUMPY[tensor.dtype])
        try:
            import ml_dtypes  # type: ignore[import-not-found, unused-ignore]

            return np.dtype(getattr(ml_dtypes, _ML_DTYPES[tensor.dtype]))
        except (ImportError, AttributeError, KeyError) as error:
            why = "; install ml_dtypes" if tensor.dtype in _ML_DTYPES else ""
            raise UnsupportedError(
                f"{tensor.path}: tensor {tensor.name!r}: numpy has no dtype for {tensor.dtype}{why}"
            ) from error

    def check(self, tensor: TensorInfo) -> None:
        self._dtype(tensor)

    def tensor(self, tensor: TensorInfo, memory: NDArray[np.uint8]) -> Any:
        return _aligned(tensor, memory).view(self._dtype(tensor)).reshape(_stored_shape(tensor))


class Plain(Framework):
    """The bytes as they are, as an array of uint8; any dtype will do."""

    def check(self, tensor: TensorInfo) -> None:
        del tensor

    def tensor(self, tensor: TensorInfo, memory: NDArray[np.uint8]) -> Any:
        del tensor
        return memory


def _aligned(tensor: TensorInfo, memory: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The bytes where the elements' size wants them: copied, if they lie elsewhere."""
    elements, size_bytes = tensor.block
    if elements == 1 and memory.ctypes.data % size_bytes:
        return memory.copy()
    return memory


def _stored_shape(tensor: TensorInfo) -> Shape:
    """In bytes along the last dimension, where an element takes less than one, or means something in a block only."""
    elements, size_bytes = tensor.block
    if elements == 1:
        return tensor.shape
    return (*tensor.shape[:-1], tensor.shape[-1] // elements * size_bytes)


def framework_named(name: FrameworkName) -> Framework:
    """A framework by its name.

    Raises:
        ValueError: there is none of that name.
        UnsupportedError: it is not installed.
    """
    if name == "numpy":
        return Numpy()
    if name != "torch":
        raise ValueError(f"framework {name!r}: choose torch or numpy")
    try:
        return Torch()
    except ImportError as error:
        raise UnsupportedError("torch is not installed; install it, or ask for framework='numpy'") from error

"""How a block's rows are put down on the device: as they are, or smaller."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray


class Codec(ABC):
    """Turns the rows of one block into the bytes that are stored, and back. Used by several threads at once.

    Attributes:
        name: stored with sessions; another codec does not read them.
    """

    name: str

    @abstractmethod
    def encoded_bytes(self, data_bytes: int) -> int:
        """The most that so many bytes of rows become."""

    @abstractmethod
    def encode(self, rows: NDArray[np.uint8], out: NDArray[np.uint8]) -> None:
        """Put rows, [bytes], down in ``out``, [encoded_bytes]; all of it is written."""

    @abstractmethod
    def decode(self, stored: NDArray[np.uint8], data_bytes: int) -> NDArray[np.uint8]:
        """The rows again, [data_bytes]; may be a view of what is stored."""

    def decode_all(self, stored: NDArray[np.uint8], data_bytes: int) -> Iterator[NDArray[np.uint8]]:
        """The rows of adjacent blocks, stored as [blocks, encoded_bytes], in as few pieces as they come in."""
        for block in stored:
            yield self.decode(block, data_bytes)


class RawCodec(Codec):
    """Rows as they are; decoding copies nothing."""

    name = "raw"

    def encoded_bytes(self, data_bytes: int) -> int:
        return data_bytes

    def encode(self, rows: NDArray[np.uint8], out: NDArray[np.uint8]) -> None:
        np.copyto(out[: len(rows)], rows)
        out[len(rows) :] = 0

    def decode(self, stored: NDArray[np.uint8], data_bytes: int) -> NDArray[np.uint8]:
        return stored[:data_bytes]

    def decode_all(self, stored: NDArray[np.uint8], data_bytes: int) -> Iterator[NDArray[np.uint8]]:
        if stored.shape[1] == data_bytes:
            yield stored.reshape(-1)
        else:
            yield from super().decode_all(stored, data_bytes)


RAW = RawCodec()

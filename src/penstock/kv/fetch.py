"""What a pipeline has to do: fetches, the chunks that they are cut into, writes."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from numpy.typing import NDArray

from penstock.kv.delivery import Target
from penstock.kv.tensor import Run, StoredTensor
from penstock.storage.pool import Block

if TYPE_CHECKING:
    from penstock.kv.pipeline import Pipeline


Tail: TypeAlias = tuple[int, NDArray[np.uint8]]  # number of the first of some rows, and they, [rows, row_bytes]


class Source(Enum):
    """What a chunk is copied from."""

    DEVICE = "device"
    MEMORY = "memory"
    PAGE_CACHE = "page cache"


class Fetch:
    """Rows of one tensor on their way to a target. Made by `Pipeline.fetch`.

    Attributes:
        tail: rows that were in no block when it began; None: there were none, or they have been taken.
    """

    def __init__(self, pipeline: Pipeline, number: int, tensor: StoredTensor, target: Target) -> None:
        self._pipeline = pipeline
        self.number = number
        self.tensor = tensor
        self.target = target
        self.tail: Tail | None = None
        self.left = 0  # chunks; the pipeline's to count
        self.error: BaseException | None = None
        self.is_cancelled = False

    def take_tail(self) -> Tail | None:
        """The tail, for the first one that asks. To be called with the lock held."""
        tail, self.tail = self.tail, None
        return tail

    def wait(self) -> None:
        """Until all rows are there.

        Raises:
            KVError: some could not be read, or are not what was stored.
        """
        self._pipeline.wait(self)

    def cancel(self) -> None:
        """Have nothing more written to the target; waits for what is just being written."""
        self._pipeline.cancel(self)


@dataclass(slots=True)
class Chunk:
    """Some blocks of a fetch. Those that come from the device have a buffer while they are under way.

    Attributes:
        is_again: it failed once.
        was_taken: the kernel has just taken the memory it had: it is short, and gets no more before the next fetch.
    """

    fetch: Fetch
    run: Run
    source: Source = Source.DEVICE
    memory: Block | None = None
    is_again: bool = False
    was_taken: bool = False

    @property
    def size_bytes(self) -> int:
        """Of its blocks, as they are stored."""
        return (self.run.last - self.run.first) * self.fetch.tensor.shape.block_bytes

    @property
    def is_in_memory(self) -> bool:
        """Nothing is read for it."""
        return self.source is Source.MEMORY


@dataclass(slots=True)
class Write:
    """Some blocks on their way to the device, from a buffer that is given back then."""

    tensor: StoredTensor
    run: Run
    memory: Block
    is_again: bool = False

    @property
    def size_bytes(self) -> int:
        """Of its blocks, as they are stored."""
        return (self.run.last - self.run.first) * self.tensor.shape.block_bytes


@dataclass(order=True, slots=True)
class Ready:
    """A chunk for the threads that copy, in the order in which they take them."""

    is_cached: bool  # later than what has landed: that keeps buffers from the device
    number: int
    first: int
    chunk: Chunk = field(compare=False)

"""What a device does for someone who brings it bytes: memory, and copies into it that go on meanwhile."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, Self


class Transfer(ABC):
    """A copy under way. Its source must stay as it is until it is done."""

    @property
    @abstractmethod
    def is_done(self) -> bool:
        """Whether the source may be used for something else."""

    @abstractmethod
    def wait(self) -> None:
        """Until it is done."""


class Device(ABC):
    """Memory that files are not read into directly."""

    name: str  # as torch spells it: cuda:0

    @abstractmethod
    def allocate(self, size_bytes: int) -> Any:
        """Memory of the device: a torch tensor of uint8, of one dimension.

        Raises:
            MemoryError: the device has not so much.
        """

    @abstractmethod
    def pin(self, memory: memoryview) -> Callable[[], None]:
        """Make host memory known to the device, so that it copies from it by itself; returns what undoes that."""

    @abstractmethod
    def copy(self, target: Any, offset: int, source: memoryview) -> Transfer:
        """Begin to copy source into memory of `allocate`, from offset on, in bytes."""

    @abstractmethod
    def follow(self, memory: Sequence[Any]) -> None:
        """Whatever is copied, or done in `beside`, comes from now on after what the caller has asked for so far.

        Args:
            memory: of the caller, that is written to there.
        """

    @abstractmethod
    def beside(self) -> AbstractContextManager[object]:
        """Within it, in any thread, what is asked of the device is done after the copies that were begun before it.

        What callers compute meanwhile does not wait for it, nor it for them: see `follow` and `publish`.
        """

    @abstractmethod
    def publish(self, memory: Sequence[Any]) -> None:
        """Whatever is computed from now on sees all that was copied or done in `beside` so far; does not wait for it.

        Args:
            memory: that is handed out now.
        """

    @abstractmethod
    def close(self) -> None:
        """Wait for all copies."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

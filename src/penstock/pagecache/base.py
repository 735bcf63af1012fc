"""What a policy sees and what it may ask for.

A policy is pure: it gets plain values and returns recommendations, and never touches the system, so that it
is tested with plain values. The runtime carries out what it returns as far as memory and the device allow.

Source: the four policy functions (init, exit, prefetch, evict) of "Accelerating Model Loading in LLM Inference
by Programmable Page Cache", FAST '26.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class ModelFile:
    """One file of a model."""

    name: str  # below the model's root, with "/" between the parts: the same on every node
    path: str
    size_bytes: int
    device: int
    inode: int


@dataclass(frozen=True, slots=True)
class Access:
    """Bytes that one worker has read or touched, merged over one polling interval."""

    file: ModelFile
    start: int  # bytes, half-open
    stop: int
    worker: int  # 0, 1, … in the order in which the workers first read
    time_s: float  # since the program's start
    miss: bool  # not cached before, and no prefetch of it under way


@dataclass(frozen=True, slots=True)
class Prefetch:
    """Recommendation: have ``[start, stop)`` of a file cached, for a worker's accelerator where one is named."""

    file: ModelFile
    start: int
    stop: int
    worker: int | None = None


@dataclass(frozen=True, slots=True)
class Evict:
    """Recommendation: drop ``[start, stop)`` of a file from the cache."""

    file: ModelFile
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Range:
    """One step of a worker's recorded reads: bytes ``[start, stop)`` of the file with that name."""

    name: str
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Context:
    """What a policy is told at the start.

    ``files`` are those known by then: of the template, of ``--model``, or found in the command; more may show
    up in accesses.
    """

    files: tuple[ModelFile, ...] = ()
    groups: tuple[tuple[Range, ...], ...] = ()  # the template: each worker's reads in order; () without one
    budget_bytes: int = 1 << 62  # page cache the model may take at the start, net of the threshold
    keep_bytes: int = 1 << 30  # how far behind a reader pages stay when they are burnt
    parameters: Mapping[str, str] = field(default_factory=dict)

    @property
    def model_bytes(self) -> int:
        """Bytes of all known files."""
        return sum(file.size_bytes for file in self.files)


class Policy:
    """The kernel's own behaviour: a policy overrides the hooks it wants.

    An exception from a hook, or a range outside its file, switches the policy off for the rest of the run;
    the program goes on with what the kernel does by itself.
    """

    only_observes = False  # True: answers nothing, ever, so nobody needs to look often
    ignores_memory = False  # True: prefetch on whatever the memory there is (only `eager` wants that)
    mismatch = ""  # set by a policy that finds its template wrong: why; the runtime then records a new one

    def start(self, context: Context) -> None:
        """The program is about to start."""

    def prefetch(self, access: Access | None) -> Sequence[Prefetch]:
        """What to prefetch, best first, now that this was accessed; None asks once before the first access.

        A non-empty answer replaces everything asked for before that is not yet under way.
        """
        del access
        return ()

    def evict(self, access: Access | None) -> Sequence[Evict]:
        """What to evict; asked while memory is over its threshold, at each access and periodically (None)."""
        del access
        return ()

    def stop(self) -> None:
        """The program has ended."""

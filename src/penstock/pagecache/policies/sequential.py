"""A segment ahead and a segment behind: the example of the paper."""

from __future__ import annotations

from collections.abc import Sequence

from penstock.pagecache.base import Access, Context, Evict, Policy, Prefetch
from penstock.units import MiB


class Sequential(Policy):
    """Prefetch the segment after the one being read; over the memory threshold, evict the one before it.

    Source: the policy that the FAST '26 paper uses to show its interface.
    """

    segment_bytes = 256 * MiB

    def start(self, context: Context) -> None:
        del context
        self._last: tuple[object, int] | None = None

    def prefetch(self, access: Access | None) -> Sequence[Prefetch]:
        if access is None:
            return ()
        segment = access.start // self.segment_bytes
        if self._last == (access.file, segment):
            return ()
        self._last = (access.file, segment)
        stop = min((segment + 2) * self.segment_bytes, access.file.size_bytes)
        return [Prefetch(access.file, access.start, stop, access.worker)]

    def evict(self, access: Access | None) -> Sequence[Evict]:
        if access is None:
            return ()
        segment = access.start // self.segment_bytes
        if segment < 1:
            return ()
        return [Evict(access.file, (segment - 1) * self.segment_bytes, segment * self.segment_bytes)]

"""Staying ahead of readers of whom nothing is known but what they have read so far."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from penstock.pagecache.base import Access, ModelFile, Prefetch
from penstock.units import MiB

# Chosen so that the first mistake costs 0.1 s of a 2 GB/s disk, and six doublings cover any checkpoint's shard.
_FIRST_WINDOW_BYTES = 256 * MiB
_LARGEST_WINDOW_BYTES = 4096 * MiB
_ONE_FORMAT_SHARE = 0.9
_DISORDER_BYTES = 64 * MiB  # a reader that leaves this much out, or comes back by it, is still reading on


@dataclass(slots=True)
class _Stream:
    """One worker in one file."""

    position: int  # where the reader is
    front: int  # up to here has been asked for
    window: int
    last_use: int  # turn of the last access
    in_order_bytes: int = 0  # since its last jump


class ReadAhead:
    """Prefetches in file order ahead of each reader, in windows that double while they are used.

    A reader that jumps about halves its window at each jump, down to none at all, so that a random reader is
    left alone. What comes after the end of a file is the next file by name.

    Args:
        files: known files, to go on to the next one.
        largest_window_bytes: never more than this ahead of one reader.
    """

    def __init__(self, files: Sequence[ModelFile], largest_window_bytes: int = _LARGEST_WINDOW_BYTES) -> None:
        self._files = sorted(files, key=lambda file: file.name)
        self._largest = min(largest_window_bytes, _LARGEST_WINDOW_BYTES)
        self._streams: dict[tuple[int, ModelFile], _Stream] = {}
        self._windows: dict[int, int] = {}  # of each worker's last stream: a new shard begins with it
        self._turn = 0

    def prefetch(self, access: Access) -> list[Prefetch]:
        """What to prefetch now, for all readers, the one that has just read first; [] to leave all as it is."""
        self._turn += 1
        key = (access.worker, access.file)
        if access.file not in self._files:
            self._files = sorted([*self._files, access.file], key=lambda file: file.name)
        stream = self._streams.get(key)
        if stream is None:
            window = self._windows.get(access.worker, min(_FIRST_WINDOW_BYTES, self._largest))
            stream = self._streams[key] = _Stream(access.stop, access.stop, window, self._turn)
        elif stream.position - _DISORDER_BYTES <= access.start <= max(stream.position, stream.front) + _DISORDER_BYTES:
            stream.position = max(stream.position, access.stop)
            stream.in_order_bytes += access.stop - access.start
            if not stream.window and stream.in_order_bytes > _DISORDER_BYTES:
                stream.window = min(_FIRST_WINDOW_BYTES, self._largest)
        elif access.miss:
            # It reads elsewhere than was prefetched.
            stream.position = stream.front = access.stop
            stream.in_order_bytes = 0
            stream.window = stream.window // 2 if stream.window >= 16 * MiB else 0
        stream.last_use = self._turn
        if stream.front - stream.position > stream.window // 2 or not stream.window:
            return []
        if stream.front > access.stop and stream.position > access.start:
            stream.window = min(stream.window * 2, self._largest)
        stream.front = max(stream.front, stream.position) + stream.window
        self._windows[access.worker] = stream.window
        return self.wanted()

    def _bytes_by_format(self) -> dict[str, int]:
        bytes_of: dict[str, int] = {}
        for file in self._files:
            suffix = os.path.splitext(file.name)[1]
            bytes_of[suffix] = bytes_of.get(suffix, 0) + file.size_bytes
        return bytes_of

    @property
    def has_one_format(self) -> bool:
        """Whether nearly all of the known bytes are in files of one kind, so that it is clear which will be read."""
        sizes = self._bytes_by_format().values()
        return max(sizes, default=0) >= _ONE_FORMAT_SHARE * sum(sizes)

    def beginning(self, most_bytes: int) -> list[Prefetch]:
        """The first bytes of the known files, in the format that most of them are in."""
        bytes_of = self._bytes_by_format()
        likely = max(bytes_of, key=lambda suffix: bytes_of[suffix], default="")
        wanted = []
        for file in self._files:
            length = min(most_bytes, file.size_bytes)
            if length > 0 and os.path.splitext(file.name)[1] == likely:
                wanted.append(Prefetch(file, 0, length))
                most_bytes -= length
        return wanted

    def wanted(self) -> list[Prefetch]:
        """All that lies in the windows, of the reader that has last read first."""
        wanted = []
        streams = sorted(self._streams.items(), key=lambda item: -item[1].last_use)
        for (worker, file), stream in streams[:64]:
            start, length = stream.position, stream.front - stream.position
            suffix = os.path.splitext(file.name)[1]
            for following in self._files[self._files.index(file) :]:
                if length <= 0:
                    break
                if os.path.splitext(following.name)[1] == suffix:
                    stop = min(start + length, following.size_bytes)
                    if stop > start:
                        wanted.append(Prefetch(following, start, stop, worker))
                        length -= stop - start
                    start = 0
        return wanted

"""Sampling the page cache by reads that may not block: nothing to import, as `penstock run` asks before it imports."""

from __future__ import annotations

import os

TYPE_CHECKING = False  # typing's own takes 8 ms to import, and a program waits for this module
if TYPE_CHECKING:
    from collections.abc import Iterable


def is_resident_nowait(fd: int, offsets: Iterable[int]) -> list[bool]:
    """Whether the page at each offset is cached, asked by a read that may not block.

    Works on any readable file. A page that is being read in counts as not resident. Asking for a page that is
    not cached has it read in, with its neighbours unless the descriptor is advised POSIX_FADV_RANDOM, and on a quick
    device that can be done before the answer is given: False is certain, True is not.

    Raises:
        OSError: EOPNOTSUPP where the file system has no non-blocking reads (tmpfs, some network mounts).
    """
    buffer = [bytearray(1)]
    answers = []
    for offset in offsets:
        try:
            answers.append(os.preadv(fd, buffer, offset, os.RWF_NOWAIT) == 1)
        except BlockingIOError:
            answers.append(False)
    return answers

"""Events of the page cache, which come by the thousand, as the few stretches that were read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from penstock.linux.window import PAGE_BYTES
from penstock.units import MiB

# What a reader comes back to, or leaves out, within so many bytes is one stretch, in file order. A copy of a large
# array enters pages 4 MiB further on, now and then, before those that it has left out.
_DISORDER_BYTES = 8 * MiB
_LARGEST_FOLIO_BYTES = 2 * MiB


@dataclass(frozen=True, slots=True)
class Stretch:
    """What one thread has read of one file, going forwards or nearly so."""

    thread: int
    file: int  # a number of the caller's
    pieces: list[tuple[int, int]]  # bytes, half-open; ascending, and none touches the next

    @property
    def start(self) -> int:
        return self.pieces[0][0]

    @property
    def stop(self) -> int:
        return self.pieces[-1][1]


def stretches(
    thread: NDArray[np.int32],
    file: NDArray[np.int64],
    start: NDArray[np.int64],
    stop: NDArray[np.int64],
    maps: NDArray[np.bool_],
) -> list[Stretch]:
    """The stretches of events that are in the order of their times, by their first events.

    Args:
        thread: of each event, [events].
        file: of each event, [events].
        start: first byte that each event tells of, [events].
        stop: the byte after the last, [events].
        maps: whether each event tells of pages that were entered in a page table, [events]. From Linux 6.18 on all of
            a folio is, and the event names 64 KiB of it: what lies between that and the next event is taken to be the
            rest of the folio, if it can be by its alignment.
    """
    if not len(start):
        return []
    order = np.lexsort((thread, file))  # stable: each thread keeps its own order
    thread, file, start, stop, maps = thread[order], file[order], start[order], stop[order], maps[order]
    begins = np.ones(len(start), bool)
    begins[1:] = (
        (thread[1:] != thread[:-1])
        | (file[1:] != file[:-1])
        | (start[1:] > stop[:-1] + _DISORDER_BYTES)
        | (start[1:] < start[:-1] - _DISORDER_BYTES)
    )
    firsts = np.flatnonzero(begins)
    pieces = list(_pieces(np.cumsum(begins) - 1, start, stop, maps))
    return [
        Stretch(int(thread[first]), int(file[first]), pieces[number])
        for number, first in sorted(enumerate(firsts.tolist()), key=lambda pair: order[pair[1]])
    ]


def _pieces(
    group: NDArray[np.int64], start: NDArray[np.int64], stop: NDArray[np.int64], maps: NDArray[np.bool_]
) -> Iterator[list[tuple[int, int]]]:
    """The ranges of each group, those that overlap, touch or share a folio as one."""
    order = np.lexsort((start, group))
    group, start, stop, maps = group[order], start[order], stop[order], maps[order]
    begins = np.ones(len(start), bool)
    begins[1:] = group[1:] != group[:-1]
    bounds = [*np.flatnonzero(begins).tolist(), len(start)]
    # The furthest byte so far within the group: of all events at once, groups are moved apart by more than a file has.
    apart = group * (int(stop.max()) + 1)
    furthest = np.maximum.accumulate(stop + apart) - apart
    folio_bytes = np.clip(start & -start, PAGE_BYTES, _LARGEST_FOLIO_BYTES)  # of one that ends where each event begins
    is_same_folio = maps[:-1] & (start[:-1] >= (start - folio_bytes)[1:])
    begins[1:] |= (start[1:] > furthest[:-1]) & ~is_same_folio
    firsts = np.flatnonzero(begins)
    lasts = np.append(firsts[1:], len(start)) - 1
    ranges = list(zip(start[firsts].tolist(), furthest[lasts].tolist(), strict=True))
    cuts = np.searchsorted(firsts, bounds).tolist()
    for low, high in pairwise(cuts):
        yield ranges[low:high]

"""Arrays of records as rows of machine words: numpy copies records field by field, which takes ten times as long."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def words(records: NDArray[np.void]) -> NDArray[np.uint64]:
    """The same memory in machine words, [records, words]; a copy where the records do not lie side by side."""
    return np.ndarray((len(records), records.itemsize // 8), np.uint64, np.ascontiguousarray(records))


def as_records(rows: NDArray[np.uint64], dtype: np.dtype[np.void]) -> NDArray[np.void]:
    """The other way round: rows of words, [records, words], contiguous."""
    return np.ndarray(len(rows), dtype, rows)


def joined(parts: Sequence[NDArray[np.void]]) -> NDArray[np.void]:
    """Records of one or more arrays in one; of one array that itself."""
    return parts[0] if len(parts) == 1 else as_records(np.concatenate([words(part) for part in parts]), parts[0].dtype)

"""penstock.storage.buffers."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import pytest

from penstock.storage.buffers import HUGE_PAGE_BYTES, huge_buffer
from penstock.units import KiB, MiB


def address(buffer: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))


@pytest.mark.parametrize("size_bytes", [4 * KiB, 4 * MiB, 5 * MiB])
def test_it_is_aligned_zeroed_and_as_long_as_asked_for(size_bytes: int) -> None:
    buffer = huge_buffer(size_bytes)
    assert len(buffer) == size_bytes
    assert address(buffer) % HUGE_PAGE_BYTES == 0
    assert bytes(buffer) == bytes(size_bytes)


def test_direct_reads_take_it(tmp_path: Path) -> None:
    path = tmp_path / "file"
    content = os.urandom(1 * MiB)
    path.write_bytes(content)
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    except OSError:
        pytest.skip("the file system has no O_DIRECT")
    try:
        buffer = huge_buffer(1 * MiB)
        assert os.preadv(fd, [buffer], 0) == 1 * MiB
    finally:
        os.close(fd)
    assert buffer == content


def test_too_much_is_a_memory_error() -> None:
    with pytest.raises(MemoryError, match="bytes for a buffer"):
        huge_buffer(1 << 60)

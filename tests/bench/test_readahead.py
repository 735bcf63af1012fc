"""Benchmarks say where they can be run."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from bench.errors import BenchError
from bench.readahead import block_device

REPOSITORY = Path(__file__).resolve().parents[2]
IN_MEMORY = Path("/dev/shm")


@pytest.mark.parametrize("name", ["io", "checkpoint", "kv", "page_cache"])
def test_a_directory_in_memory_is_refused(name: str) -> None:
    if not IN_MEMORY.is_dir():
        pytest.skip(f"needs {IN_MEMORY}")
    with tempfile.TemporaryDirectory(dir=IN_MEMORY) as directory:
        try:
            block_device(Path(directory))
        except BenchError as error:
            expected = str(error)
        else:
            pytest.skip(f"{IN_MEMORY} is on a disk")
        command = [sys.executable, "-m", f"bench.{name}", "--quick", "--dir", directory]
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
        assert done.returncode == 1
        assert done.stderr.strip() == f"Error: {expected}"
        assert not list(Path(directory).iterdir())

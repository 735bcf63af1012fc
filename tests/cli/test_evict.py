"""`penstock evict` on real files, unmapped and mapped by real processes."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from penstock.cli.evict import evict
from penstock.linux import pagecache
from penstock.linux.pagecache import FileResidency, ResidencyMethod
from penstock.units import MiB

MAPPER = """
import mmap, sys
with open(sys.argv[1], "rb") as file:
    mapping = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
total = sum(mapping[at] for at in range(0, len(mapping), mmap.PAGESIZE))
print("mapped", flush=True)
sys.stdin.read()
"""


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(evict, [str(argument) for argument in arguments])


def write(path: Path, size_bytes: int) -> Path:
    path.write_bytes(os.urandom(size_bytes))  # dirty: evict has to write it first
    with path.open("rb") as file:
        if FileResidency(file.fileno()).method is ResidencyMethod.ALWAYS:
            pytest.skip(f"{path} is in a memory file system, which cannot be evicted")
    assert resident_bytes(path) == size_bytes
    return path


def resident_bytes(path: Path) -> int:
    with path.open("rb") as file:
        return FileResidency(file.fileno()).resident_bytes(0, path.stat().st_size)


@contextlib.contextmanager
def mapped(path: Path, processes: int) -> Iterator[list[int]]:
    """Child processes that map the file and have touched all of it."""
    with contextlib.ExitStack() as stack:
        children = []
        for _ in range(processes):
            child = stack.enter_context(
                subprocess.Popen(
                    [sys.executable, "-c", MAPPER, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
                )
            )
            assert child.stdin is not None
            assert child.stdout is not None
            stack.callback(child.stdin.close)
            children.append(child)
        for child in children:
            assert child.stdout is not None
            assert child.stdout.readline() == "mapped\n"
        yield [child.pid for child in children]


def test_drops_files_that_nobody_maps(tmp_path: Path) -> None:
    first, second = write(tmp_path / "a.safetensors", MiB + 3), write(tmp_path / "b.gguf", MiB)
    other = write(tmp_path / "config.json", 4096)
    result = run(tmp_path)
    assert result.exit_code == 0, result.output
    assert [resident_bytes(path) for path in (first, second, other)] == [0, 0, 4096]
    assert result.stdout == (
        f"  1.0 MiB freed of   1.0 MiB  {first}\n  1.0 MiB freed of   1.0 MiB  {second}\n  2.0 MiB freed in all\n"
    )
    assert run(other).exit_code == 0
    assert resident_bytes(other) == 0


def test_nothing_cached_is_no_error(tmp_path: Path) -> None:
    path = write(tmp_path / "a.gguf", MiB)
    assert run(path).exit_code == 0
    assert run(path).stdout == f"      0 B freed of       0 B  {path}\n"


@pytest.mark.root
def test_drops_what_one_process_maps(tmp_path: Path) -> None:
    if not pagecache.probe(tmp_path).process_madvise:
        pytest.skip("needs CAP_SYS_NICE, to drop pages that another process maps")
    path = write(tmp_path / "a.gguf", 4 * MiB)
    with mapped(path, 1):
        result = run(path)
        assert resident_bytes(path) == 0
    assert result.stdout == f"  4.0 MiB freed of   4.0 MiB  {path}\n"


def test_says_who_keeps_what_stayed(tmp_path: Path) -> None:
    path = write(tmp_path / "a.gguf", 4 * MiB)
    with mapped(path, 2) as pids:
        result = run(path)
        assert result.exit_code == 0, result.output
        stayed = resident_bytes(path)
    assert stayed > 0  # the kernel keeps what two processes map
    first, second = result.stdout.splitlines()
    assert first.endswith(str(path))
    assert " stayed: mapped by processes " in second
    for pid in pids:
        assert f"{pid} (" in second


def test_nothing_to_drop_is_told(tmp_path: Path) -> None:
    result = run(tmp_path)
    assert result.exit_code == 1
    assert "no weight files below" in result.stderr
    assert run().exit_code == 2
    assert run(tmp_path / "none").exit_code == 2


def test_help_has_an_example() -> None:
    assert "penstock evict /models/llama-3b" in run("--help").stdout


def test_importing_the_command_imports_no_heavy_module() -> None:
    code = "import sys, penstock.cli.evict; print({'numpy', 'rich'} & set(sys.modules))"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert output.stdout.strip() == "set()"

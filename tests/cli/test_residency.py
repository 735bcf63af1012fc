"""`penstock residency` on real files, against what the kernel says of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from penstock.cli.residency import residency
from penstock.linux.pagecache import FileResidency, ResidencyMethod, drop, mincore
from penstock.units import MiB


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(residency, [str(argument) for argument in arguments])


def write(path: Path, size_bytes: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(os.urandom(size_bytes))
        os.fsync(file.fileno())
        drop(file.fileno())
        if FileResidency(file.fileno()).method is ResidencyMethod.ALWAYS:
            pytest.skip(f"{path} is in a memory file system, where everything is cached")
    return path


def cache(path: Path, start: int, stop: int) -> int:
    """Have this cached, and return what mincore then counts of the file."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)  # no read-ahead beyond what is asked for
        assert len(os.pread(file.fileno(), stop - start, start)) == stop - start
        return int(mincore(file.fileno(), 0, path.stat().st_size).sum()) * os.sysconf("SC_PAGE_SIZE")


def test_the_bar_shows_where_the_cached_pages_are(tmp_path: Path) -> None:
    path = write(tmp_path / "model.safetensors", 40 * 2 * MiB // 8)  # cells of 256 KiB
    cached = cache(path, 0, 4 * MiB)
    assert cached == 4 * MiB
    result = run(path)
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    assert result.stdout == f"{'█' * 16}{'░' * 24}   40.0 %    4.0 MiB of  10.0 MiB  {path}\n"


def test_a_directory_shows_its_weights_and_the_sum(tmp_path: Path) -> None:
    first = write(tmp_path / "a.safetensors", MiB)
    second = write(tmp_path / "deeper" / "b.gguf", MiB)
    config = write(tmp_path / "config.json", 2000)
    cache(first, 0, MiB)
    lines = run(tmp_path).stdout.splitlines()
    assert [line.split()[-1] for line in lines] == [str(first), str(second), "files"]
    assert lines[0].startswith("█" * 40 + "  100.0 %")
    assert lines[1].startswith("░" * 40 + "    0.0 %")
    assert " 50.0 %    1.0 MiB of   2.0 MiB  2 files" in lines[2]
    # Named itself, any file is shown, and no file twice.
    named = run(config, tmp_path, first).stdout.splitlines()
    assert [line.split()[-1] for line in named] == [str(config), str(first), str(second), "files"]


def test_json_has_sizes_and_the_method(tmp_path: Path) -> None:
    path = write(tmp_path / "model.gguf", MiB + 5)
    cached = cache(path, 0, MiB + 5)
    (row,) = json.loads(run("--json", path).stdout)
    assert row["path"] == str(path)
    assert row["size_bytes"] == row["resident_bytes"] == MiB + 5
    assert cached > MiB + 5  # in whole pages
    assert row["method"] in {"cachestat", "mincore"}


def test_an_empty_file_is_shown(tmp_path: Path) -> None:
    path = tmp_path / "empty"
    path.touch()
    assert run(path).stdout.endswith(f"100.0 %        0 B of       0 B  {path}\n")


def test_a_memory_file_system_is_told() -> None:
    directory = Path("/dev/shm")
    if not directory.is_dir():
        pytest.skip("there is no /dev/shm")
    path = directory / f"penstock-test-{os.getpid()}"
    path.write_bytes(b"x" * 5000)
    try:
        with path.open("rb") as file:
            told = FileResidency(file.fileno()).method is not ResidencyMethod.ALWAYS
        result = run(path)
    finally:
        path.unlink()
    assert "100.0 %" in result.stdout
    assert told or "counts as cached" in result.stderr


def test_nothing_to_show_is_told(tmp_path: Path) -> None:
    result = run(tmp_path)
    assert result.exit_code == 1
    assert f"{tmp_path}: no weight files below" in result.stderr
    assert run(tmp_path / "none").exit_code == 2
    assert run().exit_code == 2
    device = run("/dev/null")
    assert device.exit_code == 1
    assert "/dev/null is neither a file nor a directory" in device.stderr


@pytest.mark.root
def test_another_users_file_is_sampled(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root, to become somebody else")
    path = write(tmp_path / "model.gguf", 4 * MiB)
    cache(path, 0, 4 * MiB)
    code = (
        "import os, sys\n"
        "from penstock.cli.residency import residency\n"
        "import penstock.pagecache.files, penstock.linux.pagecache\n"  # while the interpreter may be read
        "fd = os.open(sys.argv[1], os.O_RDONLY)\n"
        "os.setgroups([]); os.setresgid(65534, 65534, 65534); os.setresuid(65534, 65534, 65534)\n"
        "residency([f'/proc/self/fd/{fd}'])\n"
    )
    path.chmod(0o644)
    output = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=False)
    assert output.returncode == 0, output.stderr
    assert "100.0 %    4.0 MiB of   4.0 MiB" in output.stdout
    assert "Sampled: the kernel counts" in output.stderr


def test_help_has_an_example() -> None:
    assert "penstock residency /models/llama-3b" in run("--help").stdout


def test_importing_the_command_imports_no_heavy_module() -> None:
    code = "import sys, penstock.cli.residency; print({'numpy', 'rich'} & set(sys.modules))"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert output.stdout.strip() == "set()"

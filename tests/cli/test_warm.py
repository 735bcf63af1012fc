"""`penstock warm` on real files: what it says against what the kernel says."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from penstock.cli.warm import _check_fits, warm
from penstock.linux.memory import MemoryState
from penstock.linux.pagecache import FileResidency, ResidencyMethod, drop
from penstock.testing.residency import About
from penstock.units import GiB, MiB


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(warm, [str(argument) for argument in arguments])


def write(path: Path, size_bytes: int) -> Path:
    with path.open("wb") as file:
        file.write(os.urandom(size_bytes))
        os.fsync(file.fileno())
        drop(file.fileno())
        if FileResidency(file.fileno()).method is ResidencyMethod.ALWAYS:
            pytest.skip(f"{path} is in a memory file system, where everything is cached")
    assert resident_bytes(path) == 0
    return path


def resident_bytes(path: Path) -> int:
    with path.open("rb") as file:
        return FileResidency(file.fileno()).resident_bytes(0, path.stat().st_size)


@pytest.fixture
def model(tmp_path: Path) -> list[Path]:
    return [write(tmp_path / "a.safetensors", 5 * MiB + 7), write(tmp_path / "b.safetensors", 3 * MiB)]


def test_reads_a_whole_model_and_reports_it(model: list[Path], tmp_path: Path) -> None:
    result = run(tmp_path)
    assert result.exit_code == 0, result.output
    assert [resident_bytes(path) for path in model] == [About(5 * MiB + 7), About(3 * MiB)]
    assert result.stdout.startswith("8.0 MiB of 8.0 MiB cached, 2 files; ")
    assert result.stdout.endswith("GB/s\n")
    assert result.stderr == ""


def test_what_is_cached_is_not_read_again(model: list[Path], tmp_path: Path) -> None:
    assert run(tmp_path).exit_code == 0
    again = run(tmp_path)
    assert again.exit_code == 0
    assert again.stdout.startswith("8.0 MiB of 8.0 MiB cached, 2 files; 0 B read in ")


def test_memory_bounds_what_is_read(tmp_path: Path) -> None:
    first, second = write(tmp_path / "a.gguf", 64 * MiB), write(tmp_path / "b.gguf", MiB)
    result = run("--memory", "8MiB", tmp_path)
    assert result.exit_code == 0, result.output
    assert 8 * MiB <= resident_bytes(first) < 64 * MiB  # with the kernel's own read-ahead behind it
    assert resident_bytes(second) == 0
    assert run("--memory", "0", second).exit_code == 0
    assert resident_bytes(second) == 0


def test_a_model_that_does_not_fit_is_refused_with_both_numbers() -> None:
    state = MemoryState(10 * GiB, 6 * GiB, 2 * GiB, 4 * GiB, "cgroup v2 /service")
    assert state.headroom_bytes == 6 * GiB
    _check_fits(4 * GiB, state)
    with pytest.raises(Exception, match=r"the model has 4\.1 GiB, and 4\.0 GiB may be filled") as caught:
        _check_fits(4 * GiB + 100 * MiB, state)
    assert "cgroup v2 /service" in str(caught.value)
    assert "--memory" in str(caught.value)


def test_a_sparse_model_larger_than_the_machine_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "huge.gguf"
    with path.open("wb") as file:
        try:
            file.truncate(8 << 40)
        except OSError:
            pytest.skip("the file system takes no file of 8 TiB")
    result = run(path)
    assert result.exit_code == 1
    assert "the model has 8.0 TiB" in result.stderr


def test_an_interrupt_ends_it_cleanly(tmp_path: Path) -> None:
    path = write(tmp_path / "model.gguf", 16 * MiB)
    code = (
        "import os, signal, sys, threading\n"
        "from penstock.cli import warm\n"
        "from penstock.pagecache.loader import Loader\n"
        "wait_idle = Loader.wait_idle\n"
        "def interrupted(self, timeout_s=None):\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    return wait_idle(self, timeout_s)\n"
        "Loader.wait_idle = interrupted\n"
        "warm.warm(sys.argv[1:])\n"
    )
    arguments = [sys.executable, "-c", code, str(path)]
    output = subprocess.run(arguments, capture_output=True, text=True, check=False, timeout=60)
    assert output.returncode == 130, output.stderr
    assert "Stopped: interrupted" in output.stderr
    assert "Traceback" not in output.stderr
    assert " of 16.0 MiB cached, 1 file; " in output.stdout


def test_unusable_arguments_are_told(tmp_path: Path) -> None:
    assert run().exit_code == 2
    assert run(tmp_path / "none").exit_code == 2
    bad = run("--memory", "much", tmp_path)
    assert bad.exit_code == 2
    assert "'much' is not a size" in bad.stderr
    nothing = run(tmp_path)
    assert nothing.exit_code == 1
    assert "no weight files below" in nothing.stderr


def test_help_has_an_example() -> None:
    assert "penstock warm --memory 20GiB /models/llama-70b" in run("--help").stdout


def test_importing_the_command_imports_no_heavy_module() -> None:
    code = "import sys, penstock.cli.warm; print({'numpy', 'rich'} & set(sys.modules))"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert output.stdout.strip() == "set()"

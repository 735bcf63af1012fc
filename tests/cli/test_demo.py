"""`penstock demo`, on small models and real files."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from penstock.cli import demo as module
from penstock.cli.demo import _Disk, _Run, demo
from penstock.testing.checkpoint import generate_checkpoint
from penstock.testing.shapes import PRESETS, scaled, tensors, weight_bytes
from penstock.units import MiB

SIZE = "24MiB"
MAIN = [sys.executable, "-c", "from penstock.cli.entry import main; main()", "demo"]


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(demo, [str(argument) for argument in arguments])


def test_shows_all_runs_and_leaves_nothing(disk: Path) -> None:
    result = run("--size", SIZE, "--dir", disk)
    assert result.exit_code == 0, result.output
    rows = [line for line in result.stdout.splitlines() if line.startswith(("native", "penstock, "))]
    assert [row.split("  ")[0] for row in rows[:3]] == ["native", "penstock, recording", "penstock, replaying"]
    size_bytes = weight_bytes(scaled(PRESETS["tiny-llama"], 24 * MiB))
    assert f"runs read the same {size_bytes} bytes" in result.stdout
    assert "Replaying" in result.stdout
    assert "penstock: recorded demo" in result.stderr
    assert "penstock: replayed demo" in result.stderr
    assert list(disk.iterdir()) == []
    if find_spec("matplotlib"):
        assert [path.name for path in Path.cwd().iterdir()] == ["demo.png"]
        assert Path("demo.png").read_bytes().startswith(b"\x89PNG")
    else:
        assert list(Path.cwd().iterdir()) == []
        assert "No picture" in result.stdout


def test_keep_leaves_what_the_figures_came_from(disk: Path) -> None:
    result = run("--size", SIZE, "--dir", disk, "--keep")
    assert result.exit_code == 0, result.output
    (kept,) = disk.iterdir()
    assert f"Kept in {kept}" in result.stdout
    names = {path.name for path in kept.iterdir()}
    assert {"model", "reader.py", "templates", "recording.json", "replaying.json"} <= names
    assert json.loads((kept / "replaying.json").read_text())["mode"] == "replay"
    again = run("--size", SIZE, "--dir", disk)
    assert again.exit_code == 0, again.output
    assert list(disk.iterdir()) == [kept]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("stage", ["Generating", "penstock, recording"])
def test_cleans_up_when_it_is_stopped(disk: Path, number: signal.Signals, code: int, stage: str) -> None:
    process = subprocess.Popen(
        [*MAIN, "--size", SIZE, "--dir", str(disk)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith(stage):
            break
    process.send_signal(number)
    process.communicate()
    assert process.returncode == code
    assert list(disk.iterdir()) == []
    while any(str(disk) in command for command in _commands()):  # the janitor goes last; pytest's timeout is the end
        time.sleep(0.01)


def _commands() -> Iterator[str]:
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                yield (entry / "cmdline").read_text(errors="replace")
            except OSError:
                continue


@pytest.mark.skipif(not os.access("/dev/shm", os.W_OK), reason="needs a writable /dev/shm")
def test_refuses_a_directory_in_memory(disk: Path) -> None:
    result = run("--size", SIZE, "--dir", "/dev/shm")
    assert result.exit_code == 1
    assert "in memory" in result.stderr
    assert not list(Path("/dev/shm").glob("penstock-*"))


def test_the_reader_reads_and_sums_up_every_byte(tmp_path: Path) -> None:
    shape = PRESETS["tiny-llama"]
    files = generate_checkpoint(tmp_path, shape, shard_bytes=3 * MiB)
    assert len(files) > 1

    def read() -> dict[str, object]:
        command = [sys.executable, "-c", module._READER, str(tmp_path)]
        found = subprocess.run(command, capture_output=True, text=True, check=True)
        answer = json.loads(found.stdout)
        assert isinstance(answer, dict)
        return answer

    before = read()
    assert before["bytes"] == sum(spec.size_bytes for spec in tensors(shape))
    with files[-1].open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 1]))
    assert read()["checksum"] != before["checksum"]


def test_other_bytes_are_an_error() -> None:
    runs = [_Run("native", 1.0, 100, "aa", 100), _Run("penstock, replaying", 1.0, 100, "ab", 0)]
    with pytest.raises(click.ClickException, match="did not read the same bytes"):
        module._check(runs)


def _seconds(seconds: float) -> _Run:
    return _Run("", seconds, 2_000_000_000, "aa", 0)


@pytest.mark.parametrize(
    ("native", "replay", "cached", "disk", "said"),
    [
        (4.0, 1.2, 0.6, _Disk("vda", 128, 2e9), ["30% of the native time", "direct reads of as much take 1.00 s, and"]),
        (4.0, 2.2, 2.0, _Disk("vda", 128, 2e9), ["55% of the native time", "the reader takes 2.00 s"]),
        (4.0, 2.2, None, _Disk("", None, None), ["55% of the native time."]),
        (
            1.1,
            1.1,
            0.6,
            _Disk("vda", 8192, 2e9),
            ["not faster", "91% of the disk", "read_ahead_kb at 8192"],
        ),
        (2.0, 2.1, 1.8, _Disk("vda", 128, 2e9), ["not faster", "hardly waits for the disk"]),
        (4.0, 4.4, 0.6, _Disk("vda", 128, 2e9), ["not faster", "penstock doctor"]),
        (4.0, 4.4, None, _Disk("", None, None), ["not faster", "penstock doctor"]),
    ],
)
def test_says_what_the_figures_mean(
    native: float, replay: float, cached: float | None, disk: _Disk, said: list[str]
) -> None:
    text = module._verdict(_seconds(native), _seconds(replay), None if cached is None else _seconds(cached), disk)
    for part in said:
        assert part in text


def test_says_that_a_model_is_too_small() -> None:
    small = _Run("", 0.2, 24 * MiB, "aa", 0)
    assert "A model this small" in module._verdict(small, small, None, _Disk("vda", 128, 2e9))


@pytest.mark.parametrize("arguments", [["--size", "6 gallons"], ["--size", "0"], ["--dir", "/nowhere"]])
def test_unusable_options_are_usage_errors(arguments: list[str]) -> None:
    assert run(*arguments).exit_code == 2


def test_help_has_an_example() -> None:
    assert "penstock demo --size 8GiB --dir /models" in run("--help").stdout


def test_importing_the_command_imports_no_heavy_module() -> None:
    code = "import sys, penstock.cli.demo; print({'numpy', 'rich', 'matplotlib'} & set(sys.modules))"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert output.stdout.strip() == "set()"

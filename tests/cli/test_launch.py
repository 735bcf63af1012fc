"""penstock.cli.launch: what is started before it is parsed must be what the parser would have started."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import click
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from penstock.cli import launch as launch_module
from penstock.cli.launch import CACHE_MODES, OBSERVERS, POLICIES, Launched, RunOptions, _seem_cached, plain
from penstock.cli.run import run
from penstock.linux.pagecache import drop, mincore
from penstock.pagecache.policies import BUILT_IN
from penstock.pagecache.runtime import CacheMode

OPTIONS = [option for parameter in run.params if isinstance(parameter, click.Option) for option in parameter.opts]
HERE = str(Path(__file__).parent)
VALUES = [
    "",
    "-",
    "--",
    "-q",
    "auto",
    "8GiB",
    "8KMG",
    "8",
    "8.5G",
    "1e3",
    "\u0663",
    "maio",
    "mine:Policy",
    "keep",
    "tracefs",
]
VALUES += [__file__, HERE, f"{HERE}/nothing", "python"]


def test_the_choices_are_the_real_ones() -> None:
    assert tuple(BUILT_IN) == POLICIES
    assert tuple(mode.value for mode in CacheMode) == CACHE_MODES
    choices = next(parameter.type for parameter in run.params if parameter.name == "observer")
    assert isinstance(choices, click.Choice)
    assert tuple(choices.choices) == OBSERVERS


@given(st.lists(st.sampled_from([*OPTIONS, *VALUES, "--service=x", "-x"]), max_size=8))
@example(["--quiet", "--model", HERE, "--memory", "8GiB", "--", "python", "--memory"])
@example(["--memory", "8KMG", "--", "python"])
@example(["--report", HERE, "--", "python"])
@example(["--observer", "tracefs", "python", "--", "x"])
def test_the_parser_agrees_with_what_is_plain(arguments: list[str]) -> None:
    found = plain(arguments)
    if found is None:
        return
    context = run.make_context("run", list(arguments))
    parsed = context.params | {"policy": context.params["policy_name"]}
    assert {name: getattr(found, name) for name in RunOptions.__slots__} == {
        name: parsed[name] for name in RunOptions.__slots__
    }


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--"],
        ["-q"],
        ["--model", HERE],
        ["--policy", "mine:Policy", "python"],
        ["--memory", "lots", "python"],
        ["--model", f"{HERE}/nothing", "python"],
        ["--wish", "python"],
        ["--help"],
    ],
)
def test_the_rest_is_left_to_the_parser(arguments: list[str]) -> None:
    assert plain(arguments) is None


def test_what_is_usual_is_plain() -> None:
    for arguments in (
        ["python", "serve.py", "--model", "m"],
        ["--model", HERE, "--model", __file__, "--report", f"{HERE}/new.json", "--", "x"],
        ["--observer", "process", "--memory", "64GiB", "--cache", "burn", "-q", "x"],
        ["--policy", "native", "--service", "s", "--templates", "t", "--plot", "p.png", "x"],
    ):
        assert plain(arguments) is not None


@pytest.mark.parametrize("broken", ["raise ImportError('no such thing')", "raise SystemExit(2)"])
def test_what_goes_wrong_afterwards_leaves_the_program_alone(tmp_path: Path, broken: str) -> None:
    (tmp_path / "dataclasses.py").write_text(broken)
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from penstock.cli.entry import main; main()"
    program = [sys.executable, "-c", "print('done'); raise SystemExit(7)"]
    command = [sys.executable, "-c", code, "run", "--", *program]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    assert (ended.returncode, ended.stdout) == (7, "done\n")
    expected = "penstock: not prefetching: ImportError: no such thing\n" if "Import" in broken else ""
    assert ended.stderr == expected


@pytest.mark.parametrize("observer", ["auto", "process"])
@pytest.mark.parametrize("streams", [">&-", "2>&-", ">&- 2>&-", "2>/dev/full", ">/dev/full 2>/dev/full"])
def test_closed_streams_change_nothing(tmp_path: Path, observer: str, streams: str) -> None:
    report = tmp_path / "report.json"
    program = f'{sys.executable} -c \'open("{tmp_path}/ran", "w"); raise SystemExit(7)\''
    ours = f"{sys.executable} -c 'from penstock.cli.entry import main; main()' run"
    command = f"{ours} --observer {observer} --report {report} -- {program} {streams}"
    ended = subprocess.run(["sh", "-c", command], check=False, timeout=30, stdin=subprocess.DEVNULL)
    assert ended.returncode == 7
    assert (tmp_path / "ran").exists()
    assert report.exists()


def test_whether_a_model_is_cached_is_told_by_a_few_bytes_of_each_large_file(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "small.safetensors").write_bytes(bytes(1 << 20))
    assert not _seem_cached([str(model)])
    for name in ("a.safetensors", "b.safetensors"):
        with (model / name).open("wb") as file:
            for _ in range(64):
                file.write(os.urandom(1 << 20))
            os.fsync(file.fileno())
    words = ["serve.py", "", "\0", "x" * 5000, f"--model={model}", "--tp", "2"]
    assert _seem_cached(words)
    assert _seem_cached([str(model / "a.safetensors")])
    with (model / "b.safetensors").open("rb") as file:
        drop(file.fileno())
        if mincore(file.fileno(), 0, 1 << 26).any():
            pytest.skip(f"{model} is on a file system that keeps every page in memory")
    assert not _seem_cached(words)
    assert _seem_cached([str(model / "a.safetensors")])
    assert not _seem_cached(["serve.py", "--tp", "2", "/dev/zero"])


@pytest.mark.parametrize("cached", [False, True])
def test_only_where_something_is_missing_penstock_takes_its_share_of_the_cpu(tmp_path: Path, *, cached: bool) -> None:
    class Way:
        is_given = True

        def end(self) -> None:
            self.is_given = False

    class Ended:
        def wait_ended(self, _timeout_s: float) -> bool:
            return True

    path = tmp_path / "model.gguf"
    with path.open("w+b") as file:
        file.write(os.urandom(64 << 20))
        file.flush()
        os.fsync(file.fileno())
        if not cached:
            drop(file.fileno())
            if mincore(file.fileno(), 0, 64 << 20).any():
                pytest.skip(f"{path} is on a file system that keeps every page in memory")
    launched = Launched(RunOptions(["serve", str(path)]), Ended(), object(), "", {})  # type: ignore[arg-type]
    launched.give_way = way = Way()  # type: ignore[assignment]
    launched.run_ahead()
    assert way.is_given == cached


def test_no_more_is_imported_than_the_program_can_wait_for() -> None:
    code = "import sys, penstock.cli.launch, penstock.linux.janitor, penstock.linux.tracefs; print(*sys.modules)"
    names = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True).stdout
    slow = {"click", "typing", "dataclasses", "pathlib", "re", "numpy", "enum", "functools", "collections"}
    assert not (slow | {"_struct", "mmap"}) & set(names.split())


def test_what_cannot_be_asked_is_not_taken_for_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(fd: int, offsets: object) -> list[bool]:
        raise OSError(errno.EOPNOTSUPP, "no reads that do not block")

    path = tmp_path / "model.gguf"
    path.touch()
    os.truncate(path, 1 << 26)
    monkeypatch.setattr(launch_module, "is_resident_nowait", refuse)
    assert not _seem_cached([str(path)])

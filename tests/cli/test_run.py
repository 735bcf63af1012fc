"""`penstock run` as a user sees it, and what happens when things go wrong around it."""

from __future__ import annotations

import inspect
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.contents import contents
from tests.observed import wait_until_observed
from tests.tracing import needs_access_tracepoints

from penstock.errors import UnsupportedError
from penstock.linux.pagecache import FileResidency, drop
from penstock.linux.tracefs import TraceFs
from penstock.pagecache.template import TemplateStore
from penstock.units import MiB

PENSTOCK = Path(sys.executable).with_name("penstock")
BYTES = 24 * MiB
DEADLINE_S = 60.0

# Maps every weights file of a directory, and copies and sums it piece by piece. "late" waits for a line before,
# "wait" for a byte after, with the mappings still there. Under emulation penstock takes seconds to begin looking:
# there it serves until it is seen to have read, unless that is not to be ("unseen").
READER = (
    inspect.getsource(wait_until_observed)
    + """
import glob, mmap, os, sys, zlib
if "late" in sys.argv:
    sys.stdin.readline()
total, views = 0, []
for path in sorted(glob.glob(sys.argv[1] + "/*.safetensors")):
    with open(path, "rb") as file:
        views.append(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ))
    for start in range(0, len(views[-1]), 1 << 20):
        total = zlib.crc32(views[-1][start : start + (1 << 20)], total)
print(total, flush=True)
if "wait" in sys.argv:
    sys.stdin.read(1)
elif "PENSTOCK_RIG" in os.environ and "unseen" not in sys.argv:
    wait_until_observed(os.environ["READERS_REPORT"], bytes_accessed=sum(map(len, views)))
"""
)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    directory = tmp_path / "model"
    directory.mkdir()
    for number in (1, 2):
        path = directory / f"model-0000{number}-of-00002.safetensors"
        path.write_bytes(contents(BYTES))
        with path.open("rb") as file:
            os.fsync(file.fileno())
    make_cold(directory)
    return directory


@pytest.fixture
def reader(tmp_path: Path) -> Path:
    path = tmp_path / "reader.py"
    path.write_text(READER)
    return path


@pytest.fixture(autouse=True)
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("READERS_REPORT", str(tmp_path / "readers.json"))
    before = leftovers()
    yield
    wait_until(lambda: leftovers() <= before, "a tracefs instance was left behind")


def leftovers() -> set[str]:
    if os.geteuid() != 0:
        return set()
    try:
        tracefs = TraceFs()
    except UnsupportedError:
        return set()
    try:
        return {name for name in tracefs.instances() if name.startswith("penstock-")}
    finally:
        tracefs.close()


def wait_until(condition: Callable[[], bool], otherwise: str) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, otherwise
        time.sleep(0.01)


def make_cold(directory: Path) -> None:
    for path in directory.iterdir():
        with path.open("rb") as file:
            drop(file.fileno())


def resident_share(directory: Path) -> float:
    cached = total = 0
    for path in directory.glob("*.safetensors"):
        with path.open("rb") as file:
            total += path.stat().st_size
            cached += FileResidency(file.fileno()).resident_bytes(0, path.stat().st_size)
    return cached / total


def run(*arguments: str | Path, report: Path | None = None) -> subprocess.CompletedProcess[str]:
    told = str(report or os.environ["READERS_REPORT"])
    return subprocess.run(
        [PENSTOCK, "run", "--report", told, *map(str, arguments)], env={**os.environ, "READERS_REPORT": told},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


def read(path: Path) -> dict[str, object]:
    body: dict[str, object] = json.loads(path.read_text())
    return body


def unexpected_warnings(report: dict[str, object]) -> list[str]:
    """All but the one that says why programs are observed through /proc here."""
    warnings = report["warnings"]
    assert isinstance(warnings, list)
    return [text for text in warnings if not text.startswith("observing through /proc, because tracefs is not usable")]


def plain(reader: Path, model: Path) -> str:
    return subprocess.run(
        [sys.executable, reader, model, "unseen"], capture_output=True, text=True, timeout=60, check=True
    ).stdout


def test_first_run_records_and_the_second_replays(tmp_path: Path, model: Path, reader: Path) -> None:
    expected = plain(reader, model)
    for mode in ("record", "replay", "replay"):
        make_cold(model)
        ended = run("--", sys.executable, reader, model, report=tmp_path / "report.json")
        assert (ended.returncode, ended.stdout) == (0, expected), ended.stderr
        report = read(tmp_path / "report.json")
        assert report["mode"] == mode
        assert unexpected_warnings(report) == []
        assert len(ended.stderr.splitlines()) <= 2
    timeline = report["timeline"]
    assert isinstance(timeline, list)
    assert timeline
    assert set(timeline[0]) == {"t_s", "device_read_bytes", "accessed_bytes", "resident_bytes"}


def test_replaying_prefetches_before_the_first_read(tmp_path: Path, model: Path, reader: Path) -> None:
    options = ("--service", "s", "--templates", tmp_path / "t", "--model", model)
    assert run(*options, "--", sys.executable, reader, model).returncode == 0
    make_cold(model)
    told = Path(os.environ["READERS_REPORT"])
    process = start(*options, "--report", told, "--", sys.executable, reader, model, "late")
    wait_until(lambda: resident_share(model) > 0.9, "nothing was prefetched")
    process.communicate("go\n", timeout=DEADLINE_S)
    assert process.returncode == 0
    report = read(told)
    prefetched = report["bytes_prefetched"]  # less what the disk's own read-ahead brought along
    assert isinstance(prefetched, int)
    assert prefetched > BYTES


@pytest.mark.parametrize(
    "observer", ["process", pytest.param("tracefs", marks=(pytest.mark.root, needs_access_tracepoints))]
)
def test_a_service_that_runs_on_has_its_template_stored(
    tmp_path: Path, model: Path, reader: Path, observer: str
) -> None:
    unread = model / "pytorch_model.bin"
    unread.write_bytes(bytes(BYTES))
    process = start(
        "--observer", observer, "--service", "s", "--templates", tmp_path / "t",
        "--report", tmp_path / "report.json", "--", sys.executable, reader, model, "wait",
    )  # fmt: skip
    store = TemplateStore(tmp_path / "t")
    assert wait_until_observed(str(tmp_path / "report.json"), bytes_accessed=2 * BYTES), "no report while it runs"
    wait_until(lambda: store.path("s").exists(), "no template was stored while the program ran")
    process.communicate("x", timeout=DEADLINE_S)
    report = read(tmp_path / "report.json")
    assert (report["observer"], report["model_bytes"], report["exit_code"]) == (observer, 2 * BYTES, 0)
    template = store.load("s")
    assert template is not None
    assert {identity.name for identity in template.files} == {path.name for path in model.iterdir()} - {unread.name}
    assert template.bytes_read == 2 * BYTES


def test_two_models_that_the_command_does_not_name(tmp_path: Path, model: Path, reader: Path) -> None:
    second = model.with_name("model-2")
    shutil.copytree(model, second)
    options = ("--service", "both", "--templates", tmp_path / "t")
    process = start(*options, "--", sys.executable, reader, f"{model}*", "wait")
    store = TemplateStore(tmp_path / "t")
    wait_until(lambda: store.path("both").exists(), "no template was stored while the program ran")
    process.communicate("x", timeout=DEADLINE_S)
    template = store.load("both")
    assert template is not None
    assert sorted(template.root_hints) == [str(model), str(second)]
    run(*options, "--", sys.executable, reader, f"{model}*", report=tmp_path / "report.json")
    report = read(tmp_path / "report.json")
    assert (report["mode"], unexpected_warnings(report)) == ("replay", [])


def test_a_shared_template_fits_another_path(tmp_path: Path, model: Path, reader: Path) -> None:
    other = tmp_path / "elsewhere" / "model"
    shutil.copytree(model, other)
    options = ("--templates", tmp_path / "shared")
    assert run(*options, "--", sys.executable, reader, model, report=tmp_path / "1.json").returncode == 0
    assert run(*options, "--", sys.executable, reader, other, report=tmp_path / "2.json").returncode == 0
    assert (read(tmp_path / "1.json")["mode"], read(tmp_path / "2.json")["mode"]) == ("record", "replay")


@pytest.mark.parametrize("code", [0, 3])
def test_exit_status_stdin_and_stdout_are_the_commands_own(code: int) -> None:
    ended = subprocess.run(
        [PENSTOCK, "run", "--", "sh", "-c", f"cat; echo err >&2; exit {code}"],
        input="through", capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (ended.returncode, ended.stdout) == (code, "through")
    assert "err" in ended.stderr


def test_a_signals_death_is_reported_as_shells_do() -> None:
    assert run("--", "sh", "-c", "kill -SEGV $$").returncode == 128 + signal.SIGSEGV


@pytest.mark.parametrize("observer", ["auto", "process"])
def test_a_command_that_does_not_exist(tmp_path: Path, observer: str) -> None:
    ended = run("--observer", observer, "--", str(tmp_path / "nothing"))
    assert ended.returncode == 127
    assert ended.stderr == f"penstock: {tmp_path}/nothing: No such file or directory\n"
    ended = run("--observer", observer, "--", str(tmp_path))
    assert (ended.returncode, ended.stderr) == (126, f"penstock: {tmp_path}: Permission denied\n")


def test_unknown_policy_is_refused_before_the_command_runs(tmp_path: Path) -> None:
    ended = run("--policy", "nonsense", "--", "touch", str(tmp_path / "ran"))
    assert ended.returncode == 125
    assert "unknown policy 'nonsense'" in ended.stderr
    assert not (tmp_path / "ran").exists()


def start(*arguments: str | Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [PENSTOCK, "run", *map(str, arguments)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def child_of(process: subprocess.Popen[str], reader: Path) -> int:
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for pid in map(int, children):
        if str(reader) in Path(f"/proc/{pid}/cmdline").read_text():
            return pid
    raise AssertionError(f"no child of {process.pid} runs {reader}")


def test_killing_penstock_leaves_the_program_running(model: Path, reader: Path) -> None:
    process = start("--", sys.executable, reader, model, "wait")
    assert process.stdout is not None
    assert process.stdin is not None
    assert process.stdout.readline()  # it has read its model
    child = child_of(process, reader)
    process.kill()
    process.wait(DEADLINE_S)
    os.kill(child, 0)  # alive
    process.stdin.write("x")
    process.stdin.close()
    wait_until(lambda: not Path(f"/proc/{child}").exists() or gone(child), "the program did not end")
    process.stdout.close()
    assert process.stderr is not None
    process.stderr.close()


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def test_killing_the_program_ends_penstock_as_the_shell_would(model: Path, reader: Path) -> None:
    process = start("--", sys.executable, reader, model, "wait")
    assert process.stdout is not None
    assert process.stdout.readline()
    os.kill(child_of(process, reader), signal.SIGKILL)
    process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 128 + signal.SIGKILL


@pytest.mark.root
def test_what_is_cached_at_anothers_charge_is_not_burnt(
    model: Path, reader: Path, make_memory_cgroup: Callable[[int], Path], tmp_path: Path
) -> None:
    told = Path(os.environ["READERS_REPORT"])
    options = ["--service", "charged", "--report", told]
    command = [PENSTOCK, "run", *options, "--", sys.executable, reader, model]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout
    plain(reader, model)  # by this process's cgroup
    assert resident_share(model) > 0.9
    told.unlink()
    tasks = make_memory_cgroup(84 * MiB) / "cgroup.procs"  # two interpreters take half of it
    limited = subprocess.Popen(
        [*command, "late"], stdin=subprocess.PIPE, preexec_fn=lambda: tasks.write_text(str(os.getpid()))
    )
    wait_until(told.exists, "penstock is not observing")
    limited.communicate(b"\n", timeout=DEADLINE_S)
    assert limited.returncode == 0
    report = read(told)
    assert report["mode"] == "replay"
    assert int(str(report["budget_bytes"])) < 2 * BYTES
    assert resident_share(model) > 0.9
    assert report["bytes_evicted"] == 0


def test_the_first_prefetch_waits_for_no_numpy() -> None:
    code = (
        "import sys, penstock.cli.run, penstock.pagecache.session, penstock.pagecache.runtime\n"
        "from penstock.pagecache.policies import create_policy\n"
        "create_policy('maio')\n"
        "print({'numpy', 'rich'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_the_first_look_at_what_is_cached_waits_for_no_numpy() -> None:
    code = "import sys, penstock.pagecache.observers.process; print({'numpy', 'rich'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_sigterm_reaches_the_program(model: Path, reader: Path) -> None:
    process = start("--", sys.executable, reader, model, "wait")
    assert process.stdout is not None
    assert process.stdout.readline()
    process.terminate()
    assert process.wait(DEADLINE_S) == 128 + signal.SIGTERM  # and not by the end of its input, which is still open
    process.communicate(timeout=DEADLINE_S)


def test_killing_one_worker_leaves_the_others(tmp_path: Path, model: Path, reader: Path) -> None:
    launcher = tmp_path / "launcher.py"
    launcher.write_text(
        "import subprocess, sys\n"
        "a, b = (subprocess.Popen([sys.executable, *sys.argv[1:]], stdout=subprocess.PIPE) for _ in '12')\n"
        "a.kill(); a.communicate()\n"
        "out = b.communicate()[0]\n"
        "print(out.decode().strip())\n"
    )
    expected = plain(reader, model)
    make_cold(model)
    ended = run("--", sys.executable, launcher, reader, model)
    assert (ended.returncode, ended.stdout) == (0, expected), ended.stderr


def test_a_replaced_file_makes_the_template_stale_and_is_recorded_anew(
    tmp_path: Path, model: Path, reader: Path
) -> None:
    command = ("--", sys.executable, reader, model)
    assert run(*command).returncode == 0
    replaced = model / "model-00002-of-00002.safetensors"
    replaced.unlink()
    replaced.write_bytes(contents(BYTES))
    expected = plain(reader, model)
    ended = run(*command, report=tmp_path / "report.json")
    report = read(tmp_path / "report.json")
    assert (ended.returncode, ended.stdout, report["mode"]) == (0, expected, "record")
    assert "stale" in str(report["warnings"])
    run(*command, report=tmp_path / "report.json")
    assert read(tmp_path / "report.json")["mode"] == "replay"


def test_a_template_of_less_than_is_read_is_recorded_anew(tmp_path: Path, model: Path, reader: Path) -> None:
    part = tmp_path / "part"
    part.mkdir()
    (part / "model-00001-of-00002.safetensors").symlink_to(model / "model-00001-of-00002.safetensors")
    options = ("--service", "s", "--templates", tmp_path / "t", "--model", model, "--")
    store = TemplateStore(tmp_path / "t")
    sizes = []
    for directory in (part, model, model):
        make_cold(model)
        assert run(*options, sys.executable, reader, directory, report=tmp_path / "report.json").returncode == 0
        template = store.load("s")
        assert template is not None
        sizes.append(template.bytes_read)
    report = read(tmp_path / "report.json")
    assert sizes == [BYTES, 2 * BYTES, 2 * BYTES]
    assert (report["mode"], unexpected_warnings(report)) == ("replay", [])


def test_a_file_truncated_since_the_recording(tmp_path: Path, model: Path, reader: Path) -> None:
    command = ("--", sys.executable, reader, model)
    assert run(*command).returncode == 0
    os.truncate(model / "model-00002-of-00002.safetensors", BYTES // 2)
    expected = plain(reader, model)
    ended = run(*command, report=tmp_path / "report.json")
    assert (ended.returncode, ended.stdout) == (0, expected)
    assert "stale" in str(read(tmp_path / "report.json")["warnings"])


@pytest.mark.parametrize("damage", ["truncated", "newer", "garbage"])
def test_a_damaged_template_is_said_so_and_replaced(tmp_path: Path, model: Path, reader: Path, damage: str) -> None:
    store = TemplateStore(tmp_path / "t")
    command = ("--templates", tmp_path / "t", "--service", "s", "--", sys.executable, reader, model)
    assert run(*command).returncode == 0
    path = store.path("s")
    text = path.read_text()
    match damage:
        case "truncated":
            path.write_text(text[: len(text) // 2])
        case "newer":
            path.write_text(text.replace('"version":1', '"version":2'))
        case "garbage":
            path.write_bytes(bytes(range(256)))
    ended = run(*command, report=tmp_path / "report.json")
    assert ended.returncode == 0
    assert "recording anew" in str(read(tmp_path / "report.json")["warnings"])
    assert store.load("s") is not None


def test_a_template_directory_that_cannot_be_written(tmp_path: Path, model: Path, reader: Path) -> None:
    (tmp_path / "t").write_text("a file where the directory should be")
    ended = run("--templates", tmp_path / "t", "--", sys.executable, reader, model, report=tmp_path / "report.json")
    assert ended.returncode == 0
    assert "template" in str(read(tmp_path / "report.json")["warnings"])


POLICY = """
import threading
from penstock.pagecache.base import Policy, Prefetch

class Raises(Policy):
    def prefetch(self, access):
        raise RuntimeError("broken")

class Beyond(Policy):
    def prefetch(self, access):
        return [Prefetch(access.file, 0, access.file.size_bytes + 1)] if access else []

class Blocks(Policy):
    def prefetch(self, access):
        threading.Event().wait(60)
        return []
"""


@pytest.mark.parametrize(
    ("name", "words"), [("Raises", "broken"), ("Beyond", "inside the file"), ("Blocks", "has not returned")]
)
def test_a_broken_policy_does_not_hurt_the_program(
    tmp_path: Path, model: Path, reader: Path, monkeypatch: pytest.MonkeyPatch, name: str, words: str
) -> None:
    (tmp_path / "broken.py").write_text(POLICY)
    monkeypatch.chdir(tmp_path)
    expected = plain(reader, model)
    make_cold(model)
    began = time.monotonic()
    command = ("--", sys.executable, reader, model, *(["unseen"] if name == "Blocks" else []))
    ended = run("--policy", f"broken:{name}", *command, report=tmp_path / "report.json")
    assert (ended.returncode, ended.stdout) == (0, expected), ended.stderr
    assert words in str(read(tmp_path / "report.json")["warnings"])
    assert time.monotonic() - began < 30


def test_burn_leaves_little_and_keep_leaves_all(tmp_path: Path, model: Path, reader: Path) -> None:
    command = ("--", sys.executable, reader, model)
    assert run("--cache", "keep", *command).returncode == 0
    assert resident_share(model) > 0.9
    make_cold(model)
    assert run("--cache", "auto", *command).returncode == 0
    assert resident_share(model) > 0.9
    assert run("--cache", "burn", *command).returncode == 0
    assert resident_share(model) < 0.05


def test_native_records_nothing(tmp_path: Path, model: Path, reader: Path) -> None:
    ended = run(
        "--policy", "native", "--templates", tmp_path / "t", "--", sys.executable, reader, model,
        report=tmp_path / "report.json",
    )  # fmt: skip
    assert ended.returncode == 0
    report = read(tmp_path / "report.json")
    assert (report["mode"], report["bytes_prefetched"]) == ("observe", 0)
    assert not list((tmp_path / "t").glob("*"))


def test_as_an_ordinary_user(tmp_path: Path, reader: Path, model: Path, as_ordinary_user: list[str]) -> None:
    own = tmp_path / "own"
    own.mkdir()
    own.chmod(0o777)
    environment = {**os.environ, "HOME": str(own), "XDG_CACHE_HOME": str(own / "cache")}
    options = ["--templates", own / "templates", "--report", own / "report.json"]
    command = [*as_ordinary_user, PENSTOCK, "run", *options, "--", sys.executable, reader, model, "wait"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    ) as recording:
        templates = own / "templates"
        wait_until(lambda: templates.exists() and any(templates.iterdir()), "nothing was recorded")
        _, errors = recording.communicate(b"x", timeout=DEADLINE_S)
    assert recording.returncode == 0, errors
    report = read(own / "report.json")
    assert (report["observer"], report["mode"]) == ("process", "record")
    assert report["bytes_accessed"] == 2 * BYTES
    make_cold(model)
    command[command.index(own / "report.json")] = own / "replay.json"  # access(2) knows no ambient capability
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    ) as replaying:
        if "PENSTOCK_RIG" in os.environ:
            wait_until_observed(str(own / "replay.json"), bytes_accessed=2 * BYTES)
        _, errors = replaying.communicate(b"x", timeout=DEADLINE_S)
    assert replaying.returncode == 0, errors
    report = read(own / "replay.json")
    assert (report["observer"], report["mode"]) == ("process", "replay")

"""penstock.linux.fanotify with real files and real children that open them."""

from __future__ import annotations

import os
import pickle
import select
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from penstock.errors import UnsupportedError
from penstock.linux.fanotify import OpenEvent, OpenWatch, probe

needs_fanotify = pytest.mark.skipif(probe().method is None, reason=f"no fanotify here: {probe().reason}")
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root for fanotify with descriptors")

OPEN = "import sys; open(sys.argv[1], 'rb').close()"


@pytest.fixture
def directory() -> Iterator[Path]:
    """Unlike tmp_path, other users can look into it."""
    with tempfile.TemporaryDirectory(prefix="penstock-test-") as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.fixture
def file(directory: Path) -> Path:
    path = directory / "model.safetensors"
    path.write_bytes(b"weights")
    path.chmod(0o644)
    return path


def opened_by_child(path: Path) -> int:
    with subprocess.Popen([sys.executable, "-c", OPEN, path]) as child:
        pass
    assert child.returncode == 0
    return child.pid


def as_nobody(body: Callable[[], Any]) -> Any:
    """The result of a function in a child without privileges, or the error that it raised."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
            try:
                result = body()
            except Exception as error:  # noqa: BLE001 (the parent judges it)
                result = error
            os.write(writer, pickle.dumps(result))
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as results:
        data = results.read()
    os.waitpid(pid, 0)
    return pickle.loads(data)  # noqa: S301 (this test's own child wrote it)


def supported(result: Any) -> Any:
    if isinstance(result, UnsupportedError):
        pytest.skip(str(result))
    if isinstance(result, Exception):
        raise result
    return result


@pytest.mark.root
@needs_root
@needs_fanotify
class TestAsRoot:
    def test_a_childs_open(self, file: Path) -> None:
        with OpenWatch([file]) as watch:
            pid = opened_by_child(file)
            assert select.select([watch], [], [], 10)[0] == [watch]
            assert watch.read() == [OpenEvent(file, pid)]
            assert watch.read() == []

    def test_only_watched_files(self, file: Path, directory: Path) -> None:
        other = directory / "other"
        other.touch()
        with OpenWatch([file]) as watch:
            opened_by_child(other)
            assert watch.read() == []

    def test_several_files_in_order(self, file: Path, directory: Path) -> None:
        other = directory / "other"
        other.touch()
        with OpenWatch([file, other]) as watch:
            pids = [opened_by_child(path) for path in (other, file)]
            assert watch.read() == [OpenEvent(other, pids[0]), OpenEvent(file, pids[1])]

    def test_through_a_link(self, file: Path, directory: Path) -> None:
        link = directory / "link"
        link.symlink_to(file)
        with OpenWatch([link]) as watch:
            pid = opened_by_child(file)
            assert watch.read() == [OpenEvent(link, pid)]

    def test_leaves_no_descriptors(self, file: Path) -> None:
        before = os.listdir("/proc/self/fd")
        with OpenWatch([file]) as watch:
            opened_by_child(file)
            watch.read()
        watch.close()
        assert os.listdir("/proc/self/fd") == before


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become somebody else")
class TestUnprivileged:
    @pytest.fixture(autouse=True)
    def _supported(self) -> None:
        if as_nobody(lambda: probe().method) != "fid":
            pytest.skip("no unprivileged fanotify here (Linux 5.13)")

    def test_own_opens_come_with_the_pid(self, file: Path) -> None:
        def body() -> Any:
            with OpenWatch([file]) as watch:
                file.read_bytes()
                return watch.method, os.getpid(), watch.read()

        method, pid, events = supported(as_nobody(body))
        assert method == "fid"
        assert events == [OpenEvent(file, pid)]

    def test_others_come_without(self, file: Path) -> None:
        def body() -> Any:
            with OpenWatch([file]) as watch:
                pid = os.fork()
                if pid == 0:
                    file.read_bytes()
                    os._exit(0)
                os.waitpid(pid, 0)
                return watch.read()

        events = supported(as_nobody(body))
        assert events == [OpenEvent(file, None)]


@needs_fanotify
class TestRefusals:
    def test_a_missing_file(self, directory: Path) -> None:
        with pytest.raises(FileNotFoundError):
            OpenWatch([directory / "missing"])

    def test_a_directory(self, directory: Path) -> None:
        with pytest.raises(IsADirectoryError):
            OpenWatch([directory])

    @pytest.mark.root
    @needs_root
    def test_a_file_that_may_not_be_read(self, file: Path) -> None:
        file.chmod(0o600)

        assert isinstance(as_nobody(lambda: OpenWatch([file]).close()), PermissionError)

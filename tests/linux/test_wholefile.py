"""penstock.linux.wholefile: a name when it is whole, and nothing else, however a writer ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from penstock.linux import wholefile
from penstock.linux.wholefile import WholeFile, open_unnamed, remove_abandoned


@pytest.fixture(params=["unnamed", "named"])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With and without files that have no name."""
    if request.param == "named":
        monkeypatch.setattr(wholefile, "_without_name", lambda directory, mode: None)
    return str(request.param)


def write(path: Path, contents: bytes) -> None:
    with WholeFile(path) as file:
        file.write(contents)
        file.commit()


@pytest.mark.usefixtures("kind")
class TestWholeFile:
    def test_it_has_a_name_when_it_is_whole(self, tmp_path: Path) -> None:
        path = tmp_path / "file"
        for contents in (b"old", b"new and longer"):
            with WholeFile(path, 0o640) as file:
                file.write(contents[3:], 3)
                file.write(contents[:3])
                before = path.read_bytes() if path.exists() else b""
                file.commit()
                assert path.read_bytes() == contents != before
            assert os.listdir(tmp_path) == ["file"]
        assert path.stat().st_mode & 0o777 == 0o640

    def test_without_commit_nothing_is_left(self, tmp_path: Path) -> None:
        path = tmp_path / "file"
        with WholeFile(path) as file:
            file.write(b"half")
        assert os.listdir(tmp_path) == []
        write(path, b"old")
        with pytest.raises(ZeroDivisionError), WholeFile(path) as file:
            file.write(b"half" * (1 // 0))
        file.close()
        assert os.listdir(tmp_path) == ["file"]
        assert path.read_bytes() == b"old"

    def test_nothing_is_replaced_that_should_stay(self, tmp_path: Path) -> None:
        path = tmp_path / "file"
        with WholeFile(path) as file:
            file.write(b"new")
            path.write_bytes(b"came meanwhile")
            with pytest.raises(FileExistsError):
                file.commit(replacing=False)
        assert path.read_bytes() == b"came meanwhile"
        assert os.listdir(tmp_path) == ["file"]
        path.unlink()
        with WholeFile(path) as file:
            file.write(b"new")
            file.commit(replacing=False)
        assert path.read_bytes() == b"new"

    def test_what_a_killed_writer_left_goes_and_a_live_one_s_stays(self, tmp_path: Path, kind: str) -> None:
        path, other = tmp_path / "file", tmp_path / "file.more"
        write(path, b"old")
        for each in (path, other):  # killed at the one moment when there is a second name
            code = (
                "import os, signal, sys, pathlib\n"
                "from penstock.linux import wholefile\n"
                f"if {kind == 'named'}:\n"
                "    wholefile._without_name = lambda directory, mode: None\n"
                "path = pathlib.Path(sys.argv[1])\n"
                "path.touch()\n"
                "os.rename = lambda *paths: os.kill(os.getpid(), signal.SIGKILL)\n"
                "file = wholefile.WholeFile(path)\n"
                "file.write(b'new')\n"
                "file.commit()\n"
            )
            done = subprocess.run([sys.executable, "-c", code, str(each)], check=False)
            assert done.returncode == -signal.SIGKILL
        assert path.read_bytes() == b"old"
        left = {entry for entry in os.listdir(tmp_path) if entry.startswith(".")}
        assert len(left) == 2
        with WholeFile(path) as live:
            live.write(b"live")
            mine = set(os.listdir(tmp_path)) - left
            write(path, b"newest")
            assert mine <= set(os.listdir(tmp_path))
            live.commit()
        assert path.read_bytes() == b"live"
        (others,) = (entry for entry in os.listdir(tmp_path) if entry.startswith("."))
        assert others.startswith(".file.more.")
        remove_abandoned(other)
        assert sorted(os.listdir(tmp_path)) == ["file", "file.more"]

    def test_what_looks_alike_stays(self, tmp_path: Path) -> None:
        alike = [".file.0123", ".file.0123456789abcdeg", ".file.0123456789abcdef.txt", "file.0123456789abcdef"]
        for name in alike:
            (tmp_path / name).touch()
        (tmp_path / ".file.0123456789abcdef").symlink_to("file.0123456789abcdef")
        write(tmp_path / "file", b"new")
        assert set(os.listdir(tmp_path)) == {*alike, "file", ".file.0123456789abcdef"}

    def test_a_file_that_never_gets_a_name(self, tmp_path: Path) -> None:
        fd = open_unnamed(tmp_path)
        try:
            assert os.listdir(tmp_path) == []
            os.write(fd, b"something")
            assert os.pread(fd, 9, 0) == b"something"
        finally:
            os.close(fd)

    def test_no_such_directory(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError):
            WholeFile(tmp_path / "nothing" / "file")
        with pytest.raises(FileNotFoundError):
            open_unnamed(tmp_path / "nothing")

"""penstock.storage.region on files and on loop devices."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from penstock.errors import RegionError
from penstock.linux.extents import Extent, ExtentFlag
from penstock.storage import region as region_module
from penstock.storage.base import BLOCK_BYTES, READ, WRITE, batch
from penstock.storage.buffers import huge_buffer
from penstock.storage.region import DATA_START, Region
from penstock.storage.threads import ThreadEngine
from penstock.units import KiB, MiB

OWNER = "penstock tests"


class TestOnAFile:
    def test_it_is_all_there_from_the_start(self, tmp_path: Path) -> None:
        path = tmp_path / "region"
        with Region.create(path, 8 * MiB + 1, owner=OWNER) as region:
            assert region.size_bytes == 8 * MiB + BLOCK_BYTES
            assert path.stat().st_size == DATA_START + region.size_bytes
            assert path.stat().st_blocks * 512 >= DATA_START + region.size_bytes
            assert path.stat().st_mode & 0o777 == 0o600
            if region.pieces is not None:
                assert sum(piece.stop - piece.start for piece in region.pieces) >= region.size_bytes
            identifier = region.header.identifier
        assert [entry.name for entry in tmp_path.iterdir()] == ["region"]
        with Region.open(path, owner=OWNER) as region:
            assert region.header.identifier == identifier
            assert region.header.owner == OWNER

    def test_what_is_written_there_stays(self, tmp_path: Path) -> None:
        path = tmp_path / "region"
        memory = huge_buffer(2 * MiB)
        memory[:] = os.urandom(2 * MiB)
        expected = bytes(memory)
        with Region.create(path, 8 * MiB, owner=OWNER) as region, ThreadEngine() as engine:
            start, stop = region.allocator.allocate(2 * MiB, 1 * MiB)
            assert start >= DATA_START
            file, buffer = engine.add_file(region.fd), engine.add_buffer(memory)
            one = {
                "file": [file],
                "offset": [start],
                "length": [stop - start],
                "buffer": [buffer],
                "buffer_offset": [0],
            }
            engine.submit(batch(WRITE, **one))
            assert engine.wait(1)["result"].tolist() == [2 * MiB]
            memory[:] = bytes(2 * MiB)
            engine.submit(batch(READ, **one))
            assert engine.wait(1)["result"].tolist() == [2 * MiB]
            assert bytes(memory) == expected
        assert path.read_bytes()[start:stop] == expected
        with Region.open(path, owner=OWNER):
            pass

    def test_one_that_is_there_stays_unless_told(self, tmp_path: Path) -> None:
        path = tmp_path / "region"
        with Region.create(path, 1 * MiB, owner=OWNER) as region:
            identifier = region.header.identifier
            with pytest.raises(FileExistsError, match="is there already"):
                Region.create(path, 2 * MiB, owner=OWNER)
            with pytest.raises(RegionError, match="in use"):
                Region.create(path, 2 * MiB, owner=OWNER, overwrite=True)
            with pytest.raises(RegionError, match="in use"):
                Region.open(path, owner=OWNER)
        with Region.create(path, 2 * MiB, owner=OWNER, overwrite=True) as region:
            assert region.header.identifier != identifier
            assert region.size_bytes == 2 * MiB

    def test_anothers(self, tmp_path: Path) -> None:
        path = tmp_path / "region"
        Region.create(path, 1 * MiB, owner=OWNER).close()
        with pytest.raises(RegionError, match=r"belongs to 'penstock tests', not to 'someone'"):
            Region.open(path, owner="someone")

    @pytest.mark.parametrize(
        ("at", "words"),
        [(0, "does not begin with its magic"), (16, "version"), (24, "damaged"), (100, "damaged"), (4090, "damaged")],
    )
    def test_a_damaged_header(self, tmp_path: Path, at: int, words: str) -> None:
        path = tmp_path / "region"
        Region.create(path, 1 * MiB, owner=OWNER).close()
        with path.open("r+b") as file:
            file.seek(at)
            old = file.read(1)
            file.seek(at)
            file.write(bytes([old[0] ^ 0x40]))
        with pytest.raises(RegionError, match=words):
            Region.open(path, owner=OWNER)

    @pytest.mark.parametrize("left_bytes", [0, 100, BLOCK_BYTES, DATA_START, DATA_START + 1 * MiB - 1])
    def test_a_truncated_one(self, tmp_path: Path, left_bytes: int) -> None:
        path = tmp_path / "region"
        Region.create(path, 1 * MiB, owner=OWNER).close()
        os.truncate(path, left_bytes)
        with pytest.raises(RegionError, match=r"truncated|magic"):
            Region.open(path, owner=OWNER)

    def test_one_that_was_copied_with_holes(self, tmp_path: Path) -> None:
        path, copy = tmp_path / "region", tmp_path / "copy"
        with Region.create(path, 4 * MiB, owner=OWNER) as region:
            if region.pieces is None:
                pytest.skip(f"{path} is on a file system that does not tell where files lie")
        with path.open("rb") as source, copy.open("wb") as target:
            target.write(source.read(BLOCK_BYTES))
            target.truncate(path.stat().st_size)
        with pytest.raises(RegionError, match="a hole begins at byte 4096"):
            Region.open(copy, owner=OWNER)

    @pytest.mark.parametrize("flag", [ExtentFlag.ENCODED, ExtentFlag.SHARED, ExtentFlag.DELALLOC])
    def test_one_that_cannot_be_written_in_place(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flag: ExtentFlag
    ) -> None:
        path = tmp_path / "region"
        Region.create(path, 1 * MiB, owner=OWNER).close()
        monkeypatch.setattr(region_module, "extents", lambda fd, start, stop: [Extent(0, stop, 4096, flag)])
        with pytest.raises(RegionError, match=rf"byte 0 is not where .*{flag.name}"):
            Region.open(path, owner=OWNER)

    def test_a_file_system_that_does_not_tell(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(fd: int, start: int, stop: int) -> list[Extent]:
            raise OSError(errno.EOPNOTSUPP, "not supported")

        monkeypatch.setattr(region_module, "extents", refuse)
        with Region.create(tmp_path / "region", 1 * MiB, owner=OWNER) as region:
            assert region.pieces is None

    def test_nonsense(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="a region has 4096 bytes at least"):
            Region.create(tmp_path / "region", 5, owner=OWNER)
        with pytest.raises(ValueError, match="owner"):
            Region.create(tmp_path / "region", 1 * MiB, owner="")
        with pytest.raises(FileNotFoundError):
            Region.open(tmp_path / "nothing", owner=OWNER)
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.root
    def test_a_full_file_system_shows_at_once(self, tmp_path: Path) -> None:
        mount = tmp_path / "small"
        mount.mkdir()
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(mount)], capture_output=True, text=True
        )
        if done.returncode:
            pytest.skip(f"needs to mount: {done.stderr.strip()}")
        try:
            with pytest.raises(OSError, match=r"9.0 MiB cannot be set aside") as caught:
                Region.create(mount / "region", 8 * MiB, owner=OWNER)
            assert caught.value.errno == errno.ENOSPC
            assert list(mount.iterdir()) == []
            with Region.create(mount / "region", 1 * MiB, owner=OWNER) as region:
                assert region.size_bytes == 1 * MiB
        finally:
            subprocess.run(["umount", str(mount)], check=True)

    def test_a_process_that_is_killed_meanwhile_leaves_no_region(self, tmp_path: Path) -> None:
        code = (
            "import os, signal, sys\n"
            "from penstock.storage.region import Region\n"
            "os.fsync = lambda fd: os.kill(os.getpid(), signal.SIGKILL)\n"
            f"Region.create(sys.argv[1], 1 << 20, owner={OWNER!r})\n"
        )
        done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "region")], check=False)
        assert done.returncode == -9
        assert not (tmp_path / "region").exists()


def test_it_grows(tmp_path: Path) -> None:
    path = tmp_path / "region"
    with Region.create(path, 4 * MiB, owner=OWNER) as region:
        start, stop = region.allocator.allocate(4 * MiB)
        identifier = region.header.identifier
        region.grow(9 * MiB + 1)
        assert region.size_bytes == 9 * MiB + 4 * KiB
        assert region.allocator.allocate(5 * MiB) == (stop, stop + 5 * MiB)
        region.grow(1)  # it is larger already
        assert region.size_bytes == 9 * MiB + 4 * KiB
        assert region.pieces is None or region.pieces[-1].stop >= path.stat().st_size
        assert start == 1 * MiB
    with Region.open(path, owner=OWNER) as region:
        assert region.size_bytes == 9 * MiB + 4 * KiB
        assert region.header.identifier == identifier
    os.truncate(path, DATA_START + 6 * MiB + 1)  # a power cut while it grew: some of it is there
    with Region.open(path, owner=OWNER) as region:
        assert region.size_bytes == 6 * MiB
    os.truncate(path, DATA_START + 4 * MiB)
    with Region.open(path, owner=OWNER) as region:
        assert region.size_bytes == 4 * MiB


def test_it_cannot_grow_so_much(tmp_path: Path) -> None:
    path = tmp_path / "region"
    with Region.create(path, 4 * MiB, owner=OWNER) as region:
        with pytest.raises(OSError, match="more cannot be set aside"):
            region.grow(1 << 50)
        assert path.stat().st_size == region.header.size_bytes
        region.allocator.allocate(4 * MiB)
    Region.open(path, owner=OWNER).close()


@pytest.mark.root
class TestOnADevice:
    def test_it_does_not_grow(self, loop_device: Path) -> None:
        with (
            Region.create(loop_device, 4 * MiB, owner=OWNER) as region,
            pytest.raises(RegionError, match="cannot grow"),
        ):
            region.grow(8 * MiB)

    def test_an_empty_one(self, loop_device: Path) -> None:
        with Region.create(loop_device, 0, owner=OWNER) as region:
            assert region.size_bytes == 31 * MiB
            assert region.pieces == [Extent(0, 32 * MiB, 0, ExtentFlag(0))]
            with pytest.raises(RegionError, match="in use"):
                Region.open(loop_device, owner=OWNER)
            with pytest.raises(RegionError, match="in use"):
                Region.create(loop_device, 0, owner=OWNER, overwrite=True)
        with Region.open(loop_device, owner=OWNER) as region:
            assert region.size_bytes == 31 * MiB

    def test_a_part_of_it(self, loop_device: Path) -> None:
        with Region.create(loop_device, 4 * MiB, owner=OWNER) as region:
            assert region.size_bytes == 4 * MiB
        with pytest.raises(OSError, match=r"101 MiB are wanted, the device has 32.0 MiB") as caught:
            Region.create(loop_device, 100 * MiB, owner=OWNER)
        assert caught.value.errno == errno.ENOSPC

    @pytest.mark.parametrize(
        ("command", "carried"),
        [(["mkfs.ext4", "-q"], "ext2, ext3 or ext4"), (["mkswap"], "swap"), (["mkfs.vfat"], "vfat")],
    )
    def test_what_it_carries_goes_only_if_told_twice(self, loop_device: Path, command: list[str], carried: str) -> None:
        if shutil.which(command[0]) is None:
            pytest.skip(f"needs {command[0]}")
        subprocess.run([*command, str(loop_device)], check=True, capture_output=True)
        before = loop_device.read_bytes()
        for given in ({}, {"overwrite": True}, {"destroying": carried}, {"overwrite": True, "destroying": "xfs"}):
            with pytest.raises(RegionError, match=rf"carries {carried}; .* overwrite=True, destroying='{carried}'"):
                Region.create(loop_device, 0, owner=OWNER, **given)
        with pytest.raises(RegionError, match="does not begin with its magic"):
            Region.open(loop_device, owner=OWNER)
        assert loop_device.read_bytes() == before
        Region.create(loop_device, 0, owner=OWNER, overwrite=True, destroying=carried).close()
        with pytest.raises(RegionError, match="carries a region of penstock tests"):
            Region.create(loop_device, 0, owner="someone")

    def test_data_of_unknown_kind(self, loop_device: Path) -> None:
        with loop_device.open("r+b") as file:
            file.seek(12345)
            file.write(b"x")
        with pytest.raises(RegionError, match="carries data of unknown kind"):
            Region.create(loop_device, 0, owner=OWNER)

"""penstock.storage.nvme: how requests are cut anywhere, and the contract on the drives of the rig."""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from tests.drives import Drive, drives

from penstock.cli.doctor import checks
from penstock.errors import UnsupportedError
from penstock.linux import nvme, uring
from penstock.linux.uring import Cqes, Sqes
from penstock.storage.base import BLOCK_BYTES, READ, WRITE, batch, completed
from penstock.storage.buffers import huge_buffer
from penstock.storage.nvme import CommandLimits, NvmeEngine, _Wholes, command_limits, split
from penstock.storage.region import Region
from penstock.testing.engine import EngineTests
from penstock.units import KiB, MiB, format_size


@given(
    st.lists(st.tuples(st.integers(0, 1 << 40), st.integers(1, 500), st.integers(0, 1 << 20)), min_size=1, max_size=20),
    st.lists(st.integers(1, 40), min_size=20, max_size=20),
)
def test_parts_are_the_requests(requests: list[tuple[int, int, int]], largest: list[int]) -> None:
    offset, length, buffer_offset = (np.array(values) * 512 for values in zip(*requests, strict=True))
    whole = batch(READ, file=0, offset=offset, length=length, buffer=3, buffer_offset=buffer_offset)
    most = np.array(largest[: len(whole)]) * 512
    parts, counts = split(whole, most)
    assert len(parts) == counts.sum()
    assert (parts["length"] > 0).all()
    assert (parts["length"] <= np.repeat(most, counts)).all()
    at = 0
    for request, count in zip(whole, counts.tolist(), strict=True):
        mine = parts[at : at + count]
        at += count
        assert mine["length"].sum() == request["length"]
        assert (mine["offset"][0], mine["buffer_offset"][0]) == (request["offset"], request["buffer_offset"])
        for name in ("offset", "buffer_offset"):
            assert (np.diff(mine[name]) == mine["length"][:-1]).all()
        for name in ("token", "file", "buffer", "operation"):
            assert (mine[name] == request[name]).all()


@given(st.data())
def test_requests_are_put_together_from_their_parts_in_any_order(data: st.DataObject) -> None:
    wholes = _Wholes()
    for _ in range(3):
        count = data.draw(st.integers(1, 8))
        requests = batch(
            READ, file=0, offset=np.arange(count) * 4096, length=4096, buffer=0, buffer_offset=0,
            token=np.arange(count) + 100,
        )  # fmt: skip
        parts, counts = split(requests, np.array([data.draw(st.sampled_from([512, 1024, 4096])) for _ in range(count)]))
        parts["token"] = np.repeat(wholes.add(requests, counts), counts)
        fails = np.array(data.draw(st.lists(st.booleans(), min_size=len(parts), max_size=len(parts))))
        done = completed(parts, np.where(fails, -1 - np.arange(len(parts)), parts["length"]))
        order = np.array(data.draw(st.permutations(range(len(parts)))))
        cut = data.draw(st.integers(0, len(parts)))
        found = np.concatenate([wholes.fold(done[order[:cut]])[0], wholes.fold(done[order[cut:]])[0]])
        found = found[np.argsort(found["token"])]
        assert found["token"].tolist() == requests["token"].tolist()
        starts = np.cumsum(counts) - counts
        expected = []
        for start, size in zip(starts.tolist(), counts.tolist(), strict=True):
            errors = [-1 - part for part in range(start, start + size) if fails[part]]
            expected.append(errors[0] if errors else 4096)
        assert found["result"].tolist() == expected


@pytest.mark.parametrize(
    ("mdts", "queue_bytes", "segments", "lba_bytes", "expected"),
    [
        (512 * KiB, 4 * MiB, 128, 512, (512 * KiB, 508 * KiB)),
        (512 * KiB, 512 * KiB, 127, 4096, (508 * KiB, 504 * KiB)),
        (16 * KiB, 16 * KiB, 5, 512, (16 * KiB, 16 * KiB)),
        (1 * MiB, 128 * KiB, 254, 4096, (128 * KiB, 128 * KiB)),  # an IOMMU's limit
        (None, 4 * MiB, 10_000, 512, (4 * MiB, 4 * MiB)),
        (None, 1 << 40, 1 << 30, 512, (32 * MiB, 32 * MiB)),  # the number of blocks has 16 bits
        (64 * KiB, 64 * KiB, 5, 16 * KiB, (16 * KiB, 16 * KiB)),
    ],
)
def test_what_a_command_moves_is_the_least_of_all_limits(
    mdts: int | None, queue_bytes: int, segments: int, lba_bytes: int, expected: tuple[int, int]
) -> None:
    controller = nvme.Controller("", "", "", mdts)
    queue = nvme.QueueLimits(queue_bytes, segments, is_zoned=False)
    assert command_limits(controller, queue, lba_bytes) == CommandLimits(*expected)


@pytest.mark.skipif(bool(uring.probe()), reason=f"needs io_uring: {uring.probe()}")
def test_what_is_no_namespace(tmp_path: Path) -> None:
    try:
        engine = NvmeEngine()
    except UnsupportedError as error:
        pytest.skip(str(error))
    with engine, (tmp_path / "file").open("wb") as file:
        for _ in range(2):
            with pytest.raises(UnsupportedError, match="is no NVMe namespace"):
                engine.add_file(file.fileno())
        with pytest.raises(ValueError, match="there is no file 0"):
            engine.remove_file(0)


class _Noting(NvmeEngine):
    """Notes what it tells the kernel."""

    def __init__(self, depth: int = 64) -> None:
        super().__init__(depth)
        self.lengths: list[int] = []

    def _entries(self, slots: NDArray[np.intp]) -> Sqes:
        entries = super()._entries(slots)
        self.lengths += entries["command"]["length"].tolist()
        return entries


class _Ailing(NvmeEngine):
    """Its drive answers each command with a status, so many times, before it carries it out."""

    def __init__(self, status: int, times: int) -> None:
        super().__init__(8)
        pop, came = self._ring.pop, Counter[int]()

        def ailing_pop() -> Cqes:
            taken = pop()
            for index, slot in enumerate(taken["user_data"].tolist()):
                came[slot] += 1
                if came[slot] <= times:
                    taken["result"][index] = status
            return taken

        self._ring.pop = ailing_pop  # type: ignore[method-assign]


class _Misled(NvmeEngine):
    """Believes that a namespace has more blocks than it has."""

    def _file_added(self, number: int, fd: int) -> None:
        super()._file_added(number, fd)
        self._namespaces["size_bytes"][number] += 1 * MiB


def write_plainly(path: Path, offset: int, data: bytes) -> None:
    """Through the block device, past the page cache."""
    fd = os.open(path, os.O_WRONLY | os.O_DIRECT)
    try:
        memory = huge_buffer(len(data))
        memory[:] = data
        assert os.pwrite(fd, memory, offset) == len(data)
    finally:
        os.close(fd)


def read_plainly(path: Path, offset: int, length: int) -> bytes:
    """Through the block device, past the page cache."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    try:
        memory = huge_buffer(length)
        assert os.preadv(fd, [memory], offset) == length
        return bytes(memory)
    finally:
        os.close(fd)


@pytest.mark.rig
class TestNvmeEngine(EngineTests):
    """The file is the end of the namespace, and ends within 4 KiB where its blocks are smaller."""

    ways = (0,)
    drive: Drive

    @pytest.fixture(params=drives(), ids=str, autouse=True)
    def use_drive(self, request: pytest.FixtureRequest) -> None:
        self.drive = request.param
        self.size_bytes = 1 * MiB + self.drive.lba_bytes
        self.start_bytes = self.drive.size_bytes - self.size_bytes

    def make_engine(self) -> _Noting:
        return _Noting()

    def set_up(self, directory: Path) -> tuple[Path, bytes]:
        contents = self.make_contents()
        write_plainly(self.drive.block_device, self.start_bytes, contents)
        return self.drive.character_device, contents

    def open(self, path: Path, flags: int) -> int:
        return super().open(path, flags & ~os.O_DIRECT)  # which a character device does not know

    def read_back(self, path: Path) -> bytes:
        return read_plainly(self.drive.block_device, self.start_bytes, self.size_bytes)

    @contextlib.contextmanager
    def engine_on(
        self, path: Path, flags: int, buffer_bytes: int = 0
    ) -> Iterator[tuple[NvmeEngine, NDArray[np.uint8], int, int]]:
        with super().engine_on(path, flags, buffer_bytes) as (engine, memory, file, buffer):
            assert isinstance(engine, _Noting)
            yield engine, memory, file, buffer
            assert max(engine.lengths, default=0) <= self.drive.transfer_bytes

    def test_any_bytes_of_a_file_that_is_read_through_the_cache(self, tmp_path: Path) -> None:
        """There is no cache: whole blocks only. But any memory, even at an odd address."""
        path, contents = self.set_up(tmp_path)
        lba_bytes, size_bytes = self.drive.lba_bytes, 256 * KiB
        with self.engine_on(path, os.O_RDONLY) as (engine, memory, file, buffer):
            wrong = self.batch(
                READ, file=file, offset=[13, 0, lba_bytes // 2], length=[lba_bytes, 99, lba_bytes], buffer=buffer,
                buffer_offset=0,
            )  # fmt: skip
            engine.submit(wrong)
            assert engine.wait(3)["result"].tolist() == [-errno.EINVAL] * 3
            for at in (0, 4, 512, 7):
                memory[:] = 0xA5
                engine.submit(
                    self.batch(READ, file=file, offset=[lba_bytes], length=size_bytes, buffer=buffer, buffer_offset=at)
                )
                assert engine.wait(1)["result"].tolist() == [size_bytes]
                expected = b"\xa5" * at + contents[lba_bytes : lba_bytes + size_bytes]
                assert memory.tobytes() == expected.ljust(len(memory), b"\xa5")

    def test_transfers_cut_short_go_on(self, tmp_path: Path) -> None:
        """Nothing is cut short, but everything is cut up."""
        path, contents = self.set_up(tmp_path)
        with self.engine_on(path, os.O_RDONLY) as (engine, memory, file, buffer):
            assert isinstance(engine, _Noting)
            self.limit_transfers(engine, 3 * BLOCK_BYTES)
            engine.submit(self.everything(file, buffer, 256 * KiB))
            self.check_read(engine.wait(5), memory, contents)
            assert max(engine.lengths) == 3 * BLOCK_BYTES
            assert sum(engine.lengths) == self.size_bytes
            assert engine.statistics().continued == 0

    def test_commands_are_as_large_as_they_may_be(self, tmp_path: Path) -> None:
        path, contents = self.set_up(tmp_path)
        with self.engine_on(path, os.O_RDONLY) as (engine, memory, file, buffer):
            assert isinstance(engine, _Noting)
            limits = engine.limits(file)
            assert self.drive.transfer_bytes - 8 * KiB <= limits.unaligned <= limits.aligned
            assert limits.aligned <= self.drive.transfer_bytes
            engine.submit(self.everything(file, buffer, 8 * MiB))
            self.check_read(engine.wait(1), memory, contents)
            assert len(engine.lengths) == -(-self.size_bytes // limits.aligned)

    def test_the_largest_commands_take_the_most_scattered_memory(self, tmp_path: Path) -> None:
        """Pages taken one by one from two regions, so that hardly two of them lie side by side."""
        import mmap

        path, contents = self.set_up(tmp_path)
        with self.engine_on(path, os.O_RDONLY) as (engine, _, file, _):
            pages = -(-self.size_bytes // mmap.PAGESIZE) + 1
            memory = np.frombuffer(mmap.mmap(-1, pages * mmap.PAGESIZE), np.uint8)
            other = np.frombuffer(mmap.mmap(-1, pages * mmap.PAGESIZE), np.uint8)
            for page in np.random.default_rng(5).permutation(pages).tolist():
                memory[page * mmap.PAGESIZE] = other[page * mmap.PAGESIZE] = 1
            buffer = engine.add_buffer(memory)
            for at in (0, 512, 4092):
                length = self.size_bytes // 4096 * 4096
                engine.submit(
                    self.batch(READ, file=file, offset=[0], length=[length], buffer=buffer, buffer_offset=[at])
                )
                assert engine.wait(1)["result"].tolist() == [length]
                assert memory[at : at + length].tobytes() == contents[:length]

    def test_writes_end_at_the_end(self, tmp_path: Path) -> None:
        path, contents = self.set_up(tmp_path)
        lba_bytes = self.drive.lba_bytes
        with self.engine_on(path, os.O_RDWR) as (engine, memory, file, buffer):
            memory[:] = 3
            offset = [self.size_bytes - lba_bytes, self.size_bytes, self.size_bytes + MiB, self.size_bytes - lba_bytes]
            length = [2 * lba_bytes, lba_bytes, lba_bytes, lba_bytes]
            engine.submit(
                self.batch(WRITE, file=file, offset=offset[:3], length=length[:3], buffer=buffer, buffer_offset=0)
            )
            assert engine.wait(3)["result"].tolist() == [-errno.ENOSPC] * 3
            assert self.read_back(path) == contents
            engine.submit(
                self.batch(WRITE, file=file, offset=offset[3:], length=length[3:], buffer=buffer, buffer_offset=0)
            )
            assert engine.wait(1)["result"].tolist() == [lba_bytes]
        assert self.read_back(path) == contents[:-lba_bytes] + b"\x03" * lba_bytes

    def test_what_a_descriptor_is_not_open_for(self, tmp_path: Path) -> None:
        """The kernel itself lets root write through a descriptor that is open for reading."""
        path, contents = self.set_up(tmp_path)
        with self.engine_on(path, os.O_RDONLY) as (engine, _, file, buffer):
            engine.submit(self.batch(WRITE, file=file, offset=[0], length=[4 * KiB], buffer=buffer, buffer_offset=[0]))
            done = engine.wait(1)
            assert done["result"].tolist() == [-errno.EBADF]
            assert engine.describe(done[0]) == "Bad file descriptor"
        assert self.read_back(path) == contents

    def test_what_the_drive_refuses_is_named(self, tmp_path: Path) -> None:
        path, contents = self.set_up(tmp_path)
        fd = self.open(path, os.O_RDWR)
        try:
            with _Misled() as engine:
                memory = np.frombuffer(huge_buffer(2 * MiB), np.uint8)
                file, buffer = engine.add_file(fd), engine.add_buffer(memory)
                offset = [0, self.size_bytes - 4 * KiB, self.size_bytes]
                length = [4 * KiB, 1 * MiB, 4 * KiB]  # the second fails in all its commands but perhaps the first
                for operation in (READ, WRITE):
                    engine.submit(
                        self.batch(
                            operation,
                            file=file,
                            offset=offset,
                            length=length,
                            buffer=buffer,
                            buffer_offset=[0, 4096, 0],
                        )
                    )
                    done = engine.wait(3)
                    done = done[np.argsort(done["token"])]
                    assert done["result"].tolist() == [4 * KiB, -errno.EINVAL, -errno.EINVAL]
                    assert [engine.describe(each) for each in done[1:]] == ["LBA Out of Range"] * 2
                    assert engine.statistics().failed == 2 * (operation + 1)
                assert memory[: 4 * KiB].tobytes() == contents[: 4 * KiB]
        finally:
            os.close(fd)

    @pytest.mark.parametrize(
        ("status", "times", "result", "words"),
        [
            (0x082, 5, 64 * KiB, ""),  # Namespace Not Ready
            (0x281, 6, -errno.EIO, "Unrecovered Read Error"),
            (0x281 | nvme.DO_NOT_RETRY, 1, -errno.EIO, "Unrecovered Read Error"),
            (0x7C2 | nvme.DO_NOT_RETRY, 1, -errno.EIO, "status 0x7c2"),
        ],
    )
    def test_what_the_drive_may_yet_do_is_tried_again(
        self, tmp_path: Path, status: int, times: int, result: int, words: str
    ) -> None:
        path, contents = self.set_up(tmp_path)
        fd = self.open(path, os.O_RDONLY)
        try:
            with _Ailing(status, times) as engine:
                memory = np.frombuffer(huge_buffer(64 * KiB), np.uint8)
                file, buffer = engine.add_file(fd), engine.add_buffer(memory)
                engine.submit(
                    self.batch(READ, file=file, offset=[0], length=[64 * KiB], buffer=buffer, buffer_offset=[0])
                )
                done = engine.wait(1)
                assert done["result"].tolist() == [result]
                if result < 0:
                    assert engine.describe(done[0]) == words
                else:
                    assert memory.tobytes() == contents[: 64 * KiB]
        finally:
            os.close(fd)

    def test_an_ordinary_user(self, tmp_path: Path, as_ordinary_user: list[str]) -> None:
        """The kernel permits it to whoever may open the device, or to nobody but root; and that is said."""
        path, contents = self.set_up(tmp_path)
        code = (
            "import sys\n"
            "from penstock.errors import UnsupportedError\n"
            "from penstock.storage.base import READ, batch\n"
            "from penstock.storage.nvme import NvmeEngine\n"
            "memory = bytearray(65536)\n"
            "with open(sys.argv[1], 'rb', 0) as file, NvmeEngine() as engine:\n"
            "    try:\n"
            "        number, buffer = engine.add_file(file.fileno()), engine.add_buffer(memory)\n"
            "    except UnsupportedError as error:\n"
            "        sys.exit(str(error))\n"
            "    at = int(sys.argv[2])\n"
            "    engine.submit(batch(\n"
            "        READ, file=number, offset=[at], length=65536, buffer=buffer, buffer_offset=[0]))\n"
            "    print(engine.wait(1)['result'].tolist(), memory.hex())\n"
        )
        command = [*as_ordinary_user, sys.executable, "-c", code, str(path), str(self.start_bytes)]
        mode = path.stat().st_mode
        os.chmod(path, 0o644)
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        finally:
            os.chmod(path, mode)
        if done.returncode:
            assert "not permitted; before Linux 6.2 it needs CAP_SYS_ADMIN" in done.stderr
            assert os.uname().release.startswith("6.1.")
        else:
            assert done.stdout == f"[65536] {contents[:65536].hex()}\n"

    def test_doctor_says_how_large_commands_are(self) -> None:
        rows = {check.name: check for check in checks(self.drive.block_device)}
        passthrough = rows["nvme passthrough"]
        assert (rows["file system"].detail, passthrough.state) == ("none: a raw block device", "ok")
        with self.make_engine() as engine:
            fd = os.open(self.drive.character_device, os.O_RDONLY)
            most = engine.limits(engine.add_file(fd)).aligned
            os.close(fd)
        assert passthrough.detail.startswith(f"{self.drive.character_device} takes commands of up to")
        assert format_size(most) in passthrough.detail

    def test_a_region_on_the_block_device_is_read_and_written_through_the_other(self, tmp_path: Path) -> None:
        device = self.drive.block_device
        write_plainly(device, 0, bytes(64 * KiB))
        with Region.create(device, 0, owner="test", overwrite=True) as region:
            allocated, _ = region.allocator.allocate(256 * KiB)
            fd = os.open(nvme.character_device(region.path), os.O_RDWR)
            try:
                with self.make_engine() as engine:
                    memory = np.frombuffer(huge_buffer(512 * KiB), np.uint8)
                    memory[: 256 * KiB] = np.random.default_rng(3).integers(0, 256, 256 * KiB, np.uint8)
                    file, buffer = engine.add_file(fd), engine.add_buffer(memory)
                    for operation, at in ((WRITE, 0), (READ, 256 * KiB)):
                        engine.submit(
                            batch(
                                operation, file=file, offset=[allocated], length=[256 * KiB], buffer=buffer,
                                buffer_offset=[at],
                            )
                        )  # fmt: skip
                        assert engine.wait(1)["result"].tolist() == [256 * KiB]
                    assert (memory[: 256 * KiB] == memory[256 * KiB :]).all()
                    assert os.preadv(region.fd, [memory[256 * KiB :]], allocated) == 256 * KiB
                    assert (memory[: 256 * KiB] == memory[256 * KiB :]).all()
            finally:
                os.close(fd)
        with Region.open(device, owner="test") as region:  # its header is what it was
            assert region.header.owner == "test"


@pytest.mark.rig
class TestWithASmallRing(TestNvmeEngine):
    def make_engine(self) -> _Noting:
        return _Noting(4)

"""penstock.checkpoint.load, compared with what the safetensors library makes of the same files."""

from __future__ import annotations

import errno
import gc
import json
import mmap
import os
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import penstock
from penstock.checkpoint import feeding, load, reading
from penstock.checkpoint.base import DTYPE_BITS
from penstock.checkpoint.frameworks import Plain
from penstock.checkpoint.load import CheckpointLoad, load_checkpoint, load_file, stream_checkpoint
from penstock.checkpoint.plan import Slice
from penstock.errors import CheckpointError, UnsupportedError
from penstock.linux import uring
from penstock.linux.memory import MemoryState
from penstock.linux.pagecache import drop, mincore
from penstock.storage.base import Engine
from penstock.storage.threads import ThreadEngine
from penstock.storage.uring import UringEngine
from penstock.testing.faults import FaultyEngine, fail_at
from penstock.testing.residency import kept_cached
from penstock.units import GiB, MiB

Tensor = tuple[str, str, tuple[int, ...]]  # name, dtype, shape

MIXED: list[Tensor] = [
    ("odd", "U8", (13,)),
    ("weight", "F32", (700, 1000)),
    ("half", "BF16", (1024, 512)),
    ("scalar", "F64", ()),
    ("empty", "F16", (0, 4)),
    ("flag", "BOOL", (3,)),
    ("late", "I64", (5,)),
    ("big", "F16", (3000, 999)),
    ("small", "I8", (1,)),
]


def write(path: Path, tensors: list[Tensor], *, seed: int = 0, cold: bool = True) -> dict[str, bytes]:
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    random = np.random.default_rng(seed)
    contents: dict[str, bytes] = {}
    at = 0
    for name, dtype, shape in tensors:
        size = int(np.prod(shape, dtype=np.int64)) * DTYPE_BITS[dtype] // 8
        data = random.integers(0, 2 if dtype == "BOOL" else 256, size, np.uint8).tobytes()
        contents[name] = data
        table[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(table).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text + b"".join(contents.values()))
        file.flush()
        os.fsync(file.fileno())
        if cold:
            drop(file.fileno())
    return contents


def cached_bytes(path: Path) -> int:
    with path.open("rb") as file:
        return int(mincore(file.fileno(), 0, path.stat().st_size).sum()) * 4096


@pytest.fixture(params=["threads", "uring"])
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    if request.param == "uring" and uring.probe():
        pytest.skip(f"needs io_uring: {uring.probe()}")
    with ThreadEngine() if request.param == "threads" else UringEngine() as engine:
        yield engine
        assert engine.in_flight == 0
        assert engine.add_file(0) == 0  # none was left
        assert engine.add_buffer(bytearray(1)) == 0


@pytest.fixture
def small_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "READ_BYTES", 64 * 1024)
    monkeypatch.setattr(feeding, "_WORTH_BYTES", 0)  # threads submit, also what is little
    monkeypatch.setattr(feeding, "_PIECE_BYTES", 256 * 1024)


def test_the_same_as_safetensors(tmp_path: Path, engine: Engine) -> None:
    import safetensors.torch
    import torch

    path = tmp_path / "model.safetensors"
    write(path, MIXED)
    ours, theirs = load_file(path, engine=engine), safetensors.torch.load_file(path)
    assert sorted(ours) == sorted(theirs)
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype
        assert ours[name].shape == tensor.shape
        assert ours[name].device == tensor.device
        if tensor.numel():
            assert torch.equal(ours[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))
            assert ours[name].untyped_storage().nbytes() == tensor.untyped_storage().nbytes()
    ours["weight"].add_(1)  # it is memory of its own


@pytest.mark.parametrize("dtype", sorted(DTYPE_BITS))
def test_every_dtype(tmp_path: Path, dtype: str) -> None:
    import safetensors.torch
    import torch

    path = tmp_path / "model.safetensors"
    contents = write(path, [("shift", "U8", (1,)), ("x", dtype, (4, 8)), ("y", dtype, (2, 2, 4))])
    try:
        theirs = safetensors.torch.load_file(path)
    except Exception:  # noqa: BLE001 (whatever it raises for a dtype that torch lacks)
        with pytest.raises(UnsupportedError, match=rf"'x': this torch has no dtype for {dtype}"):
            load_file(path)
        return
    ours = load_file(path)
    for name in ("x", "y"):
        assert ours[name].dtype == theirs[name].dtype
        assert ours[name].shape == theirs[name].shape
        assert bytes(ours[name].reshape(-1).view(torch.uint8).numpy()) == contents[name]


@pytest.mark.parametrize("dtype", sorted(DTYPE_BITS))
def test_every_dtype_as_numpy(tmp_path: Path, dtype: str) -> None:
    path = tmp_path / "model.safetensors"
    contents = write(path, [("shift", "U8", (1,)), ("x", dtype, (4, 8)), ("scalar", "F32", ())])
    has_none = dtype.startswith(("F6_", "F4")) or (dtype.startswith(("F8", "BF")) and find_spec("ml_dtypes") is None)
    if has_none:
        with pytest.raises(UnsupportedError, match=rf"'x': numpy has no dtype for {dtype}"):
            load_file(path, framework="numpy")
        return
    found = load_file(path, framework="numpy")
    assert found["x"].shape == (4, 8)
    assert found["x"].tobytes() == contents["x"]
    assert found["x"].flags.aligned
    assert found["scalar"].shape == ()
    found["x"][0] = 0  # it may be written


def test_it_goes_past_the_page_cache(tmp_path: Path, engine: Engine) -> None:
    path = tmp_path / "model.safetensors"
    contents = write(path, MIXED)
    if cached_bytes(path):
        pytest.skip(f"{path} is on a file system that keeps every page in memory")
    found = load_file(path, framework=Plain(), engine=engine)
    assert {name: memory.tobytes() for name, memory in found.items()} == contents
    assert cached_bytes(path) <= 64 * 1024  # the header, read as files are
    statistics = found.statistics
    assert statistics.engine == engine.name
    assert statistics.bytes_read >= path.stat().st_size - 4096
    assert statistics.direct_bytes >= statistics.bytes_read - 4 * MiB  # a part with the header in it is not
    assert statistics.buffered_bytes == 0


def test_what_is_cached_is_copied(tmp_path: Path, engine: Engine, small_reads: None) -> None:
    path = tmp_path / "model.safetensors"
    contents = write(path, MIXED)
    if cached_bytes(path):
        pytest.skip(f"{path} is on a file system that keeps every page in memory")
    with kept_cached(path, 2 * MiB, 5 * MiB):
        found = load_checkpoint(path, framework=Plain(), engine=engine)
    assert {name: memory.tobytes() for name, memory in found.items()} == contents
    assert 3 * MiB - 128 * 1024 <= found.statistics.cached_bytes <= 4 * MiB
    with kept_cached(path, 0, path.stat().st_size):
        warm = load_checkpoint(path, framework=Plain(), engine=engine)
    assert warm.statistics.direct_bytes == 0
    assert {name: memory.tobytes() for name, memory in warm.items()} == contents


def test_what_is_not_on_disk_yet(tmp_path: Path, engine: Engine) -> None:
    path = tmp_path / "model.safetensors"
    contents = write(path, MIXED)
    with path.open("r+b") as file:  # dirty pages, in the page cache only
        file.seek(path.stat().st_size - len(contents["small"]) - len(contents["big"]))
        file.write(b"\7" * len(contents["big"]))
        file.flush()
        found = load_checkpoint(path, names=["big"], framework=Plain(), engine=engine)
    assert found["big"].tobytes() == b"\7" * len(contents["big"])


def test_a_file_system_without_direct_reads(engine: Engine) -> None:
    directory = Path("/dev/shm")
    if not directory.is_dir():
        pytest.skip("needs /dev/shm")
    path = directory / f"penstock-test-{os.getpid()}.safetensors"
    try:
        contents = write(path, MIXED)
        found = load_file(path, framework=Plain(), engine=engine)
        assert {name: memory.tobytes() for name, memory in found.items()} == contents
    finally:
        path.unlink()


def test_names_slices_and_shards(tmp_path: Path, engine: Engine, small_reads: None) -> None:
    one = write(tmp_path / "one.safetensors", MIXED, seed=1)
    two = write(tmp_path / "two.safetensors", [("tail", "F32", (100, 50)), ("unwanted", "F32", (300_000,))], seed=2)
    found = load_checkpoint(
        tmp_path,
        names=["tail", "big", "flag", "tail"],
        slices={"big": Slice(0, 1000, 2500)},
        framework="numpy",
        engine=engine,
    )
    assert sorted(found) == ["big", "flag", "tail"]
    assert found["tail"].tobytes() == two["tail"]
    assert found["flag"].tobytes() == one["flag"]
    whole = np.frombuffer(one["big"], np.float16).reshape(3000, 999)
    assert found["big"].shape == (1500, 999)
    assert found["big"].tobytes() == whole[1000:2500].tobytes()
    assert found.statistics.bytes_read < len(one["big"])
    with pytest.raises(CheckpointError, match="has no tensor 'nothing'"):
        load_checkpoint(tmp_path, names=["nothing"])


def test_slices_in_pieces(tmp_path: Path, engine: Engine, small_reads: None) -> None:
    path = tmp_path / "model.safetensors"
    contents = write(path, [*MIXED, ("cube", "U8", (50, 60, 70))])
    big = np.frombuffer(contents["big"], np.float16).reshape(3000, 999)
    cube = np.frombuffer(contents["cube"], np.uint8).reshape(50, 60, 70)
    for part, expected in (
        (Slice(1, 0, 10), big[:, :10]),
        (Slice(1, 333, 999), big[:, 333:]),
        (Slice(1, 5, 5), big[:, 5:5]),
        (Slice(1, 0, 999), big),
    ):
        found = load_checkpoint(path, names=["big", "flag"], slices={"big": part}, framework="numpy", engine=engine)
        assert found["big"].shape == expected.shape
        assert found["big"].tobytes() == expected.tobytes()
        assert found["flag"].tobytes() == contents["flag"]
    slices = {"cube": Slice(1, 20, 40), "big": Slice(1, 998, 999)}
    found = load_checkpoint(path, slices=slices, framework=Plain(), engine=engine)
    assert found["cube"].tobytes() == cube[:, 20:40].tobytes()
    assert found["big"].tobytes() == big[:, 998:].tobytes()
    assert found["half"].tobytes() == contents["half"]
    with pytest.raises(OSError, match="Input/output error"):
        load_checkpoint(path, names=["big"], slices=slices, framework=Plain(), engine=FaultyEngine(engine, fail_at(7)))


def test_tensors_come_as_they_land(tmp_path: Path, engine: Engine, small_reads: None) -> None:
    path = tmp_path / "model.safetensors"
    contents = write(path, MIXED)
    told: list[int] = []
    seen = []
    for name, memory in stream_checkpoint(path, framework=Plain(), engine=engine, progress=told.append):
        assert memory.tobytes() == contents[name]
        seen.append(name)
    assert seen == ["empty", *(name for name, _, _ in MIXED if name != "empty")]
    assert sum(told) >= path.stat().st_size - 64 * 1024
    assert all(part >= 0 for part in told)


@pytest.mark.parametrize("enabled", [True, False])
def test_the_collector_goes_on_afterwards(tmp_path: Path, enabled: bool) -> None:
    write(tmp_path / "model.safetensors", MIXED)
    (tmp_path / "damaged.safetensors").write_bytes(b"nothing")
    seen = []
    try:
        if not enabled:
            gc.disable()
        load_checkpoint(
            tmp_path / "model.safetensors", framework=Plain(), progress=lambda _: seen.append(gc.isenabled())
        )
        assert gc.isenabled() is enabled
        with pytest.raises(CheckpointError):
            load_file(tmp_path / "damaged.safetensors", framework=Plain())
        assert gc.isenabled() is enabled
    finally:
        gc.enable()
    assert not any(seen)


def test_leaving_early_leaves_nothing(tmp_path: Path, engine: Engine, small_reads: None) -> None:
    path = tmp_path / "model.safetensors"
    contents = write(path, MIXED)
    descriptors = os.listdir("/proc/self/fd")
    for name, memory in stream_checkpoint(path, framework=Plain(), engine=engine):
        if name == "weight":
            assert memory.tobytes() == contents["weight"]
            break
    assert engine.in_flight == 0
    assert os.listdir("/proc/self/fd") == descriptors
    load_file(path, framework=Plain(), engine=engine)


def test_engines_by_name_are_closed(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    contents = write(path, MIXED)
    descriptors, threads = os.listdir("/proc/self/fd"), threading.active_count()
    for name in ("auto", "threads"):
        found = load_file(path, framework=Plain(), engine=name)
        assert found["big"].tobytes() == contents["big"]
    assert os.listdir("/proc/self/fd") == descriptors
    assert threading.active_count() == threads
    with pytest.raises((UnsupportedError, ValueError), match="device 'gpu'"):
        load_file(path, "gpu")
    with pytest.raises(ValueError, match="choose torch or numpy"):
        load_file(path, framework="jax")
    assert os.listdir("/proc/self/fd") == descriptors


@pytest.mark.parametrize("number", [0, 7, 60])
def test_a_read_that_fails(tmp_path: Path, engine: Engine, small_reads: None, number: int) -> None:
    path = tmp_path / "model.safetensors"
    contents = write(path, MIXED)
    faulty = FaultyEngine(engine, fail_at(number))
    with pytest.raises(OSError, match=r"could not be read: Input/output error.*model.safetensors") as caught:
        load_file(path, framework=Plain(), engine=faulty)
    assert caught.value.errno == errno.EIO
    assert engine.in_flight == 0
    found = load_file(path, framework=Plain(), engine=engine)
    assert {name: memory.tobytes() for name, memory in found.items()} == contents


def test_reads_cut_short_everywhere(tmp_path: Path, engine: Engine) -> None:
    path = tmp_path / "model.safetensors"
    contents = write(path, MIXED)
    engine._largest_transfer_bytes = 8192  # type: ignore[attr-defined]
    found = load_file(path, framework=Plain(), engine=engine)
    assert {name: memory.tobytes() for name, memory in found.items()} == contents


def test_no_memory(tmp_path: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.safetensors"
    contents = write(path, MIXED)

    mapped = mmap.mmap

    def refuse(fd: int, length: int, **options: Any) -> mmap.mmap:
        if length > 1 * MiB:
            raise OSError(errno.ENOMEM, "Cannot allocate memory")
        return mapped(fd, length, **options)

    with monkeypatch.context() as patch:
        patch.setattr(reading.mmap, "mmap", refuse)
        with pytest.raises(MemoryError, match=r"no .* MiB of memory for its tensors"):
            load_file(path, framework=Plain(), engine=engine)
        with pytest.raises(MemoryError, match=r"no \d+ bytes for a buffer"):  # of the pool that slices pass through
            load_checkpoint(path, names=["big"], slices={"big": Slice(1, 0, 9)}, framework=Plain(), engine=engine)
    found = load_file(path, framework=Plain(), engine=engine)
    assert {name: memory.tobytes() for name, memory in found.items()} == contents


class Meddling(FaultyEngine):
    """Does something to the file before the reads begin."""

    def __init__(self, engine: Engine, meddle: Callable[[], object]) -> None:
        super().__init__(engine, lambda _: 0)
        self._meddle = [meddle]
        self._first = threading.Lock()

    def submit(self, requests: Any) -> None:
        with self._first:  # threads submit
            while self._meddle:
                self._meddle.pop()()
        super().submit(requests)


@pytest.mark.parametrize("left_bytes", [100, 1 * MiB, 4 * MiB + 5])
def test_a_file_truncated_meanwhile(tmp_path: Path, engine: Engine, left_bytes: int) -> None:
    path = tmp_path / "model.safetensors"
    write(path, MIXED)
    with pytest.raises(CheckpointError, match=rf"had \d+ bytes when its header was read, and has {left_bytes} now"):
        load_file(path, framework=Plain(), engine=Meddling(engine, lambda: os.truncate(path, left_bytes)))


def test_a_file_changed_meanwhile(tmp_path: Path, engine: Engine) -> None:
    path = tmp_path / "model.safetensors"
    write(path, MIXED)

    def grow() -> None:
        with path.open("ab") as file:
            file.write(b"more")

    with pytest.raises(CheckpointError, match=r"had \d+ bytes when its header was read, and has \d+ now"):
        load_file(path, framework=Plain(), engine=Meddling(engine, grow))
    write(path, MIXED)
    with pytest.raises(CheckpointError, match="was written to"):
        load_file(path, framework=Plain(), engine=Meddling(engine, lambda: os.utime(path, ns=(5, 5))))
    load = CheckpointLoad(path, framework=Plain(), engine=engine)
    other = tmp_path / "other"
    write(other, MIXED, seed=3)
    os.rename(other, path)  # who has it open goes on with the old one
    with load:
        assert len(dict(load)) == len(MIXED)


def test_interrupted(tmp_path: Path, engine: Engine, small_reads: None) -> None:
    path = tmp_path / "model.safetensors"
    contents = write(path, MIXED)
    with pytest.raises(KeyboardInterrupt):
        load_file(path, framework=Plain(), engine=Meddling(engine, lambda: signal.raise_signal(signal.SIGINT)))
    with pytest.raises(KeyboardInterrupt):
        load_checkpoint(path, framework=Plain(), engine=engine, progress=lambda _: signal.raise_signal(signal.SIGINT))
    assert engine.in_flight == 0
    found = load_file(path, framework=Plain(), engine=engine)
    assert found["big"].tobytes() == contents["big"]


def resident_memory_bytes() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_memory_goes_back_tensor_by_tensor(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    names = [str(number) for number in range(16)]
    contents = write(path, [(name, "U8", (4 * MiB,)) for name in names])
    found = load_file(path, framework="numpy", engine="threads")
    before = resident_memory_bytes()
    for name in names[:15]:
        del found[name]
    deadline = time.monotonic() + 30
    while resident_memory_bytes() > before - 50 * MiB:
        assert time.monotonic() < deadline, f"{(before - resident_memory_bytes()) / MiB:.0f} MiB went back"
        time.sleep(0.01)
    assert found["15"].tobytes() == contents["15"]


@pytest.mark.parametrize("size_bytes", [8 * MiB, MiB // 2])
def test_more_than_there_is_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size_bytes: int) -> None:
    path = tmp_path / "model.safetensors"
    contents = write(path, [(f"{number:03}", "U8", (size_bytes,)) for number in range(256 * MiB // size_bytes)])
    monkeypatch.setattr(load, "read_memory", lambda: MemoryState(GiB, GiB - 80 * MiB, 0, 0, "cgroup v2 /service"))
    with pytest.raises(MemoryError, match=r"take 256 MiB, and 80.0 MiB \(cgroup v2 /service\) can be had"):
        load_checkpoint(path, framework="numpy")
    before, most = resident_memory_bytes(), 0
    for name, tensor in stream_checkpoint(path, framework="numpy"):
        assert tensor.tobytes() == contents[name]
        most = max(most, resident_memory_bytes() - before)
    assert most < 120 * MiB


@pytest.mark.parametrize("framework", ["numpy", "torch"])
def test_what_is_derived_from_a_tensor_holds_its_memory(tmp_path: Path, framework: str) -> None:
    import gc

    path = tmp_path / "model.safetensors"
    contents = write(path, [("a", "F16", (1024, 1024)), ("b", "F16", (1024, 1024))])
    found = load_file(path, framework=framework)
    rows = found["a"][512:].reshape(-1)[5:]
    del found
    gc.collect()
    assert bytes(np.asarray(rows)) == contents["a"][512 * 2048 + 10 :]


@pytest.mark.parametrize("name", ["uring", "threads"])
def test_the_interpreter_ends_in_the_middle(tmp_path: Path, name: str) -> None:
    if name == "uring" and uring.probe():
        pytest.skip(f"needs io_uring: {uring.probe()}")
    path = tmp_path / "model.safetensors"
    write(path, [(str(number), "U8", (4 * MiB,)) for number in range(64)], cold=False)
    code = f"""
import penstock
found = penstock.stream_checkpoint({str(path)!r}, framework="numpy", engine={name!r})
print(next(found)[0])
"""
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
        assert (done.returncode, done.stdout, done.stderr) == (0, "0\n", "")


def test_without_direct_reads_and_not_cached(tmp_path: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feeding, "_WORTH_BYTES", 0)
    path = tmp_path / "model.safetensors"
    contents = write(path, [(str(number), "U8", (4 * MiB,)) for number in range(16)])
    opened = reading.open_regular

    def refuse(path: str, flags: int = os.O_RDONLY) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return opened(path, flags)

    monkeypatch.setattr(reading, "open_regular", refuse)
    found = load_file(path, framework=Plain(), engine=engine)
    assert {name: memory.tobytes() for name, memory in found.items()} == contents


def test_a_tensor_that_is_let_go_is_gone(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    write(path, [(str(number), "U8", (16 * MiB,)) for number in range(2)])
    stream = stream_checkpoint(path, framework="numpy", engine="threads")
    _, tensor = next(stream)
    before = resident_memory_bytes()
    del tensor
    assert resident_memory_bytes() < before - 12 * MiB
    stream.close()


def test_tensors_outlive_everything(tmp_path: Path) -> None:
    import gc

    path = tmp_path / "model.safetensors"
    contents = write(path, MIXED)
    kept = load_file(path)["weight"]
    gc.collect()
    path.unlink()
    assert kept.numpy().tobytes() == contents["weight"]


def test_the_package_offers_it(tmp_path: Path) -> None:
    write(tmp_path / "model.safetensors", MIXED)
    assert penstock.load_file is load_file
    assert penstock.load_checkpoint is load_checkpoint
    assert penstock.stream_checkpoint is stream_checkpoint
    assert penstock.Slice is Slice
    with pytest.raises(AttributeError, match="no attribute 'wish'"):
        _ = penstock.wish
    with pytest.raises(CheckpointError, match="is a directory; use load_checkpoint"):
        load_file(tmp_path)
    code = "import sys, penstock; print({'numpy', 'typing', 'torch'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"

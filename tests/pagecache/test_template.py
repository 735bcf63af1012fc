"""penstock.pagecache.template: the file format, the store, and what a recording comes to."""

from __future__ import annotations

import errno
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.examples import examples

from penstock.errors import TemplateError, TemplateFormatError
from penstock.linux.pagecache import drop, mincore
from penstock.linux.window import PAGE_BYTES
from penstock.pagecache.base import Range
from penstock.pagecache.intervals import IntervalSet
from penstock.pagecache.template import (
    SUFFIX,
    FileIdentity,
    GroupRecorder,
    Template,
    TemplateStore,
    fingerprint,
)
from penstock.testing.checkpoint import safetensors_header, shards
from penstock.testing.shapes import PRESETS, tensors
from penstock.units import GiB, KiB, MiB

FILES = (FileIdentity("a.safetensors", 10 * MiB + 5, "f00"), FileIdentity("sub/b.safetensors", 4 * MiB, "ba7"))
EXAMPLE = Template(
    "serve-llama",
    FILES,
    (
        (Range("a.safetensors", 0, MiB), Range("sub/b.safetensors", MiB, 4 * MiB)),
        (Range("a.safetensors", 8 * MiB, 10 * MiB + 5), Range("a.safetensors", 2 * MiB, 3 * MiB)),
    ),
    ("/models/llama", "/models/vae"),
    "2026-11-20T12:00:00+00:00",
)


@st.composite
def templates(draw: st.DrawFn) -> Template:
    names = draw(st.lists(st.text(min_size=1, max_size=12), min_size=1, max_size=4, unique=True))
    files = tuple(FileIdentity(name, draw(st.integers(1, 1 << 42)), draw(st.text(max_size=32))) for name in names)

    def part(file: FileIdentity) -> st.SearchStrategy[Range]:
        pages = -(-file.size_bytes // PAGE_BYTES)

        def make(first: int, count: int) -> Range:
            stop = min((first + count) * PAGE_BYTES, file.size_bytes)
            return Range(file.name, first * PAGE_BYTES, stop)

        return st.builds(make, st.integers(0, pages - 1), st.integers(1, pages))

    ranges = st.lists(st.sampled_from(files).flatmap(part), max_size=12)
    groups = draw(st.lists(ranges.map(tuple), max_size=4))
    roots = tuple(draw(st.lists(st.text(), max_size=2)))
    return Template(draw(st.text()), files, tuple(groups), roots, draw(st.text()))


class TestFormat:
    @given(templates())
    def test_round_trip(self, template: Template) -> None:
        text = template.to_json()
        assert Template.from_json(text) == template
        assert text.isascii()
        assert text.count("\n") == 1

    def test_bytes_read(self) -> None:
        assert EXAMPLE.bytes_read == MiB + 3 * MiB + 2 * MiB + 5 + MiB

    def test_ranges_are_whole_pages(self) -> None:
        ragged = Template("s", FILES, ((Range("a.safetensors", 100, 5000), Range("a.safetensors", 9000, 9001)),))
        (group,) = Template.from_json(ragged.to_json()).groups
        assert group == (Range("a.safetensors", 0, 8192), Range("a.safetensors", 8192, 12288))

    def test_another_machines_page_size(self) -> None:
        body = json.loads(EXAMPLE.to_json())
        body["page_bytes"] = 16 * PAGE_BYTES
        body["groups"] = [[[0, 1, 2]]]
        (group,) = Template.from_json(signed(body)).groups
        assert group == (Range("a.safetensors", 16 * PAGE_BYTES, 48 * PAGE_BYTES),)

    def test_the_documented_text(self) -> None:
        body = json.loads(EXAMPLE.to_json())
        assert body["groups"] == [
            [[0, 0, MiB // PAGE_BYTES], [1, MiB // PAGE_BYTES, 3 * MiB // PAGE_BYTES]],
            [[0, 8 * MiB // PAGE_BYTES, 2 * MiB // PAGE_BYTES + 1, -(8 * MiB // PAGE_BYTES) - 1, MiB // PAGE_BYTES]],
        ]
        assert body["files"] == [["a.safetensors", 10 * MiB + 5, "f00"], ["sub/b.safetensors", 4 * MiB, "ba7"]]

    @pytest.mark.parametrize("length", [0, 1, 20, -20, -2])
    def test_truncated(self, length: int) -> None:
        with pytest.raises(TemplateFormatError, match="delete it"):
            Template.from_json(EXAMPLE.to_json()[:length], "/x/t.json")

    def test_every_changed_character_is_noticed(self) -> None:
        text = EXAMPLE.to_json()
        for at in range(len(text) - 1):
            with pytest.raises(TemplateFormatError):
                Template.from_json(text[:at] + ("0" if text[at] != "0" else "1") + text[at + 1 :])

    @pytest.mark.parametrize("text", ["[]", "null", "7", '"x"', "{}", '{"format": "penstock-report", "version": 1}'])
    def test_other_json(self, text: str) -> None:
        with pytest.raises(TemplateFormatError, match="not a penstock template"):
            Template.from_json(text)

    @pytest.mark.parametrize("version", [2, 0, "1", None])
    def test_another_version(self, version: object) -> None:
        body = json.loads(EXAMPLE.to_json())
        body["version"] = version
        with pytest.raises(TemplateFormatError, match=f"/x: template version {version!r}"):
            Template.from_json(signed(body), "/x")

    @pytest.mark.parametrize(
        "change",
        [
            {"groups": [[[7, 0, 1]]]},
            {"groups": [[[0, 0]]]},
            {"groups": [[[0, -1, 1]]]},
            {"groups": [[[0, 0, 0]]]},
            {"groups": [[[0, 1 << 30, 1]]]},
            {"groups": 5},
            {"files": [["a"]]},
            {"service": None},
            {"page_bytes": "x"},
        ],
    )
    def test_whole_but_nonsense(self, change: dict[str, object]) -> None:
        body = {**json.loads(EXAMPLE.to_json()), **change}
        if change.get("service", "") is None:
            del body["service"]
        with pytest.raises(TemplateFormatError, match="/x: "):
            Template.from_json(signed(body), "/x")


def signed(body: dict[str, object]) -> str:
    """A template's text with the checksum that its contents call for."""
    from penstock.pagecache.template import _checksum

    body.pop("checksum", None)
    return json.dumps({**body, "checksum": _checksum(body)})


@pytest.fixture
def store(tmp_path: Path) -> TemplateStore:
    return TemplateStore(tmp_path / "templates" / "deeper")


class TestStore:
    def test_nothing_there(self, store: TemplateStore) -> None:
        assert store.load("serve-llama") is None
        assert list(store) == []
        assert not store.delete("serve-llama")
        assert not store.directory.exists()  # it is made at the first write

    def test_saved_loaded_listed_deleted(self, store: TemplateStore) -> None:
        path = store.save(EXAMPLE)
        assert path == store.directory / f"serve-llama{SUFFIX}"
        assert store.load("serve-llama") == EXAMPLE
        assert list(store) == [(path, EXAMPLE)]
        assert os.listdir(store.directory) == [path.name]
        assert store.delete("serve-llama")
        assert store.load("serve-llama") is None

    def test_anyone_may_read_it(self, store: TemplateStore) -> None:
        umask = os.umask(0o022)
        try:
            path = store.save(EXAMPLE)
        finally:
            os.umask(umask)
        assert path.stat().st_mode & 0o777 == 0o644

    @settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=examples(40))
    @given(st.lists(st.text(st.characters(exclude_categories=[])), min_size=1, max_size=6, unique=True))
    def test_any_name_will_do(self, store: TemplateStore, names: list[str]) -> None:
        for name in names:
            template = Template(name, FILES, EXAMPLE.groups)
            path = store.save(template)
            assert path.parent == store.directory
            assert store.load(name) == template
        assert len({store.path(name) for name in names}) == len(names)

    @pytest.mark.parametrize(
        "name", ["", ".", "..", "../../etc/passwd", "/etc/passwd", ".hidden", "a/b", "a\nb", "\0", "x" * 300, "-rf"]
    )
    def test_odd_names(self, store: TemplateStore, name: str) -> None:
        template = Template(name, FILES, EXAMPLE.groups)
        path = store.save(template)
        assert path.parent == store.directory
        assert [entry for entry in os.listdir(store.directory) if not entry.endswith(SUFFIX)] == []
        assert store.load(name) == template
        assert list(store) == [(path, template)]
        assert store.delete(name)

    def test_damaged_files_are_told_and_the_others_listed(self, store: TemplateStore) -> None:
        good = store.save(EXAMPLE)
        damaged = {
            "binary": bytes(range(128, 256)),
            "truncated": EXAMPLE.to_json().encode()[:-30],
            "empty": b"",
            "newer": EXAMPLE.to_json().replace('"version":1', '"version":2').encode(),
        }
        for name, data in damaged.items():
            (store.directory / f"{name}{SUFFIX}").write_bytes(data)
        (store.directory / f"directory{SUFFIX}").mkdir()
        (store.directory / f"dangling{SUFFIX}").symlink_to("nowhere")
        (store.directory / f"loop{SUFFIX}").symlink_to(f"loop{SUFFIX}")
        (store.directory / "README").write_text("not a template")
        found = {path.name.removesuffix(SUFFIX): content for path, content in store}
        assert found.pop("serve-llama") == EXAMPLE
        assert all(isinstance(found[name], TemplateFormatError) for name in damaged)
        assert isinstance(found["directory"], TemplateError)
        assert "cannot be read" in str(found["loop"])
        assert set(found) == {*damaged, "directory", "loop"}
        for name in damaged:
            with pytest.raises(TemplateFormatError, match=f"{name}{SUFFIX}"):
                store.load(name)
        assert store.save(Template("binary", FILES, EXAMPLE.groups)) != good
        assert store.load("binary") is not None


# Saves versions of one template in turn; the recorded date tells whose it is.
WRITER = """
import sys
from penstock.linux import wholefile
from penstock.pagecache.base import Range
from penstock.pagecache.template import FileIdentity, Template, TemplateStore

directory, named, writer, versions = sys.argv[1], sys.argv[2] == "named", sys.argv[3], int(sys.argv[4])
if named:  # as on a file system without O_TMPFILE
    wholefile._without_name = lambda directory, mode: None
store = TemplateStore(directory)
files = (FileIdentity("a", 1 << 40, "f"),)
sys.stdin.readline()
for version in range(versions):
    ranges = tuple(Range("a", n << 20, (n << 20) + 4096) for n in range(version * 5 + 1))
    store.save(Template("shared", files, (ranges,), (writer,), str(version)))
"""


class TestWritersAtOnce:
    @pytest.mark.parametrize("kind", ["unnamed", "named"])
    @pytest.mark.parametrize("same_pid", [False, True])
    def test_a_reader_sees_whole_templates(self, tmp_path: Path, kind: str, same_pid: bool) -> None:
        """Containers that share a directory may have the same pid, each in a name space of its own."""
        namespace = ["unshare", "--fork", "--pid"] if same_pid else []
        if same_pid and (os.geteuid() != 0 or shutil.which("unshare") is None):
            pytest.skip("needs root and unshare (util-linux), for pid namespaces")
        store, versions = TemplateStore(tmp_path), examples(25)
        writers = [
            subprocess.Popen(
                [*namespace, sys.executable, "-c", WRITER, str(tmp_path), kind, name, str(versions)],
                stdin=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for name in "abc"
        ]
        for writer in writers:
            assert writer.stdin is not None
            writer.stdin.write("\n")
            writer.stdin.flush()
        seen = set()
        while any(writer.poll() is None for writer in writers):
            template = store.load("shared")
            if template is not None:
                assert len(template.groups[0]) == int(template.recorded_at) * 5 + 1
                seen.add((template.root_hints, template.recorded_at))
        for writer in writers:
            assert writer.communicate() == (None, "")
            assert writer.returncode == 0
        last = store.load("shared")
        assert last is not None
        assert last.recorded_at == str(versions - 1)
        assert os.listdir(tmp_path) == [f"shared{SUFFIX}"]


FULL = """
import errno, os, subprocess, sys
from penstock.linux import wholefile
from penstock.pagecache.base import Range
from penstock.pagecache.template import FileIdentity, Template, TemplateStore

directory = sys.argv[1]
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32k", "tmpfs", directory], check=True)

files = (FileIdentity("a", 1 << 40, "f"),)
def template(ranges):
    parts = tuple(Range("a", n << 20, (n << 20) + 4096) for n in range(ranges))
    return Template("service", files, (parts,))

store = TemplateStore(directory)
for is_named in (False, True):
    if is_named:  # as where a file system has no files without a name
        wholefile._without_name = lambda directory, mode: None
    store.save(template(3))
    for _ in range(3):
        try:
            store.save(template(10_000))
        except OSError as error:
            assert error.errno == errno.ENOSPC, error
        else:
            raise AssertionError("there was room")
    assert store.load("service") == template(3)
    assert os.listdir(directory) == ["service.template.json"], os.listdir(directory)
    store.save(template(4))
print("the old one is there")
"""


@pytest.mark.root
def test_a_full_disk_leaves_the_old_template(tmp_path: Path) -> None:
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        pytest.skip("needs root and unshare (util-linux), to mount a small file system for itself alone")
    command = ["unshare", "--mount", sys.executable, "-c", FULL, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "the old one is there\n"), done.stderr
    assert os.listdir(tmp_path) == []


def test_a_recorder_killed_while_it_writes_leaves_nothing(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys\n"
        "from penstock.pagecache.template import *\n"
        "class Killed(Template):\n"
        "    def to_json(self):\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "TemplateStore(sys.argv[1]).save(Killed('service', (), ()))\n"
    )
    try:
        os.close(os.open(tmp_path, os.O_TMPFILE | os.O_WRONLY))
    except OSError as error:
        pytest.skip(f"{tmp_path}: this file system has no unnamed files: {error.strerror}")
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, check=False)
    assert done.returncode == -9
    assert os.listdir(tmp_path) == []


class TestDirectory:
    def test_one_that_is_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        store = TemplateStore(tmp_path / "file")
        with pytest.raises(OSError, match="file") as caught:
            store.save(EXAMPLE)
        assert caught.value.errno in {errno.EEXIST, errno.ENOTDIR}
        assert list(store) == []


class TestFingerprint:
    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        path = tmp_path / "model"
        path.write_bytes(os.urandom(2 * MiB + 17))
        return path

    def test_copies_are_alike(self, path: Path, tmp_path: Path) -> None:
        copy = shutil.copyfile(path, tmp_path / "copy")
        assert fingerprint(path, 2 * MiB + 17) == fingerprint(copy, 2 * MiB + 17)

    @pytest.mark.parametrize("offset", [0, 4095, 2 * MiB + 16, 2 * MiB])
    def test_its_ends_count(self, path: Path, offset: int) -> None:
        before = fingerprint(path, 2 * MiB + 17)
        with path.open("r+b") as file:
            file.seek(offset)
            byte = file.read(1)[0]
            file.seek(offset)
            file.write(bytes([byte ^ 1]))
        assert fingerprint(path, 2 * MiB + 17) != before

    def test_every_eighth_of_it_counts(self, path: Path) -> None:
        before = fingerprint(path, 2 * MiB + 17)
        data = path.read_bytes()
        for at in range(0, 2 * MiB, MiB // 4):
            path.write_bytes(data[:at] + bytes(MiB // 4) + data[at + MiB // 4 :])
            assert fingerprint(path, 2 * MiB + 17) != before

    @pytest.mark.parametrize("size_bytes", [0, 1, 4096, 5000])
    def test_small_files(self, tmp_path: Path, size_bytes: int) -> None:
        found = set()
        for fill in (b"a", b"b"):
            (tmp_path / "small").write_bytes(fill * size_bytes)
            found.add(fingerprint(tmp_path / "small", size_bytes))
        assert len(found) == (2 if size_bytes else 1)

    def test_the_size_counts(self, path: Path) -> None:
        assert fingerprint(path, 2 * MiB) != fingerprint(path, 2 * MiB + 17)

    def test_asking_leaves_only_the_samples_in_the_cache(self, path: Path) -> None:
        with path.open("r+b") as file:
            os.fsync(file.fileno())
            drop(file.fileno())
            if mincore(file.fileno(), 0, 2 * MiB).any():
                pytest.skip(f"{path} is on a file system that keeps every page in memory")
            fingerprint(path, 2 * MiB + 17)
            assert 0 < mincore(file.fileno(), 0, 2 * MiB + 17).sum() <= 18  # the last sample lies across two pages

    def test_a_file_that_is_gone(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError):
            fingerprint(tmp_path / "gone", 5)


Read = tuple[str, int, int]


def record(reads: Iterable[Read], sizes: dict[str, int]) -> tuple[Range, ...]:
    recorder = GroupRecorder()
    for name, start, stop in reads:
        recorder.record(name, start, stop)
    return recorder.ranges(sizes)


def in_chunks(name: str, start: int, stop: int, chunk_bytes: int = MiB) -> Iterator[Read]:
    for at in range(start, stop, chunk_bytes):
        yield name, at, min(at + chunk_bytes, stop)


def interleaved(readers: Sequence[Iterator[Read]], seed: int = 0) -> Iterator[Read]:
    """Threads of one process, each at its own speed."""
    order = random.Random(seed)
    alive = list(readers)
    while alive:
        reader = order.choice(alive)
        try:
            yield next(reader)
        except StopIteration:
            alive.remove(reader)


class TestRecording:
    SIZES = {"a": 2 * GiB, "b": 2 * GiB}  # noqa: RUF012

    def test_a_sequential_reader_is_one_range(self) -> None:
        assert record(in_chunks("a", 0, 2 * GiB), self.SIZES) == (Range("a", 0, 2 * GiB),)

    def test_files_in_their_order(self) -> None:
        reads = [*in_chunks("b", 0, GiB), *in_chunks("a", GiB, 2 * GiB)]
        assert record(reads, self.SIZES) == (Range("b", 0, GiB), Range("a", GiB, 2 * GiB))

    def test_a_range_stands_where_it_was_first_read(self) -> None:
        reads = [("a", GiB, GiB + MiB), ("a", 0, MiB), *in_chunks("a", GiB + MiB, GiB + 64 * MiB)]
        assert record(reads, self.SIZES) == (Range("a", GiB, GiB + 64 * MiB), Range("a", 0, MiB))

    def test_nothing_read(self) -> None:
        assert record([], self.SIZES) == ()

    def test_a_tail_that_was_not_seen_is_taken_as_read(self) -> None:
        assert record(in_chunks("a", 0, 2 * GiB - 32 * MiB), self.SIZES) == (Range("a", 0, 2 * GiB),)
        far = record(in_chunks("a", 0, GiB), self.SIZES)
        assert far == (Range("a", 0, GiB),)

    @given(
        st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 999), st.integers(1, 200)), max_size=60),
        st.integers(1, 40),
    )
    def test_all_that_was_read_and_each_byte_once(self, reads: list[tuple[str, int, int]], unit: int) -> None:
        size = 1200 * unit * PAGE_BYTES
        scaled = [(name, at * unit * PAGE_BYTES, (at + length) * unit * PAGE_BYTES) for name, at, length in reads]
        ranges = record(scaled, {"a": size, "b": size})
        listed = {name: IntervalSet() for name in "ab"}
        for part in ranges:
            assert 0 <= part.start < part.stop <= size
            assert listed[part.name].add(part.start, part.stop) == part.stop - part.start
        for name, start, stop in scaled:
            assert listed[name].covers(start, stop)
        if scaled:
            assert (ranges[0].name, ranges[0].start) == scaled[0][:2]
        identities = tuple(FileIdentity(name, size, "") for name in "ab")
        template = Template("s", identities, (ranges,))
        assert Template.from_json(template.to_json()) == template

    @pytest.mark.slow
    @pytest.mark.parametrize("size_bytes", [6 * GiB, 1 << 42])
    def test_a_reader_without_an_order_is_bounded(self, size_bytes: int) -> None:
        """In memory and in time: a service that reads pages at random for days."""
        order = random.Random(5)
        recorder = GroupRecorder()
        for _ in range(70_000):
            start = order.randrange(size_bytes // PAGE_BYTES) * PAGE_BYTES
            recorder.record(order.choice("ab"), start, start + PAGE_BYTES)
        assert 0 < len(recorder.ranges({"a": size_bytes, "b": size_bytes})) < 70_000


class Model:
    """The files of a 3-billion-parameter checkpoint, as `penstock generate` would write them."""

    def __init__(self) -> None:
        self.tensors: list[tuple[str, int, int]] = []  # file, first and last byte
        self.sizes: dict[str, int] = {}
        parts = shards(tensors(PRESETS["llama-3.2-3b"]))
        for number, specs in enumerate(parts, 1):
            name = f"model-{number:05}-of-{len(parts):05}.safetensors"
            at = len(safetensors_header(specs))
            for spec in specs:
                self.tensors.append((name, at, at + spec.size_bytes))
                at += spec.size_bytes
            self.sizes[name] = at
        self.gib = sum(self.sizes.values()) / GiB

    def template(self, groups: Sequence[Iterable[Read]]) -> Template:
        identities = tuple(FileIdentity(name, size, "0123456789abcdef" * 2) for name, size in self.sizes.items())
        recorded = tuple(record(group, self.sizes) for group in groups)
        return Template(
            "serve-llama-3b-0123456789ab", identities, recorded, ("/models/llama-3b",), "2026-11-20T12:00:00"
        )


@pytest.fixture(scope="module")
def model() -> Model:
    model = Model()
    assert len(model.tensors) == 254
    assert 5.5 < model.gib < 6.5
    return model


class TestSize:
    """At most 2 KiB for each GiB of model."""

    def check(self, template: Template, model: Model) -> None:
        text = template.to_json()
        assert len(text) <= 2 * KiB * model.gib
        assert Template.from_json(text).bytes_read >= sum(s for s in model.sizes.values()) * 0.99

    def test_in_file_order(self, model: Model) -> None:
        reads = itertools.chain.from_iterable(in_chunks(name, 0, size) for name, size in model.sizes.items())
        template = model.template([reads])
        self.check(template, model)
        assert len(template.groups[0]) == len(model.sizes)

    def test_the_beginning_of_every_tensor_first(self, model: Model) -> None:
        """As transformers reads: metadata, a touch of each tensor, then the tensors in an order of its own."""
        touches = [(name, start, start + 64 * KiB) for name, start, _ in model.tensors]
        order = random.Random(1).sample(model.tensors, len(model.tensors))
        reads = itertools.chain(touches, *(in_chunks(*tensor) for tensor in order))
        self.check(model.template([reads]), model)

    def test_a_pool_of_threads(self, model: Model) -> None:
        threads = [itertools.chain.from_iterable(in_chunks(*t) for t in model.tensors[n::4]) for n in range(4)]
        self.check(model.template([interleaved(threads)]), model)

    def test_two_workers_that_read_slices(self, model: Model) -> None:
        """Tensor parallelism: each reads its half of the rows of every tensor."""

        def half(worker: int) -> Iterator[Read]:
            for name, start, stop in model.tensors:
                middle = (start + stop) // 2
                yield from in_chunks(name, *((start, middle), (middle, stop))[worker])

        template = model.template([half(0), half(1)])
        self.check(template, model)
        assert len(template.groups) == 2

"""penstock.pagecache.files on real directories."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from penstock.pagecache.base import ModelFile
from penstock.pagecache.files import ModelFiles, find_weights, looks_like_weights, models_in_command
from penstock.units import KiB, MiB


def write(path: Path, size_bytes: int = 256 * KiB) -> Path:
    """A sparse file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.truncate(size_bytes)
    return path


def identity(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino


class TestWeights:
    @pytest.mark.parametrize(
        ("name", "size_bytes", "expected"),
        [
            ("model-00001-of-00002.safetensors", 256 * KiB, True),
            ("model.GGUF", 256 * KiB, True),
            ("pytorch_model.bin", MiB, True),
            ("model.safetensors", 256 * KiB - 1, False),  # an adapter's or a test's: not worth it
            ("tokenizer.json", 17 * MiB, False),
            ("2a8d1f0c9b", 64 * MiB, True),  # a blob of the Hugging Face cache
            ("2a8d1f0c9b", 64 * MiB - 1, False),
            ("libtorch_cpu.so", 500 * MiB, False),
            ("libcublasLt.so.12", 500 * MiB, False),
            ("/lib.so.d/weights", 500 * MiB, True),
        ],
    )
    def test_by_name_and_size(self, name: str, size_bytes: int, expected: bool) -> None:
        assert looks_like_weights(name, size_bytes) is expected

    def test_a_tree_in_the_order_of_its_names(self, tmp_path: Path) -> None:
        wanted = [write(tmp_path / name) for name in ("b.safetensors", "c.safetensors", "vae/a.safetensors")]
        write(tmp_path / ".git/x.safetensors")
        write(tmp_path / "config.json")
        (tmp_path / "gone.safetensors").symlink_to(tmp_path / "nowhere")
        assert find_weights(tmp_path) == wanted
        assert find_weights(tmp_path / "config.json") == [tmp_path / "config.json"]  # a named file is taken as it is
        assert find_weights(tmp_path / "none") == []

    def test_links_are_followed_to_files(self, tmp_path: Path) -> None:
        blob = write(tmp_path / "blobs/2a8d1f", 64 * MiB)
        snapshot = tmp_path / "snapshots/main"
        snapshot.mkdir(parents=True)
        (snapshot / "model.safetensors").symlink_to(blob)
        assert find_weights(snapshot) == [snapshot / "model.safetensors"]


class TestCommands:
    @pytest.mark.parametrize("words", [["--model", "{}"], ["--model={}"], ["{}"], ["-m", "{}", "--tp=2"]])
    def test_a_directory_however_it_is_named(self, tmp_path: Path, words: list[str]) -> None:
        write(tmp_path / "llama/model.safetensors")
        directory = tmp_path / "llama"
        command = ["serve", *(word.format(directory) for word in words)]
        assert models_in_command(command) == [directory]

    def test_relative_to_the_working_directory(self, tmp_path: Path) -> None:
        write(tmp_path / "llama.gguf")
        assert models_in_command(["serve", "llama.gguf", "./llama.gguf"], tmp_path) == [tmp_path / "llama.gguf"]

    def test_the_program_itself_is_no_model(self, tmp_path: Path) -> None:
        path = write(tmp_path / "model.llamafile")
        assert models_in_command([str(path)]) == []

    def test_a_pipeline_has_its_weights_further_down(self, tmp_path: Path) -> None:
        write(tmp_path / "unet/model.safetensors")
        assert models_in_command(["draw", str(tmp_path)]) == []  # as a home directory might have
        write(tmp_path / "model_index.json", 500)
        assert models_in_command(["draw", str(tmp_path)]) == [tmp_path]

    @pytest.mark.parametrize("word", ["", "=", "--flag", "x" * 5000, "a\nb", "\0", "/dev/null", "http://x/y", "\udcff"])
    def test_words_that_name_no_model(self, word: str) -> None:
        assert models_in_command(["serve", word, f"--model={word}"]) == []

    def test_a_directory_that_may_not_be_read(self, tmp_path: Path) -> None:
        write(tmp_path / "llama/model.safetensors")
        (tmp_path / "llama").chmod(0)
        try:
            found = models_in_command(["serve", str(tmp_path / "llama")])
            may_read = os.access(tmp_path / "llama", os.R_OK, effective_ids=True)  # as root may
        finally:
            (tmp_path / "llama").chmod(0o700)
        assert found == ([tmp_path / "llama"] if may_read else [])


class TestModelFiles:
    def test_names_are_below_the_root(self, tmp_path: Path) -> None:
        path = write(tmp_path / "llama/parts/a.safetensors", MiB)
        files = ModelFiles([tmp_path / "llama"])
        (file,) = files
        assert file == ModelFile("parts/a.safetensors", str(path), MiB, *identity(path))
        assert len(files) == 1
        assert files.get(*identity(path)) is file
        assert files.by_name("parts/a.safetensors") is file
        assert files.by_name("a.safetensors") is None
        assert files.get(0, 0) is None

    def test_a_single_files_root_is_its_directory(self, tmp_path: Path) -> None:
        files = ModelFiles([write(tmp_path / "llama.gguf")])
        assert [file.name for file in files] == ["llama.gguf"]
        assert files.roots == [tmp_path]

    def test_names_do_not_depend_on_where_the_root_is(self, tmp_path: Path) -> None:
        for node in ("here", "there/deeper"):
            for name in ("a.safetensors", "b/c.safetensors"):
                write(tmp_path / node / "llama" / name)
        names = [[f.name for f in ModelFiles([tmp_path / node / "llama"])] for node in ("here", "there/deeper")]
        assert names[0] == names[1] == ["a.safetensors", "b/c.safetensors"]

    def test_a_relative_root(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = write(tmp_path / "llama/a.gguf")
        monkeypatch.chdir(tmp_path / "llama")
        (file,) = ModelFiles([Path()])
        assert (file.name, file.path) == ("a.gguf", str(path))

    def test_a_file_that_the_program_opened(self, tmp_path: Path) -> None:
        known, other = write(tmp_path / "llama/a.gguf"), write(tmp_path / "elsewhere/b.gguf")
        files = ModelFiles([tmp_path / "llama"])
        assert files.add(str(known), *identity(known)) is files.by_name("a.gguf")
        found = files.add(str(other), *identity(other))
        assert (found.name, files.roots) == ("b.gguf", [tmp_path / "llama", tmp_path / "elsewhere"])
        later = write(tmp_path / "llama/sub/c.gguf")
        assert files.add(str(later), *identity(later)).name == "sub/c.gguf"
        assert len(files) == 3

    def test_one_that_is_gone(self, tmp_path: Path) -> None:
        files = ModelFiles()
        with pytest.raises(FileNotFoundError):
            files.add(str(tmp_path / "gone"), 1, 2)
        assert len(files) == 0

    def test_the_observer_may_call_the_device_otherwise(self, tmp_path: Path) -> None:
        """As btrfs does: stat(2) and /proc/PID/maps show different devices."""
        path = write(tmp_path / "a.gguf")
        files = ModelFiles([path])
        device, inode = identity(path)
        assert files.add(str(path), device + 1, inode) is files.get(device, inode)
        assert files.get(device + 1, inode) is files.get(device, inode)
        assert (len(files), len(list(files))) == (1, 1)

    def test_two_models_with_the_same_file_names(self, tmp_path: Path) -> None:
        """A draft model and its target, or the parts of a pipeline."""
        for name in ("a/draft", "b/draft", "target"):
            write(tmp_path / name / "model.safetensors")
        roots = [tmp_path / name for name in ("target", "a/draft", "b/draft")]
        files = ModelFiles(roots)
        assert [f.name for f in files] == ["model.safetensors", "draft/model.safetensors", "b/draft/model.safetensors"]
        assert [f.name for f in ModelFiles(roots)] == [f.name for f in files]
        found = ModelFiles()
        for root in roots:
            path = root / "model.safetensors"
            found.add(str(path), *identity(path))
        assert len({f.name for f in found}) == 3

    def test_a_file_that_replaces_another_keeps_its_name(self, tmp_path: Path) -> None:
        path = write(tmp_path / "a.gguf")
        files = ModelFiles([path])
        replacement = write(tmp_path / "new")
        replacement.replace(path)
        assert files.add(str(path), *identity(path)).name == "a.gguf"

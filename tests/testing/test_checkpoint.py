"""Generated safetensors checkpoints, read without the code under test and by the format's own readers."""

from __future__ import annotations

import errno
import json
import shutil
import struct
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from penstock.testing.checkpoint import generate_checkpoint, safetensors_header, shards
from penstock.testing.shapes import PRESETS, ModelShape, TensorSpec, tensors
from penstock.units import GiB, KiB, MiB


def narrow(preset: str) -> ModelShape:
    """The preset's architecture at 1 MiB or less."""
    shape = PRESETS[preset]
    return replace(
        shape,
        hidden_size=64,
        layers=3,
        heads=4,
        kv_heads=min(shape.kv_heads, 4) // 2,
        head_dim=16,
        intermediate_size=96,
        vocab_size=192,
    )


SMALL = narrow("tiny-llama")  # 229 KiB; in shards of 64 KiB 4 files


def names_in(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def stored_tensors(path: Path) -> dict[str, bytes]:
    """Name and bytes of each tensor, in the order of the file; read without the code under test."""
    content = path.read_bytes()
    (header_bytes,) = struct.unpack_from("<Q", content)
    data = content[8 + header_bytes :]
    header = json.loads(content[8 : 8 + header_bytes])
    header.pop("__metadata__")
    return {name: data[slice(*entry["data_offsets"])] for name, entry in header.items()}


class TestShards:
    @pytest.mark.parametrize(
        ("preset", "file_bytes"),
        [
            # meta-llama/Llama-3.1-8B and Llama-3.2-3B on huggingface.co
            ("llama-3.1-8b", [4_976_698_672, 4_999_802_720, 4_915_916_176, 1_168_138_808]),
            ("llama-3.2-3b", [4_965_799_096, 1_459_729_952]),
        ],
    )
    def test_file_sizes_are_the_published_ones(self, preset: str, file_bytes: list[int]) -> None:
        files = shards(tensors(PRESETS[preset]))
        assert [len(safetensors_header(file)) + sum(spec.size_bytes for spec in file) for file in files] == file_bytes

    def test_files_are_filled_by_module_and_sorted_by_name(self) -> None:
        first, second = shards([TensorSpec(name, "BF16", (10,)) for name in "dcba"], 50)
        assert [spec.name for spec in first] == ["c", "d"]
        assert [spec.name for spec in second] == ["a", "b"]

    def test_a_tensor_larger_than_a_shard_has_its_own(self) -> None:
        sizes = {"a": 4, "big": 100, "b": 4, "c": 4}
        specs = [TensorSpec(name, "BF16", (size,)) for name, size in sizes.items()]
        assert [[spec.name for spec in file] for file in shards(specs, 32)] == [["a"], ["big"], ["b", "c"]]

    @pytest.mark.parametrize("shard_bytes", [0, -1])
    def test_sizes_must_be_positive(self, shard_bytes: int, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="positive"):
            generate_checkpoint(tmp_path, SMALL, shard_bytes=shard_bytes)


class TestSafetensors:
    def test_one_file_has_no_index(self, tmp_path: Path) -> None:
        files = generate_checkpoint(tmp_path / "a" / "model", SMALL)
        assert files == [tmp_path / "a" / "model" / "model.safetensors"]
        assert names_in(files[0].parent) == ["config.json", "generation_config.json", "model.safetensors"]

    def test_index_lists_every_tensor_in_its_file(self, tmp_path: Path) -> None:
        files = generate_checkpoint(tmp_path, SMALL, shard_bytes=64 * KiB)
        assert [file.name for file in files] == [f"model-{i + 1:05}-of-00004.safetensors" for i in range(4)]
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        stored = {file.name: stored_tensors(file) for file in files}
        assert index["weight_map"] == {name: file for file, content in stored.items() for name in content}
        assert index["metadata"]["total_size"] == sum(
            len(data) for content in stored.values() for data in content.values()
        )

    def test_safetensors_reads_what_was_planned(self, tmp_path: Path) -> None:
        safetensors = pytest.importorskip("safetensors", reason="safetensors is not installed")
        pytest.importorskip("torch", reason="torch is not installed; numpy has no bf16")
        planned = {spec.name: spec for spec in tensors(SMALL)}
        found = {}
        for file in generate_checkpoint(tmp_path, SMALL, shard_bytes=96 * KiB):
            assert struct.unpack("<Q", file.read_bytes()[:8])[0] % 8 == 0
            with safetensors.safe_open(file, framework="pt") as reader:
                assert reader.metadata() == {"format": "pt"}
                for name in reader.keys():  # noqa: SIM118 - not a dictionary
                    tensor = reader.get_tensor(name)
                    assert bool(tensor.isfinite().all())
                    assert float(tensor.abs().max()) < 0.1
                    found[name] = TensorSpec(name, "BF16", tuple(tensor.shape))
        assert found == planned

    @pytest.mark.parametrize("preset", ["tiny-llama", "llama-3.2-1b", "qwen2.5-7b", "opt-6.7b", "mixtral-8x7b"])
    def test_transformers_loads_it(self, preset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        torch = pytest.importorskip("torch", reason="torch is not installed")
        transformers = pytest.importorskip("transformers", reason="transformers is not installed")
        files = generate_checkpoint(tmp_path, narrow(preset), shard_bytes=128 * KiB)
        model, loading = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path, dtype="auto", output_loading_info=True
        )
        assert {key: value for key, value in loading.items() if value} == {}
        assert model.dtype == torch.bfloat16
        stored = next(data for file in files for name, data in stored_tensors(file).items() if "embed_tok" in name)
        embedding = model.get_input_embeddings().weight.detach()
        assert embedding.contiguous().view(torch.uint8).numpy().tobytes() == stored
        assert bool(model(torch.tensor([[1, 2, 3]])).logits.isfinite().all())

    def test_weights_are_finite_small_and_hard_to_compress(self, tmp_path: Path) -> None:
        # tied, so that the file stays at 1.4 MiB; the embedding, 9/8 MiB, is more than one block
        (file,) = generate_checkpoint(tmp_path, replace(SMALL, vocab_size=9216, tied_embeddings=True))
        data = b"".join(stored_tensors(file).values())
        values = (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4")
        assert np.isfinite(values).all()
        assert 0.001 < np.abs(values).max() < 0.1
        assert values.min() < 0 < values.max()
        assert len(zlib.compress(data[:MiB], 6)) > 0.7 * MiB

    def test_seed_and_name_determine_a_tensor(self, tmp_path: Path) -> None:
        (whole,) = generate_checkpoint(tmp_path / "a", SMALL, seed=1)
        (again,) = generate_checkpoint(tmp_path / "b", SMALL, seed=1)
        (other,) = generate_checkpoint(tmp_path / "c", SMALL, seed=2)
        cut = generate_checkpoint(tmp_path / "d", SMALL, seed=1, shard_bytes=32 * KiB)
        assert whole.read_bytes() == again.read_bytes()
        merged = {name: data for file in cut for name, data in stored_tensors(file).items()}
        assert merged == stored_tensors(whole)
        assert all(merged[name] != data for name, data in stored_tensors(other).items())
        assert len(set(merged.values())) == len(merged)

    def test_progress_adds_up_to_the_files(self, tmp_path: Path) -> None:
        steps: list[int] = []
        files = generate_checkpoint(tmp_path, SMALL, size_bytes=150 * KiB, shard_bytes=64 * KiB, progress=steps.append)
        assert sum(steps) == sum(file.stat().st_size for file in files)


class TestExistingFiles:
    def test_a_directory_with_weights_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "adapter.safetensors").write_bytes(b"mine")
        with pytest.raises(FileExistsError, match="already") as caught:
            generate_checkpoint(tmp_path, SMALL)
        assert str(tmp_path) in str(caught.value)
        assert names_in(tmp_path) == ["adapter.safetensors"]

    def test_overwrite_replaces_the_checkpoint_and_nothing_else(self, tmp_path: Path) -> None:
        generate_checkpoint(tmp_path, SMALL, shard_bytes=64 * KiB)
        (tmp_path / "model-notes.safetensors.txt").write_text("mine")
        (tmp_path / "adapter.safetensors").write_bytes(b"mine")
        generate_checkpoint(tmp_path, SMALL, overwrite=True)
        assert names_in(tmp_path) == [
            "adapter.safetensors",
            "config.json",
            "generation_config.json",
            "model-notes.safetensors.txt",
            "model.safetensors",
        ]
        generate_checkpoint(tmp_path, SMALL, shard_bytes=128 * KiB, overwrite=True)
        assert "model.safetensors" not in names_in(tmp_path)
        assert "model-00002-of-00002.safetensors" in names_in(tmp_path)


class TestFailures:
    def test_too_little_room_is_seen_before_writing(self, tmp_path: Path) -> None:
        target = tmp_path / "new" / "model"
        size_bytes = 2 * shutil.disk_usage(tmp_path).free + GiB
        with pytest.raises(OSError, match="are free") as caught:
            generate_checkpoint(target, PRESETS["llama-3.1-8b"], size_bytes=size_bytes)
        assert caught.value.errno == errno.ENOSPC
        assert caught.value.filename == str(target)
        assert names_in(tmp_path) == []

    def test_a_disk_that_fills_up_names_the_file(self, tmp_path: Path) -> None:
        partial = tmp_path / "model.safetensors.partial"
        partial.symlink_to("/dev/full")
        with pytest.raises(OSError, match=r"writing at 0") as caught:
            generate_checkpoint(tmp_path, SMALL)
        assert caught.value.errno == errno.ENOSPC
        assert caught.value.filename == str(partial)
        assert names_in(tmp_path) == []

    @pytest.mark.parametrize("overwrite", [False, True])
    def test_a_failure_leaves_the_directory_as_it_was(self, overwrite: bool, tmp_path: Path) -> None:
        target = tmp_path / "new" / "model"
        before: dict[str, bytes] = {}
        if overwrite:
            generate_checkpoint(target, SMALL, shard_bytes=64 * KiB)
            before = {path.name: path.read_bytes() for path in target.iterdir()}
        written_bytes = 0

        def interrupt(step_bytes: int) -> None:
            nonlocal written_bytes
            written_bytes += step_bytes
            if written_bytes > 128 * KiB:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            generate_checkpoint(target, SMALL, seed=1, shard_bytes=64 * KiB, overwrite=overwrite, progress=interrupt)
        if overwrite:
            assert {path.name: path.read_bytes() for path in target.iterdir()} == before
        else:
            assert names_in(tmp_path) == []

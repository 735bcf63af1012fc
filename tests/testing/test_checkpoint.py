"""Generated checkpoints: the plan against the real models, the files through the formats' own readers."""

from __future__ import annotations

import errno
import json
import shutil
import struct
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from penstock.errors import UnsupportedError
from penstock.testing.checkpoint import (
    PRESETS,
    ModelShape,
    TensorSpec,
    generate_checkpoint,
    generate_gguf,
    gguf_tensors,
    model_config,
    safetensors_header,
    scaled,
    shards,
    tensors,
    weight_bytes,
)
from penstock.units import GiB, MiB

TINY = PRESETS["tiny-llama"]


def narrow(preset: str) -> ModelShape:
    """The preset's architecture at a few hundred KiB."""
    if preset == "tiny-llama":
        return TINY
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


class TestShapes:
    @pytest.mark.parametrize(
        ("preset", "parameters"),
        [
            ("llama-3.2-1b", 1_235_814_400),
            ("llama-3.2-3b", 3_212_749_824),
            ("llama-3.1-8b", 8_030_261_248),
            ("llama-3.1-70b", 70_553_706_496),
            ("qwen2.5-7b", 7_615_616_512),
            ("qwen2.5-72b", 72_706_203_648),
            ("opt-6.7b", 6_658_473_984),
            ("mixtral-8x7b", 46_702_792_704),
        ],
    )
    def test_parameter_counts_are_the_published_ones(self, preset: str, parameters: int) -> None:
        assert sum(spec.elements for spec in tensors(PRESETS[preset])) == parameters

    @pytest.mark.parametrize("preset", PRESETS)
    def test_parameter_counts_are_those_of_transformers(self, preset: str) -> None:
        torch = pytest.importorskip("torch", reason="torch is not installed")
        transformers = pytest.importorskip("transformers", reason="transformers is not installed")
        shape = PRESETS[preset]
        config = transformers.AutoConfig.for_model(**model_config(shape))
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config)
        unique = {id(parameter): parameter.numel() for parameter in model.parameters()}
        assert sum(unique.values()) == sum(spec.elements for spec in tensors(shape))

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
        assert [
            len(safetensors_header(file)) + sum(spec.size_bytes for spec in file) for file in files
        ] == file_bytes

    def test_files_are_filled_by_module_and_sorted_by_name(self) -> None:
        first, second = shards([TensorSpec(name, "BF16", (10,)) for name in "dcba"], 50)
        assert [spec.name for spec in first] == ["c", "d"]
        assert [spec.name for spec in second] == ["a", "b"]

    def test_a_tensor_larger_than_a_shard_has_its_own(self) -> None:
        sizes = {"a": 4, "big": 100, "b": 4, "c": 4}
        specs = [TensorSpec(name, "BF16", (size,)) for name, size in sizes.items()]
        assert [[spec.name for spec in file] for file in shards(specs, 32)] == [["a"], ["big"], ["b", "c"]]

    @pytest.mark.parametrize("preset", PRESETS)
    @pytest.mark.parametrize("size_bytes", [8 * GiB, 20 * GiB])
    def test_scaled_comes_within_half_a_layer(self, preset: str, size_bytes: int) -> None:
        shape = scaled(PRESETS[preset], size_bytes)
        total_bytes = sum(spec.size_bytes for spec in tensors(shape))
        layer_bytes = sum(
            spec.size_bytes for spec in tensors(shape) if f".layers.{shape.layers - 1}." in spec.name
        )
        assert abs(total_bytes - size_bytes) <= layer_bytes / 2
        assert shape.vocab_size == PRESETS[preset].vocab_size

    @pytest.mark.parametrize("preset", PRESETS)
    def test_weight_bytes_are_the_sum_of_the_tensors(self, preset: str) -> None:
        assert weight_bytes(PRESETS[preset]) == sum(spec.size_bytes for spec in tensors(PRESETS[preset]))

    def test_scaled_reduces_the_vocabulary_below_one_layer(self) -> None:
        shape = scaled(PRESETS["llama-3.2-1b"], 200 * MiB)
        assert shape.layers == 1
        assert shape.vocab_size % 64 == 0
        assert sum(spec.size_bytes for spec in tensors(shape)) == pytest.approx(200 * MiB, rel=0.01)
        assert scaled(PRESETS["llama-3.2-1b"], 1).vocab_size == 64

    @pytest.mark.parametrize("size_bytes", [0, -1])
    def test_sizes_must_be_positive(self, size_bytes: int, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="positive"):
            scaled(TINY, size_bytes)
        with pytest.raises(ValueError, match="positive"):
            generate_checkpoint(tmp_path, TINY, shard_bytes=size_bytes)


class TestSafetensors:
    def test_one_file_has_no_index(self, tmp_path: Path) -> None:
        files = generate_checkpoint(tmp_path / "a" / "model", TINY)
        assert files == [tmp_path / "a" / "model" / "model.safetensors"]
        assert names_in(files[0].parent) == ["config.json", "generation_config.json", "model.safetensors"]

    def test_index_lists_every_tensor_in_its_file(self, tmp_path: Path) -> None:
        files = generate_checkpoint(tmp_path, TINY, shard_bytes=2 * MiB)
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
        planned = {spec.name: spec for spec in tensors(TINY)}
        found = {}
        for file in generate_checkpoint(tmp_path, TINY, shard_bytes=3 * MiB):
            assert struct.unpack("<Q", file.read_bytes()[:8])[0] % 8 == 0
            with safetensors.safe_open(file, framework="pt") as reader:
                assert reader.metadata() == {"format": "pt"}
                for name in reader.keys():  # noqa: SIM118 - not a dictionary
                    tensor = reader.get_tensor(name)
                    assert bool(tensor.isfinite().all())
                    assert float(tensor.abs().max()) < 0.1
                    found[name] = TensorSpec(name, "BF16", tuple(tensor.shape))
        assert found == planned

    @pytest.mark.parametrize(
        "preset", ["tiny-llama", "llama-3.2-1b", "qwen2.5-7b", "opt-6.7b", "mixtral-8x7b"]
    )
    def test_transformers_loads_it(
        self, preset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        torch = pytest.importorskip("torch", reason="torch is not installed")
        transformers = pytest.importorskip("transformers", reason="transformers is not installed")
        files = generate_checkpoint(tmp_path, narrow(preset), shard_bytes=MiB)
        model, loading = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path, dtype="auto", output_loading_info=True
        )
        assert {key: value for key, value in loading.items() if value} == {}
        assert model.dtype == torch.bfloat16
        stored = next(
            data for file in files for name, data in stored_tensors(file).items() if "embed_tok" in name
        )
        embedding = model.get_input_embeddings().weight.detach()
        assert embedding.contiguous().view(torch.uint8).numpy().tobytes() == stored
        assert bool(model(torch.tensor([[1, 2, 3]])).logits.isfinite().all())

    def test_weights_are_finite_small_and_hard_to_compress(self, tmp_path: Path) -> None:
        (file,) = generate_checkpoint(tmp_path, TINY)
        data = b"".join(stored_tensors(file).values())
        values = (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4")
        assert np.isfinite(values).all()
        assert 0.001 < np.abs(values).max() < 0.1
        assert values.min() < 0 < values.max()
        assert len(zlib.compress(data[:MiB], 6)) > 0.7 * MiB

    def test_seed_and_name_determine_a_tensor(self, tmp_path: Path) -> None:
        (whole,) = generate_checkpoint(tmp_path / "a", TINY, seed=1)
        (again,) = generate_checkpoint(tmp_path / "b", TINY, seed=1)
        (other,) = generate_checkpoint(tmp_path / "c", TINY, seed=2)
        cut = generate_checkpoint(tmp_path / "d", TINY, seed=1, shard_bytes=MiB)
        assert whole.read_bytes() == again.read_bytes()
        merged = {name: data for file in cut for name, data in stored_tensors(file).items()}
        assert merged == stored_tensors(whole)
        assert all(merged[name] != data for name, data in stored_tensors(other).items())
        assert len(set(merged.values())) == len(merged)

    def test_progress_adds_up_to_the_files(self, tmp_path: Path) -> None:
        steps: list[int] = []
        files = generate_checkpoint(
            tmp_path, TINY, size_bytes=3 * MiB, shard_bytes=MiB, progress=steps.append
        )
        assert sum(steps) == sum(file.stat().st_size for file in files)


class TestExistingFiles:
    def test_a_directory_with_weights_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "adapter.safetensors").write_bytes(b"mine")
        with pytest.raises(FileExistsError, match="already") as caught:
            generate_checkpoint(tmp_path, TINY)
        assert str(tmp_path) in str(caught.value)
        assert names_in(tmp_path) == ["adapter.safetensors"]

    def test_overwrite_replaces_the_checkpoint_and_nothing_else(self, tmp_path: Path) -> None:
        generate_checkpoint(tmp_path, TINY, shard_bytes=2 * MiB)
        (tmp_path / "model-notes.safetensors.txt").write_text("mine")
        (tmp_path / "adapter.safetensors").write_bytes(b"mine")
        generate_checkpoint(tmp_path, TINY, overwrite=True)
        assert names_in(tmp_path) == [
            "adapter.safetensors",
            "config.json",
            "generation_config.json",
            "model-notes.safetensors.txt",
            "model.safetensors",
        ]
        generate_checkpoint(tmp_path, TINY, shard_bytes=4 * MiB, overwrite=True)
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
        with pytest.raises(OSError, match="are free"):
            generate_gguf(target / "model.gguf", PRESETS["llama-3.1-8b"], size_bytes=size_bytes)
        assert names_in(tmp_path) == []

    def test_a_disk_that_fills_up_names_the_file(self, tmp_path: Path) -> None:
        partial = tmp_path / "model.safetensors.partial"
        partial.symlink_to("/dev/full")
        with pytest.raises(OSError, match=r"writing at 0") as caught:
            generate_checkpoint(tmp_path, TINY)
        assert caught.value.errno == errno.ENOSPC
        assert caught.value.filename == str(partial)
        assert names_in(tmp_path) == []

    @pytest.mark.parametrize("overwrite", [False, True])
    def test_a_failure_leaves_the_directory_as_it_was(self, overwrite: bool, tmp_path: Path) -> None:
        target = tmp_path / "new" / "model"
        before: dict[str, bytes] = {}
        if overwrite:
            generate_checkpoint(target, TINY, shard_bytes=2 * MiB)
            before = {path.name: path.read_bytes() for path in target.iterdir()}
        written_bytes = 0

        def interrupt(step_bytes: int) -> None:
            nonlocal written_bytes
            written_bytes += step_bytes
            if written_bytes > 4 * MiB:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            generate_checkpoint(
                target, TINY, seed=1, shard_bytes=2 * MiB, overwrite=overwrite, progress=interrupt
            )
        if overwrite:
            assert {path.name: path.read_bytes() for path in target.iterdir()} == before
        else:
            assert names_in(tmp_path) == []


class TestGguf:
    @pytest.mark.parametrize("preset", ["tiny-llama", "qwen2.5-7b", "mixtral-8x7b"])
    def test_gguf_reads_what_was_planned(self, preset: str, tmp_path: Path) -> None:
        gguf = pytest.importorskip("gguf", reason="gguf is not installed")
        shape = narrow(preset)
        path = generate_gguf(tmp_path / "model.gguf", shape, seed=3)
        reader = gguf.GGUFReader(path)
        architecture = "qwen2" if shape.architecture == "qwen2" else "llama"
        assert field(reader, "general.architecture") == architecture
        assert field(reader, f"{architecture}.block_count") == shape.layers
        assert field(reader, f"{architecture}.attention.head_count_kv") == shape.kv_heads
        assert field(reader, f"{architecture}.rope.freq_base") == shape.rope_theta
        assert reader.alignment == 32
        found = []
        for tensor in reader.tensors:
            dims = tuple(int(size) for size in tensor.shape[::-1])
            found.append(TensorSpec(tensor.name, tensor.tensor_type.name, dims))
            data = np.ascontiguousarray(tensor.data)
            values = data.view("<f4") if tensor.tensor_type.name == "F32" else as_f32(data)
            assert values.size == found[-1].elements
            assert np.isfinite(values).all()
            assert np.abs(values).max() < 0.1
            assert tensor.data_offset % 32 == 0
        assert found == gguf_tensors(shape)
        assert sum(spec.elements for spec in found) == sum(spec.elements for spec in tensors(shape))
        last = reader.tensors[-1]
        assert path.stat().st_size == last.data_offset + last.n_bytes + -last.n_bytes % 32

    @pytest.mark.parametrize("preset", sorted(set(PRESETS) - {"opt-6.7b"}))
    def test_llama_cpp_knows_every_name(self, preset: str) -> None:
        gguf = pytest.importorskip("gguf", reason="gguf is not installed")
        shape = PRESETS[preset]
        architecture = gguf.MODEL_ARCH.QWEN2 if shape.architecture == "qwen2" else gguf.MODEL_ARCH.LLAMA
        known = {gguf.TENSOR_NAMES[kind] for kind in gguf.MODEL_TENSORS[architecture]}
        for spec in gguf_tensors(shape):
            name, _, _ = spec.name.rpartition(".")
            parts = name.split(".")
            pattern = ".".join(["blk", "{bid}", *parts[2:]]) if parts[0] == "blk" else name
            assert pattern in known

    def test_opt_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(UnsupportedError, match="safetensors"):
            generate_gguf(tmp_path / "model.gguf", PRESETS["opt-6.7b"])
        assert names_in(tmp_path) == []

    def test_an_existing_file_is_refused_or_replaced(self, tmp_path: Path) -> None:
        path = tmp_path / "model.gguf"
        path.write_bytes(b"mine")
        with pytest.raises(FileExistsError, match="overwrite"):
            generate_gguf(path, TINY)
        assert path.read_bytes() == b"mine"
        generate_gguf(path, TINY, overwrite=True)
        first = path.read_bytes()
        generate_gguf(path, TINY, overwrite=True)
        assert path.read_bytes() == first
        assert names_in(tmp_path) == ["model.gguf"]


def field(reader: Any, key: str) -> object:
    return reader.get_field(key).contents()


def as_f32(data: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return (data.reshape(-1).view("<u2").astype("<u4") << 16).view("<f4")

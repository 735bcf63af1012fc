"""Generated GGUF files, read by ggml's own reader."""

from __future__ import annotations

import errno
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from penstock.errors import UnsupportedError
from penstock.testing.gguf import generate_gguf, gguf_tensors
from penstock.testing.shapes import PRESETS, ModelShape, TensorSpec, tensors
from penstock.units import GiB


def narrow(preset: str) -> ModelShape:
    """The preset's architecture at 1 MiB or less, with norms that need padding."""
    shape = PRESETS[preset]
    return replace(
        shape,
        hidden_size=60,
        layers=3,
        heads=4,
        kv_heads=min(shape.kv_heads, 4) // 2,
        head_dim=16,
        intermediate_size=96,
        vocab_size=192,
    )


def names_in(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


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

    def test_too_little_room_is_seen_before_writing(self, tmp_path: Path) -> None:
        target = tmp_path / "new" / "model.gguf"
        size_bytes = 2 * shutil.disk_usage(tmp_path).free + GiB
        with pytest.raises(OSError, match="are free") as caught:
            generate_gguf(target, PRESETS["llama-3.1-8b"], size_bytes=size_bytes)
        assert caught.value.errno == errno.ENOSPC
        assert names_in(tmp_path) == []

    def test_opt_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(UnsupportedError, match="safetensors"):
            generate_gguf(tmp_path / "model.gguf", PRESETS["opt-6.7b"])
        assert names_in(tmp_path) == []

    def test_an_existing_file_is_refused_or_replaced(self, tmp_path: Path) -> None:
        path = tmp_path / "model.gguf"
        path.write_bytes(b"mine")
        with pytest.raises(FileExistsError, match="overwrite"):
            generate_gguf(path, narrow("tiny-llama"))
        assert path.read_bytes() == b"mine"
        generate_gguf(path, narrow("tiny-llama"), overwrite=True)
        first = path.read_bytes()
        generate_gguf(path, narrow("tiny-llama"), overwrite=True)
        assert path.read_bytes() == first
        assert names_in(tmp_path) == ["model.gguf"]


def field(reader: Any, key: str) -> object:
    return reader.get_field(key).contents()


def as_f32(data: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return (data.reshape(-1).view("<u2").astype("<u4") << 16).view("<f4")

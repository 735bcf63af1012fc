"""Model shapes: the plan against the real models, by their published numbers and by transformers."""

from __future__ import annotations

import pytest

from penstock.testing.shapes import PRESETS, model_config, scaled, tensors, weight_bytes
from penstock.units import GiB, MiB


class TestPresets:
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

    @pytest.mark.parametrize("preset", PRESETS)
    def test_weight_bytes_are_the_sum_of_the_tensors(self, preset: str) -> None:
        assert weight_bytes(PRESETS[preset]) == sum(spec.size_bytes for spec in tensors(PRESETS[preset]))


class TestScaled:
    @pytest.mark.parametrize("preset", PRESETS)
    @pytest.mark.parametrize("size_bytes", [8 * GiB, 20 * GiB])
    def test_scaled_comes_within_half_a_layer(self, preset: str, size_bytes: int) -> None:
        shape = scaled(PRESETS[preset], size_bytes)
        total_bytes = sum(spec.size_bytes for spec in tensors(shape))
        layer_bytes = sum(spec.size_bytes for spec in tensors(shape) if f".layers.{shape.layers - 1}." in spec.name)
        assert abs(total_bytes - size_bytes) <= layer_bytes / 2
        assert shape.vocab_size == PRESETS[preset].vocab_size

    def test_scaled_reduces_the_vocabulary_below_one_layer(self) -> None:
        shape = scaled(PRESETS["llama-3.2-1b"], 200 * MiB)
        assert shape.layers == 1
        assert shape.vocab_size % 64 == 0
        assert sum(spec.size_bytes for spec in tensors(shape)) == pytest.approx(200 * MiB, rel=0.01)
        assert scaled(PRESETS["llama-3.2-1b"], 1).vocab_size == 64

    @pytest.mark.parametrize("size_bytes", [0, -1])
    def test_sizes_must_be_positive(self, size_bytes: int) -> None:
        with pytest.raises(ValueError, match="positive"):
            scaled(PRESETS["tiny-llama"], size_bytes)

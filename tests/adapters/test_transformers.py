"""penstock.adapters.transformers: the same model as transformers' own, from the same files."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from penstock.adapters.transformers import from_pretrained
from penstock.errors import CheckpointError, UnsupportedError
from penstock.testing.checkpoint import generate_checkpoint
from penstock.testing.shapes import PRESETS
from penstock.units import MiB

torch = pytest.importorskip("torch", reason="needs torch")
transformers = pytest.importorskip("transformers", reason="needs transformers")


def same(ours: Any, theirs: Any) -> None:
    """All parameters and buffers, bit by bit, and what they make of a text."""
    assert type(ours) is type(theirs)
    mine, others = dict(ours.state_dict()), dict(theirs.state_dict())
    assert list(mine) == list(others)
    for name, tensor in others.items():
        assert mine[name].dtype == tensor.dtype
        assert torch.equal(mine[name], tensor), name
    for (name, buffer), (other_name, other) in zip(ours.named_buffers(), theirs.named_buffers(), strict=True):
        assert name == other_name
        assert torch.equal(buffer, other)
    assert ours.training == theirs.training
    tokens = torch.arange(12)[None]
    with torch.inference_mode():
        assert torch.equal(ours(tokens).logits, theirs(tokens).logits)


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    generate_checkpoint(tmp_path / "model", PRESETS["tiny-llama"], size_bytes=24 * MiB, shard_bytes=8 * MiB)
    return tmp_path / "model"


@pytest.fixture
def tied(tmp_path: Path) -> Path:
    config = transformers.LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    model.generation_config.temperature = 0.7
    model.generation_config.do_sample = True
    model.save_pretrained(tmp_path / "tied")
    return tmp_path / "tied"


def test_shards(sharded: Path) -> None:
    told: list[int] = []
    ours = from_pretrained(transformers.AutoModelForCausalLM, sharded, progress=told.append)
    same(ours, transformers.AutoModelForCausalLM.from_pretrained(sharded))
    assert sum(told) >= 24 * MiB * 0.9
    assert ours.name_or_path == str(sharded)


def test_tied_weights_and_generation(tied: Path) -> None:
    theirs = transformers.LlamaForCausalLM.from_pretrained(tied)
    for model_class in (transformers.AutoModelForCausalLM, transformers.LlamaForCausalLM):
        ours = from_pretrained(model_class, tied, engine="threads")
        same(ours, theirs)
        assert ours.lm_head.weight.data_ptr() == ours.model.embed_tokens.weight.data_ptr()
        assert ours.generation_config.to_dict() == theirs.generation_config.to_dict()
        assert ours.config.to_dict() == theirs.config.to_dict()


def test_another_dtype_and_another_class(tied: Path) -> None:
    ours = from_pretrained(transformers.AutoModelForCausalLM, tied, dtype=torch.float32)
    same(ours, transformers.AutoModelForCausalLM.from_pretrained(tied, dtype=torch.float32))
    headless = from_pretrained(transformers.AutoModel, tied)
    theirs = transformers.AutoModel.from_pretrained(tied)
    assert type(headless) is type(theirs)
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(headless.state_dict()[name], tensor)


def test_what_is_wrong(tied: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="device 'gpu'"):
        from_pretrained(transformers.AutoModelForCausalLM, tied, device="gpu")
    [weights] = tied.glob("*.safetensors")
    os.truncate(weights, weights.stat().st_size - 1)
    with pytest.raises(CheckpointError, match="truncated"):
        from_pretrained(transformers.AutoModelForCausalLM, tied)
    config = json.loads((tied / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8"}
    (tied / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedError, match="is quantised"):
        from_pretrained(transformers.AutoModelForCausalLM, tied)

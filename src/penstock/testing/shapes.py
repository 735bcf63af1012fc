"""The tensors of real models, by name and shape, and the config.json that goes with them.

Which tensors there are, how large they are and what they are called follows from a dozen numbers of the
model. Nothing here reads or writes a file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from types import MappingProxyType
from typing import Final, Literal

Architecture = Literal["llama", "qwen2", "mixtral", "opt"]

_MIN_VOCAB: Final = 64
_OPT_POSITION_OFFSET: Final = 2  # OPT's position table begins with two unused rows
_ITEM_BYTES: Final = {"BF16": 2, "F32": 4}


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """Llama 3's scaling of the rotary frequencies."""

    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What determines a model's tensors, and the numbers its config.json needs beside them."""

    name: str
    architecture: Architecture
    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    max_positions: int
    tied_embeddings: bool = False
    experts: int = 0
    experts_per_token: int = 0
    norm_eps: float = 1e-5
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    bos_token: int = 1
    eos_token: int = 2


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor: its name, its type as safetensors spells it, and its shape, outermost dimension first."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        return prod(self.shape)

    @property
    def size_bytes(self) -> int:
        return self.elements * _ITEM_BYTES[self.dtype]


def _llama3(name: str, hidden: int, layers: int, heads: int, head_dim: int, ffn: int, *, factor: float) -> ModelShape:
    return ModelShape(
        name=name,
        architecture="llama",
        hidden_size=hidden,
        layers=layers,
        heads=heads,
        kv_heads=8,
        head_dim=head_dim,
        intermediate_size=ffn,
        vocab_size=128_256,
        max_positions=131_072,
        tied_embeddings=name.startswith("llama-3.2"),
        rope_theta=500_000.0,
        rope_scaling=RopeScaling(factor),
        bos_token=128_000,
        eos_token=128_001,
    )


def _qwen2(name: str, hidden: int, layers: int, heads: int, kv_heads: int, ffn: int, eps: float) -> ModelShape:
    return ModelShape(
        name=name,
        architecture="qwen2",
        hidden_size=hidden,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=128,
        intermediate_size=ffn,
        vocab_size=152_064,
        max_positions=131_072,
        norm_eps=eps,
        rope_theta=1_000_000.0,
        bos_token=151_643,
        eos_token=151_643,
    )


# From the config.json of each base model on huggingface.co.
PRESETS: Final[Mapping[str, ModelShape]] = MappingProxyType(
    {
        shape.name: shape
        for shape in (
            ModelShape(
                name="tiny-llama",
                architecture="llama",
                hidden_size=256,
                layers=4,
                heads=8,
                kv_heads=4,
                head_dim=32,
                intermediate_size=688,
                vocab_size=1024,
                max_positions=2048,
            ),
            _llama3("llama-3.2-1b", 2048, 16, 32, 64, 8192, factor=32.0),
            _llama3("llama-3.2-3b", 3072, 28, 24, 128, 8192, factor=32.0),
            _llama3("llama-3.1-8b", 4096, 32, 32, 128, 14_336, factor=8.0),
            _llama3("llama-3.1-70b", 8192, 80, 64, 128, 28_672, factor=8.0),
            _qwen2("qwen2.5-7b", 3584, 28, 28, 4, 18_944, 1e-6),
            _qwen2("qwen2.5-72b", 8192, 80, 64, 8, 29_568, 1e-5),
            ModelShape(
                name="opt-6.7b",
                architecture="opt",
                hidden_size=4096,
                layers=32,
                heads=32,
                kv_heads=32,
                head_dim=128,
                intermediate_size=16_384,
                vocab_size=50_272,
                max_positions=2048,
                tied_embeddings=True,
                bos_token=2,
            ),
            ModelShape(
                name="mixtral-8x7b",
                architecture="mixtral",
                hidden_size=4096,
                layers=32,
                heads=32,
                kv_heads=8,
                head_dim=128,
                intermediate_size=14_336,
                vocab_size=32_000,
                max_positions=32_768,
                experts=8,
                experts_per_token=2,
                rope_theta=1_000_000.0,
            ),
        )
    }
)


def tensors(shape: ModelShape) -> list[TensorSpec]:
    """The tensors of the checkpoint in the order of the model's modules, all of them bf16."""
    named = _opt_tensors(shape) if shape.architecture == "opt" else _llama_tensors(shape)
    return [TensorSpec(name, "BF16", dims) for name, dims in named]


def _llama_tensors(shape: ModelShape) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, ffn = shape.hidden_size, shape.intermediate_size
    q_rows, kv_rows = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    yield "model.embed_tokens.weight", (shape.vocab_size, hidden)
    for index in range(shape.layers):
        layer = f"model.layers.{index}"
        for name, rows in (("q", q_rows), ("k", kv_rows), ("v", kv_rows)):
            yield f"{layer}.self_attn.{name}_proj.weight", (rows, hidden)
            if shape.architecture == "qwen2":
                yield f"{layer}.self_attn.{name}_proj.bias", (rows,)
        yield f"{layer}.self_attn.o_proj.weight", (hidden, q_rows)
        if shape.architecture == "mixtral":
            yield f"{layer}.block_sparse_moe.gate.weight", (shape.experts, hidden)
            for expert in range(shape.experts):
                yield f"{layer}.block_sparse_moe.experts.{expert}.w1.weight", (ffn, hidden)
                yield f"{layer}.block_sparse_moe.experts.{expert}.w2.weight", (hidden, ffn)
                yield f"{layer}.block_sparse_moe.experts.{expert}.w3.weight", (ffn, hidden)
        else:
            yield f"{layer}.mlp.gate_proj.weight", (ffn, hidden)
            yield f"{layer}.mlp.up_proj.weight", (ffn, hidden)
            yield f"{layer}.mlp.down_proj.weight", (hidden, ffn)
        yield f"{layer}.input_layernorm.weight", (hidden,)
        yield f"{layer}.post_attention_layernorm.weight", (hidden,)
    yield "model.norm.weight", (hidden,)
    if not shape.tied_embeddings:
        yield "lm_head.weight", (shape.vocab_size, hidden)


def _opt_tensors(shape: ModelShape) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, ffn = shape.hidden_size, shape.intermediate_size

    def linear(name: str, rows: int, columns: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield f"{name}.weight", (rows, columns)
        yield f"{name}.bias", (rows,)

    def norm(name: str) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield f"{name}.weight", (hidden,)
        yield f"{name}.bias", (hidden,)

    yield "model.decoder.embed_tokens.weight", (shape.vocab_size, hidden)
    yield "model.decoder.embed_positions.weight", (shape.max_positions + _OPT_POSITION_OFFSET, hidden)
    yield from norm("model.decoder.final_layer_norm")
    for index in range(shape.layers):
        layer = f"model.decoder.layers.{index}"
        for name in ("k_proj", "v_proj", "q_proj", "out_proj"):
            yield from linear(f"{layer}.self_attn.{name}", hidden, hidden)
        yield from norm(f"{layer}.self_attn_layer_norm")
        yield from linear(f"{layer}.fc1", ffn, hidden)
        yield from linear(f"{layer}.fc2", hidden, ffn)
        yield from norm(f"{layer}.final_layer_norm")
    if not shape.tied_embeddings:
        yield "lm_head.weight", (shape.vocab_size, hidden)


def scaled(shape: ModelShape, size_bytes: int) -> ModelShape:
    """The same model with the number of layers, at least 1, that brings its weights closest to `size_bytes`.

    Widths stay. Where one layer and the embeddings are already more than `size_bytes`, the vocabulary shrinks
    too, to a multiple of 64 and no less than 64, so the result of a very small size is larger than asked for.

    Raises:
        ValueError: `size_bytes` is not positive.
    """
    if size_bytes <= 0:
        raise ValueError(f"a checkpoint of {size_bytes} bytes cannot be made; ask for a positive size")
    one, two = (weight_bytes(replace(shape, layers=layers)) for layers in (1, 2))
    if one <= size_bytes:
        return replace(shape, layers=1 + round((size_bytes - one) / (two - one)))
    row_bytes = shape.hidden_size * _ITEM_BYTES["BF16"] * (1 if shape.tied_embeddings else 2)
    excess_rows = (one - size_bytes) / row_bytes
    vocab = round((shape.vocab_size - excess_rows) / _MIN_VOCAB) * _MIN_VOCAB
    return replace(shape, layers=1, vocab_size=min(shape.vocab_size, max(_MIN_VOCAB, vocab)))


def weight_bytes(shape: ModelShape) -> int:
    """The bytes of all tensors of the safetensors checkpoint, without listing them layer by layer."""
    one_bytes, two_bytes = (
        sum(spec.size_bytes for spec in tensors(replace(shape, layers=layers))) for layers in (1, 2)
    )
    return one_bytes + (shape.layers - 1) * (two_bytes - one_bytes)


def model_config(shape: ModelShape) -> dict[str, object]:
    """config.json, in the spelling that transformers 4 and 5 both read."""
    last_token = shape.vocab_size - 1  # a reduced vocabulary does not have the real model's special tokens
    config: dict[str, object] = {
        "model_type": shape.architecture,
        "hidden_size": shape.hidden_size,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "vocab_size": shape.vocab_size,
        "max_position_embeddings": shape.max_positions,
        "tie_word_embeddings": shape.tied_embeddings,
        "bos_token_id": min(shape.bos_token, last_token),
        "eos_token_id": min(shape.eos_token, last_token),
        "torch_dtype": "bfloat16",
        "use_cache": True,
    }
    if shape.architecture == "opt":
        return config | {
            "architectures": ["OPTForCausalLM"],
            "activation_function": "relu",
            "do_layer_norm_before": True,
            "ffn_dim": shape.intermediate_size,
            "pad_token_id": 1,
            "word_embed_proj_dim": shape.hidden_size,
        }
    config |= {
        "hidden_act": "silu",
        "intermediate_size": shape.intermediate_size,
        "num_key_value_heads": shape.kv_heads,
        "rms_norm_eps": shape.norm_eps,
        "rope_theta": shape.rope_theta,
    }
    match shape.architecture:
        case "llama":
            config |= {
                "architectures": ["LlamaForCausalLM"],
                "attention_bias": False,
                "head_dim": shape.head_dim,
                "mlp_bias": False,
            }
        case "qwen2":
            config |= {"architectures": ["Qwen2ForCausalLM"], "sliding_window": None}
            config |= {"use_sliding_window": False, "max_window_layers": shape.layers}
        case "mixtral":
            config |= {"architectures": ["MixtralForCausalLM"], "sliding_window": None}
            config |= {"num_local_experts": shape.experts, "num_experts_per_tok": shape.experts_per_token}
    if shape.rope_scaling is not None:
        config["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": shape.rope_scaling.factor,
            "low_freq_factor": shape.rope_scaling.low_freq_factor,
            "high_freq_factor": shape.rope_scaling.high_freq_factor,
            "original_max_position_embeddings": shape.rope_scaling.original_max_positions,
        }
    return config

"""Checkpoints with a real model's tensor names and shapes, and random weights.

A benchmark of model loading needs the files of the model: their number and sizes, the tensors' names, shapes
and order in the file. What the weights say does not matter, as long as no layer below can compress them away
and every number is finite. So this module writes what Hugging Face's `save_pretrained` would have written, or
llama.cpp's converter, at the speed of the disk and without a download. There is no tokenizer among the files.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Final, Literal

import numpy as np

from penstock.errors import UnsupportedError
from penstock.units import MiB, format_size

Architecture = Literal["llama", "qwen2", "mixtral", "opt"]
Progress = Callable[[int], None]  # called with the bytes written since the last call

SHARD_BYTES: Final = 5_000_000_000  # "5GB", the shard size of nearly every published checkpoint
_BLOCK_BYTES: Final = MiB  # in one run 3.8 GB/s; 4 MiB 3.2, 16 MiB 2.2: the masks find 1 MiB in the cache
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


def _llama3(
    name: str, hidden: int, layers: int, heads: int, head_dim: int, ffn: int, *, factor: float
) -> ModelShape:
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


def _qwen2(
    name: str, hidden: int, layers: int, heads: int, kv_heads: int, ffn: int, eps: float
) -> ModelShape:
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


def shards(specs: Sequence[TensorSpec], shard_bytes: int = SHARD_BYTES) -> list[list[TensorSpec]]:
    """The tensors of each file, in the order in which they lie in it.

    As Hugging Face does it: filled in the order of the modules until the next tensor would go over
    `shard_bytes`, a larger tensor alone in its file; inside a file sorted by name, so that layer 10 lies
    before layer 2.

    Raises:
        ValueError: `shard_bytes` is not positive.
    """
    if shard_bytes <= 0:
        raise ValueError(f"shards of {shard_bytes} bytes hold nothing; ask for a positive shard size")
    filled: list[list[TensorSpec]] = []
    room_bytes = 0
    for spec in specs:
        if not filled or spec.size_bytes > room_bytes:
            filled.append([])
            room_bytes = shard_bytes
        filled[-1].append(spec)
        room_bytes -= spec.size_bytes
    return [sorted(shard, key=lambda spec: spec.name) for shard in filled]


def safetensors_header(specs: Sequence[TensorSpec]) -> bytes:
    """Length, JSON and padding of a safetensors file, to where the first tensor's bytes begin (8-aligned)."""
    table: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for spec in specs:
        stop = offset + spec.size_bytes
        table[spec.name] = {"dtype": spec.dtype, "shape": spec.shape, "data_offsets": [offset, stop]}
        offset = stop
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


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


def generate_checkpoint(
    directory: str | os.PathLike[str],
    shape: ModelShape,
    *,
    size_bytes: int | None = None,
    shard_bytes: int | None = None,
    seed: int = 0,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> list[Path]:
    """Write a safetensors checkpoint and its configuration; the weight files, in order.

    Args:
        directory: made where it does not exist.
        size_bytes: take `scaled(shape, size_bytes)`; None keeps the model's own size.
        shard_bytes: largest file; None is 5 GB. Weights that fit in one go to model.safetensors, no index.
        seed: a tensor's bytes depend on this and on its name only, not on how the files are cut.
        overwrite: replace the checkpoint that is there, once the new one is complete; both need room.

    Every file is written beside its place, flushed to the disk, and renamed when all are complete; a failure
    leaves the directory as it was.

    Raises:
        FileExistsError: the directory holds safetensors files and `overwrite` is not set.
        OSError: the file system has no room (ENOSPC, seen before anything is written where possible).
        ValueError: a size is not positive, or the seed is negative.
    """
    directory = Path(directory)
    if size_bytes is not None:
        shape = scaled(shape, size_bytes)
    old = sorted(directory.glob("*.safetensors"))
    if old and not overwrite:
        raise FileExistsError(
            errno.EEXIST,
            f"{len(old)} safetensors files are there already; choose another directory or overwrite",
            str(directory),
        )
    _check_room(directory, weight_bytes(shape))
    files = shards(tensors(shape), SHARD_BYTES if shard_bytes is None else shard_bytes)

    names = [_shard_name(index, len(files)) for index in range(len(files))]
    config = model_config(shape)
    texts = {"config.json": config}
    texts["generation_config.json"] = {key: config[key] for key in ("bos_token_id", "eos_token_id")}
    if len(files) > 1:
        weight_map = {spec.name: name for name, file in zip(names, files, strict=True) for spec in file}
        texts["model.safetensors.index.json"] = {
            "metadata": {"total_size": weight_bytes(shape)},
            "weight_map": weight_map,
        }
    with _Staging(directory) as staging:
        for name, file in zip(names, files, strict=True):
            _write_file(staging.path(name), safetensors_header(file), file, seed=seed, progress=progress)
        for name, content in texts.items():
            text = json.dumps(content, indent=2, sort_keys=True) + "\n"
            _write_file(staging.path(name), text.encode(), (), seed=seed, progress=None)
        staging.publish()
    for path in directory.glob("model*.safetensors*"):
        if _CHECKPOINT_FILE.fullmatch(path.name) and path.name not in texts and path.name not in names:
            path.unlink()  # the replaced checkpoint had other shards
    return [directory / name for name in names]


_CHECKPOINT_FILE: Final = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json")


def _shard_name(index: int, count: int) -> str:
    return "model.safetensors" if count == 1 else f"model-{index + 1:05}-of-{count:05}.safetensors"


_GGUF_VERSION: Final = 3
_GGUF_ALIGNMENT_BYTES: Final = 32
_GGUF_TYPES: Final = {"F32": 0, "BF16": 30}  # ggml.h, enum ggml_type
_GGUF_FILE_TYPE_BF16: Final = 32  # llama.h, LLAMA_FTYPE_MOSTLY_BF16
_GGUF_NAMES: Final = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "block_sparse_moe.gate": "ffn_gate_inp",
    "w1": "ffn_gate_exps",
    "w2": "ffn_down_exps",
    "w3": "ffn_up_exps",
}
_HF_NAME: Final = re.compile(
    r"(?:model\.layers\.(?P<layer>\d+)\.)?(?:block_sparse_moe\.experts\.(?P<expert>\d+)\.)?"
    r"(?P<module>.+)\.(?P<kind>weight|bias)"
)


def gguf_tensors(shape: ModelShape) -> list[TensorSpec]:
    """The tensors as llama.cpp names them; matrices in bf16, vectors in f32, the experts of a layer in one.

    Llama 3's `rope_freqs.weight`, a table and not a weight, is left out.

    Raises:
        UnsupportedError: llama.cpp does not know the architecture.
    """
    if shape.architecture == "opt":
        raise UnsupportedError(f"{shape.name}: llama.cpp has no OPT; write it as safetensors")
    specs = []
    for spec in tensors(shape):
        match = _HF_NAME.fullmatch(spec.name)
        if match is None or match["module"] not in _GGUF_NAMES:
            raise UnsupportedError(f"{shape.name}: llama.cpp has no name for {spec.name}; use safetensors")
        dims = spec.shape
        if match["expert"] is not None:
            if match["expert"] != "0":
                continue
            dims = (shape.experts, *dims)
        block = f"blk.{match['layer']}." if match["layer"] else ""
        name = f"{block}{_GGUF_NAMES[match['module']]}.{match['kind']}"
        specs.append(TensorSpec(name, "F32" if len(dims) == 1 else "BF16", dims))
    return specs


def generate_gguf(
    path: str | os.PathLike[str],
    shape: ModelShape,
    *,
    size_bytes: int | None = None,
    seed: int = 0,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Write the model as one GGUF file, version 3, aligned to 32 bytes.

    The arguments are those of `generate_checkpoint`; the format is docs/gguf.md of ggml.

    Raises:
        FileExistsError: the file is there and `overwrite` is not set.
        UnsupportedError: llama.cpp does not know the architecture.
        OSError, ValueError: as for `generate_checkpoint`.
    """
    path = Path(path)
    if size_bytes is not None:
        shape = scaled(shape, size_bytes)
    if path.exists() and not overwrite:
        raise FileExistsError(
            errno.EEXIST, "the file is there already; choose another name or overwrite", str(path)
        )
    _check_room(path.parent, weight_bytes(shape))
    specs = gguf_tensors(shape)
    with _Staging(path.parent) as staging:
        _write_file(
            staging.path(path.name),
            _gguf_header(shape, specs),
            specs,
            alignment_bytes=_GGUF_ALIGNMENT_BYTES,
            seed=seed,
            progress=progress,
        )
        staging.publish()
    return path


def _padded(size_bytes: int) -> int:
    return size_bytes + -size_bytes % _GGUF_ALIGNMENT_BYTES


def _gguf_header(shape: ModelShape, specs: Sequence[TensorSpec]) -> bytes:
    architecture = "llama" if shape.architecture == "mixtral" else shape.architecture
    metadata: dict[str, str | int | float] = {
        "general.architecture": architecture,
        "general.name": shape.name,
        "general.alignment": _GGUF_ALIGNMENT_BYTES,
        "general.file_type": _GGUF_FILE_TYPE_BF16,
        f"{architecture}.block_count": shape.layers,
        f"{architecture}.context_length": shape.max_positions,
        f"{architecture}.embedding_length": shape.hidden_size,
        f"{architecture}.feed_forward_length": shape.intermediate_size,
        f"{architecture}.attention.head_count": shape.heads,
        f"{architecture}.attention.head_count_kv": shape.kv_heads,
        f"{architecture}.attention.key_length": shape.head_dim,
        f"{architecture}.attention.value_length": shape.head_dim,
        f"{architecture}.attention.layer_norm_rms_epsilon": shape.norm_eps,
        f"{architecture}.rope.dimension_count": shape.head_dim,
        f"{architecture}.rope.freq_base": shape.rope_theta,
        f"{architecture}.vocab_size": shape.vocab_size,
        "tokenizer.ggml.model": "no_vocab",
    }
    if shape.experts:
        metadata[f"{architecture}.expert_count"] = shape.experts
        metadata[f"{architecture}.expert_used_count"] = shape.experts_per_token
    header = bytearray(struct.pack("<4sIQQ", b"GGUF", _GGUF_VERSION, len(specs), len(metadata)))
    for key, value in metadata.items():
        header += _gguf_string(key)
        match value:
            case str():
                header += struct.pack("<I", 8) + _gguf_string(value)
            case int():
                header += struct.pack("<II", 4, value)  # uint32
            case float():
                header += struct.pack("<If", 6, value)  # float32
    offset = 0
    for spec in specs:
        dims = spec.shape[::-1]  # ggml counts from the innermost dimension
        header += _gguf_string(spec.name)
        header += struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, _GGUF_TYPES[spec.dtype], offset)
        offset += _padded(spec.size_bytes)
    return bytes(header) + bytes(-len(header) % _GGUF_ALIGNMENT_BYTES)


def _gguf_string(text: str) -> bytes:
    encoded = text.encode()
    return struct.pack("<Q", len(encoded)) + encoded


class _Staging:
    """Files written beside their places in one directory: all of them are published, or none is left."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._made = [path for path in (directory, *directory.parents) if not path.exists()]
        self._names: list[str] = []

    def __enter__(self) -> _Staging:
        self._directory.mkdir(parents=True, exist_ok=True)
        return self

    def path(self, name: str) -> Path:
        self._names.append(name)
        return self._partial(name)

    def publish(self) -> None:
        while self._names:
            self._partial(self._names[0]).replace(self._directory / self._names[0])
            self._names.pop(0)
        self._made.clear()
        descriptor = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def __exit__(self, *_: object) -> None:
        for name in self._names:
            self._partial(name).unlink(missing_ok=True)
        for directory in self._made:
            with contextlib.suppress(OSError):  # someone else put a file there meanwhile
                directory.rmdir()

    def _partial(self, name: str) -> Path:
        return self._directory / f"{name}.partial"


def _check_room(directory: Path, wanted_bytes: int) -> None:
    existing = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    free_bytes = shutil.disk_usage(existing).free
    if wanted_bytes > free_bytes:
        raise OSError(
            errno.ENOSPC,
            f"the checkpoint takes {format_size(wanted_bytes)} and {format_size(free_bytes)} are free; "
            "make room, choose another file system or ask for a smaller size",
            str(directory),
        )


def _write_file(
    path: Path,
    header: bytes,
    specs: Sequence[TensorSpec],
    *,
    alignment_bytes: int = 1,
    seed: int,
    progress: Progress | None,
) -> None:
    """Write one file and flush it to the disk; a failed write's error names the file and the offset."""
    offset = 0
    try:
        with path.open("wb", buffering=0) as file:
            for block in _blocks(header, specs, alignment_bytes, seed):
                rest = block
                while rest:  # a raw write may be short
                    written = file.write(rest)
                    offset += written
                    rest = rest[written:]
                if progress is not None:
                    progress(len(block))
            os.fsync(file.fileno())
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, f"writing at {offset}: {os.strerror(error.errno)}", str(path)) from error


def _blocks(
    header: bytes, specs: Sequence[TensorSpec], alignment_bytes: int, seed: int
) -> Iterator[memoryview]:
    yield memoryview(header)
    for spec in specs:
        yield from _weights(spec, seed)
        padding = -spec.size_bytes % alignment_bytes
        if padding:
            yield memoryview(bytes(padding))


# Sign and mantissa are random. Of the eight exponent bits, 011x0xxx, four are: exponents from 96 to 103 and
# from 112 to 119 of a bias of 127, so every weight is finite and below 2**-7. 12 of 16 bits cannot be
# compressed; trained bf16 weights have about 11.
_RANDOM_BITS: Final = 0b1_00010111_1111111
_SET_BITS: Final = 0b0_01100000_0000000
_MASKS: Final = {
    "BF16": (_RANDOM_BITS * 0x0001_0001_0001_0001, _SET_BITS * 0x0001_0001_0001_0001),
    "F32": ((_RANDOM_BITS << 16 | 0xFFFF) * 0x0000_0001_0000_0001, _SET_BITS * 0x0001_0000_0001_0000),
}


def _weights(spec: TensorSpec, seed: int) -> Iterator[memoryview]:
    """The tensor's bytes, block by block."""
    generator = np.random.Generator(np.random.SFC64([seed, int.from_bytes(spec.name.encode(), "little")]))
    random_bits, set_bits = (np.uint64(mask) for mask in _MASKS[spec.dtype])
    for start in range(0, spec.size_bytes, _BLOCK_BYTES):
        block_bytes = min(_BLOCK_BYTES, spec.size_bytes - start)
        words = generator.integers(0, 1 << 64, size=-(-block_bytes // 8), dtype=np.uint64)
        words &= random_bits
        words |= set_bits
        yield words.data.cast("B")[:block_bytes]

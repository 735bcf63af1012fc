"""The same weights as llama.cpp would have them: one GGUF file, with ggml's names and types."""

from __future__ import annotations

import errno
import os
import re
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from penstock.errors import UnsupportedError
from penstock.testing.checkpoint import Progress, Staging, check_room, write_file
from penstock.testing.shapes import ModelShape, TensorSpec, scaled, tensors, weight_bytes

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
        raise FileExistsError(errno.EEXIST, "the file is there already; choose another name or overwrite", str(path))
    check_room(path.parent, weight_bytes(shape))
    specs = gguf_tensors(shape)
    with Staging(path.parent) as staging:
        write_file(
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

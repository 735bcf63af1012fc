"""The models whose caches are compared: shapes that are known, without torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from penstock.units import GiB, MiB

_COMMON: Mapping[str, Any] = {
    "vocab_size": 1000,
    "hidden_size": 512,
    "num_attention_heads": 8,
    "max_position_embeddings": 16384,
    "eos_token_id": None,
    "pad_token_id": 0,
    "bos_token_id": 1,
}


@dataclass(frozen=True, slots=True)
class Family:
    """A model, and what it is given.

    Attributes:
        class_name: in transformers.
        config: of the model.
        dtype: of its weights and of its cache, as torch calls it.
        dtype_bytes: of one element.
        tokens: of the prompt, for each sequence.
        batch: sequences.
        piece: tokens that prefill takes at once, so that attention itself takes little memory.
        own_bytes: of host memory: the process, the model where it is there, attention.
    """

    class_name: str
    config: Mapping[str, Any]
    dtype: str = "float32"
    dtype_bytes: int = 4
    tokens: int = 4096
    batch: int = 2
    piece: int = 512
    own_bytes: int = 900 * MiB

    @property
    def layers(self) -> int:
        """How many there are."""
        return int(self.config["num_hidden_layers"])

    @property
    def kv_bytes(self) -> int:
        """Of the cache after the prompt."""
        heads = int(self.config["num_attention_heads"])
        heads_kv = int(self.config.get("num_key_value_heads", heads))
        row_bytes = int(self.config["hidden_size"]) // heads * heads_kv * self.dtype_bytes
        return 2 * self.layers * self.tokens * self.batch * row_bytes


FAMILIES: Mapping[str, Family] = {
    # Two cores decode these in well under a second a token; their caches have the shape of larger ones.
    "llama": Family(
        "LlamaForCausalLM",
        {**_COMMON, "intermediate_size": 1024, "num_key_value_heads": 8, "num_hidden_layers": 16},
    ),
    "opt": Family(
        "OPTForCausalLM",
        {**_COMMON, "ffn_dim": 1024, "word_embed_proj_dim": 512, "num_hidden_layers": 16},
    ),
    "llama-8b": Family(
        "LlamaForCausalLM",
        {
            **_COMMON,
            "vocab_size": 128256,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "num_hidden_layers": 32,
            "max_position_embeddings": 131072,
        },
        dtype="bfloat16",
        dtype_bytes=2,
        tokens=16384,
        piece=2048,
        own_bytes=4 * GiB,
    ),
}

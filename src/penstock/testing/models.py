"""Tiny models of transformers, of every kind of cache that matters, with random weights."""

from __future__ import annotations

import inspect
from typing import Any

_SMALL = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {"num_key_value_heads": 2}),
    "opt": ("OPTForCausalLM", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "qwen2": ("Qwen2ForCausalLM", {"num_key_value_heads": 1}),
    "mistral": ("MistralForCausalLM", {"num_key_value_heads": 2, "sliding_window": 8}),
    "gemma3": (
        "Gemma3ForCausalLM",
        {
            "num_key_value_heads": 2,
            "head_dim": 8,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
        },
    ),
    "gpt_neox": ("GPTNeoXForCausalLM", {}),
}


def make_model(name: str, dtype: Any = None, seed: int = 0) -> Any:
    """A model of random weights, in evaluation mode."""
    import torch
    import transformers

    class_name, extra = MODELS[name]
    model_class = getattr(transformers, class_name)
    torch.manual_seed(seed)
    config = model_class.config_class(**_SMALL | extra)
    model = model_class(config).eval()
    for parameter in model.parameters():  # else all tokens are about as likely
        parameter.data.normal_(0, 0.3)
    return model.to(dtype or torch.float32)


def taking(cache: Any) -> dict[str, Any]:
    """The argument by which models and `generate` take a cache: ``cache``, or in older releases ``past_key_values``."""
    import transformers

    parameters = inspect.signature(transformers.LlamaForCausalLM.forward).parameters
    return {"cache" if "cache" in parameters else "past_key_values": cache}

"""Ways of decoding that caches are compared by."""

from __future__ import annotations

from typing import Any

import torch

from penstock.testing.models import taking

WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampled": {"do_sample": True, "temperature": 1.3, "top_k": 20},
    "beams": {"do_sample": False, "num_beams": 3},
    "sampled beams": {"do_sample": True, "num_beams": 3},
    "several": {"do_sample": True, "num_return_sequences": 3},
}


def prompt(batch: int, tokens: int, seed: int = 1) -> Any:
    """Token ids, [batch, tokens]."""
    return torch.randint(3, 99, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def decode(model: Any, inputs: Any, cache: Any, way: str, tokens: int = 30) -> list[list[int]]:
    """What `generate` makes of it, with the same seed each time."""
    torch.manual_seed(5)
    options = {**taking(cache), "attention_mask": torch.ones_like(inputs), "max_new_tokens": tokens, **WAYS[way]}
    found: list[list[int]] = model.generate(inputs, **options).tolist()
    return found


def talk(model: Any, cache: Any, parts: list[Any]) -> Any:
    """Logits of the last part, after others that were computed in inference mode, as it was not."""
    with torch.inference_mode():
        for part in parts[:-1]:
            model(part, **taking(cache))
    with torch.no_grad():
        return model(parts[-1], **taking(cache)).logits

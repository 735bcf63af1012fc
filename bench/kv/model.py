"""One run of a real model, a process of its own: ``python -m bench.kv.model ARM DIRECTORY FAMILY TOKENS BATCH STEPS``.

Arms: ``dynamic`` is transformers' DynamicCache; ``saved`` writes each layer's keys and values with torch.save after
every update and reads them before the next, as oLLM does; ``penstock`` is `NVMeCache`; ``session`` saves the context,
loads it in a cache of its own and goes on, beside the prefill that this replaces.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from penstock.adapters.transformers import NVMeCache
from penstock.testing.models import taking

# Two cores decode them in well under a second a token; their caches have the shape of larger ones.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": (
        "LlamaForCausalLM",
        {"intermediate_size": 1024, "num_key_value_heads": 8, "num_hidden_layers": 16},
    ),
    "opt": (
        "OPTForCausalLM",
        {"ffn_dim": 1024, "word_embed_proj_dim": 512, "num_hidden_layers": 16},
    ),
}
_COMMON = {
    "vocab_size": 1000,
    "hidden_size": 512,
    "num_attention_heads": 8,
    "max_position_embeddings": 16384,
    "eos_token_id": None,
    "pad_token_id": 0,
    "bos_token_id": 1,
}


class SavedLayer(DynamicLayer):
    """A layer whose states are in a file between two updates."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path
        self._tokens = 0

    def update(self, key_states: Any, value_states: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        del args, kwargs
        if self._tokens:
            self.keys, self.values = torch.load(self._path)
        keys, values = super().update(key_states, value_states)
        torch.save((keys, values), self._path)
        self._tokens = keys.shape[-2]
        self.keys = self.values = None
        return keys, values

    def get_seq_length(self) -> int:
        return self._tokens


def make_model(family: str) -> Any:
    """A model of random weights."""
    name, extra = FAMILIES[family]
    model_class = getattr(transformers, name)
    torch.manual_seed(0)
    return model_class(model_class.config_class(**_COMMON | extra)).eval()


def kv_bytes(family: str, tokens: int, batch: int) -> int:
    """Of the cache after so many tokens, in float32."""
    layers = int(FAMILIES[family][1]["num_hidden_layers"])
    return 2 * layers * tokens * batch * int(_COMMON["hidden_size"]) * 4


def make_cache(arm: str, model: Any, directory: Path) -> Any:
    """The cache of an arm."""
    if arm == "dynamic":
        return DynamicCache(config=model.config)
    if arm == "saved":
        return Cache(layers=[SavedLayer(directory / f"{n}.pt") for n in range(model.config.num_hidden_layers)])
    return NVMeCache(model.config, directory)


def main() -> None:
    """Prefill, decode; prints times and tokens as JSON."""
    arm, place, family, tokens, batch, steps = sys.argv[1:]
    directory = Path(place)
    model = make_model(family)
    ids = torch.randint(3, 1000, (int(batch), int(tokens)), generator=torch.Generator().manual_seed(1))
    found: dict[str, Any] = {"steps_s": [], "tokens": []}
    cache = make_cache(arm, model, directory)
    with torch.inference_mode():
        begin = time.perf_counter()
        # In pieces, so that attention itself takes little memory.
        for start in range(0, ids.shape[1], 512):
            logits = model(ids[:, start : start + 512], **taking(cache), logits_to_keep=1).logits
        found["prefill_s"] = time.perf_counter() - begin
        if arm == "session":
            begin = time.perf_counter()
            cache.save("bench", ids)
            found["save_s"] = time.perf_counter() - begin
            before = logits
            cache.close()
            begin = time.perf_counter()
            cache = NVMeCache.load("bench", model.config, directory, tokens=ids)
            found["load_s"] = time.perf_counter() - begin
            logits = before
        for _ in range(int(steps)):
            chosen = logits[:, -1].argmax(-1, keepdim=True)
            found["tokens"].append(chosen.flatten().tolist())
            begin = time.perf_counter()
            logits = model(chosen, **taking(cache)).logits
            found["steps_s"].append(time.perf_counter() - begin)
        found["logits"] = logits[:, -1].double().sum(-1).tolist()
    if isinstance(cache, NVMeCache):
        figures = cache.statistics()
        found["cached_bytes"] = figures.plan.cached_bytes
        cache.close()
    found["peak_rss_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps(found))


if __name__ == "__main__":
    main()

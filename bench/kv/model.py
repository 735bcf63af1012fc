"""One run of a real model, in a process of its own: ``python -m bench.kv.model ARM DIRECTORY FAMILY DEVICE STEPS``.

Arms: ``dynamic`` is transformers' DynamicCache; ``saved`` writes each layer's keys and values with torch.save after
every update and reads them before the next, as oLLM does; ``penstock`` is `NVMeCache`, and ``direct`` the same with no
memory; ``session`` saves the context, loads it in a cache of its own and goes on, beside the prefill that this
replaces.

On a GPU every arm is given the same tokens to go on with, whatever it made of those before: there the arithmetic alone
differs a little from run to run, and where two tokens are about as likely that would lead to other texts.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from bench.kv.family import FAMILIES, Family
from penstock.adapters.transformers import NVMeCache
from penstock.linux.process import memory_bytes
from penstock.testing.models import taking

_COMPARED = 64  # logits of each sequence


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


def make_model(family: Family, device: str) -> Any:
    """A model of random weights."""
    model_class = getattr(transformers, family.class_name)
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, family.dtype))
    try:
        with torch.device(device):
            return model_class(model_class.config_class(**family.config)).eval()
    finally:
        torch.set_default_dtype(before)


def make_cache(arm: str, config: Any, directory: Path) -> Any:
    """The cache of an arm."""
    match arm:
        case "dynamic":
            return DynamicCache(config=config)
        case "saved":
            return Cache(layers=[SavedLayer(directory / f"{n}.pt") for n in range(config.num_hidden_layers)])
        case "direct":
            return NVMeCache(config, directory, memory=0)
    return NVMeCache(config, directory)


def main() -> None:
    """Prefill, decode; prints times and tokens as JSON."""
    arm, place, name, device, steps = sys.argv[1:]
    directory, family = Path(place), FAMILIES[name]
    model = make_model(family, device)
    ids = torch.randint(3, 1000, (family.batch, family.tokens), generator=torch.Generator().manual_seed(1)).to(device)
    synchronize = torch.accelerator.synchronize if device != "cpu" else lambda: None
    given = torch.randint(3, 1000, (int(steps), family.batch, 1), generator=torch.Generator().manual_seed(2)).to(device)
    found: dict[str, Any] = {"steps_s": [], "tokens": []}
    cache = make_cache(arm, model.config, directory)
    with torch.inference_mode():
        if device != "cpu":  # what the first use of a GPU takes
            model(ids[:1, :8])
        synchronize()
        begin = time.perf_counter()
        for start in range(0, ids.shape[1], family.piece):
            logits = model(ids[:, start : start + family.piece], **taking(cache), logits_to_keep=1).logits
        synchronize()
        found["prefill_s"] = time.perf_counter() - begin
        if arm == "session":
            begin = time.perf_counter()
            cache.save("bench", ids.cpu())
            found["save_s"] = time.perf_counter() - begin
            cache.close()
            begin = time.perf_counter()
            cache = NVMeCache.load("bench", model.config, directory, tokens=ids.cpu(), device=device)
            found["load_s"] = time.perf_counter() - begin
        for step in range(int(steps)):
            chosen = logits[:, -1].argmax(-1, keepdim=True)
            found["tokens"].append(chosen.flatten().tolist())
            if device != "cpu":
                chosen = given[step]
            begin = time.perf_counter()
            logits = model(chosen, **taking(cache)).logits
            synchronize()
            found["steps_s"].append(time.perf_counter() - begin)
        found["logits"] = logits[:, -1, :_COMPARED].double().flatten().tolist()
    if isinstance(cache, NVMeCache):
        figures = cache.statistics()
        found["cached_bytes"] = figures.plan.cached_bytes
        cache.close()
    found["peak_rss_bytes"] = memory_bytes(os.getpid())["VmHWM"]
    print(json.dumps(found))


if __name__ == "__main__":
    main()

"""Sessions of `NVMeCache`: what its layers hold, in a file, bound to the model and the tokens that it came from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from penstock.adapters.nvme_layer import NVMeLayer
from penstock.errors import SessionError
from penstock.kv.session import SessionReader, SessionWriter

# What a configuration says of where it came from, and not of the model.
_INCIDENTAL = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures")


def save(path: Path, config: Any, layers: Iterable[Any], tokens: torch.Tensor) -> None:
    """Write what layers hold.

    Args:
        path: of the file.
        config: of the model.
        layers: of the cache.
        tokens: their ids, [batch, tokens]: those that the cache holds come first.

    Raises:
        SessionError: a layer keeps what cannot be saved.
        ValueError: there is nothing to save, or fewer tokens than the cache holds.
    """
    layers = list(layers)
    length = max((layer.get_seq_length() for layer in layers if isinstance(layer, DynamicLayer | NVMeLayer)), default=0)
    if not length:
        raise ValueError("the cache is empty: there is nothing to save")
    dtype = next(_dtype(layer) for layer in layers if layer.is_initialized)
    facts = {"model": _model(config), "dtype": str(dtype), "tokens": length, "ids": _digest(tokens, length)}
    with SessionWriter(path, facts) as writer:
        for number, layer in enumerate(layers):
            if not isinstance(layer, NVMeLayer | DynamicLayer):
                raise SessionError(f"layer {number} is a {type(layer).__name__}, which cannot be saved")
            extra = _extra(layer)
            for kind in ("keys", "values"):
                states = getattr(layer, kind)
                if states is None:
                    continue
                rows = states.detach().permute(2, 0, 1, 3).contiguous().cpu()
                about = {"layer": number, "shape": list(rows.shape), **extra}
                writer.add(f"{number} {kind}", _bytes(rows), about)
        writer.commit()


def load(path: Path, config: Any, layers: list[Any], tokens: torch.Tensor, device: str) -> None:
    """Fill the layers of an empty cache with a session.

    Raises:
        SessionError: it is damaged, another model's, or of other tokens.
    """
    with SessionReader(path) as reader:
        length = int(reader.facts.get("tokens", 0))
        wanted: dict[str, Any] = {"model": _model(config)}
        if getattr(config, "dtype", None) is not None:
            wanted["dtype"] = str(config.dtype)
        reader.require(wanted)
        if tokens.shape[-1] < length:
            raise SessionError(f"{path}: holds {length} tokens, and {tokens.shape[-1]} were given to compare")
        reader.require({"ids": _digest(tokens, length)})
        dtype = getattr(torch, str(reader.facts["dtype"]).removeprefix("torch."))
        numbers = sorted({int(part.about["layer"]) for part in reader.parts.values()})
        if numbers and numbers[-1] >= len(layers):
            raise SessionError(f"{path}: has {numbers[-1] + 1} layers, and the model {len(layers)}")
        for number in numbers:
            states = []
            for kind in ("keys", "values"):
                part = reader.parts[f"{number} {kind}"]
                rows = torch.from_numpy(reader.read(part.name)).view(dtype).view(part.about["shape"])
                states.append(rows.permute(1, 2, 0, 3).to(device))
            _restore(layers[number], states[0], states[1], part.about)


def _restore(layer: Any, keys: torch.Tensor, values: torch.Tensor, about: Mapping[str, Any]) -> None:
    if isinstance(layer, NVMeLayer):
        layer.update(keys, values)
        return
    layer.lazy_initialization(keys, values)
    layer.keys, layer.values = keys.contiguous(), values.contiguous()
    if isinstance(layer, DynamicSlidingWindowLayer):
        layer.cumulative_length = int(about["cumulative_length"])


def _dtype(layer: NVMeLayer | DynamicLayer) -> torch.dtype:
    """Of its states, which of transformers' own layers only the states tell."""
    if isinstance(layer, NVMeLayer):
        return layer.dtype
    assert layer.keys is not None  # it is initialized
    return layer.keys.dtype


def _extra(layer: Any) -> dict[str, int]:
    if isinstance(layer, DynamicSlidingWindowLayer):
        return {"cumulative_length": int(layer.cumulative_length)}
    return {}


def _bytes(rows: torch.Tensor) -> NDArray[np.uint8]:
    flat: NDArray[np.uint8] = rows.reshape(-1).view(torch.uint8).numpy()
    return flat


def _model(config: Any) -> str:
    """A digest of what makes a model's cache what it is."""
    known = {key: value for key, value in config.to_dict().items() if key not in _INCIDENTAL}
    text = json.dumps(known, sort_keys=True, default=str)
    return f"{known.get('model_type', 'model')} {hashlib.blake2b(text.encode(), digest_size=12).hexdigest()}"


def _digest(tokens: torch.Tensor, length: int) -> str:
    ids = tokens.reshape(-1, tokens.shape[-1]) if tokens.ndim else tokens
    if ids.shape[-1] < length:
        raise ValueError(f"the cache holds {length} tokens, and the ids of {ids.shape[-1]} were given")
    part = ids[:, :length].to("cpu", torch.int64).contiguous()
    return hashlib.blake2b(bytes(_bytes(part)), digest_size=16).hexdigest() + f" of {list(part.shape)}"

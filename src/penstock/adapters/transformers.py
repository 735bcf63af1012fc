"""Models of Hugging Face transformers, with their weights loaded by penstock.

Built on what transformers documents: a configuration, `from_config`, and `from_pretrained` with a ``state_dict``, which
takes the tensors as they are and does the rest as always: ties weights, fills buffers, checks names.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from penstock.checkpoint.load import Progress, load_checkpoint
from penstock.errors import UnsupportedError
from penstock.storage.choose import EngineName

_GENERATION_CONFIG = "generation_config.json"


def from_pretrained(
    model_class: Any,
    directory: str | os.PathLike[str],
    *,
    device: str = "cpu",
    engine: EngineName = "auto",
    progress: Progress | None = None,
    **options: Any,
) -> Any:
    """The model that ``model_class.from_pretrained(directory)`` gives, its weights read past the page cache.

    Args:
        model_class: a class of models, such as LlamaForCausalLM, or one that chooses, such as AutoModelForCausalLM.
        directory: with config.json and safetensors files, as save_pretrained leaves it.
        device: as torch names it; another than the CPU takes the package accelerate, as transformers does.
        engine: as for `penstock.load_checkpoint`.
        progress: called with the bytes that have landed since the last call.
        options: passed to transformers, such as dtype or attn_implementation. With another dtype than the checkpoint's
            each tensor is converted once more.

    Raises:
        CheckpointError: the checkpoint is damaged, or there is none.
        UnsupportedError: transformers is not installed, the checkpoint is quantised (transformers itself prepares those
            while it loads), or the device cannot be had.
        MemoryError: the weights take more than there is.
    """
    try:
        from transformers import AutoConfig, GenerationConfig
    except ImportError as error:
        raise UnsupportedError("transformers is not installed; install it with torch") from error
    directory = Path(directory)
    config = options.pop("config", None) or AutoConfig.from_pretrained(directory)
    if getattr(config, "quantization_config", None) is not None:
        raise UnsupportedError(
            f"{directory}: the checkpoint is quantised; load it with transformers' own from_pretrained"
        )
    tensors = load_checkpoint(directory, device=device, engine=engine, progress=progress)
    if device != "cpu":
        options.setdefault("device_map", {"": device})  # else transformers moves it all to the CPU
    chosen = _class_for(model_class, config)
    model = chosen.from_pretrained(None, config=config, state_dict=dict(tensors), **{"dtype": "auto"} | options)
    model.name_or_path = model.config.name_or_path = str(directory)  # else it is that of no directory
    if (directory / _GENERATION_CONFIG).exists() and model.can_generate():
        model.generation_config = GenerationConfig.from_pretrained(directory)
    return model


def _class_for(model_class: Any, config: Any) -> Any:
    """The class itself, or the one that an Auto class chooses for the configuration: asked by making an empty model."""
    if not hasattr(model_class, "from_config"):
        return model_class
    import torch

    with torch.device("meta"):
        return type(model_class.from_config(config))


def __getattr__(name: str) -> Any:
    if name == "NVMeCache":  # which imports torch and transformers
        from penstock.adapters.nvme_cache import NVMeCache

        return NVMeCache
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

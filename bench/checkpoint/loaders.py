"""One arm in a process of its own: ``python -m bench.checkpoint.loaders ARM DIR DEVICE [--hash]``.

Writes "ready", waits for a line, loads, and writes a JSON object.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from penstock.linux.process import memory_bytes

_PAGE_BYTES = 4096


def _penstock(directory: Path, device: str, engine: str = "auto") -> Callable[[], dict[str, Any]]:
    import torch

    import penstock
    from penstock.checkpoint import load

    del torch, load
    return lambda: penstock.load_checkpoint(directory, device=device, engine=engine)


def _safetensors(directory: Path, device: str, backend: str = "mmap") -> Callable[[], dict[str, Any]]:
    from safetensors.torch import load_file

    def load() -> dict[str, Any]:
        found = {}
        for path in _files(directory):
            for name, tensor in load_file(path, device=device, backend=backend).items():
                found[name] = tensor.clone() if (backend, device) == ("mmap", "cpu") else tensor
        return found

    return load


def _runai(directory: Path, device: str) -> Callable[[], dict[str, Any]]:
    from runai_model_streamer import SafetensorsStreamer

    def load() -> dict[str, Any]:
        with SafetensorsStreamer() as streamer:
            streamer.stream_files([str(path) for path in _files(directory)])
            return {name: tensor.to(device) for name, tensor in streamer.get_tensors()}

    return load


def _fastsafetensors(directory: Path, device: str) -> Callable[[], dict[str, Any]]:
    from fastsafetensors import SafeTensorsFileLoader

    def load() -> dict[str, Any]:
        numbered = f"{device}:0" if device == "cuda" else device
        loader = SafeTensorsFileLoader(None, device=numbered, nogds=True)
        loader.add_filenames({0: [str(path) for path in _files(directory)]})
        buffers = loader.copy_files_to_device()
        found = {name: buffers.get_tensor(name) for name in loader.get_keys()}
        found[""] = buffers  # holds their memory
        return found

    return load


def _readinto(directory: Path, device: str) -> Callable[[], dict[str, Any]]:
    import numpy as np

    if device != "cpu":
        import torch

    def load() -> dict[str, Any]:
        found = {}
        for path in _files(directory):
            memory = np.empty(path.stat().st_size, np.uint8)
            with path.open("rb", buffering=0) as file:
                at = 0
                while got := file.readinto(memory[at:].data):
                    at += got
            found[f"/{path.name}"] = memory if device == "cpu" else torch.from_numpy(memory).to(device)
        return found

    return load


class _Model(dict[str, Any]):
    """A model's parameters and buffers, all touched."""

    def __init__(self, model: Any) -> None:
        super().__init__(model.named_parameters(remove_duplicate=False))
        self.update(model.named_buffers())
        self._model = model
        for tensor in self.values():
            if tensor.device.type == "cpu":
                _bytes_of(tensor)[::_PAGE_BYTES].tobytes()

    def add_logits(self) -> None:
        import torch

        with torch.inference_mode():
            self["logits"] = self._model(torch.arange(1, 9, device=self._model.device).unsqueeze(0)).logits


def _import_model(directory: Path) -> Any:
    """Have transformers import what the model takes, which it puts off until one is made; returns its Auto class."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory))
    return AutoModelForCausalLM


def _transformers(directory: Path, device: str) -> Callable[[], dict[str, Any]]:
    auto = _import_model(directory)
    options = {} if device == "cpu" else {"device_map": {"": device}}
    return lambda: _Model(auto.from_pretrained(directory, dtype="auto", **options))


def _adapter(directory: Path, device: str) -> Callable[[], dict[str, Any]]:
    from penstock.adapters.transformers import from_pretrained

    auto = _import_model(directory)
    return lambda: _Model(from_pretrained(auto, directory, device=device))


def _penstock_threads(directory: Path, device: str) -> Callable[[], dict[str, Any]]:
    return _penstock(directory, device, "threads")


def _safetensors_pread(directory: Path, device: str) -> Callable[[], dict[str, Any]]:
    return _safetensors(directory, device, "pread")


ARMS: dict[str, Callable[[Path, str], Callable[[], dict[str, Any]]]] = {
    "penstock": _penstock,
    "penstock-threads": _penstock_threads,
    "safetensors": _safetensors,
    "safetensors-pread": _safetensors_pread,
    "runai": _runai,
    "fastsafetensors": _fastsafetensors,
    "readinto": _readinto,
    "transformers": _transformers,
    "adapter": _adapter,
}
MODEL_ARMS = {"transformers", "adapter"}  # whose tensors are a model's
NEEDS = {
    "penstock": "torch", "penstock-threads": "torch", "safetensors": "safetensors", "safetensors-pread": "safetensors",
    "runai": "runai_model_streamer", "fastsafetensors": "fastsafetensors", "readinto": "numpy",
    "transformers": "transformers", "adapter": "transformers",
}  # fmt: skip


def _files(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.safetensors"))


def _bytes_of(tensor: Any) -> memoryview:
    import numpy as np

    if isinstance(tensor, np.ndarray):
        return memoryview(tensor).cast("B")
    import torch

    return memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def _hashes(found: dict[str, Any]) -> dict[str, str]:
    return {
        name: hashlib.blake2b(_bytes_of(tensor), digest_size=16).hexdigest() if tensor.numel() else ""
        for name, tensor in found.items()
        if name and not name.startswith("/")
    }


def _synchronizing(device: str) -> Callable[[], None]:
    """The device is ready, which takes seconds; what this returns waits until it has done everything."""
    if device == "cpu":
        return lambda: None
    import torch

    torch.ones(1, device=device)
    return torch.accelerator.synchronize


def main() -> None:
    """One load."""
    device = sys.argv[3]
    load = ARMS[sys.argv[1]](Path(sys.argv[2]), device)
    synchronize = _synchronizing(device)
    print("ready", flush=True)
    sys.stdin.readline()
    with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")  # the peak counts from here
    before_bytes = memory_bytes(os.getpid())["VmRSS"]
    cpu = os.times()
    begun_s = time.perf_counter()
    found = load()
    synchronize()
    seconds = time.perf_counter() - begun_s
    after = os.times()
    sizes = memory_bytes(os.getpid())
    answer: dict[str, Any] = {
        "seconds": seconds,
        "cpu_s": after.user - cpu.user + after.system - cpu.system,
        "peak_bytes": sizes["VmHWM"] - before_bytes,
        "anonymous_bytes": sizes["RssAnon"],
        "tensors": sum(1 for name in found if name and not name.startswith("/")),
    }
    if "--hash" in sys.argv:
        if isinstance(found, _Model):
            found.add_logits()
        answer["hashes"] = _hashes(found)
    statistics = getattr(found, "statistics", None)
    if statistics is not None:
        answer["engine"] = statistics.engine
        answer["cached_bytes"] = statistics.cached_bytes
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()

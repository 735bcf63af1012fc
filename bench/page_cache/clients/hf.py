"""transformers: from_pretrained, then every page of every parameter is touched; the host keeps the model.

from_pretrained has one order. For ``--order reverse``, which only serves to record a template that is wrong for
it, the parameters are touched from last to first straight from the safetensors files.
"""

from __future__ import annotations

import time

_START = time.perf_counter()

import torch  # noqa: E402
from safetensors import safe_open  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

from bench.page_cache.clients.staging import Options, Tally, parse_options, weight_files  # noqa: E402


def _touch(tally: Tally, name: str, tensor: torch.Tensor) -> None:
    flat = tensor.detach().view(-1).view(torch.uint8).numpy()
    tally.add(name, flat)


def _load_reversed(options: Options, tally: Tally) -> None:
    for path in weight_files(options.path, reverse=True):
        with safe_open(path, framework="pt") as file:
            for name in reversed(list(file.offset_keys())):
                _touch(tally, name, file.get_tensor(name))


def main() -> None:
    """Load, touch, report."""
    options = parse_options(__doc__ or "")
    tally = Tally(options.verify)
    tally.phases["import_s"] = time.perf_counter() - _START
    if options.reverse:
        with tally.phase("load"):
            _load_reversed(options, tally)
    else:
        with tally.phase("load"):
            model = AutoModelForCausalLM.from_pretrained(options.path, dtype="auto")
        with tally.phase("touch"):
            for name, parameter in model.named_parameters():
                _touch(tally, name, parameter)
    tally.report()


if __name__ == "__main__":
    main()

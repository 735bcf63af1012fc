"""Sessions of NVMeCache: another process goes on where one ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from penstock.adapters.transformers import NVMeCache  # noqa: E402
from penstock.errors import SessionError  # noqa: E402
from penstock.testing.models import MODELS, make_model, taking  # noqa: E402


def ids(batch: int, tokens: int, seed: int = 1) -> Any:
    return torch.randint(3, 99, (batch, tokens), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", list(MODELS))
def test_a_context_is_reused(tmp_path: Path, name: str) -> None:
    model = make_model(name)
    context, more = ids(2, 40), ids(2, 5, seed=2)
    with torch.no_grad():
        with NVMeCache(model.config, tmp_path) as cache:
            model(context, **taking(cache))
            path = cache.save("context", context)
            expected = model(more, **taking(cache)).logits
        assert path.exists()
        with NVMeCache.load("context", model.config, tmp_path, tokens=torch.cat((context, more), dim=1)) as cache:
            assert cache.get_seq_length() == 40
            assert torch.equal(model(more, **taking(cache)).logits, expected)


def test_generate_goes_on(tmp_path: Path) -> None:
    model = make_model("llama")
    context, more = ids(1, 40), ids(1, 5, seed=2)
    whole = torch.cat((context, more), dim=1)
    options = {"attention_mask": torch.ones_like(whole), "max_new_tokens": 10, "do_sample": False}
    expected = model.generate(whole, **options)
    with NVMeCache(model.config, tmp_path) as cache, torch.no_grad():
        model(context, **taking(cache))
        cache.save("context", context)
    with NVMeCache.load("context", model.config, tmp_path, tokens=whole) as cache:
        assert model.generate(whole, **taking(cache), **options).tolist() == expected.tolist()


def test_beams_are_saved_as_they_are(tmp_path: Path) -> None:
    config = make_model("llama").config
    with NVMeCache(config, tmp_path) as cache:
        for layer in range(4):
            cache.update(torch.randn(3, 2, 9, 8), torch.randn(3, 2, 9, 8), layer)
        cache.reorder_cache(torch.tensor([2, 2, 0]))
        expected = [layer.keys for layer in cache.layers]
        cache.save("beams", ids(3, 9))
    with NVMeCache.load("beams", config, tmp_path, tokens=ids(3, 9)) as cache:
        assert all(torch.equal(layer.keys, keys) for layer, keys in zip(cache.layers, expected, strict=True))


def test_whose_it_is(tmp_path: Path) -> None:
    model, other = make_model("llama"), make_model("qwen2")
    with NVMeCache(model.config, tmp_path) as cache, torch.no_grad():
        with pytest.raises(ValueError, match="nothing to save"):
            cache.save("mine", ids(1, 9))
        model(ids(1, 9), **taking(cache))
        with pytest.raises(ValueError, match="holds 9 tokens, and the ids of 8"):
            cache.save("mine", ids(1, 8))
        with pytest.raises(ValueError, match="a name has letters"):
            cache.save("../mine", ids(1, 9))
        path = cache.save("mine", ids(1, 9))
    with pytest.raises(SessionError, match=r"its model is llama .* and qwen2"):
        NVMeCache.load("mine", other.config, tmp_path, tokens=ids(1, 9))
    with pytest.raises(SessionError, match="its ids is"):
        NVMeCache.load("mine", model.config, tmp_path, tokens=ids(1, 9, seed=3))
    with pytest.raises(SessionError, match="holds 9 tokens, and 5 were given"):
        NVMeCache.load("mine", model.config, tmp_path, tokens=ids(1, 5))
    with pytest.raises(FileNotFoundError):
        NVMeCache.load("yours", model.config, tmp_path, tokens=ids(1, 9))
    contents = bytearray(path.read_bytes())
    contents[4200] ^= 1
    path.write_bytes(contents)
    with pytest.raises(SessionError, match="damaged at offset 4096"):
        NVMeCache.load("mine", model.config, tmp_path, tokens=ids(1, 9))
    with NVMeCache(path=tmp_path) as cache, pytest.raises(ValueError, match="without a configuration"):
        cache.save("mine", ids(1, 9))


_SAVER = """
import sys, torch
from penstock.adapters.transformers import NVMeCache
from penstock.testing.models import make_model
cache = NVMeCache(make_model("llama").config, sys.argv[1])
number = 0
while True:
    number += 1
    cache.reset()
    for layer in range(4):
        states = torch.full((1, 2, 4000, 8), float(number))
        cache.update(states, states, layer)
    cache.save("mine", torch.zeros(1, 4000))
    print(number, flush=True)
"""


def test_a_saver_that_is_killed(tmp_path: Path) -> None:
    config = make_model("llama").config
    kills = int(os.environ.get("PENSTOCK_TEST_KILLS", "5"))
    for number in range(kills):
        with subprocess.Popen([sys.executable, "-c", _SAVER, str(tmp_path)], stdout=subprocess.PIPE) as saver:
            assert saver.stdout is not None
            assert saver.stdout.readline()
            time.sleep(0.1 * number / kills)  # somewhere in a save, which takes about as long
            saver.send_signal(signal.SIGKILL)
        with NVMeCache.load("mine", config, tmp_path, tokens=torch.zeros(1, 4000)) as cache:
            saved = float(cache.layers[0].keys[0, 0, 0, 0])
            assert saved >= 1
            for layer in cache.layers:
                assert bool((layer.keys == saved).all())
                assert bool((layer.values == saved).all())
    # One that was killed while a session took another's place may have left its file; the next writer removes it.
    with NVMeCache.load("mine", config, tmp_path, tokens=torch.zeros(1, 4000)) as cache:
        cache.save("mine", torch.zeros(1, 4000))
    assert os.listdir(tmp_path) == ["mine.penstock-session"]

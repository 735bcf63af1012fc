"""NVMeCache on a real GPU: the same tokens as DynamicCache, whatever stream they are computed on."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from tests.decoding import decode, prompt, talk  # noqa: E402

from penstock.adapters.transformers import NVMeCache, from_pretrained  # noqa: E402
from penstock.kv import layout  # noqa: E402
from penstock.linux.process import memory_bytes  # noqa: E402
from penstock.testing.checkpoint import generate_checkpoint  # noqa: E402
from penstock.testing.models import MODELS, make_model, taking  # noqa: E402
from penstock.testing.shapes import PRESETS  # noqa: E402
from penstock.units import KiB, MiB  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

BUDGETS: dict[str, Any] = {"none": 0, "half": 24 * KiB, "all": "auto"}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of a few rows, so that a short text has some."""
    monkeypatch.setattr(layout, "WANTED_BLOCK_BYTES", 2 * KiB)


@pytest.mark.parametrize("way", ["greedy", "sampled", "beams"])
@pytest.mark.parametrize("memory", list(BUDGETS))
@pytest.mark.parametrize("name", list(MODELS))
def test_the_same_tokens(tmp_path: Path, name: str, memory: str, way: str) -> None:
    model = make_model(name).cuda()
    inputs = prompt(2, 40).cuda()
    expected = decode(model, inputs, transformers.DynamicCache(config=model.config), way)
    with NVMeCache(model.config, tmp_path, memory=BUDGETS[memory]) as cache:
        assert decode(model, inputs, cache, way) == expected


def test_on_a_stream_of_the_callers(tmp_path: Path) -> None:
    model = make_model("llama").cuda()
    inputs = prompt(2, 40).cuda()
    expected = decode(model, inputs, transformers.DynamicCache(config=model.config), "greedy", tokens=60)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with NVMeCache(model.config, tmp_path) as cache, torch.cuda.stream(stream):
        assert decode(model, inputs, cache, "greedy", tokens=60) == expected


def test_in_inference_mode(tmp_path: Path) -> None:
    model = make_model("llama").cuda()
    parts = [prompt(2, tokens, seed=tokens).cuda() for tokens in (40, 3, 2)]
    expected = talk(model, transformers.DynamicCache(config=model.config), parts)
    with NVMeCache(model.config, tmp_path) as cache:
        assert torch.allclose(talk(model, cache, parts), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("memory", [0, "auto"])
def test_what_is_computed_meanwhile_does_not_see_what_comes_next(tmp_path: Path, memory: Any) -> None:
    """Rows of the next layers are copied while this one's are still being read, for long."""
    layers, tokens = 6, 3000
    torch.manual_seed(0)
    states = [[torch.randn(2, 4, tokens, 64, device="cuda") for _ in range(2)] for _ in range(layers)]
    config = transformers.LlamaConfig(num_hidden_layers=layers)
    with NVMeCache(config, tmp_path, memory=memory) as cache:
        for layer, (keys, values) in enumerate(states):
            cache.update(keys, values, layer)
        for _ in range(5):
            sums = []
            for layer, pair in enumerate(states):
                new = [torch.randn(2, 4, 1, 64, device="cuda") for _ in range(2)]
                pair[0], pair[1] = (torch.cat((old, one), dim=2) for old, one in zip(pair, new, strict=True))
                keys, values = cache.update(*new, layer)
                torch.cuda._sleep(20_000_000)  # some 10 ms: all rows of the next layer are there before this ends
                sums.append(((keys == pair[0]).all(), (values == pair[1]).all()))
                del keys, values
            assert [(bool(one), bool(other)) for one, other in sums] == [(True, True)] * layers


def test_nothing_is_left(tmp_path: Path) -> None:
    config = make_model("llama").config
    states = torch.randn(1, 2, 3000, 8, device="cuda")

    def use() -> None:
        with NVMeCache(config, tmp_path) as cache:
            for layer in range(4):
                cache.update(states, states, layer)
            cache.update(states[:, :, :1], states[:, :, :1], 0)

    def anonymous_bytes() -> int:
        return memory_bytes(os.getpid())["RssAnon"]

    use()
    torch.cuda.synchronize()
    before_bytes, fds = anonymous_bytes(), len(os.listdir("/proc/self/fd"))
    for _ in range(10):
        use()
    assert anonymous_bytes() - before_bytes < 64 * MiB
    assert len(os.listdir("/proc/self/fd")) == fds


def test_a_session_is_loaded_to_the_gpu(tmp_path: Path) -> None:
    model = make_model("llama").cuda()
    context, more = prompt(2, 40).cuda(), prompt(2, 5, seed=2).cuda()
    with torch.no_grad():
        with NVMeCache(model.config, tmp_path) as cache:
            model(context, **taking(cache))
            cache.save("context", context.cpu())
            expected = model(more, **taking(cache)).logits
        tokens = torch.cat((context, more), dim=1).cpu()
        with NVMeCache.load("context", model.config, tmp_path, tokens=tokens, device="cuda") as cache:
            assert torch.equal(model(more, **taking(cache)).logits, expected)


def test_a_model_is_loaded_to_the_gpu(tmp_path: Path) -> None:
    generate_checkpoint(tmp_path / "model", PRESETS["tiny-llama"], size_bytes=24 * MiB, shard_bytes=8 * MiB)
    auto = transformers.AutoModelForCausalLM
    theirs = auto.from_pretrained(tmp_path / "model", dtype="auto").cuda()
    ours = from_pretrained(auto, tmp_path / "model", device="cuda")
    tokens = torch.arange(12, device="cuda")[None]
    for name, tensor in theirs.state_dict().items():
        mine = ours.state_dict()[name]
        assert mine.device == tensor.device
        assert torch.equal(mine, tensor), name
    with torch.inference_mode():
        assert torch.equal(ours(tokens).logits, theirs(tokens).logits)

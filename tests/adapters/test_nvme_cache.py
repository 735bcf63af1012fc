"""NVMeCache against DynamicCache: the same tokens, whatever the model, the way of decoding and the budget."""

from __future__ import annotations

import copy
import gc
import itertools
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from packaging.version import Version  # noqa: E402
from tests.decoding import WAYS, decode, prompt, talk  # noqa: E402

from penstock.adapters.nvme_cache import NVMeCache  # noqa: E402
from penstock.errors import KVError, RegionError  # noqa: E402
from penstock.kv import layout  # noqa: E402
from penstock.kv.residency import KVTensor, spread  # noqa: E402
from penstock.kv.residency import Path as Residence  # noqa: E402
from penstock.testing.models import MODELS, make_model, taking  # noqa: E402
from penstock.units import KiB  # noqa: E402


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of a few rows, so that a short text has some."""
    monkeypatch.setattr(layout, "WANTED_BLOCK_BYTES", 2 * KiB)


@pytest.fixture(params=list(MODELS))
def model(request: pytest.FixtureRequest) -> Any:
    return make_model(request.param)


class Rotating:
    """A ranking that is another one at every step."""

    def __init__(self) -> None:
        self._turn = itertools.count()

    def __call__(self, tensors: Sequence[KVTensor]) -> list[KVTensor]:
        order = spread(tensors)
        at = next(self._turn) % max(1, len(order))
        return order[at:] + order[:at]


BUDGETS: dict[str, dict[str, Any]] = {
    "none": {"memory": 0},
    "half": {"memory": 24 * KiB},
    "all": {"memory": "auto"},
    "moving": {"memory": 24 * KiB, "ranking": Rotating},
}


@pytest.fixture(params=list(BUDGETS))
def make_cache(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[[Any], NVMeCache]]:
    made: list[NVMeCache] = []

    def make(model: Any) -> NVMeCache:
        options = dict(BUDGETS[request.param])
        if "ranking" in options:
            options["ranking"] = options["ranking"]()
        made.append(NVMeCache(model.config, tmp_path, **options))
        return made[-1]

    yield make
    for cache in made:
        cache.close()


@pytest.mark.parametrize("way", list(WAYS))
def test_the_same_tokens(model: Any, make_cache: Callable[[Any], NVMeCache], way: str) -> None:
    inputs = prompt(2, 40)
    expected = decode(model, inputs, transformers.DynamicCache(config=model.config), way)
    cache = make_cache(model)
    assert decode(model, inputs, cache, way) == expected
    figures = cache.statistics()
    if len(figures.plan.decisions):
        assert figures.store.pipeline.direct_bytes + figures.store.pipeline.cached_bytes > 0


def test_padding_on_the_left(model: Any, make_cache: Callable[[Any], NVMeCache]) -> None:
    inputs = prompt(3, 20)
    mask = torch.ones_like(inputs)
    for row, padded in enumerate((0, 7, 13)):
        inputs[row, :padded] = 0
        mask[row, :padded] = 0
    options = {"attention_mask": mask, "max_new_tokens": 20, "do_sample": False}
    expected = model.generate(inputs, **taking(transformers.DynamicCache(config=model.config)), **options)
    found = model.generate(inputs, **taking(make_cache(model)), **options)
    assert found.tolist() == expected.tolist()


def test_a_second_turn(model: Any, make_cache: Callable[[Any], NVMeCache]) -> None:
    first, second = prompt(1, 30), prompt(1, 12, seed=2)

    def talk(cache: Any) -> Any:
        options = {**taking(cache), "max_new_tokens": 15, "do_sample": False}
        answer = model.generate(first, attention_mask=torch.ones_like(first), **options)
        turn = torch.cat((answer, second), dim=1)
        return model.generate(turn, attention_mask=torch.ones_like(turn), **options)

    expected = talk(transformers.DynamicCache(config=model.config))
    assert talk(make_cache(model)).tolist() == expected.tolist()


def test_assisted_decoding(make_cache: Callable[[Any], NVMeCache]) -> None:
    model, assistant = make_model("llama"), make_model("llama", seed=3)
    inputs = prompt(1, 30)

    def generate(cache: Any, **options: Any) -> Any:
        return model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            **taking(cache),
            max_new_tokens=25,
            do_sample=False,
            eos_token_id=model.config.vocab_size - 1,  # looking up in the prompt fails without one before 5.15
            **options,
        )

    for way in ({"assistant_model": assistant}, {"prompt_lookup_num_tokens": 3}):
        expected = generate(transformers.DynamicCache(config=model.config), **way)
        assert generate(make_cache(model), **way).tolist() == expected.tolist()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_logits_are_equal(make_cache: Callable[[Any], NVMeCache], dtype: str) -> None:
    model = make_model("llama", getattr(torch, dtype))
    inputs = prompt(2, 64)

    def logits(cache: Any, mode: Any) -> list[Any]:
        found = []
        with mode():
            for start, stop in [(0, 40), (40, 41), (41, 50), (50, 64)]:
                found.append(model(inputs[:, start:stop], **taking(cache)).logits)
        return found

    for mode in (torch.no_grad, torch.inference_mode):
        expected = logits(transformers.DynamicCache(config=model.config), mode)
        for one, other in zip(logits(make_cache(model), mode), expected, strict=True):
            assert torch.equal(one, other)


def states(batch: int, tokens: int, seed: int) -> tuple[Any, Any]:
    made = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 2, tokens, 8, generator=made), torch.randn(batch, 2, tokens, 4, generator=made)


def test_operations_on_batches(tmp_path: Path) -> None:
    theirs = transformers.DynamicCache()
    new: Any = 3 if Version(transformers.__version__) >= Version("5.4") else torch.arange(3)
    with NVMeCache(path=tmp_path, memory=0) as ours:

        def both(what: Callable[[Any], Any]) -> None:
            expected, found = what(theirs), what(ours)
            for one, other in zip(expected or (), found or (), strict=True):
                assert torch.equal(one, other)
            for one, other in zip(theirs, ours, strict=True):
                assert torch.equal(one[0], other[0])
                assert torch.equal(one[1], other[1])
                assert one[2:] == other[2:] == (None,)
            for number in range(len(theirs)):
                assert torch.equal(theirs.layers[number].keys, ours.layers[number].keys)
                assert torch.equal(theirs.layers[number].values, ours.layers[number].values)
                assert theirs.get_seq_length(number) == ours.get_seq_length(number)
                assert theirs.layers[number].get_mask_sizes(new) == ours.layers[number].get_mask_sizes(new)

        for layer in range(3):
            both(lambda cache, layer=layer: cache.update(*states(4, 33, layer), layer))
        both(lambda cache: cache.reorder_cache(torch.tensor([3, 3, 0, 1])))
        for layer in range(3):
            both(lambda cache, layer=layer: cache.update(*states(4, 5, 10 + layer), layer))
        both(lambda cache: cache.reorder_cache(torch.tensor([1, 0, 2, 0])))
        both(lambda cache: cache.crop(-9))
        both(lambda cache: cache.batch_select_indices((3, 2, 0)))
        both(lambda cache: cache.batch_select_indices([1, 2]))
        for layer in range(3):
            both(lambda cache, layer=layer: cache.update(*states(2, 40, 20 + layer), layer))
        both(lambda cache: cache.batch_repeat_interleave(5))
        both(lambda cache: cache.update(*states(10, 1, 30), 1))
        both(lambda cache: cache.batch_select_indices(torch.tensor([False, True] * 5)))
        both(lambda cache: cache.crop(-3))
        with pytest.raises(ValueError, match="states of 2 sequences, the cache has 5"):
            ours.update(*states(2, 1, 0), 0)
        ours.reset()
        assert ours.get_seq_length() == 0
        for layer in range(3):
            keys, values = ours.update(*states(1, 3, layer), layer)
            assert torch.equal(keys, states(1, 3, layer)[0])
            assert torch.equal(values, states(1, 3, layer)[1])


def test_a_copy_is_refused_and_harms_nothing(tmp_path: Path) -> None:
    with NVMeCache(path=tmp_path) as cache:
        cache.update(*states(1, 7, 0), 0)
        with pytest.raises(TypeError, match=r"use save\(\), and load\(\)"):
            copy.deepcopy(cache)
        keys, _ = cache.update(*states(1, 1, 1), 0)
        assert torch.equal(keys[:, :, :7], states(1, 7, 0)[0])


def test_what_was_handed_out_stays(tmp_path: Path) -> None:
    """As long as somebody has it."""
    with NVMeCache(path=tmp_path, memory=0) as cache:
        kept = []
        for step in range(6):
            for layer in range(2):
                keys, values = cache.update(*states(1, 7, 10 * step + layer), layer)
                kept.append((keys, values, keys.clone(), values.clone()))
        for keys, values, keys_then, values_then in kept:
            assert torch.equal(keys, keys_then)
            assert torch.equal(values, values_then)


def test_the_statistics_say_why(tmp_path: Path) -> None:
    model = make_model("llama")
    with NVMeCache(model.config, tmp_path, memory=12 * KiB) as cache:
        inputs = prompt(1, 64)
        model.generate(inputs, attention_mask=torch.ones_like(inputs), **taking(cache), max_new_tokens=4)
        decisions = cache.statistics().plan.decisions
        assert len(decisions) == 8
        assert {decision.path for decision in decisions.values()} == set(Residence)
        assert str(decisions[KVTensor(0, "keys")]).startswith("layer 0 keys: memory, because it is number 1 of 8")
        assert "budget of 12.0 KiB" in str(next(d for d in decisions.values() if d.path is Residence.DIRECT))


def test_nothing_is_left_behind(tmp_path: Path) -> None:
    model = make_model("llama")
    inputs = prompt(1, 20)

    def once() -> None:
        with NVMeCache(model.config, tmp_path) as cache:
            model.generate(inputs, attention_mask=torch.ones_like(inputs), **taking(cache), max_new_tokens=3)

    once()
    gc.collect()
    threads, descriptors = threading.active_count(), len(os.listdir("/proc/self/fd"))
    for _ in range(int(os.environ.get("PENSTOCK_TEST_CALLS", "5"))):
        once()
    gc.collect()
    assert threading.active_count() == threads
    assert len(os.listdir("/proc/self/fd")) == descriptors
    assert list(tmp_path.iterdir()) == []


def test_damage_is_an_error_and_not_a_token(tmp_path: Path) -> None:
    model = make_model("llama")
    path = tmp_path / "kv"
    inputs = prompt(1, 64)
    with NVMeCache(model.config, path, memory=0) as cache:
        model(inputs, **taking(cache))
        cache.statistics()
        size = path.stat().st_size
        with path.open("r+b") as file:
            file.seek(1 << 20)
            file.write(os.urandom(64 * KiB))
            file.flush()
            os.fsync(file.fileno())
        assert path.stat().st_size == size
        with pytest.raises(KVError, match="its checksum is"):
            model(inputs[:, :1], **taking(cache))
    assert not path.exists()


@pytest.mark.root
def test_a_device_that_is_full(loop_device: Path) -> None:
    """The step fails that needs more; what the cache holds stays, keys and values alike."""
    kept: list[tuple[Any, Any]] = []
    with NVMeCache(path=loop_device, memory=0) as cache:

        def fill() -> None:
            for step in range(10_000):
                new = states(1, 4097, step)
                cache.update(*new, 0)
                kept.append(new)

        with pytest.raises(RegionError, match="cannot grow"):
            fill()
        for found, which in ((cache.layers[0].keys, 0), (cache.layers[0].values, 1)):
            assert torch.equal(found, torch.cat([pair[which] for pair in kept], dim=2))
        cache.crop(-5000)
        keys, _ = cache.update(*states(1, 1, 0), 0)
        assert keys.shape[2] == 4097 * len(kept) - 5000 + 1


@pytest.mark.parametrize("asked", [-33, -3, 0, 3, 33, 50, torch.tensor(-3), torch.tensor(0), torch.tensor(3)], ids=str)
def test_crop_as_the_installed_transformers_does(asked: Any, tmp_path: Path) -> None:
    theirs = transformers.DynamicCache()
    with NVMeCache(path=tmp_path, memory=0) as ours:
        for cache in (theirs, ours):
            cache.update(*states(1, 33, 0), 0)
        try:
            theirs.crop(asked)
        except ValueError:
            with pytest.raises(ValueError, match=r"crop\(\d+\): give the number of tokens to remove as a negative"):
                ours.crop(asked)
        else:
            ours.crop(asked)
        assert theirs.get_seq_length() == ours.get_seq_length()
        more = states(1, 2, 1)
        for one, other in zip(theirs.update(*more, 0), ours.update(*more, 0), strict=True):
            assert torch.equal(one, other)


def test_in_inference_mode_and_out_of_it(tmp_path: Path) -> None:
    model = make_model("llama")
    parts = [prompt(1, tokens, seed=tokens) for tokens in (40, 3, 2)]
    expected = talk(model, transformers.DynamicCache(config=model.config), parts)
    with NVMeCache(model.config, tmp_path) as cache:
        assert torch.equal(talk(model, cache, parts), expected)


def test_memory_is_a_size(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a size"):
        NVMeCache(path=tmp_path, memory="lots")
    with pytest.raises(ValueError, match="-1 bytes"):
        NVMeCache(path=tmp_path, memory=-1)
    assert copy.copy(list(tmp_path.iterdir())) == []


def test_rows_that_go_through_a_device() -> None:
    """With host memory in the device's place: what is computed there is the same."""
    from penstock.adapters.nvme_layer import _DeviceTarget
    from penstock.device.plain import PlainDevice

    rows = torch.randn(7, 3, 2, 8)  # tokens, batch, heads, head_dim
    stored = rows.view(torch.uint8).numpy().reshape(7, -1)
    found = torch.zeros(3, 2, 9, 8)
    with PlainDevice("cpu") as device:
        _DeviceTarget(found, 3, None, device).write(2, stored)
        assert torch.equal(found[:, :, 2:], rows.permute(1, 2, 0, 3))
        lineage = np.array([[2, 0]] * 9, np.int32)
        fewer = torch.zeros(2, 2, 9, 8)
        _DeviceTarget(fewer, 3, lineage, device).write(0, stored)
        assert torch.equal(fewer[:, :, :7], rows.permute(1, 2, 0, 3)[[2, 0]])

"""penstock.pagecache.service: which commands are the same service."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from penstock.pagecache.service import service_id


def identify(*command: str, root: str = "/models/llama-3b", directory: str = "/home/user", **environment: str) -> str:
    return service_id(command, [Path(root)] if root else [], environment, directory)


SERVE = ("python", "serve.py", "--model", "/models/llama-3b")


def test_it_can_be_read() -> None:
    assert re.fullmatch(r"serve-llama-3b-[0-9a-f]{12}", identify(*SERVE))
    assert identify(*SERVE) == identify(*SERVE)


@pytest.mark.parametrize("flag", ["--model {}", "--model={}", "{}", "--weights={}/model.safetensors"])
@pytest.mark.parametrize("other", ["/mnt/nvme3/llama-3b", "/llama-3b", "/models/a b/llama-3b"])
def test_the_model_may_lie_elsewhere(flag: str, other: str) -> None:
    words = ["serve", *flag.split()]
    here = identify(*(word.format("/models/llama-3b") for word in words))
    there = identify(*(word.format(other) for word in words), root=other)
    assert here == there


def test_a_relative_path_is_the_same_model() -> None:
    relative = identify("serve", "llama-3b", directory="/models")
    assert relative == identify("serve", "/models/llama-3b", directory="/models")


@pytest.mark.parametrize(
    "command",
    [
        ("python", "serve.py", "--model", "/models/llama-8b"),
        (*SERVE, "--tensor-parallel-size", "2"),
        (*SERVE, "--tensor-parallel-size=2"),
        ("python", "chat.py", "--model", "/models/llama-3b"),
        ("python3.12", *SERVE[1:]),
        (*SERVE, ""),
    ],
)
def test_another_command_is_another_service(command: tuple[str, ...]) -> None:
    root = command[3] if command[3].startswith("/models") else "/models/llama-3b"
    assert identify(*command, root=root) != identify(*SERVE)


def test_another_tensor_parallel_size_is_another_service() -> None:
    found = {identify(*SERVE, f"--tensor-parallel-size={size}") for size in (1, 2, 4)}
    found |= {identify(*SERVE, "--tensor-parallel-size", str(size)) for size in (1, 2, 4)}
    assert len(found) == 6


@pytest.mark.parametrize("name", ["WORLD_SIZE", "LOCAL_RANK", "NODE_RANK"])
def test_the_parallelism_of_the_environment_counts(name: str) -> None:
    found = {identify(*SERVE), identify(*SERVE, **{name: "0"}), identify(*SERVE, **{name: "1"})}
    assert len(found) == 3


def test_devices_count_by_how_many_they_are() -> None:
    two = identify(*SERVE, CUDA_VISIBLE_DEVICES="0,1")
    assert identify(*SERVE, CUDA_VISIBLE_DEVICES="4,7") == two
    assert identify(*SERVE, CUDA_VISIBLE_DEVICES="4") != two
    assert identify(*SERVE, HIP_VISIBLE_DEVICES="0,1") != two


def test_the_rest_of_the_environment_does_not_count() -> None:
    assert identify(*SERVE, PATH="/bin", HOME="/root") == identify(*SERVE)


@pytest.mark.parametrize(
    ("command", "head"),
    [
        (("python", "serve.py"), "serve"),
        (("python3", "-u", "/opt/app/serve.py"), "serve"),
        (("python", "-m", "vllm.entrypoints.openai.api_server", "--port", "80"), "vllm.entrypoints.openai.api_server"),
        (("/usr/bin/torchrun", "--nproc-per-node=2", "train.py"), "train"),
        (("torchrun", "-m", "pack.train"), "pack.train"),
        (("/opt/llama.cpp/llama-server", "-m", "/models/llama-3b/model.gguf"), "llama-server"),
        (("python", "-m"), "python"),
    ],
)
def test_the_head_is_the_script_or_the_program(command: tuple[str, ...], head: str) -> None:
    assert identify(*command).startswith(f"{head}-llama-3b-")


def test_llama_cpps_model_may_lie_elsewhere() -> None:
    command = ("llama-server", "-m", "{}/model.gguf")
    here, there = ([word.format(root) for word in command] for root in ("/models/llama-3b", "/mnt/b/llama-3b"))
    assert identify(*here) == identify(*there, root="/mnt/b/llama-3b")


def test_without_a_known_model() -> None:
    assert re.fullmatch(r"serve-[0-9a-f]{12}", identify("python", "serve.py", root=""))


def test_words_that_are_not_text() -> None:
    name = os.fsdecode(b"/models/\xff\xfe")
    assert identify("serve", name, root=name) == identify("serve", name, root=name)
    assert identify("serve", "x" * 10_000) != identify("serve", "x" * 10_001)

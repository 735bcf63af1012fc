"""`penstock generate`, through click's own runner."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from penstock.cli.generate import PRESET_NAMES, generate


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(generate, [str(argument) for argument in arguments])


def test_writes_a_checkpoint_and_reports_it(tmp_path: Path) -> None:
    result = run(tmp_path, "--preset", "tiny-llama", "--shard-size", "2MiB", "--seed", "7")
    assert result.exit_code == 0, result.output
    assert re.fullmatch(
        rf"{re.escape(str(tmp_path))}: 39 tensors, 4 shards, 6\.5 MiB in \d+\.\d s, \d+\.\d\d GB/s\n",
        result.stdout,
    )
    assert result.stderr == ""
    assert len(list(tmp_path.glob("model-*-of-00004.safetensors"))) == 4


def test_size_chooses_the_layers(tmp_path: Path) -> None:
    result = run(tmp_path, "--preset", "tiny-llama", "--size", "20MiB")
    assert result.exit_code == 0, result.output
    assert "1 shard, 20.4 MiB" in result.stdout
    assert json.loads((tmp_path / "config.json").read_text())["num_hidden_layers"] == 14


def test_a_cut_vocabulary_is_told(tmp_path: Path) -> None:
    result = run(tmp_path, "--preset", "tiny-llama", "--size", "2MiB")
    assert result.exit_code == 0, result.output
    assert "the vocabulary is cut to 640 tokens" in result.stderr
    assert json.loads((tmp_path / "config.json").read_text())["vocab_size"] == 640


def test_gguf_is_one_file(tmp_path: Path) -> None:
    result = run(tmp_path, "--preset", "tiny-llama", "--format", "gguf")
    assert result.exit_code == 0, result.output
    (path,) = tmp_path.iterdir()
    assert path.name == "tiny-llama-BF16.gguf"
    assert result.stdout.startswith(f"{path}: 39 tensors, 1 shard, ")
    assert path.read_bytes()[:4] == b"GGUF"


def test_refuses_to_overwrite_unless_told(tmp_path: Path) -> None:
    arguments = (tmp_path, "--preset", "tiny-llama")
    assert run(*arguments).exit_code == 0
    first = (tmp_path / "model.safetensors").read_bytes()
    refused = run(*arguments, "--seed", "1")
    assert refused.exit_code == 1
    assert str(tmp_path) in refused.stderr
    assert "overwrite" in refused.stderr
    assert (tmp_path / "model.safetensors").read_bytes() == first
    assert run(*arguments, "--seed", "1", "--overwrite").exit_code == 0
    assert (tmp_path / "model.safetensors").read_bytes() != first


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "tiny-llama", "--size", "6 gallons"], "is not a size"),
        (["--preset", "tiny-llama", "--shard-size", "0"], "at least one byte"),
        (["--preset", "no-such-model"], "no-such-model"),
        (["--preset", "tiny-llama", "--format", "gguf", "--shard-size", "1GB"], "a GGUF is one file"),
        ([], "--preset"),
    ],
)
def test_unusable_options_are_usage_errors(arguments: list[str], message: str, tmp_path: Path) -> None:
    result = run(tmp_path / "new", *arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "llama-3.1-8b", "--size", "1024TiB"], "are free"),
        (["--preset", "opt-6.7b", "--format", "gguf"], "llama.cpp has no OPT"),
    ],
)
def test_failures_are_told_without_a_traceback(arguments: list[str], message: str, tmp_path: Path) -> None:
    result = run(tmp_path / "new", *arguments)
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit)
    assert message in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_help_has_an_example_and_the_presets() -> None:
    result = run("--help")
    assert result.exit_code == 0
    assert "penstock generate /data/llama-3b --preset llama-3.2-3b\n" in result.stdout


def test_preset_names_are_those_of_the_generator() -> None:
    from penstock.testing.checkpoint import PRESETS

    assert list(PRESETS) == list(PRESET_NAMES)


def test_importing_the_command_imports_neither_numpy_nor_rich() -> None:
    code = "import sys, penstock.cli.generate; print({'numpy', 'rich', 'penstock.testing'} & set(sys.modules))"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert output.stdout.strip() == "set()"

"""The fuzzer's corpus, and a second of fuzzing."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

pytest.importorskip("gguf", reason="needs the package gguf")

from tests.checkpoint.fuzz import CORPUS, changed, complaint


@pytest.mark.parametrize("path", sorted(CORPUS.iterdir()), ids=lambda path: path.name)
def test_the_corpus(path: Path) -> None:
    assert complaint(path) == ""


def test_some_changes_of_it(tmp_path: Path) -> None:
    source = random.Random(20)
    seeds = {path: path.read_bytes() for path in sorted(CORPUS.iterdir())}
    for _ in range(500):
        path, contents = source.choice(list(seeds.items()))
        case = tmp_path / f"case{path.suffix}"
        case.write_bytes(changed(contents, list(seeds.values()), source))
        assert complaint(case) == "", case.read_bytes()

"""A real model: its decode steps and its tokens, with each cache and each memory limit."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console

from bench.errors import RunError
from bench.kv.family import FAMILIES
from bench.page_cache.limit import MemoryLimit
from penstock.units import format_size

_STEPS = 8
_TOLERANCE = 0.1  # of logits in bfloat16 that are around 1; chosen without measurement
_LEAST_FASTER = 5.0  # a session's load than its prefill


def real_model(console: Console, name: str, device: str, directory: Path, rounds: int, *, limited: bool) -> bool:
    """Run and print; whether tokens are the same and sessions are as fast as they have to be."""
    family = FAMILIES[name]
    size = format_size(family.kv_bytes)
    console.print(
        f"{name}: {family.tokens} tokens, batch {family.batch}, KV {size}, computed on {device}", highlight=False
    )
    passed = True
    runs: dict[tuple[str, str], list[dict[str, Any]]] = {}
    limits = {"ample": None} | ({"half": family.own_bytes + family.kv_bytes // 2} if limited else {})
    ample = ("dynamic", "saved", "penstock", "direct", "session")
    for number in range(rounds):
        for memory, limit_bytes in limits.items():
            for arm in ample if limit_bytes is None else ("saved", "penstock"):
                run = _run(arm, directory, name, device, limit_bytes)
                runs.setdefault((memory, arm), []).append(run)
                console.print(
                    f"round {number + 1}/{rounds}, {memory}, {arm}: prefill {run['prefill_s']:.2f} s, "
                    f"step {median(run['steps_s'][1:]):.3f} s, peak {format_size(run['peak_rss_bytes'])}",
                    highlight=False,
                )
    expected = runs["ample", "dynamic"][0]
    for (memory, arm), values in runs.items():
        same = all(_same(run, expected, device) for run in values)
        passed = passed and same
        step_s = median(median(run["steps_s"][1:]) for run in values)
        prefill_s = median(run["prefill_s"] for run in values)
        alike = "the same tokens and logits" if device == "cpu" else f"logits within {_TOLERANCE}"
        told = alike if same else "OTHER TOKENS OR LOGITS"
        console.print(f"{memory:6} {arm:9} prefill {prefill_s:6.2f} s  step {step_s:.3f} s  {told}", highlight=False)
    sessions = runs["ample", "session"]
    faster = median(run["prefill_s"] / run["load_s"] for run in sessions)
    good = faster >= _LEAST_FASTER
    console.print(
        f"{'PASS' if good else 'FAIL'}  loading the session ({median(run['load_s'] for run in sessions):.2f} s) is "
        f"{faster:.1f} times as fast as its prefill ≥ {_LEAST_FASTER:.0f}",
        highlight=False,
    )
    return passed and good


def _same(run: dict[str, Any], expected: dict[str, Any], device: str) -> bool:
    """On the CPU bit by bit. On a GPU the arithmetic differs: rows are compared bit by bit by the tests marked gpu."""
    if device == "cpu":
        return run["tokens"] == expected["tokens"] and run["logits"] == expected["logits"]
    pairs = zip(run["logits"], expected["logits"], strict=True)
    return all(math.isclose(found, wanted, abs_tol=_TOLERANCE) for found, wanted in pairs)


def _run(arm: str, directory: Path, name: str, device: str, limit_bytes: int | None) -> dict[str, Any]:
    command = [sys.executable, "-m", "bench.kv.model", arm, str(directory), name, device, str(_STEPS)]
    limit = None if limit_bytes is None else MemoryLimit(limit_bytes)
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, preexec_fn=limit.enter if limit else None
        )
        kills = limit.use().oom_kills if limit else 0
    finally:
        if limit:
            limit.remove()
        for path in directory.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    if done.returncode:
        raise RunError(f"{arm}: exit status {done.returncode}, OOM kills {kills}: {done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found

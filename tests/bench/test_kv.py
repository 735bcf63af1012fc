"""The KV benchmark, tiny: every arm runs, compares its bytes and leaves nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_quick_runs_every_arm(tmp_path: Path) -> None:
    scratch, result, picture = tmp_path / "scratch", tmp_path / "result.json", tmp_path / "steps.svg"
    scratch.mkdir()
    command = [sys.executable, "-m", "bench.kv", "--quick", "--dir", str(scratch), "--json", str(result)]
    command += ["--plot", str(picture)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(result.read_text())["rows"]
    assert [row["arm"] for row in rows] == ["memmap", "memmap-128", "buffered", "direct", "penstock"]
    assert all(run["step_s"] > 0 for row in rows for run in row["runs"])
    assert list(scratch.iterdir()) == []
    assert "</svg>" in picture.read_text()
    again = tmp_path / "again.png"
    subprocess.run([sys.executable, "-m", "bench.kv.plot", str(result), str(again)], cwd=ROOT, check=True)
    assert again.read_bytes().startswith(b"\x89PNG")

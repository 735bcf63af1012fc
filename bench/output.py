"""What a benchmark leaves in files."""

from __future__ import annotations

import json
from pathlib import Path


def write_json(path: Path, content: object) -> None:
    """Write a document whole or not at all. Missing directories are made: nothing measured is to be lost for one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.partial")
    beside.write_text(json.dumps(content, indent=1) + "\n")
    beside.replace(path)

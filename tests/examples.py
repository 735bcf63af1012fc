"""How often properties are tried."""

from __future__ import annotations

import os


def examples(count: int) -> int:
    """So many examples; a tenth of them in the rig, where everything takes ten times as long."""
    return max(count // 10, 5) if "PENSTOCK_RIG" in os.environ else count

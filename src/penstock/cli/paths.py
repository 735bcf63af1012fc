"""Where penstock keeps what it learns."""

from __future__ import annotations

import os
from pathlib import Path


def template_directory(option: str | None) -> Path:
    """``--templates``, else $PENSTOCK_TEMPLATES, else penstock/templates in the XDG data directory."""
    import platformdirs

    chosen = option or os.environ.get("PENSTOCK_TEMPLATES")
    return Path(chosen) if chosen else platformdirs.user_data_path("penstock") / "templates"


def fingerprint_directory() -> Path:
    """penstock/fingerprints in the XDG cache directory: this node's own, and safe to delete."""
    import platformdirs

    return platformdirs.user_cache_path("penstock") / "fingerprints"

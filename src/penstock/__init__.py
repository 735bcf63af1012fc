"""penstock: model weights from SSD at the device's speed, for programs nobody may change and for those that call it.

What is named here is imported at its first use: the command line starts without it.
"""

from __future__ import annotations

__version__ = "0.1.0"

TYPE_CHECKING = False  # typing's own takes 8 ms to import, and `penstock run` has a program waiting
if TYPE_CHECKING:
    from typing import Any

    from penstock.checkpoint.load import load_checkpoint as load_checkpoint
    from penstock.checkpoint.load import load_file as load_file
    from penstock.checkpoint.load import stream_checkpoint as stream_checkpoint
    from penstock.checkpoint.plan import Slice as Slice

_HOMES = {
    "Slice": "penstock.checkpoint.plan",
    "load_checkpoint": "penstock.checkpoint.load",
    "load_file": "penstock.checkpoint.load",
    "stream_checkpoint": "penstock.checkpoint.load",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)

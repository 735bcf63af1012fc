"""What goes wrong in the rig itself, not in a test."""

from __future__ import annotations


class RigError(Exception):
    """The rig cannot run here, or a machine did not come up; the message says why."""

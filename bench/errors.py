"""What stops a benchmark, and what makes one run of it invalid."""

from __future__ import annotations


class BenchError(Exception):
    """The benchmark cannot be run here as asked; the message says what to do."""


class RunError(Exception):
    """One run is invalid: it failed, read wrong bytes, or did not start from the state it should."""

"""Observe only: the kernel's own behaviour, and the baseline of every comparison."""

from __future__ import annotations

from penstock.pagecache.base import Policy


class Native(Policy):
    """Prefetches nothing and evicts nothing."""

    only_observes = True

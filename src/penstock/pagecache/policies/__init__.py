"""Policies that come with penstock, and finding a user's own."""

from __future__ import annotations

import importlib
import os
import sys
from typing import TYPE_CHECKING

from penstock.errors import PolicyError

if TYPE_CHECKING:
    from penstock.pagecache.base import Policy

BUILT_IN = {
    "native": "penstock.pagecache.policies.native:Native",
    "eager": "penstock.pagecache.policies.eager:Eager",
    "sequential": "penstock.pagecache.policies.sequential:Sequential",
    "maio": "penstock.pagecache.policies.maio:Maio",
}


def create_policy(name: str) -> Policy:
    """A policy by its name, or a user's by ``package.module:Class``, found as ``python -m`` would find it.

    Raises:
        PolicyError: there is no such policy, it is not a Policy, or making it failed.
    """
    from penstock.pagecache.base import Policy

    target = BUILT_IN.get(name, name)
    module_name, colon, class_name = target.partition(":")
    if not colon:
        raise PolicyError(
            f"unknown policy {name!r}: choose one of {', '.join(BUILT_IN)}, or write package.module:Class"
        )
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        policy = getattr(importlib.import_module(module_name), class_name)()
    except Exception as error:
        raise PolicyError(f"policy {name!r} cannot be made: {type(error).__name__}: {error}") from error
    if not isinstance(policy, Policy):
        raise PolicyError(f"policy {name!r}: {class_name} is not a penstock.pagecache.base.Policy")
    return policy

"""What holds for all tests."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True, scope="session")
def interruptible() -> Iterator[None]:
    """A shell has its background jobs ignore SIGINT, and children inherit that: programs under test would too."""
    before = signal.getsignal(signal.SIGINT)
    if before is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def as_ordinary_user() -> list[str]:
    """What to put before a command that is to run without privileges.

    As root that is another user, who may read whatever root may (the interpreter can lie in root's home).
    """
    if os.geteuid() != 0:
        return []
    if shutil.which("setpriv") is None:
        pytest.skip("needs setpriv (util-linux), to become an ordinary user")
    identity = ["--reuid=65534", "--regid=65534", "--clear-groups"]
    return ["setpriv", *identity, "--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"]

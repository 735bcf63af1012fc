"""What several tests of the page cache need."""

from __future__ import annotations

import os
import shutil

import pytest


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

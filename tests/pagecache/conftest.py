"""What several tests of the page cache need."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from penstock.pagecache.ledger import Ledger


@pytest.fixture
def ledger() -> Iterator[Ledger]:
    """An empty one."""
    ledger = Ledger()
    yield ledger
    ledger.close()

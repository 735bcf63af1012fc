"""Both observers under the contract that ships in penstock.testing.observer."""

from __future__ import annotations

import os

import pytest

from penstock.errors import UnsupportedError
from penstock.linux.tracefs import ACCESS_EVENTS, TraceFs
from penstock.pagecache.files import ModelFiles
from penstock.pagecache.ledger import Ledger
from penstock.pagecache.observers.base import Observer
from penstock.pagecache.observers.process import ProcessObserver
from penstock.pagecache.observers.tracefs import TracefsObserver
from penstock.testing.observer import ObserverTests


class TestProcessObserver(ObserverTests):
    def make_observer(self, files: ModelFiles, ledger: Ledger) -> Observer:
        return ProcessObserver(files, ledger)


@pytest.mark.root
class TestTracefsObserver(ObserverTests):
    def make_observer(self, files: ModelFiles, ledger: Ledger) -> Observer:
        if os.geteuid() != 0:
            pytest.skip("needs root, for tracefs")
        try:
            tracefs = TraceFs()
        except UnsupportedError as error:
            pytest.skip(str(error))
        found = tracefs.available_events(ACCESS_EVENTS)
        tracefs.close()
        if len(found) < len(ACCESS_EVENTS):
            pytest.skip("needs the page-cache access tracepoints (Linux 6.9)")
        return TracefsObserver(files)

"""tracefs in tests, and why it cannot be used where it cannot."""

from __future__ import annotations

import os

import pytest

from penstock.errors import UnsupportedError
from penstock.linux.tracefs import ACCESS_EVENTS, TraceFs


def open_tracefs() -> TraceFs:
    """It, to be closed; skips the test where there is none for us."""
    if os.geteuid() != 0:
        pytest.skip("needs root, for tracefs")
    try:
        return TraceFs()
    except UnsupportedError as error:
        pytest.skip(str(error))


def _lacking() -> str:
    """Why programs cannot be observed through it; "" where they can."""
    if os.geteuid() != 0:
        return "needs root, for tracefs"
    try:
        tracefs = TraceFs()
    except UnsupportedError as error:
        return str(error)
    missing = set(ACCESS_EVENTS) - set(tracefs.available_events(ACCESS_EVENTS))
    tracefs.close()
    return f"this kernel lacks the tracepoints {', '.join(sorted(missing))} (Linux 6.9)" if missing else ""


LACKING = _lacking()
needs_access_tracepoints = pytest.mark.skipif(bool(LACKING), reason=LACKING)

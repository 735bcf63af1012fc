"""The end of the interpreter: threads that are daemons are stopped wherever they are, with what they hold locked."""

from __future__ import annotations

import atexit
import weakref
from collections.abc import Callable


def before_exit(method: Callable[[], None]) -> Callable[[], None]:
    """Have a bound method called while threads still run, unless its object is gone; returns what undoes that."""
    weak = weakref.WeakMethod(method)

    def call() -> None:
        bound = weak()
        if bound is not None:
            bound()

    atexit.register(call)
    return lambda: atexit.unregister(call)

"""Which engine: the one asked for, or the best that works here."""

from __future__ import annotations

from typing import Literal, TypeAlias

from penstock.errors import UnsupportedError
from penstock.storage.base import Engine
from penstock.storage.threads import ThreadEngine
from penstock.storage.uring import DEPTH, UringEngine

EngineName: TypeAlias = Literal["auto", "uring", "threads"]
ENGINES: tuple[EngineName, ...] = ("auto", "uring", "threads")


def create_engine(name: EngineName = "auto", *, depth: int = DEPTH) -> tuple[Engine, str]:
    """An engine, and why it is not a better one ("" where it is the one asked for, or the best there is).

    Args:
        name: ``auto`` is io_uring where it works, else threads.
        depth: requests that io_uring gives the kernel at once.

    Raises:
        UnsupportedError: ``uring`` was asked for by name, and cannot be had.
        ValueError: there is no such engine.
    """
    if name not in ENGINES:
        raise ValueError(f"engine {name!r}: choose one of {', '.join(ENGINES)}")
    if name == "threads":
        return ThreadEngine(), ""
    try:
        return UringEngine(depth), ""
    except (UnsupportedError, OSError) as error:
        if name == "uring":
            raise UnsupportedError(str(error)) from error
        return ThreadEngine(), str(error)

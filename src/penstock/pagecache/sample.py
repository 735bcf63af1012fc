"""One point of a run's timeline, as the runtime takes it and the report stores it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Sample:
    """The sums at one moment of a run; bytes since its start."""

    t_s: float  # since the program's start
    device_read_bytes: int
    accessed_bytes: int  # of the model, each byte once
    resident_bytes: int  # page cache of the model's files

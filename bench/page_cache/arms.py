"""The ways in which the same command is started."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Arm:
    """One way to start a client.

    Attributes:
        policy: what ``penstock run --policy`` is given; None runs the command without penstock.
        options: further options of ``penstock run``.
        template: None; "empty" (the run records), "file" (recorded before, in a run that reads as this one
            does) or "reverse" (recorded from a run in the opposite order).
        resident: the model is in the page cache when the run begins.
        warm: ``penstock warm`` runs first, as a part of the time.
        mode: what the report must say.
    """

    name: str
    text: str
    policy: str | None = None
    options: tuple[str, ...] = ()
    template: Literal["empty", "file", "reverse"] | None = None
    resident: bool = False
    warm: bool = False
    mode: str | None = None


_ARMS = (
    Arm("native", "no penstock"),
    Arm("native-observed", "--policy native", policy="native"),
    Arm("eager", "--policy eager: everything at the first access", policy="eager"),
    Arm("sequential", "--policy sequential: a segment ahead, one behind", policy="sequential"),
    Arm("precache", "penstock warm, then no penstock; both counted", warm=True),
    Arm("first", "the recording run", policy="maio", template="empty", mode="record"),
    Arm("maio", "replay of a template", policy="maio", template="file", mode="replay"),
    Arm("maio-P", "replay, prefetch only: nothing is burnt", policy="maio", options=("--cache", "keep"),
        template="file", mode="replay"),
    Arm("maio-P-E", "replay, prefetch and eviction always: --cache burn", policy="maio",
        options=("--cache", "burn"), template="file", mode="replay"),
    Arm("wrong", "replay of a template of the opposite order", policy="maio", template="reverse"),
    Arm("resident", "no penstock, the model is cached", resident=True),
    Arm("resident-observed", "--policy native, the model is cached", policy="native", resident=True),
    Arm("resident-maio", "replay, the model is cached", policy="maio", template="file", resident=True,
        mode="replay"),
)  # fmt: skip

ARMS = {arm.name: arm for arm in _ARMS}
CLIENTS = ("hf", "mmap", "read", "tp2", "gguf")


@dataclass(frozen=True, slots=True, order=True)
class Setting:
    """What a client runs under.

    Attributes:
        memory: "ample" or a percentage of the model, such as "45%".
        read_ahead: KiB, or "machine".
        user: "root" (the benchmark's own rights) or "user" (an ordinary user's).
        passes: how many times the client reads everything.
    """

    client: str
    memory: str = "ample"
    read_ahead: str = "machine"
    user: str = "root"
    passes: int = 1

    def __str__(self) -> str:
        passes = f", {self.passes} passes" if self.passes > 1 else ""
        return f"{self.client}, memory {self.memory}, read-ahead {self.read_ahead}, {self.user}{passes}"


@dataclass(frozen=True, slots=True, order=True)
class Key:
    """What is compared: an arm under a setting."""

    setting: Setting
    arm: str

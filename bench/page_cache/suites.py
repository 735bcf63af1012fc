"""Which settings and arms a benchmark runs, and what they must reach."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from bench.page_cache.arms import ARMS, CLIENTS, Key, Setting
from penstock.units import GiB, KiB, MiB

SHARE = "45%"
_PASSES = 10  # of a warm model


@dataclass(frozen=True, slots=True)
class Bar:
    """A figure that must not be exceeded.

    Attributes:
        subject: whose seconds (or, for the other kinds, peak memory and template).
        against: what they are divided by; None is the limit L of the subject's setting.
    """

    subject: Key
    most: float
    against: Key | None = None
    kind: Literal["ratio", "memory", "template"] = "ratio"

    def __str__(self) -> str:
        setting = self.subject.setting
        if self.kind == "memory":
            return f"{setting}: penstock's own memory in {self.subject.arm}"
        if self.kind == "template":
            return f"{setting}: template per GiB of model"
        if self.against is None:
            return f"{setting}: {self.subject.arm} / L"
        other = self.against.arm
        if self.against.setting != setting:
            other += f" with memory {self.against.setting.memory}"
        return f"{setting}: {self.subject.arm} / {other}"


@dataclass(frozen=True, slots=True)
class Suite:
    """Settings, their arms, and bars; each round goes through all of them."""

    name: str
    arms: dict[Setting, tuple[str, ...]]
    bars: tuple[Bar, ...] = ()
    least_rounds: int = 5

    def __add__(self, other: Suite) -> Suite:
        arms = {
            setting: tuple(dict.fromkeys(self.arms.get(setting, ()) + other.arms.get(setting, ())))
            for setting in self.arms | other.arms
        }
        rounds = max(self.least_rounds, other.least_rounds)
        return Suite(f"{self.name}+{other.name}", arms, self.bars + other.bars, rounds)


def _ratio(setting: Setting, arm: str, against: str, most: float) -> Bar:
    return Bar(Key(setting, arm), most, Key(setting, against))


def _ample_128() -> Suite:
    arms: dict[Setting, tuple[str, ...]] = {}
    bars: list[Bar] = []
    for client in CLIENTS:
        setting = Setting(client, read_ahead="128")
        if client in ("hf", "mmap"):
            arms[setting] = ("native", "first", "maio", "resident")
            bars.append(_ratio(setting, "maio", "native", 0.55))
            bars.append(Bar(Key(setting, "maio"), 1.3))
            bars.append(_ratio(setting, "first", "native", 0.80))
        else:
            arms[setting] = ("native", "maio", "resident")
            bars.append(_ratio(setting, "maio", "native", 0.70))
    return Suite("ample-128", arms, tuple(bars))


def _ample_machine() -> Suite:
    settings = [Setting(client) for client in ("hf", "mmap")]
    return Suite(
        "ample-machine",
        dict.fromkeys(settings, ("native", "maio", "resident")),
        tuple(_ratio(setting, "maio", "native", 0.70) for setting in settings),
    )


def _limit() -> Suite:
    arms: dict[Setting, tuple[str, ...]] = {}
    bars: list[Bar] = []
    for client in ("mmap", "read", "tp2"):
        setting, ample = Setting(client, SHARE, "128"), Setting(client, read_ahead="128")
        arms[setting] = ("native", "eager", "maio")
        arms[ample] = ("maio",)
        bars.append(_ratio(setting, "maio", "native", 0.75))
        bars.append(_ratio(setting, "maio", "eager", 0.60))
        bars.append(Bar(Key(setting, "maio"), 1.2, Key(ample, "maio")))
    return Suite("limit", arms, tuple(bars))


def _safety() -> Suite:
    settings = [
        Setting(client, memory, "128")
        for client in CLIENTS
        for memory in ("ample", SHARE)
    ]  # fmt: skip
    bars: list[Bar] = []
    for setting in settings:
        bars.append(_ratio(setting, "wrong", "native", 1.10))
        bars.append(_ratio(setting, "resident-maio", "resident", 1.10))
    return Suite("safety", dict.fromkeys(settings, ("native", "wrong", "resident", "resident-maio")), tuple(bars))


def _user() -> Suite:
    settings = [Setting(client, read_ahead="128", user="user") for client in ("hf", "mmap")]
    return Suite(
        "user",
        dict.fromkeys(settings, ("native", "maio", "resident")),
        tuple(_ratio(setting, "maio", "native", 0.70) for setting in settings),
    )


def _observe() -> Suite:
    bars: list[Bar] = []
    # One warm pass over 6 GiB takes 0.4 to 0.8 s, of which Python's own start is 0.02: what observing costs a program
    # that goes on is seen in many.
    settings = [
        Setting(client, read_ahead="128", passes=passes) for passes in (1, _PASSES) for client in ("read", "mmap")
    ]
    for setting in settings:
        bars.append(_ratio(setting, "resident-observed", "resident", 1.04))
        bars.append(Bar(Key(setting, "resident-observed"), 80 * MiB, kind="memory"))
        bars.append(Bar(Key(setting, "resident-maio"), 2 * KiB, kind="template"))
    return Suite(
        "observe",
        dict.fromkeys(settings, ("resident", "resident-observed", "resident-maio")),
        tuple(bars),
        least_rounds=9,
    )


SUITES = {suite.name: suite for suite in (_ample_128(), _ample_machine(), _limit(), _safety(), _user(), _observe())}


def quick() -> Suite:
    """Every client and every arm, each at least once, in few runs; nothing is judged."""
    every = tuple(ARMS)
    return Suite(
        "quick",
        {
            Setting("mmap"): every,
            Setting("mmap", SHARE): ("native", "eager", "maio"),
            Setting("mmap", user="user"): ("native", "maio"),
            Setting("read"): ("native", "first", "maio", "wrong", "resident-observed"),
            Setting("tp2"): ("native", "first", "maio", "wrong"),
            Setting("tp2", SHARE): ("native", "maio"),
            Setting("gguf"): ("native", "first", "maio", "wrong"),
            Setting("hf"): ("native", "maio"),
        },
        least_rounds=1,
    )


def chosen(
    clients: Iterable[str],
    arms: Iterable[str],
    memory: Iterable[str],
    read_ahead: Iterable[str],
    users: Iterable[str],
) -> Suite:
    """Every combination of what was asked for; nothing is judged."""
    settings = [
        Setting(client, share, kib, user)
        for client in clients
        for share in memory
        for kib in read_ahead
        for user in users
    ]
    return Suite("chosen", dict.fromkeys(settings, tuple(arms)))


def without(suite: Suite, reasons: dict[str, str]) -> tuple[Suite, list[str]]:
    """The part of a suite that can run here, and why the rest cannot.

    Args:
        reasons: what is missing, by the value of a setting: a client, "limit", "read-ahead", or "user".
    """
    arms: dict[Setting, tuple[str, ...]] = {}
    skipped: list[str] = []
    for setting, names in suite.arms.items():
        wants = (
            setting.client,
            "limit" if setting.memory != "ample" else "",
            "read-ahead" if setting.read_ahead != "machine" else "",
            "user" if setting.user == "user" else "",
        )
        missing = [reasons[want] for want in wants if want in reasons]
        if missing:
            skipped.append(f"{setting}: {'; '.join(missing)}")
        else:
            arms[setting] = names
    return Suite(suite.name, arms, suite.bars, suite.least_rounds), skipped


# Seconds per GiB, from a 2-core virtual machine with a disk of 2 GB/s; only for the estimate.
_SECONDS_PER_GIB = {"native": 1.5, "wrong": 1.5, "eager": 1.5, "sequential": 1.2, "first": 1.2, "precache": 1.2}
_CACHED_SECONDS_PER_GIB = 0.5
_PREPARE_SECONDS_PER_GIB = 0.5
_START_SECONDS = {"hf": 5.0}


def estimate_s(suite: Suite, rounds: int, size_bytes: int) -> float:
    """About how long a suite takes."""
    size_gib = size_bytes / GiB
    a_round = 0.6 * size_gib  # the disk's own speed
    recordings = 0.0
    seen: set[tuple[str, str, bool]] = set()
    for setting, names in suite.arms.items():
        for name in names:
            arm = ARMS[name]
            rate = _CACHED_SECONDS_PER_GIB if arm.resident else _SECONDS_PER_GIB.get(name, 0.8)
            seconds = (rate + _PREPARE_SECONDS_PER_GIB) * size_gib + _START_SECONDS.get(setting.client, 1.0)
            a_round += seconds
            template = (setting.client, setting.user, name == "wrong")
            if arm.template in ("file", "reverse") and template not in seen:
                seen.add(template)
                recordings += seconds
    verification = len(suite.arms) and 0.8 * size_gib * sum(map(len, suite.arms.values()))
    return a_round * (rounds + 1) + verification + recordings

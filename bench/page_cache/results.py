"""What the runs say together: medians, ratios within rounds, the limit, and the bars."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median

from bench.page_cache.arms import ARMS, Key, Setting
from bench.page_cache.run import Run
from bench.page_cache.suites import Bar
from penstock.units import GiB, format_size


@dataclass(frozen=True, slots=True)
class Verdict:
    """A bar and what was measured.

    Attributes:
        value: None where a run that it needs is missing or failed.
        floor: what L alone would give: a bar below it is out of any program's reach on this machine.
    """

    bar: Bar
    value: float | None
    floor: float | None = None

    @property
    def passed(self) -> bool:
        """Whether the figure is there and within the bar."""
        return self.value is not None and self.value <= self.bar.most

    def __str__(self) -> str:
        words = f"{self.bar}: {self._text(self.value)} ≤ {self._text(self.bar.most)}"
        if self.floor is not None:
            words += f" (L alone: {self.floor:.2f})"
        return f"{'PASS' if self.passed else 'FAIL'}  {words}"

    def _text(self, value: float | None) -> str:
        if value is None:
            return "not measured"
        return f"{value:.2f}" if self.bar.kind == "ratio" else format_size(value)


class Results:
    """The timed runs of a benchmark.

    Args:
        bandwidths: bytes a second that the disk delivered, one for each round.
    """

    def __init__(self, runs: Sequence[Run], bandwidths: Sequence[float], failed: set[Key]) -> None:
        self._runs: dict[Key, dict[int, Run]] = {}
        for run in runs:
            self._runs.setdefault(run.key, {})[run.round] = run
        self.bandwidths = bandwidths
        self.failed = failed

    def runs(self, key: Key) -> list[Run]:
        """The runs of an arm, in the order of rounds."""
        return [run for _, run in sorted(self._runs.get(key, {}).items())]

    def median_s(self, key: Key) -> float | None:
        """The median of its seconds."""
        seconds = [run.seconds for run in self.runs(key)]
        return median(seconds) if seconds else None

    def ratio(self, key: Key, against: Key) -> float | None:
        """The median over rounds of the ratio of the two runs of one round."""
        ours, theirs = self._runs.get(key, {}), self._runs.get(against, {})
        ratios = [ours[number].seconds / theirs[number].seconds for number in ours.keys() & theirs.keys()]
        return median(ratios) if ratios else None

    def limit_s(self, setting: Setting) -> float | None:
        """L: the model resident, or the disk's own speed, whichever takes longer.

        Where the model is loaded within a memory limit, resident is what it took with ample memory; where it was
        not measured, the disk alone counts.
        """
        of_setting = [run for key, runs in self._runs.items() if key.setting == setting for run in runs.values()]
        if not of_setting or not self.bandwidths:
            return None
        keys = [Key(replace(setting, memory=memory), "resident") for memory in ("ample", setting.memory)]
        resident = next((key for key in keys if self._runs.get(key)), None)
        resident_s = (self.median_s(resident) if resident else None) or 0.0
        return max(resident_s, of_setting[0].bytes / setting.passes / median(self.bandwidths))

    def verdict(self, bar: Bar) -> Verdict:
        """Judge a bar."""
        if bar.subject in self.failed or bar.against in self.failed:
            return Verdict(bar, None)
        return Verdict(bar, self._value(bar), self._floor(bar))

    def _floor(self, bar: Bar) -> float | None:
        """For a comparison of cold runs."""
        if bar.against is None or ARMS[bar.subject.arm].resident:
            return None
        limit_s, theirs_s = self.limit_s(bar.subject.setting), self.median_s(bar.against)
        return limit_s / theirs_s if limit_s and theirs_s else None

    def _value(self, bar: Bar) -> float | None:
        runs = self.runs(bar.subject)
        if not runs:
            return None
        if bar.kind == "memory":
            return max(run.penstock_peak_bytes for run in runs)
        if bar.kind == "template":
            return max(run.template_bytes / (run.bytes / bar.subject.setting.passes / GiB) for run in runs)
        if bar.against is not None:
            return self.ratio(bar.subject, bar.against)
        limit_s, ours_s = self.limit_s(bar.subject.setting), self.median_s(bar.subject)
        return ours_s / limit_s if ours_s and limit_s else None

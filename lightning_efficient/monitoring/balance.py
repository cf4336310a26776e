"""What each technique cost and saved in a run, per batch, against the same batch without it.

The sums come from the techniques themselves, under four tags; of one that trains in phases (it has a tag ``phase``)
batches of earlier phases are held against those of the last one.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from lightning_efficient.monitoring.report import BalanceWords, RunReport
from lightning_efficient.monitoring.series import Point, quantile
from lightning_efficient.monitoring.units import human

__all__ = ["TAGS", "FullSize", "Trade", "batch_ms", "full_size", "is_balance", "phase_medians", "trades"]

TAGS = ("cost_total_ms", "gain_total_ms", "spared_bytes", "held_bytes")
"""Names of the tags of a balance, below the technique's."""
_FEWEST = 3  # batches of the last phase, to know what one takes
_PHASES = "Saved: what the batches of earlier phases took less than the median of the last phase's."


@dataclass(frozen=True)
class Trade:
    """Of one technique; NaN where something was not measured.

    Attributes:
        technique: As in the tags.
        cost_ms: By which it made a batch longer, the mean over the run.
        gain_ms: By which it made a batch shorter, likewise.
        batch_ms: Mean time of a batch with all that there was.
        spared_bytes: The most memory that it spared.
        held_bytes: The most memory that it took for itself.
        words: How it was measured, and what came of it.
    """

    technique: str
    cost_ms: float
    gain_ms: float
    batch_ms: float
    spared_bytes: float
    held_bytes: float
    words: BalanceWords

    @property
    def net_ms(self) -> float:
        """By which a batch was longer; negative: shorter. NaN if neither was measured."""
        known = [value for value in (self.cost_ms, -self.gain_ms) if math.isfinite(value)]
        return sum(known) if known else math.nan

    @property
    def percent(self) -> float:
        """The same, in percent of the batch without the technique."""
        return 100 * self.net_ms / (self.batch_ms - self.net_ms)

    def cells(self) -> tuple[str, str, str, str, str]:
        """For a table: cost, gain, both in percent of the batch without it, memory spared, memory held."""
        percent = f"{self.percent:+.1f} %" if math.isfinite(self.percent) else "not measured"
        return (
            human(self.cost_ms, "ms"), human(self.gain_ms, "ms"), percent,
            human(self.spared_bytes, "bytes"), human(self.held_bytes, "bytes"),
        )  # fmt: skip


@dataclass(frozen=True)
class FullSize:
    """A batch of the last phase of whoever trains in phases; of the whole run, if nobody does.

    Attributes:
        batch_ms: That it took.
        cost_ms: Of it, what the techniques' clocks say that they took; NaN if none of them measured.
        phased: Whether somebody trains in phases.
    """

    batch_ms: float
    cost_ms: float
    phased: bool


def is_balance(tag: str) -> bool:
    """Whether the tag is of a balance."""
    return tag.partition("/")[2] in TAGS


def batch_ms(report: RunReport) -> float:
    """Mean time of a batch, with the time until the next one, validation left out; from logs, without that time."""
    batches, seconds = report.totals.get("batches", 0.0), report.totals.get("train_seconds")
    if batches and seconds is not None:
        return 1e3 * seconds / batches
    points = report.series.get("efficiency/step_ms", ())
    return sum(point.value for point in points) / len(points) if points else math.nan


def trades(report: RunReport) -> tuple[Trade, ...]:
    """Of each technique of the run."""
    words = {row.technique: row for row in report.balances}
    found = []
    for technique in dict.fromkeys([*report.techniques, *words]):
        series = [report.series.get(f"{technique}/{name}", ()) for name in TAGS]
        batches = report.totals.get("batches") or math.nan
        cost, gain = (_sum(points) / batches for points in series[:2])
        spared, held = (max((point.value for point in points), default=math.nan) for points in series[2:])
        said = words.get(technique, BalanceWords(technique, "", "", ""))
        medians = phase_medians(report, technique)
        if math.isnan(gain) and len(medians) > 1:
            gain = _phase_gain(report, technique, medians[-1])
            if math.isfinite(gain):
                said = said._replace(time=f"{said.time} {_PHASES}".strip())
        found.append(Trade(technique, cost, gain, batch_ms(report), spared, held, said))
    return tuple(found)


def phase_medians(report: RunReport, technique: str) -> tuple[float, ...]:
    """Median milliseconds of a batch in each phase of a technique; empty if it has none, or few batches were seen."""
    phases: dict[float, list[float]] = {}
    for phase, value in _by_phase(report, technique):
        phases.setdefault(phase, []).append(value)
    if not phases or len(phases[max(phases)]) < _FEWEST:
        return ()
    return tuple(quantile(phases[phase], 0.5) for phase in sorted(phases))


def full_size(report: RunReport) -> FullSize:
    """What a batch took when the model had its full size, and how much of that is known to be of techniques."""
    medians = {technique: phase_medians(report, technique) for technique in report.techniques}
    phased = next((technique for technique, phases in medians.items() if len(phases) > 1), "")
    costs = [points for name in report.techniques if (points := report.series.get(f"{name}/{TAGS[0]}"))]
    batches = report.totals.get("batches") or math.nan
    begin = -1
    if phased:
        looks = report.series[f"{phased}/phase"]
        begin = next(look.step for look in looks if look.value == looks[-1].value)
        batches *= (looks[-1].step - begin) / (looks[-1].step + 1)
    taken = [_sum(points) - _sum([point for point in points if point.step <= begin], 0.0) for points in costs]
    known = sum(taken) / batches if taken else math.nan
    return FullSize(medians[phased][-1] if phased else batch_ms(report), known, bool(phased))


def _phase_gain(report: RunReport, technique: str, last_ms: float) -> float:
    """Milliseconds per batch, over the whole run, that earlier phases took less than the last one."""
    batches = list(_by_phase(report, technique))
    last = max(phase for phase, _ in batches)
    return sum(last_ms - value for phase, value in batches if phase < last) / len(batches)


def _by_phase(report: RunReport, technique: str) -> Iterator[tuple[float, float]]:
    """Phase and time of each batch of which the phase is certain: it was the same when it was looked at around it."""
    looks = report.series.get(f"{technique}/phase", ())
    batches = report.series.get("efficiency/step_ms", ())
    for before, after in pairwise(looks):
        if before.value == after.value:
            start, end = (bisect_left(batches, look.step, key=lambda point: point.step) for look in (before, after))
            yield from ((before.value, point.value) for point in batches[start:end])


def _sum(points: Sequence[Point], default: float = math.nan) -> float:
    """Of a total that only grows, and may have begun anew; ``default`` if there is none."""
    if not points:
        return default
    values = [point.value for point in points]
    return values[-1] + sum(before for before, after in pairwise(values) if after < before)

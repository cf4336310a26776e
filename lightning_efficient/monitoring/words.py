"""A comparison in plain words: how the runs did, what each technique took and gave, and why."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from lightning_efficient.monitoring.balance import Trade, batch_ms, full_size
from lightning_efficient.monitoring.comparison import Comparison
from lightning_efficient.monitoring.metrics import Target, value_in_words
from lightning_efficient.monitoring.report import RunReport
from lightning_efficient.monitoring.units import human

__all__ = ["run_words", "technique_words", "unaccounted_words"]

_LITTLE = 0.02  # of a batch: differences as small as this are those of the machine
_MOSTLY = 0.5  # of a peak


def run_words(comparison: Comparison, place: int, labels: Sequence[str]) -> list[str]:
    """How the run at ``place`` did against the first one, a sentence each.

    Args:
        comparison: Of all runs.
        place: Of the run, not the first.
        labels: What the runs are called.
    """
    first, name = labels[0], labels[place]
    report, base = comparison.runs[place].report, comparison.baseline.report
    sentences = []
    if comparison.target is not None:
        goal = _goal_words(comparison, comparison.target, first)
        times = comparison.times()
        reached, needed = times[place], times[0]
        if reached is None:
            sentences.append(f"{name} did not come to {goal}.")
        elif needed and math.isfinite(reached / needed):
            sentences.append(
                f"{name} came to {goal} in {human(reached, 's')}, {first} in {human(needed, 's')}: "
                f"{_times(reached / needed)} the time."
            )
    elif comparison.metric:
        sentences.append(f"{first} has no finite {comparison.metric} for {name} to come to.")
    sentences += _batch_words(base, report, first)
    sentences += _memory_words(base, report, first)
    return sentences


def technique_words(trade: Trade) -> str:
    """What came of a technique, then what it took and gave."""
    parts = [trade.words.verdict] if trade.words.verdict else []
    costs, gains = _some(trade.cost_ms), _some(trade.gain_ms)
    if costs or gains:
        both = [f"took {human(trade.cost_ms, 'ms')}"] if costs else []
        both += [f"saved {human(trade.gain_ms, 'ms')}"] if gains else []
        parts.append(f"Per batch it {' and '.join(both)}, {trade.percent:+.1f} % of the batch without it.")
    elif math.isfinite(trade.net_ms):
        parts.append("It took no time that could be measured.")
    spared, held = human(trade.spared_bytes, "bytes"), human(trade.held_bytes, "bytes")
    if _some(trade.spared_bytes):
        parts.append(f"It saved up to {spared} of memory.")
    if _some(trade.held_bytes):
        more = ", which is more than it saved" if trade.held_bytes > trade.spared_bytes > 0 else ""
        parts.append(f"It held up to {held} for itself{more}.")
    return " ".join(parts) or "What it cost and saved was not measured."


def unaccounted_words(base: RunReport, report: RunReport, first: str) -> str:
    """What the techniques' clocks leave open of the difference to a plain run; empty where that is next to nothing.

    Args:
        base: Of the plain run.
        report: Of the other.
        first: Name of the plain run.
    """
    full, plain = full_size(report), batch_ms(base)
    longer = full.batch_ms - plain
    rest = longer - full.cost_ms
    if not rest > _LITTLE * full.batch_ms:
        return ""
    when = "At full size a batch" if full.phased else "A batch"
    return (
        f"{when} took {human(full.batch_ms, 'ms')}, {human(longer, 'ms')} more than a mean one of {first}: "
        f"{human(full.cost_ms, 'ms')} are in the techniques' clocks, {human(rest, 'ms')} in none of them (threads that "
        "read, write and copy on the same cores, the techniques' own Python, and how fast the machine was at the time)."
    )


def _goal_words(comparison: Comparison, target: Target, first: str) -> str:
    final = comparison.baseline.report.metrics[comparison.metric][-1].value
    but = "" if target.which == "final" else f" (its final one is {value_in_words(final)})"
    return f"{first}'s {target.which} {comparison.metric} of {value_in_words(target.value)}{but}"


def _batch_words(base: RunReport, report: RunReport, first: str) -> Iterator[str]:
    ours, theirs = report.totals.get("step_ms_median", math.nan), base.totals.get("step_ms_median", math.nan)
    if math.isfinite(ours) and theirs > 0:
        yield f"A batch took {human(ours, 'ms')} at the median, {_times(ours / theirs)} that of {first}."


def _memory_words(base: RunReport, report: RunReport, first: str) -> Iterator[str]:
    ours, theirs = report.totals.get("peak_memory_bytes", math.nan), base.totals.get("peak_memory_bytes", math.nan)
    if not math.isfinite(ours) or not theirs > 0:
        return
    yield f"Memory peaked at {human(ours, 'bytes')}, {_times(ours / theirs)} that of {first}."
    grown, before = (r.totals.get("peak_memory_growth_bytes", math.nan) for r in (report, base))
    if before > 0 and math.isfinite(grown) and ours - grown > _MOSTLY * ours:
        yield (
            f"{human(ours - grown, 'bytes')} of that were taken before training began, by Python, torch and the data, "
            f"which no technique makes smaller; training itself took {human(grown, 'bytes')} against "
            f"{human(before, 'bytes')}, {_times(grown / before)} as much."
        )


def _times(ratio: float) -> str:
    return f"{ratio:.2f} times"


def _some(value: float) -> bool:
    return math.isfinite(value) and value > 0

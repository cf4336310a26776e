"""Runs side by side, the first one as the baseline: what is compared, in rows, sentences and charts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lightning_efficient.monitoring.charts import Line, Mark, Panel, running_median
from lightning_efficient.monitoring.metrics import NO_RESULT, falls, interest, last_in_words, target_of
from lightning_efficient.monitoring.runs import Run, RunError
from lightning_efficient.monitoring.series import Point
from lightning_efficient.monitoring.units import human

__all__ = ["Comparison", "Row", "time_to"]

_MOST_METRICS = 6
_MOST_NAMED = 12
_TOTALS = (
    ("time of a batch, median", "step_ms_median", "ms"),
    ("CPU time of a batch, median", "step_cpu_ms_median", "ms"),
    ("training time, whole run", "train_seconds", "s"),
    ("CPU time, whole run", "train_cpu_seconds", "s"),
    ("tokens per second", "tokens_per_s", "per_s"),
    ("samples per second", "samples_per_s", "per_s"),
    ("peak memory", "peak_memory_bytes", "bytes"),
    ("peak memory above the start", "peak_memory_growth_bytes", "bytes"),
    ("peak memory of the host process", "peak_host_memory_bytes", "bytes"),
    ("optimizer steps", "optimizer_steps", ""),
    ("parameters at the end", "parameters", ""),
)
_VOLATILE = ("Date",)  # facts that differ between any two runs


def time_to(
    points: Sequence[Point], value: float, clock: Callable[[Point], float], *, falling: bool = True
) -> float | None:
    """When a metric first came to ``value``, interpolated between two finite readings; None if it never did.

    Args:
        points: Of the metric, in order.
        value: To reach.
        clock: Which of the point's clocks.
        falling: Whether smaller values are better.
    """
    sign = 1.0 if falling else -1.0
    before: Point | None = None
    for point in points:
        if math.isfinite(point.value) and sign * point.value <= sign * value:
            if before is None or not math.isfinite(before.value) or before.value == point.value:
                return clock(point)
            share = (before.value - value) / (before.value - point.value)
            return clock(before) + share * (clock(point) - clock(before))
        before = point
    return None


@dataclass(frozen=True)
class Row:
    """One quantity.

    Attributes:
        label: In words.
        cells: Its value in each run.
        changes: Against the first run, or empty; as many as cells.
    """

    label: str
    cells: tuple[str, ...]
    changes: tuple[str, ...]


class Comparison:
    """Of any number of runs, the first of which is the baseline.

    Args:
        runs: At least one.
        metric: By which time is told; None: the baseline's first validation metric, else one of a test, else a loss.
        title: Of the page.

    Attributes:
        metric: The same; empty where no run has any.
        falling: Whether smaller values of it are better: as its name says, else as it went in the baseline.
        target: Its value in the baseline that others are to come to; None where there is none.

    Raises:
        RunError: If there is no run, or the baseline has no such metric.
    """

    def __init__(self, runs: Sequence[Run], metric: str | None = None, title: str = "Runs, side by side") -> None:
        if not runs:
            raise RunError("There is no run to report. Give one folder, or several.")
        self.runs, self.title = tuple(runs), title
        self.names = _distinct([run.name for run in runs])
        known = runs[0].report.metrics
        if metric is not None and metric not in known:
            raise RunError(f"{runs[0].name} has no metric {metric!r}. It has: {', '.join(sorted(known)) or 'none'}.")
        results = (name for name in _by_interest(runs[:1]) if interest(name) < NO_RESULT)
        self.metric = metric or next(results, "")
        points = known.get(self.metric, ())
        self.falling = falls(self.metric, points)
        self.target = target_of(points, falling=self.falling)

    @property
    def baseline(self) -> Run:
        """The first run."""
        return self.runs[0]

    def rows(self) -> list[Row]:
        """What is compared; quantities that no run has are left out, and so are metrics beyond the first six."""
        rows = [self._final(name) for name in self._metrics()[:_MOST_METRICS]]
        if self.target is not None and len(self.runs) > 1:
            goal = f"{self.names[0]}'s {self.target.which} {self.metric}"
            rows += [self._time(f"training time to {goal}", _seconds), self._time(f"CPU time to {goal}", _cpu_seconds)]
        for label, total, unit in _TOTALS:
            rows.append(_compared(label, [run.report.totals.get(total, math.nan) for run in self.runs], unit))
        return [row for row in rows if any(cell != "not measured" for cell in row.cells)]

    def left_out(self) -> str:
        """Which metrics the rows do not show, in a sentence; empty if they show all."""
        names = self._metrics()[_MOST_METRICS:]
        more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
        named = ", ".join(names[:_MOST_NAMED]) + more
        return f"Metrics that the table leaves out: {named}. --metric puts one first." if names else ""

    def times(self, clock: Callable[[Point], float] | None = None) -> list[float | None]:
        """When each run came to :attr:`target`; None: it never did; NaN: not measured."""
        if self.target is None:
            return [math.nan for _ in self.runs]
        value = self.target.value
        return [
            time_to(points, value, clock or _seconds, falling=self.falling) if points else math.nan
            for points in self._points(self.metric)
        ]

    def facts(self) -> tuple[dict[str, tuple[str, ...]], dict[str, str]]:
        """Facts that differ between the runs, and those that are the same in all."""
        names = dict.fromkeys(name for run in self.runs for name in run.report.facts)
        values = {name: tuple(run.report.facts.get(name, "not known") for run in self.runs) for name in names}
        same = {name: cells[0] for name, cells in values.items() if len(set(cells)) == 1}
        differ = {name: cells for name, cells in values.items() if name not in same}
        return {name: differ[name] for name in sorted(differ, key=lambda name: name in _VOLATILE)}, same

    def warnings(self) -> list[str]:
        """What is not whole: runs without a report, and those that were interrupted."""
        found = [note for run in self.runs if run.source for note in run.report.notes]
        return found + [
            f"{name} was interrupted ({run.report.interrupted}); its figures go up to there."
            for name, run in zip(self.names, self.runs, strict=True)
            if run.report.interrupted
        ]

    def notes(self) -> list[str]:
        """How it was measured, of all runs, each sentence once."""
        return list(dict.fromkeys(note for run in self.runs if not run.source for note in run.report.notes))

    def panels(self) -> list[Panel]:
        """The metric and the training loss, against steps and against time; memory; the time of batches."""
        panels, marks = [], self._marks()
        for name in dict.fromkeys([self.metric, "train_loss"]):
            for axis, words in (("step", "against steps"), ("seconds", "against time")):
                panels.append(
                    Panel(f"{name} {words}", self._lines(name, axis), x_label=axis, marks=marks * (axis == "step"))
                )
        memory = [run.report.series.get("efficiency/used_memory_bytes", ()) for run in self.runs]
        if not any(memory):
            memory = [run.report.series.get("efficiency/peak_memory_bytes", ()) for run in self.runs]
        panels.append(Panel("memory in use", self._drawn(memory, "step"), "bytes", marks=marks))
        batches = self._drawn([run.report.series.get("efficiency/step_ms", ()) for run in self.runs], "step")
        smooth = [Line(line.label, line.x, running_median(list(line.y)), look=line.look) for line in batches]
        panels.append(Panel("time of a batch (running median)", smooth, "ms", marks=marks, from_zero=True))
        return [panel for panel in panels if any(len(line.x) > 1 for line in panel.lines)]

    def _marks(self) -> tuple[Mark, ...]:
        """The events of all runs, numbered by run."""
        return tuple(
            Mark(event.step, number, f"{name}, step {event.step:,}, {event.technique}: {event.text}", look)
            for look, (name, run) in enumerate(zip(self.names, self.runs, strict=True))
            for number, event in enumerate(run.report.events, start=1)
        )

    def _metrics(self) -> list[str]:
        return [name for name in dict.fromkeys([self.metric, *_by_interest(self.runs)]) if name]

    def _points(self, metric: str) -> list[Sequence[Point]]:
        return [run.report.metrics.get(metric, ()) for run in self.runs]

    def _final(self, name: str) -> Row:
        found = self._points(name)
        last = [points[-1].value if points else math.nan for points in found]
        cells = tuple(last_in_words(points) if points else "not measured" for points in found)
        changes = tuple(f"{value - last[0]:+.3g}" if math.isfinite(value - last[0]) else "" for value in last[1:])
        return Row(f"final {name}", cells, ("", *changes))

    def _time(self, label: str, clock: Callable[[Point], float]) -> Row:
        times = self.times(clock)
        row = _compared(label, [math.nan if time is None else time for time in times], "s")
        timed = [any(math.isfinite(clock(point)) for point in points) for points in self._points(self.metric)]
        cells = tuple(
            "not reached" if time is None and known else cell
            for time, known, cell in zip(times, timed, row.cells, strict=True)
        )
        return Row(row.label, cells, row.changes)

    def _lines(self, metric: str, axis: str) -> list[Line]:
        style = "thin" if metric == "train_loss" else "marked"
        return self._drawn(self._points(metric), axis, style)

    def _drawn(self, series: Sequence[Sequence[Point]], axis: str, style: str = "line") -> list[Line]:
        lines = []
        for place, points in enumerate(series):
            shown = [(_step(p) if axis == "step" else p.seconds, p.value) for p in points]
            shown = [point for point in shown if all(map(math.isfinite, point))]
            if shown:
                x, y = zip(*shown, strict=True)
                lines.append(Line(self.names[place], x, y, style, look=place))
        return lines


def _by_interest(runs: Sequence[Run]) -> list[str]:
    """The metrics of ``runs``, those first that a reader looks for first."""
    ranks: dict[str, int] = {}
    for run in runs:
        for name in run.report.metrics:
            rank = interest(name, validated=not run.source)
            ranks[name] = min(rank, ranks.get(name, rank))
    return sorted(ranks, key=ranks.__getitem__)


def _compared(label: str, values: Sequence[float], unit: str) -> Row:
    first = values[0]
    changes = [f"x {value / first:.2f}" if first and math.isfinite(value / first) else "" for value in values[1:]]
    return Row(label, tuple(human(value, unit) for value in values), ("", *changes))


def _distinct(names: Sequence[str]) -> tuple[str, ...]:
    """The names, with a number where one comes again."""
    seen: dict[str, int] = {}
    found = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        found.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
    return tuple(found)


def _step(point: Point) -> float:
    return float(point.step)


def _seconds(point: Point) -> float:
    return point.seconds


def _cpu_seconds(point: Point) -> float:
    return point.cpu_seconds

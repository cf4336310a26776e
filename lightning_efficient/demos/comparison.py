"""Two reports side by side: a table for the terminal, and a Markdown file with plots."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from lightning_efficient.monitoring.report import RunReport
from lightning_efficient.monitoring.series import Point
from lightning_efficient.monitoring.units import human

__all__ = ["Comparison", "time_to", "write_comparison"]

METRIC = "val_bits_per_byte"


def time_to(points: Sequence[Point], value: float, clock: Callable[[Point], float]) -> float | None:
    """When a metric first fell to ``value``, interpolated between two readings; None if it never did.

    Args:
        points: Of the metric, in order.
        value: To reach.
        clock: Which of the point's clocks.
    """
    before: Point | None = None
    for point in points:
        if point.value <= value:
            if before is None or before.value <= point.value:
                return clock(point)
            share = (before.value - value) / (before.value - point.value)
            return clock(before) + share * (clock(point) - clock(before))
        before = point
    return None


@dataclass(frozen=True)
class Comparison:
    """A plain run and one with techniques.

    Attributes:
        plain: The first.
        suite: The second.
        names: What they are called.
    """

    plain: RunReport
    suite: RunReport
    names: tuple[str, ...] = ("plain", "suite")

    def rows(self) -> list[tuple[str, str, str, str]]:
        """What is compared, in both runs, and by how much, or by which factor, it changed."""
        target = self.plain.metrics[METRIC][-1].value
        final = self.suite.metrics[METRIC][-1].value
        rows = [("final validation bits per byte", f"{target:.4f}", f"{final:.4f}", f"{final - target:+.4f}")]
        for clock, words in ((_seconds, "training time"), (_cpu_seconds, "CPU time")):
            times = [time_to(run.metrics[METRIC], target, clock) for run in self.runs]
            shown = [human(t, "s") if t is not None else "not reached" for t in times]
            rows.append((f"{words} to plain's final value", shown[0], shown[1], _ratio(times[1], times[0])))
        for words, tag, unit in (
            ("training time, whole run", "train_seconds", "s"),
            ("CPU time, whole run", "train_cpu_seconds", "s"),
            ("peak memory of the process", "peak_memory_bytes", "bytes"),
            ("parameters at the end", "parameters", ""),
        ):
            values = [run.totals.get(tag, math.nan) for run in self.runs]
            rows.append((words, human(values[0], unit), human(values[1], unit), _ratio(values[1], values[0])))
        saved, kept = (self.suite.series.get(f"activations/{name}_bytes") for name in ("saved", "kept"))
        if saved and kept:  # the same tensors, as they are and as they are kept
            values = [saved[-1].value, kept[-1].value]
            words = "kept from forward to backward, at the end"
            rows.append((words, human(values[0], "bytes"), human(values[1], "bytes"), _ratio(values[1], values[0])))
        return rows

    @property
    def runs(self) -> tuple[RunReport, RunReport]:
        return self.plain, self.suite

    def table(self) -> str:
        """For a terminal."""
        lines = [("", *self.names, "change"), *self.rows()]
        widths = [max(len(line[i]) for line in lines) for i in range(4)]
        text = [
            "  ".join(
                [line[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(line[1:], widths[1:], strict=True))]
            )
            for line in lines
        ]
        text.insert(1, "-" * len(text[0]))
        if self.suite.events:
            text += ["", "What the techniques did:"]
            text += [f"  step {event.step:>5}  {event.technique}: {event.text}" for event in self.suite.events]
        return "\n".join(text)

    def markdown(self, plot: str) -> str:
        """For a file."""
        head = ["", *self.names, "change"]
        lines = [
            "# The demo task, plain and with the suite",
            "",
            f"A byte-level language model on the standard library's sources; {human(self.plain.totals['parameters'])} "
            "parameters. Every figure is measured in these two runs; times are of training, without validation.",
            "",
            f"| {' | '.join(head)} |",
            f"|{'---|' * 4}",
            *(f"| {' | '.join(row)} |" for row in self.rows()),
            "",
            f"![Validation bits per byte against step and time]({plot})",
            "",
        ]
        if self.suite.events:
            lines += ["| step | technique | what happened |", "|---|---|---|"]
            lines += [f"| {event.step} | {event.technique} | {event.text} |" for event in self.suite.events]
            lines.append("")
        lines += [f"- [{name}, in full]({name}/efficiency_report.md)" for name in self.names]
        facts = {key: value for key, value in self.plain.facts.items() if self.suite.facts.get(key) == value}
        lines += ["", "| both runs | |", "|---|---|", *(f"| {key} | {value} |" for key, value in facts.items()), ""]
        return "\n".join(lines)


def write_comparison(folder: Path, comparison: Comparison) -> Path:
    """Write ``comparison.md`` and ``comparison.png`` into ``folder``."""
    from lightning_efficient.monitoring.panels import Line, Panel, draw

    panels = []
    for axis, title, clock in (
        ("step", "Validation bits per byte", _step),
        ("seconds", "Against training time", _seconds),
    ):
        lines = [
            Line(name, [clock(p) for p in run.metrics[METRIC]], [p.value for p in run.metrics[METRIC]], "marked")
            for name, run in zip(comparison.names, comparison.runs, strict=True)
        ]
        panels.append(Panel(title, lines, x_label=axis))
    draw(panels, folder / "comparison.png")
    path = folder / "comparison.md"
    path.write_text(comparison.markdown("comparison.png"), encoding="utf-8")
    return path


def _step(point: Point) -> float:
    return float(point.step)


def _seconds(point: Point) -> float:
    return point.seconds


def _cpu_seconds(point: Point) -> float:
    return point.cpu_seconds


def _ratio(new: float | None, old: float | None) -> str:
    return "-" if new is None or not old or not math.isfinite(new / old) else f"x {new / old:.2f}"

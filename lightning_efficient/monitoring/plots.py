"""Which plots a report has, and what is in each."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from pathlib import Path

from lightning_efficient.monitoring.balance import is_balance
from lightning_efficient.monitoring.charts import Line, Mark, Panel
from lightning_efficient.monitoring.layout import chart_groups
from lightning_efficient.monitoring.panels import draw
from lightning_efficient.monitoring.report import RunReport
from lightning_efficient.monitoring.series import Point
from lightning_efficient.monitoring.units import label_of, technique_of, unit_of

__all__ = ["save_plots"]

_MOST_METRICS = 6


def save_plots(report: RunReport, folder: Path) -> dict[str, str]:
    """Draw every plot for which there is data.

    Returns:
        Section (``loss``, ``memory``, ``step_time`` or the technique) to the name of the file in ``folder``.
    """
    sections = {
        "loss": _metric_panels(report),
        "memory": _memory_panels(report),
        "step_time": _time_panels(report),
    } | {technique: _technique_panels(report, technique) for technique in report.techniques}
    names = {}
    for section, panels in sections.items():
        panels = [panel for panel in panels if any(line.x for line in panel.lines)]
        if panels:
            names[section] = f"efficiency_{section}.png"
            draw(panels, folder / names[section])
    return names


def _metric_panels(report: RunReport) -> list[Panel]:
    """Losses together, since they share a scale; every other validation metric by itself."""
    losses = [name for name in report.metrics if "loss" in name]
    others = [name for name in report.metrics if name not in losses]
    groups = [("Loss", losses)] + [(name, [name]) for name in others]
    panels = []
    for title, names in groups[:_MOST_METRICS]:
        for axis in ("step", "seconds"):
            lines = []
            for name in names[:_MOST_METRICS]:
                points = report.metrics[name]
                lines.append(_line(name, points, axis, "thin" if name == "train_loss" else "marked"))
            panels.append(Panel(title, lines, x_label=axis, marks=_marks(report, axis)))
    return panels


def _memory_panels(report: RunReport) -> list[Panel]:
    panels = []
    for title, name in (("Memory", "memory"), ("Memory of the host process", "host_memory")):
        labels = {f"used_{name}_growth_bytes": "in use", f"peak_{name}_growth_bytes": "peak so far"}
        panels.append(_panel(report, f"{title} above the start of the fit", labels, "bytes"))
    held = {"parameter_bytes": "parameters", "gradient_bytes": "gradients", "optimizer_state_bytes": "optimizer state"}
    return [*panels, _panel(report, "What the model holds", held, "bytes")]


def _time_panels(report: RunReport) -> list[Panel]:
    clouds = {
        "step_ms": "Time of a batch",
        "step_cpu_ms": "CPU time of a batch",
        "data_wait_ms": "Time between batches",
    }
    panels = [_panel(report, title, {name: title}, "ms", style="cloud") for name, title in clouds.items()]
    unit = report.batch_unit
    return [*panels, _panel(report, f"{unit.capitalize()} per second", {f"{unit}_per_s": unit}, "per_s")]


def _technique_panels(report: RunReport, technique: str) -> list[Panel]:
    tags = [tag for tag in report.series if technique_of(tag) == technique and not is_balance(tag)]
    panels = []
    for title, members in chart_groups(tags).get(technique, {}).items():
        # The axis names the unit, so that the title need not.
        labels = {tag.partition("/")[2]: label_of(tag) for tag in members}
        short = title.partition(" (")[0] if len(members) > 1 else label_of(members[0])
        panels.append(_panel(report, short.capitalize(), labels, unit_of(members[0]), technique=technique))
    return [panel for panel in panels if any(any(line.y) for line in panel.lines)]  # what is 0 throughout shows nothing


def _panel(
    report: RunReport,
    title: str,
    labels: Mapping[str, str],
    unit: str,
    *,
    technique: str = "efficiency",
    style: str = "line",
) -> Panel:
    """Quantities of one technique, by name, against the step."""
    series = {label: report.series.get(f"{technique}/{name}", ()) for name, label in labels.items()}
    lines = [_line(label, points, "step", style) for label, points in series.items() if points]
    positive = all(y >= 0 for line in lines for y in line.y)
    return Panel(title, lines, unit, marks=_marks(report, "step"), from_zero=positive)


def _line(label: str, points: Sequence[Point], axis: str, style: str) -> Line:
    shown = [point for point in points if math.isfinite(point.value)]
    x = [point.step if axis == "step" else point.seconds for point in shown]
    return Line(label, x, [point.value for point in shown], style)


def _marks(report: RunReport, axis: str) -> list[Mark]:
    """The events, numbered as in the report's table."""
    clock = report.series.get("efficiency/step_ms", ())
    marks = []
    for number, event in enumerate(report.events, start=1):
        if axis == "step":
            marks.append(Mark(event.step, number))
        elif clock:
            index = min(bisect_left(clock, event.step, key=lambda point: point.step), len(clock) - 1)
            marks.append(Mark(clock[index].seconds, number))
    return marks

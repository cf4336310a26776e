"""Small multiples: a figure of panels, each a few lines over one x-axis, drawn without any global state."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lightning_efficient.monitoring.charts import Line, Mark, Panel, running_median, scale
from lightning_efficient.monitoring.series import quantile

__all__ = ["draw"]

# Okabe and Ito's colours: told apart with every common form of colour blindness, and in grey print.
# Wide below and thin or broken above: curves that lie upon one another are both seen.
_LOOKS: tuple[dict[str, Any], ...] = (
    {"color": "#0072B2", "linewidth": 2.6},
    {"color": "#D55E00", "linewidth": 1.6, "linestyle": (0, (5, 1.5))},
    {"color": "#009E73", "linewidth": 1.6, "linestyle": (0, (8, 2, 2, 2))},
    {"color": "#CC79A7", "linewidth": 1.6, "linestyle": (0, (2, 1.5))},
    {"color": "#E69F00", "linewidth": 1.6, "linestyle": "-"},
    {"color": "#56B4E9", "linewidth": 1.6, "linestyle": "-"},
)
_INK, _GRID = "#333333", "#e3e3e3"
_FEW_VALUES = 12


def draw(panels: Sequence[Panel], path: Path, *, columns: int = 2) -> None:
    """Draw ``panels`` row by row into the PNG file ``path``."""
    columns = min(columns, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(5.4 * columns, 3.4 * rows), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)  # type: ignore[union-attr, call-arg]
    grid: Any = figure.subplots(rows, columns, squeeze=False)
    for axes, panel in zip(grid.flat, panels, strict=False):
        _draw_panel(axes, panel)
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    figure.savefig(path, dpi=120)


def _draw_panel(axes: Axes, panel: Panel) -> None:
    y_scale, y_unit = scale([y for line in panel.lines for y in line.y], panel.unit)
    x_scale, x_unit = 1.0, "step"
    if panel.x_label == "seconds":
        x_scale, x_unit = scale([x for line in panel.lines for x in line.x], "s")
        x_unit = f"training time ({x_unit})"
    for place, line in enumerate(panel.lines):
        look = _LOOKS[(place if line.look is None else line.look) % len(_LOOKS)]
        if len(panel.lines) == 1:
            look = {"color": look["color"], "linewidth": 1.6}
        _draw_line(axes, [x / x_scale for x in line.x], [y / y_scale for y in line.y], line, look)
    _style(axes, panel.title)
    hidden = _limit_y(axes, [y / y_scale for line in panel.lines for y in line.y], y_unit, panel)
    axes.set_ylabel(y_unit, color=_INK, fontsize=9)
    if panel.x_label == "step":
        axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_xlabel(x_unit + hidden, color=_INK, fontsize=9)
    _draw_marks(axes, [Mark(mark.x / x_scale, mark.number) for mark in panel.marks])
    if len(panel.lines) > 1:
        axes.legend(
            loc="upper left",
            bbox_to_anchor=(-0.02, -0.19),
            ncols=3 if max(len(line.label) for line in panel.lines) < 20 else 2,
            frameon=False,
            fontsize=8.5,
            labelcolor=_INK,
            handlelength=1.4,
            columnspacing=1.2,
        )


def _draw_line(axes: Axes, x: list[float], y: list[float], line: Line, look: dict[str, Any]) -> None:
    if line.style == "cloud":
        axes.plot(x, y, ".", color=look["color"], alpha=0.4, markersize=4, markeredgewidth=0)
        axes.plot(x, running_median(y), color=look["color"], linewidth=1.6, label=line.label)
    elif len(x) < 3 or (line.style == "marked" and len(x) <= 40):
        axes.plot(x, y, "o-", color=look["color"], linewidth=1.4, markersize=4, label=line.label)
    elif line.style in ("marked", "thin"):
        axes.plot(x, y, "-", color=look["color"], linewidth=1.0 if line.style == "thin" else 1.8, label=line.label)
    else:
        # What takes few values changes at once: a slope between two readings would tell of times that never were.
        drawn = "steps-post" if len(set(y)) <= _FEW_VALUES < len(y) else "default"
        axes.plot(x, y, label=line.label, drawstyle=drawn, **look)


def _style(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold", color=_INK, pad=8)
    axes.grid(True, color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=_INK, labelsize=8.5, length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color("#999999")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=7, steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 2.5, 5, 10]))
    axes.ticklabel_format(useOffset=False, style="plain")


def _limit_y(axes: Axes, values: list[float], unit: str, panel: Panel) -> str:
    """Leave room for the marks, and keep a few outliers from flattening all the rest; says so if it does."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return ""
    low, high, hidden = min(finite), max(finite), ""
    if any(line.style == "cloud" for line in panel.lines):
        top = 1.5 * quantile(finite, 0.98)
        beyond = sum(value > top for value in finite)
        if beyond and top > 0:
            hidden = f"   ({beyond} above the axis, up to {high:,.0f} {unit})"
            high = top
    if panel.from_zero:
        low = min(low, 0.0)
    room = (high - low) or abs(high) or 1.0
    axes.set_ylim(low if panel.from_zero else low - 0.06 * room, high + (0.18 if panel.marks else 0.08) * room)
    return hidden


def _draw_marks(axes: Axes, marks: Sequence[Mark]) -> None:
    """Dashed lines, with the numbers of those that lie closer together than their labels are wide joined."""
    low, high = axes.get_xlim()
    alpha = 1.0 if len(marks) <= 12 else 0.4
    groups: list[list[Mark]] = []
    for mark in sorted(marks, key=lambda mark: (mark.x, mark.number)):
        axes.axvline(mark.x, color="#777777", linewidth=0.9, linestyle=(0, (4, 3)), alpha=alpha, zorder=1)
        if groups and mark.x - groups[-1][-1].x < 0.06 * (high - low):
            groups[-1].append(mark)
        else:
            groups.append([mark])
    for group in groups:
        numbers = sorted(mark.number for mark in group)
        text = str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]}\N{EN DASH}{numbers[-1]}"
        axes.annotate(
            text,
            (sum(mark.x for mark in group) / len(group), 0.94),
            xycoords=("data", "axes fraction"),
            ha="center",
            va="center",
            fontsize=8,
            color=_INK,
            bbox={"boxstyle": "round,pad=0.25", "facecolor": "white", "edgecolor": "#999999", "linewidth": 0.7},
        )

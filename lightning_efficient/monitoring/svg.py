"""Charts as SVG that stands in a page of HTML: its colours are the page's, its points say their values when hovered."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from html import escape

from lightning_efficient.monitoring.charts import Line, Panel, scale
from lightning_efficient.monitoring.series import quantile
from lightning_efficient.monitoring.units import human

__all__ = ["LOOKS", "chart"]

LOOKS = 6
"""Colours that the page defines, as classes ``c0`` to ``c5``."""
_WIDTH, _HEIGHT = 420, 250  # narrow: on a phone a chart is as wide as the screen, and its text must stay legible
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 10, 22, 40
_MOST_POINTS, _MOST_TITLES = 300, 40
_STEPS = (1.0, 2.0, 2.5, 5.0, 10.0)


def chart(panel: Panel) -> str:
    """The panel as an ``<svg>``, without its title."""
    y_by, y_unit = scale([y for line in panel.lines for y in line.y], panel.unit)
    x_by, x_unit = 1.0, "step"
    if panel.x_label == "seconds":
        x_by, x_unit = scale([x for line in panel.lines for x in line.x], "s")
        x_unit = f"training time ({x_unit})"
    lines = [_scaled(line, x_by, y_by) for line in panel.lines]
    x_low, x_high = _range([x for line in lines for x in line.x], room=0.0)
    y_low, y_high = _y_range(lines, from_zero=panel.from_zero)

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_low) / (x_high - x_low)
        up = (min(max(y, y_low), y_high) - y_low) / (y_high - y_low)
        return _LEFT + across * (_WIDTH - _LEFT - _RIGHT), _HEIGHT - _BOTTOM - up * (_HEIGHT - _TOP - _BOTTOM)

    parts = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(panel.title)}">']
    for tick in _ticks(y_low, y_high, 5):
        _, y = place(x_low, tick)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{_number(tick)}</text>')
    for tick in _ticks(x_low, x_high, 5):
        x, _ = place(tick, y_low)
        parts.append(f'<text x="{x:.1f}" y="{_HEIGHT - _BOTTOM + 17}" text-anchor="middle">{_number(tick)}</text>')
    parts.append(f'<text x="{_WIDTH - _RIGHT}" y="{_HEIGHT - 4}" text-anchor="end" class="unit">{x_unit}</text>')
    if y_unit:
        parts.append(f'<text x="4" y="12" class="unit">{y_unit}</text>')
    for mark in panel.marks:
        x, _ = place(min(max(mark.x, x_low), x_high), y_low)
        path = f"M{x:.1f} {_TOP}V{_HEIGHT - _BOTTOM}"
        look = "" if mark.look is None else f" c{mark.look % LOOKS}"
        # A wide invisible line, for the pointer to find.
        parts.append(
            f'<g class="mark{look}"><title>{escape(mark.text)}</title><path d="{path}"/><path d="{path}"/></g>'
        )
    for number, (line, given) in enumerate(zip(lines, panel.lines, strict=True)):
        parts += _curve(line, given, number if line.look is None else line.look, panel, place)
    return "".join([*parts, "</svg>"])


def _curve(line: Line, given: Line, look: int, panel: Panel, place: object) -> Iterator[str]:
    """The line, and at some of its points a circle that says where it is."""
    at = [place(x, y) for x, y in zip(line.x, line.y, strict=True)]  # type: ignore[operator]
    every = max(1, math.ceil(len(at) / _MOST_POINTS))
    kept = [*at[:-1:every], at[-1]]
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in kept)
    yield f'<polyline class="line c{look % LOOKS}" points="{points}"/>'
    told = max(1, math.ceil(len(at) / _MOST_TITLES))
    for number in dict.fromkeys([*range(0, len(at), told), len(at) - 1]):
        x, y = at[number]
        where = f"step {given.x[number]:,.0f}" if panel.x_label == "step" else human(given.x[number], "s")
        words = escape(f"{line.label}, {where}: {_value(given.y[number], panel.unit)}")
        seen = " seen" if line.style == "marked" and len(at) <= _MOST_TITLES else ""
        yield f'<circle class="c{look % LOOKS}{seen}" cx="{x:.1f}" cy="{y:.1f}" r="6"><title>{words}</title></circle>'


def _value(value: float, unit: str) -> str:
    return human(value, unit) if unit else f"{value:.4g}"


def _scaled(line: Line, x_by: float, y_by: float) -> Line:
    return Line(line.label, [x / x_by for x in line.x], [y / y_by for y in line.y], line.style, line.look)


def _range(values: Sequence[float], *, room: float) -> tuple[float, float]:
    low, high = min(values), max(values)
    extra = room * (high - low) or (0.0 if high > low else abs(high) or 1.0)
    return low - extra, high + extra


def _y_range(lines: Sequence[Line], *, from_zero: bool) -> tuple[float, float]:
    """Of all values, but for a few outliers of noisy ones."""
    values = [y for line in lines for y in line.y]
    if from_zero:
        return min(0.0, *values), 1.08 * min(max(values), 1.5 * quantile(values, 0.98)) or 1.0
    return _range(values, room=0.06)


def _ticks(low: float, high: float, most: int) -> list[float]:
    """Round numbers between both, at most one more than ``most``."""
    raw = (high - low) / most
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in _STEPS if factor * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [index * step for index in range(first, math.floor(high / step + 1e-9) + 1)]


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 or float(value).is_integer() else f"{value:.4g}"

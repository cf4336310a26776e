"""What a chart shows, in the units that a person reads; drawn by :mod:`.panels` (PNG) and :mod:`.svg`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from lightning_efficient.monitoring.series import quantile

__all__ = ["Line", "Mark", "Panel", "running_median", "scale"]

# Unit to (from which value on, divisor, name), largest first.
_SCALES: dict[str, tuple[tuple[float, float, str], ...]] = {
    "bytes": tuple(
        (1024**power, 1024**power, f"{letter}iB") for power, letter in zip((4, 3, 2, 1), "TGMK", strict=True)
    ),
    "ms": ((300_000, 60_000, "min"), (5000, 1000, "s")),
    "s": ((3 * 3600, 3600, "h"), (300, 60, "min"), (0, 1, "s")),
    "per_s": ((1e6, 1e6, "million per second"), (1e4, 1e3, "thousand per second"), (0, 1, "per second")),
    "": ((1e9, 1e9, "billion"), (1e6, 1e6, "million"), (1e4, 1e3, "thousand"), (0, 1, "")),
}


@dataclass(frozen=True)
class Line:
    """One curve: its name for the legend, and its points.

    Attributes:
        label: Name.
        x: Steps, or seconds.
        y: Values in the unit of the panel.
        style: ``line``; ``thin`` for a noisy one; ``marked`` for points that matter each, if they are few; ``cloud``
            for many noisy points, with their running median on top.
        look: Which colour, for curves that belong together in several charts; None: by its place in the panel.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    style: str = "line"
    look: int | None = None


@dataclass(frozen=True)
class Mark:
    """A dashed line at an event, or at several that are too close to tell apart.

    Attributes:
        x: Where.
        number: Of the event.
        text: What happened.
        look: Colour of the curve that it belongs to; None: of none.
    """

    x: float
    number: int
    text: str = ""
    look: int | None = None


@dataclass(frozen=True)
class Panel:
    """One pair of axes.

    Attributes:
        title: What is shown.
        lines: The curves, at most six.
        unit: Of the values, as of :func:`~lightning_efficient.monitoring.units.unit_of`.
        x_label: ``step``, or ``seconds``, which is shown in the unit that fits.
        marks: Events.
        from_zero: Whether the y-axis starts at 0.
    """

    title: str
    lines: Sequence[Line]
    unit: str = ""
    x_label: str = "step"
    marks: Sequence[Mark] = field(default=())
    from_zero: bool = False


def scale(values: Sequence[float], unit: str) -> tuple[float, str]:
    """What to divide ``values`` by, and the name of the unit that they are in then."""
    largest = max((abs(value) for value in values if math.isfinite(value)), default=0.0)
    for start, divisor, name in _SCALES.get(unit, ()):
        if largest >= start:
            return divisor, name
    return 1.0, unit


def running_median(values: list[float]) -> list[float]:
    """Each value as the median of those around it."""
    half = max(2, len(values) // 60)
    return [quantile(values[max(0, i - half) : i + half + 1], 0.5) for i in range(len(values))]

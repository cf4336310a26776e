"""When to go to the next phase: whichever of several conditions holds first."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

__all__ = ["LossTracker", "Until", "parse_until"]


@dataclass(frozen=True)
class Until:
    """A phase lasts until one of these holds; ``step`` or ``fraction`` always caps it.

    Attributes:
        step: Optimizer steps since the start of the run.
        fraction: Of the optimizer steps of the whole run, in (0, 1).
        loss_below: The smoothed loss (or the monitored metric) falls under it.
        plateau: Optimizer steps without a new minimum of the smoothed loss.
        correlation_below: The gradients of more than half of the neighbouring layers correlate less than this, three
            readings in a row ([Yang 2021] §3.3).
    """

    step: int | None = None
    fraction: float | None = None
    loss_below: float | None = None
    plateau: int | None = None
    correlation_below: float | None = None

    def cap(self, total_steps: float) -> int:
        """The step at which the phase ends at the latest.

        Args:
            total_steps: Optimizer steps of the whole run; infinite where it has no end.

        Raises:
            ValueError: If a fraction is asked of a run without end.
        """
        caps = [] if self.step is None else [self.step]
        if self.fraction is not None:
            if not math.isfinite(total_steps):
                raise ValueError(
                    f"until={{fraction: {self.fraction}}} needs a run of known length, but neither max_steps nor "
                    "max_epochs is set. Set one, or give until={step: N}."
                )
            caps.append(round(self.fraction * total_steps))
        return min(caps)


def parse_until(value: Any, *, where: str, default_fraction: float) -> Until:
    """Read ``until`` as a user writes it.

    Args:
        value: An int (a step), a float below one (a fraction of the run), a mapping of :class:`Until`'s fields, or
            None.
        where: Name of the argument, for errors.
        default_fraction: The cap where the mapping has neither ``step`` nor ``fraction``.

    Raises:
        ValueError: If it is none of these or out of range.
    """
    known = [field.name for field in fields(Until)]
    if isinstance(value, bool) or not isinstance(value, int | float | Mapping | type(None)):
        raise ValueError(f"{where}={value!r}: expected a step (int), a fraction (float < 1) or a mapping of {known}.")
    if value is None:
        return Until(fraction=default_fraction)
    if isinstance(value, int | float):
        value = {"step": value} if isinstance(value, int) else {"fraction": value}
    unknown = sorted(set(value) - set(known))
    if unknown:
        raise ValueError(f"{where} has unknown keys {unknown}; allowed are {known}.")
    settings = {key: entry for key, entry in value.items() if entry is not None}
    for key, entry in settings.items():
        if isinstance(entry, bool) or not isinstance(entry, int | float) or not math.isfinite(entry):
            raise ValueError(f"{where}.{key}={entry!r}: expected a finite number.")
        if key in ("step", "plateau") and (entry != int(entry) or entry < 1):
            raise ValueError(f"{where}.{key}={entry!r}: expected a whole number of steps, at least 1.")
        if key == "fraction" and not 0 < entry < 1:
            raise ValueError(f"{where}.fraction={entry!r}: expected a number between 0 and 1, e.g. 0.125.")
        if key == "correlation_below" and not -1 < entry <= 1:
            raise ValueError(f"{where}.correlation_below={entry!r}: expected a correlation in (-1, 1].")
    for key in ("step", "plateau"):
        if key in settings:
            settings[key] = int(settings[key])
    if "step" not in settings and "fraction" not in settings:
        settings["fraction"] = default_fraction
    return Until(**settings)


class LossTracker:
    """The loss, smoothed, and how long ago it was lowest; plain numbers, saved and restored exactly.

    Args:
        halflife: Readings after which a value counts half.
    """

    def __init__(self, halflife: float = 10.0) -> None:
        self._decay = 0.5 ** (1.0 / halflife)
        self._sum = 0.0
        self._weight = 0.0
        self.best = math.inf
        self.best_step = 0

    @property
    def value(self) -> float:
        """The smoothed loss; NaN before the first reading."""
        return self._sum / self._weight if self._weight else math.nan

    def update(self, loss: float, step: int) -> None:
        """Add a reading; one that is not finite is left out.

        Args:
            loss: Agreed on by all ranks.
            step: Optimizer steps so far.
        """
        if not math.isfinite(loss):
            return
        self._sum = self._decay * self._sum + (1 - self._decay) * loss
        self._weight = self._decay * self._weight + (1 - self._decay)
        if self.value < self.best:
            self.best, self.best_step = self.value, step

    def restart(self, step: int) -> None:
        """Forget the minimum, at the beginning of a phase."""
        self.best, self.best_step = math.inf, step

    def state_dict(self) -> dict[str, float]:
        return {"sum": self._sum, "weight": self._weight, "best": self.best, "best_step": self.best_step}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        self._sum, self._weight = state["sum"], state["weight"]
        self.best, self.best_step = state["best"], int(state["best_step"])

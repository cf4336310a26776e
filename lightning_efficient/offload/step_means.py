"""What a step costs on average, from totals that only grow."""

from __future__ import annotations

from collections.abc import Callable, Mapping

__all__ = ["Increase", "StepMeans"]


class Increase:
    """What came to a total since it was last asked for.

    Args:
        total: One that is smaller than before was begun anew.
    """

    def __init__(self, total: Callable[[], float]) -> None:
        self._total, self._before = total, total()

    def __call__(self) -> float:
        now, before = self._total(), self._before
        self._before = now
        return now - before if before <= now else now


class StepMeans:
    """Means over the steps between one look and the next.

    Args:
        totals: Asked for what has been counted since the beginning, by name. One that is smaller than before was begun
            anew.
    """

    def __init__(self, totals: Callable[[], Mapping[str, float]]) -> None:
        self._totals = totals
        self._begun = 0
        self._looked: tuple[int, Mapping[str, float]] = (1, {})  # steps that had begun then, the totals then
        self._means: dict[str, float] | None = None

    def step(self) -> None:
        """A step begins; what was counted before the first one was for no step."""
        if not self._begun:
            self._looked = 1, dict(self._totals())
        self._begun += 1

    def look(self) -> None:
        """As a step begins: :meth:`means` is of the steps since the last look, until the next one."""
        if self._begun > self._looked[0]:
            self._means = self._since_look(self._begun - self._looked[0])
            self._looked = self._begun, dict(self._totals())

    def means(self) -> dict[str, float]:
        """By the names of the totals; before there was a look, of all steps."""
        return dict(self._means) if self._means is not None else self._since_look(max(self._begun, 1))

    def _since_look(self, steps: int) -> dict[str, float]:
        before = self._looked[1]
        totals = self._totals()
        return {
            name: (now - before.get(name, 0.0) * (before.get(name, 0.0) <= now)) / steps for name, now in totals.items()
        }

"""How long an operation stays in high bits at first, and whether low ones pay for it at all; both by measurement.

(What is learnt then, for the limits of signs, is in :mod:`~lightning_efficient.precision.signs`.)
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

__all__ = ["Learning"]

_SETTLED = 10  # batches in which no limit grew
_AT_LEAST, _AT_MOST = 10, 200
_MEASURED = 8  # batches, then it is left alone if low bits clearly take longer; the first, memory still new, not timed
_CLEARLY = 1.2  # times as long; whoever is nearer is timed until it has learnt


class Learning:
    """Of one operation.

    Attributes:
        batches: That it was computed in.
        low_pays: Whether low bits take less time than high ones; None: it is not known, or nobody asks.

    Args:
        until: Batches to learn in; None: until the limits settle.
        timed: Whether the time that low bits take is compared.
    """

    def __init__(self, until: int | None = 0, *, timed: bool = False) -> None:
        self.batches = self.settled = 0
        self.low_pays: bool | None = None
        self._until, self._timed = until, timed
        self._at: int | None = None
        self._limits: tuple[float, ...] = ()
        self._ratios: list[float] = []
        self._low = self._high = 0.0

    @property
    def done(self) -> bool:
        """Whether it may compute in low bits, or never will."""
        if self.low_pays is False:
            return True
        if self._until is not None:
            return self.batches > self._until
        return self.batches > _AT_LEAST and (self.settled >= _SETTLED or self.batches > _AT_MOST)

    def begin(self, batch: int, limits: tuple[float, ...]) -> None:
        """The operation is computed in ``batch``, maybe not for the first time; ``limits`` are those learnt so far."""
        if batch == self._at or self.done:
            return
        self._at = batch
        self.batches += 1
        grew = not self._limits or any(new > old for new, old in zip(limits, self._limits, strict=True))
        self.settled = 0 if grew else self.settled + 1
        self._limits = limits
        if self._timed and self._low and self._high and self.batches > 2:
            self._ratios.append(self._low / self._high)
        self._low = self._high = 0.0
        if not self._ratios or not (self.done or self.batches > _MEASURED):
            return
        ratio = statistics.median(self._ratios)
        if self.done or ratio > _CLEARLY:
            self.low_pays = ratio <= 1
            self._ratios = []

    def untimed(self) -> None:
        """Times would be those of launches, not of work."""
        self._timed = False

    def took(self, low: float, high: float) -> None:
        """Seconds of one product in low bits, with all that guards it, and in high ones."""
        if self._timed:  # else they would be in checkpoints for nothing, and differ between equal runs
            self._low += low
            self._high += high

    def agreed(self) -> list[float]:
        """What ranks agree on: the largest number of each."""
        return [self.batches, -self.settled, -1.0 if self.low_pays is None else float(not self.low_pays)]

    def agree(self, values: list[float]) -> None:
        """What :meth:`agreed` returned, the largest of all ranks."""
        batches, settled, slow = values
        self.batches, self.settled = int(batches), int(-settled)
        self.low_pays = None if slow < 0 else not slow

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers."""
        return {
            "batches": self.batches, "settled": self.settled, "low_pays": self.low_pays,
            "limits": list(self._limits), "ratios": list(self._ratios), "low": self._low, "high": self._high,
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """What :meth:`state_dict` returned."""
        self.batches, self.settled, self.low_pays = state["batches"], state["settled"], state["low_pays"]
        self._limits, self._ratios = tuple(state["limits"]), list(state["ratios"])
        self._low, self._high = state["low"], state["high"]
        self._at = None

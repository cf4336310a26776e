"""How near steps come to what they cannot be shorter than: the largest of computing, the disk's and the host's work."""

from __future__ import annotations

import time
from dataclasses import dataclass

__all__ = ["LimitMeter", "Work"]

_WARM_UP = 2  # steps that are not counted: the first ones reserve, learn an order, compile


@dataclass(frozen=True)
class Work:
    """Totals since the beginning.

    Attributes:
        disk_seconds: In which the disk was busy.
        waited_seconds: In which computing waited for transfers, or for steps on the host.
        host_seconds: In which the host stepped for a device.
    """

    disk_seconds: float
    waited_seconds: float
    host_seconds: float = 0.0


class LimitMeter:
    """Counts steps, and what was done in them."""

    def __init__(self) -> None:
        self._steps = 0
        self._begun: tuple[float, Work] | None = None
        self._now: tuple[float, Work] | None = None

    def step(self, work: Work) -> None:
        """A step begins, with these totals."""
        self._now = time.perf_counter(), work
        if self._steps == _WARM_UP:
            self._begun = self._now
        self._steps += 1

    def measurements(self) -> dict[str, float]:
        """Means over the steps that have ended, but for the first ones; empty before there are any.

        ``fraction_of_limit``: the largest of the time without waiting, the disk's and that of steps on the host, over
        the time of the step.
        ``overlap``: the part of the disk's work that nobody waited for.
        """
        if self._begun is None or self._now is None or self._steps <= _WARM_UP + 1:
            return {}
        (began, before), (now, after) = self._begun, self._now
        steps = self._steps - 1 - _WARM_UP
        step = (now - began) / steps
        disk = (after.disk_seconds - before.disk_seconds) / steps
        host = (after.host_seconds - before.host_seconds) / steps
        waited = min((after.waited_seconds - before.waited_seconds) / steps, step)
        return {
            "step_ms": step * 1e3,
            "disk_busy_ms": disk * 1e3,
            "waited_ms": waited * 1e3,
            **({"host_step_ms": host * 1e3} if host else {}),
            "fraction_of_limit": min(1.0, max(step - waited, disk, host) / step),
            "overlap": max(0.0, 1 - waited / disk) if disk else 1.0,
        }

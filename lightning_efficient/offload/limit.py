"""How near steps come to what they cannot be shorter than: the largest of computing, the disk's and the host's work."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

__all__ = ["LimitMeter", "Work"]

_WARM_UP = 2  # steps that are not counted: the first ones reserve, learn an order, compile


@dataclass(frozen=True)
class Work:
    """Totals since the beginning.

    Attributes:
        disk_seconds: In which the disk was busy.
        waited_seconds: In which computing waited for transfers, or for steps on the host.
        host_seconds: In which the host stepped for a device.
        disk_bytes: That the disk moved, in both directions together.
    """

    disk_seconds: float
    waited_seconds: float
    host_seconds: float = 0.0
    disk_bytes: float = 0.0


class LimitMeter:
    """Counts steps, and what was done in them.

    Attributes:
        disk_bytes_per_second: What the disk can move, in both directions together, where that was measured; None: what
            it does is taken for what it can.

    Args:
        work: Asked for the totals.
        behind: Whether a device computes behind the host's back, which so does not see how long it waited.
    """

    def __init__(self, work: Callable[[], Work], *, behind: bool = False) -> None:
        self.disk_bytes_per_second: float | None = None
        self._work, self._behind = work, behind
        self._steps = self._counted = 0
        self._interrupted = self._inside = False
        self._computed = 0.0
        self._last: dict[str, float] = {}
        self._sums: dict[str, float] = {}

    def step(self) -> None:
        """A step begins."""
        now = {"step": time.perf_counter(), "computed": self._computed, **asdict(self._work())}
        if self._steps > _WARM_UP and not self._interrupted:
            self._counted += 1
            for name, value in now.items():  # a total that is smaller than before was begun anew
                self._sums[name] = self._sums.get(name, 0.0) + max(0.0, value - self._last[name])
        self._last, self._interrupted = now, False
        self._steps += 1

    def interrupt(self) -> None:
        """Something else than training takes place, an evaluation or a save: the time until the next step is none."""
        self._interrupted = True

    @contextlib.contextmanager
    def computing(self) -> Iterator[None]:
        """Around what computes in a step; what it waits within does not count, nor what is within another."""
        if self._inside:
            yield
            return
        self._inside = True
        began, waited = time.perf_counter(), self._work().waited_seconds
        try:
            yield
        finally:
            self._inside = False
            waited = max(0.0, self._work().waited_seconds - waited)
            self._computed += max(0.0, time.perf_counter() - began - waited)

    def measurements(self) -> dict[str, float]:
        """Means over steps, but for the first ones and those before an interruption; empty before there are any.

        ``fraction_of_limit``: the largest of the time of computing, the disk's and that of steps on the host, over the
        time of the step. Where nobody has said what computes, that is all but waiting.
        ``overlap``: the part of the disk's work that nobody waited for.
        """
        if not self._counted:
            return {}
        means = {name: total / self._counted for name, total in self._sums.items()}
        step, disk, host = means["step"], means["disk_seconds"], means["host_seconds"]
        values = {"step_ms": step * 1e3, "disk_busy_ms": disk * 1e3}
        if host:
            values["host_step_ms"] = host * 1e3
        if self._behind:
            return values
        waited = min(means["waited_seconds"], step)
        computing = means["computed"] or step - waited
        disk_limit = disk
        if self.disk_bytes_per_second is not None:
            disk_limit = means["disk_bytes"] / self.disk_bytes_per_second
        return values | {
            "waited_ms": waited * 1e3,
            "computing_ms": computing * 1e3,
            "fraction_of_limit": min(1.0, max(computing, disk_limit, host) / step),
            "overlap": max(0.0, 1 - waited / disk) if disk else 1.0,
        }

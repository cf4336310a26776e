"""How often to checkpoint, so that it costs no more than a given part of the run.

The interval comes from Algorithm 1 of Mohan et al. 2021 ("CheckFreq", 4.3.2), with the overhead of a checkpoint
measured as a whole rather than put together from parts: whatever makes the steps around it longer counts, the copy, the
stall and the writer that takes memory bandwidth and processor time away. It is adapted while training runs (4.4),
upwards soon and downwards slowly.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["FrequencyTuner", "interval"]

_QUIET_STEPS = 50  # that the time of a step is the median of
_COSTS = 15  # checkpoints whose cost is averaged to let them come more often
_RECENT = 5  # and to let them come less often
_SLACK = 0.5  # of the allowed overhead, under which they are cheap
_SURPLUS = 1.3  # of the interval, over which a longer one is taken


def interval(step_seconds: float, overhead_seconds: float, in_flight_seconds: float, max_overhead: float) -> int:
    """Steps from one checkpoint to the next (CheckFreq, Algorithm 1).

    Args:
        step_seconds: Of a step without a checkpoint, ``T_i``.
        overhead_seconds: By which a checkpoint makes the run longer, ``T_o``.
        in_flight_seconds: From the request until it is durable, ``T_c + T_s``.
        max_overhead: Part of the run's time that checkpoints may take, ``p``.
    """
    until_the_last_is_written = (in_flight_seconds - overhead_seconds) / step_seconds
    until_it_is_paid_for = overhead_seconds / (max_overhead * step_seconds)
    return max(1, math.ceil(until_the_last_is_written), math.ceil(until_it_is_paid_for))


class FrequencyTuner:
    """Finds the interval from the times of steps, and follows it.

    Args:
        max_overhead: Part of the run's time that checkpoints may take.
        skip_steps: First steps of a fit that are not looked at.
        profile_steps: Steps without a checkpoint that are needed before there is an interval.
    """

    def __init__(self, max_overhead: float, *, skip_steps: int = 5, profile_steps: int = 10) -> None:
        self.max_overhead = max_overhead
        self.skip_steps = skip_steps
        self.profile_steps = profile_steps
        self._interval: int | None = None
        self.begin()

    def begin(self) -> None:
        """A fit begins: its steps may take another time than the last one's."""
        self._seen = 0
        self._quiet: deque[float] = deque(maxlen=_QUIET_STEPS)
        self._costs: deque[float] = deque(maxlen=_COSTS)
        self._in_flight: deque[float] = deque(maxlen=_COSTS)
        self._open_cost: float | None = None
        self._unchanged = 0
        self._first = True

    @property
    def step_seconds(self) -> float | None:
        """Of a step without a checkpoint, or None before there are enough of them."""
        return statistics.median(self._quiet) if len(self._quiet) >= self.profile_steps else None

    @property
    def ready(self) -> bool:
        """Whether the cost of one more checkpoint could be told: steps without one are known, and the last is over."""
        return self.step_seconds is not None and self._open_cost is None

    @property
    def interval(self) -> int | None:
        """Steps from one checkpoint to the next; None before it is known."""
        return self._interval

    @property
    def overhead(self) -> float | None:
        """Part of the run's time that checkpoints take at this interval, as measured."""
        step = self.step_seconds
        if step is None or not self._costs or self._interval is None:
            return None
        return max(0.0, statistics.median(self._costs)) / (self._interval * step)

    def step(self, seconds: float, *, busy: bool) -> None:
        """A step has passed.

        Args:
            seconds: From its beginning to the next one's, with what was saved in between, without validation.
            busy: Whether a checkpoint was taken or written in it.
        """
        self._seen += 1
        if self._seen <= self.skip_steps:
            return
        if not busy:
            self._close()
            self._quiet.append(seconds)
        elif (usual := self.step_seconds) is not None:
            self._open_cost = (self._open_cost or 0.0) + seconds - usual

    def written(self, seconds: float) -> None:
        """A checkpoint has become durable.

        Args:
            seconds: After it was asked for.
        """
        self._in_flight.append(seconds)

    def _close(self) -> None:
        """The steps around a checkpoint are over."""
        if self._open_cost is None:
            return
        cost, self._open_cost = self._open_cost, None
        if self._first:  # its memory was new
            self._first = False
            return
        self._costs.append(cost)
        if self._in_flight:
            self._adapt()

    def _adapt(self) -> None:
        self._unchanged += 1
        lately = self._wanted(list(self._costs)[-_RECENT:])
        if self._interval is None or lately > _SURPLUS * self._interval:
            self._interval, self._unchanged = lately, 0
        elif self._unchanged >= _COSTS:
            usual = self._wanted(list(self._costs))
            if usual < _SLACK * self._interval:
                self._interval, self._unchanged = (self._interval + usual) // 2, 0

    def _wanted(self, costs: Sequence[float]) -> int:
        """The interval that these costs ask for."""
        step = self.step_seconds
        if step is None:
            raise RuntimeError("No step without a checkpoint has been seen yet.")
        in_flight = statistics.median(self._in_flight)
        wanted = interval(step, max(0.0, statistics.median(costs)), in_flight, self.max_overhead)
        # One step of each interval must stay without a checkpoint, to be compared with.
        return max(wanted, math.ceil(in_flight / step) + 2)

    def state_dict(self) -> dict[str, Any]:
        return {"interval": self._interval}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._interval = state["interval"]

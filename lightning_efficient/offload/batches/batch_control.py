"""Decides into how many micro-batches a batch is split, from what the steps before needed and what there is.

The batch size of an optimizer step stays; what changes is how much of the batch is on the device at a time. (Compare
Chang, US 2019/0311257: a signal of the device's state (free memory, idle time, throughput) updates the batch size.)
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from typing import Any

__all__ = ["BatchController", "StepMeasurement"]

_VERSION = 1
_WHOLE = 1 << 40  # samples in a part, if there is no limit
_FORGET = 0.05  # of the difference by which a need sinks to a smaller one, in each step
_SIZES = 8  # of parts, that are remembered
_DOUBLINGS = 20  # of the steps until the next try
_SLOWER = 0.95  # of the throughput that there was: less is worse
_IDLE = 0.2  # of a step's time: above, fewer and larger parts are tried sooner


@dataclass(frozen=True)
class StepMeasurement:
    """What a step saw.

    Attributes:
        samples: In the batch, on this rank.
        parts: Into which it was split.
        used_bytes: Memory in use as the step began.
        free_bytes: Memory that could be had then, beyond that.
        peak_bytes: The most that was in use at a moment of the step.
        step_s: Seconds from the beginning of the step before to that of this one; 0 if it is the first.
        idle_s: Those of them in which the device waited for data.
        pressure_percent: Of the time in which a process waited for memory.
    """

    samples: int
    parts: int
    used_bytes: int
    free_bytes: int
    peak_bytes: int
    step_s: float = 0.0
    idle_s: float = 0.0
    pressure_percent: float = 0.0


@dataclass
class _State:
    limit: int = _WHOLE  # samples in a part
    largest: int = 1  # batch so far, in samples
    steps: int = 0
    changed_at: int = 0
    roomy_steps: int = 0
    needs: dict[int, float] = field(default_factory=dict)  # samples in a part: bytes beyond what was in use before
    failures: dict[int, list[int]] = field(default_factory=dict)  # the same: times, step of the next try, free bytes
    rates: list[float] = field(default_factory=list)  # samples per second, since the last change
    trial: list[float] = field(default_factory=list)  # the limit and the rate before parts were merged


class BatchController:
    """Keeps the micro-batches as large as memory allows.

    Memory that a part needs is taken as a line, fixed bytes plus bytes per sample, laid over all that was measured.
    After an out-of-memory error the parts are halved. They are halved ahead of one, if what they need would leave less
    than ``reserve`` of the memory. Two are made one again after ``patience`` steps in each of which the line left
    ``margin``; if that fails, or is slower, the next try is after twice as many steps. When the device idles, the steps
    count double: larger parts give it more to do for each byte that is moved.

    With the same calls it decides the same.

    Args:
        margin: Share of all memory that a larger part has to leave free.
        reserve: Share below which parts are made smaller; less than ``margin``.
        patience: Steps.
        pressure_percent: Of time waiting for memory, from which on the system suffers.
        agree: The largest of the integers that the ranks give; called by :meth:`parts` on all of them.

    Raises:
        ValueError: For arguments out of range.
    """

    def __init__(
        self,
        *,
        margin: float = 0.1,
        reserve: float = 0.02,
        patience: int = 20,
        pressure_percent: float = 20.0,
        agree: Callable[[int], int] = lambda number: number,
    ) -> None:
        if not 0 <= reserve < margin < 1:
            raise ValueError(f"reserve={reserve} and margin={margin}; they are shares with 0 <= reserve < margin < 1.")
        if patience < 1:
            raise ValueError(f"patience={patience}; it is a number of steps, at least 1.")
        self._margin, self._reserve = margin, reserve
        self._patience, self._pressure = patience, pressure_percent
        self._agree = agree
        self._state = _State()

    @property
    def limit(self) -> int | None:
        """Samples in a part at most; None if batches are not split."""
        return None if self._state.limit >= _WHOLE else self._state.limit

    def parts(self, samples: int) -> int:
        """Into how many parts to split a batch, from 1 to ``samples``; to be asked on all ranks."""
        agreed = -self._agree(-self._state.limit)
        if agreed != self._state.limit:
            self._change(agreed)
        return _ceil(samples, min(agreed, samples))

    def split(self, parts: int, samples: int) -> None:
        """Begin with this number of parts for a batch of ``samples``, as if it had been found."""
        self._change(_WHOLE if parts <= 1 else _ceil(samples, parts))

    def out_of_memory(self, samples: int, parts: int, free_bytes: int) -> bool:
        """Make the parts smaller after an attempt failed.

        Args:
            samples: In the batch.
            parts: Of the attempt.
            free_bytes: That could be had before it.

        Returns:
            False if the parts were of one sample.
        """
        size = _ceil(samples, parts)
        if size == 1:
            return False
        self._failed(size, free_bytes)
        self._change(min(self._state.limit, _ceil(samples, min(2 * parts, samples))))
        return True

    def observe(self, step: StepMeasurement) -> None:
        """Learn from a step that went well."""
        state = self._state
        state.steps += 1
        state.largest = max(state.largest, step.samples)
        size = _ceil(step.samples, step.parts)
        self._learn(size, step.peak_bytes - step.used_bytes)
        if step.step_s > 0:
            state.rates = [*state.rates, step.samples / step.step_s][-self._patience :]
        if self._is_tight(step, size) and size > 1:
            self._failed(size, step.free_bytes)
            self._change(min(state.limit, _ceil(step.samples, min(2 * step.parts, step.samples))))
        elif state.trial and len(state.rates) == self._patience:
            self._judge_merging(size)
        elif state.limit < state.largest == step.samples:  # a short batch tells nothing of whole ones
            self._perhaps_merge(step)

    def predicted_bytes(self, size: int) -> float:
        """What a part of ``size`` samples needs beyond what is in use before it, by all that was measured.

        A line over the measured needs; with needs of one size only, the line through nothing, which says too much for
        larger parts.
        """
        needs = self._state.needs
        if len(needs) < 2:
            return max((need / known * size for known, need in needs.items()), default=0.0)
        mean_size, mean_need = sum(needs) / len(needs), sum(needs.values()) / len(needs)
        spread = sum((known - mean_size) ** 2 for known in needs)
        slope = sum((known - mean_size) * (need - mean_need) for known, need in needs.items()) / spread
        slope = max(slope, 0.0)
        return slope * size + max(need - slope * known for known, need in needs.items())

    def state_dict(self) -> dict[str, Any]:
        """Numbers, and lists and dictionaries of them."""
        return {"version": _VERSION, **asdict(self._state)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a state.

        Raises:
            ValueError: If it is of another version.
        """
        if state_dict.get("version") != _VERSION:
            raise ValueError(
                f"The state of the batch control has version {state_dict.get('version')}; this reads version "
                f"{_VERSION}. Resume with the release that saved it, or start without the strategy's state."
            )
        self._state = _State(**copy.deepcopy({one.name: state_dict[one.name] for one in fields(_State)}))

    def _learn(self, size: int, need: float) -> None:
        known = self._state.needs.get(size, 0.0)
        self._state.needs[size] = need if need > known else known + _FORGET * (need - known)
        if len(self._state.needs) > _SIZES:  # the size met longest ago
            del self._state.needs[next(iter(self._state.needs))]
        else:
            self._state.needs[size] = self._state.needs.pop(size)

    def _is_tight(self, step: StepMeasurement, size: int) -> bool:
        left = step.free_bytes - self._state.needs[size]
        suffers = step.pressure_percent >= self._pressure
        return left < self._reserve * (step.used_bytes + step.free_bytes) or (
            suffers and self._state.steps - self._state.changed_at >= self._patience
        )

    def _perhaps_merge(self, step: StepMeasurement) -> None:
        state = self._state
        larger = _ceil(step.samples, _ceil(_ceil(step.samples, state.limit), 2))
        margin = self._margin * (step.used_bytes + step.free_bytes)
        roomy = step.free_bytes - self.predicted_bytes(larger) >= margin and step.pressure_percent < self._pressure
        blocked = any(
            size <= larger and state.steps < next_try and step.free_bytes < free_bytes + margin
            for size, (_, next_try, free_bytes) in state.failures.items()
        )
        if not roomy or blocked:
            state.roomy_steps = 0
            return
        state.roomy_steps += 2 if step.idle_s > _IDLE * step.step_s else 1
        if state.roomy_steps >= self._patience:
            trial = [state.limit, sum(state.rates) / len(state.rates)] if state.rates else []
            self._change(_WHOLE if larger == step.samples else larger)
            state.trial = trial

    def _judge_merging(self, size: int) -> None:
        """Whether the larger parts are at least as quick; if not, back to the smaller ones."""
        state = self._state
        (limit, rate), state.trial = state.trial, []
        if sorted(state.rates)[len(state.rates) // 2] < _SLOWER * rate:
            self._failed(size, _WHOLE)  # more memory does not help
            self._change(int(limit))

    def _failed(self, size: int, free_bytes: int) -> None:
        failures = self._state.failures
        times = failures.pop(size, [0])[0] + 1
        self._state.needs.pop(size, None)  # by the next try, the smaller ones tell better
        failures[size] = [times, self._state.steps + (self._patience << min(times, _DOUBLINGS)), free_bytes]
        if len(failures) > _SIZES:
            del failures[next(iter(failures))]

    def _change(self, limit: int) -> None:
        state = self._state
        state.limit, state.changed_at = limit, state.steps
        state.roomy_steps, state.rates, state.trial = 0, [], []


def _ceil(number: int, divisor: int) -> int:
    return -(-number // divisor)

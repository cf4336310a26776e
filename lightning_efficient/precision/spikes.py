"""When a loss, or the norm of a gradient, is a spike: far beyond what the last steps had.

The rule is robust: what it compares with is the median of a window, into which no spike goes. A value is a spike if it
is beyond ``factor`` times the median, and also many times their usual scatter above it, so that losses which differ
much from batch to batch by themselves are none. What is not finite always is. (Chowdhery et al. 2022, "PaLM", 5.1, went
back some hundred steps at each spike of the loss and left out the batches; most of those were not to blame.)
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from lightning_efficient.core.units import parse_bytes

__all__ = ["HEALTHY", "NOT_FINITE", "OVERFLOW", "SPIKE", "STEEP", "Level", "SpikeGuard", "judge"]

HEALTHY, OVERFLOW, STEEP, SPIKE, NOT_FINITE = range(5)
"""Verdicts; among ranks the largest counts. Overflow: the loss is finite, and gradients that a scaler has multiplied
are not. Steep: the norm of the gradient is a spike, and the loss is none."""

_SCATTERS = 10.0
_NORMAL = 1.4826  # standard deviations of a normal distribution in a median of absolute deviations


@dataclass(frozen=True)
class SpikeGuard:
    """What a spike is, and how far back one can go.

    Attributes:
        factor: A loss beyond so many times the median is a spike (of a median that is not positive: so many times its
            magnitude, less one, above it).
        window: Steps of which the median is; there are no spikes before half of them are known.
        gradients: Whether the norm of the gradient is looked at, too, which takes one more reading of it. One that is
            as large in high bits is taken for what the batch gives, and nothing is left out for it: healthy runs have
            gradients of many times their usual size now and then.
        snapshot_every: Optimizer steps between two snapshots of the guard's own.
        snapshots: How many there are at most.
        memory_cap: Of all of them, in bytes or as ``"2GiB"``; None: as much as so many take.
        most_skipped: Batches in a row that are skipped at most: then the level of the loss is taken as another one.

    Raises:
        ValueError: If one of them is out of range.
    """

    factor: float = 3.0
    window: int = 50
    gradients: bool = True
    snapshot_every: int = 10
    snapshots: int = 2
    memory_cap: int | str | None = None
    most_skipped: int = 5

    def __post_init__(self) -> None:
        if isinstance(self.factor, bool) or not isinstance(self.factor, int | float) or not self.factor > 1:
            raise ValueError(f"spike_guard: factor={self.factor!r} must be a number above 1, such as 3.0.")
        if not isinstance(self.gradients, bool):
            raise ValueError(f"spike_guard: gradients={self.gradients!r} must be true or false.")
        for name, least in (("window", 4), ("snapshot_every", 1), ("snapshots", 0), ("most_skipped", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"spike_guard: {name}={value!r} must be a whole number, {least} or more.")
        if self.memory_cap is not None:
            parse_bytes(self.memory_cap, "spike_guard: memory_cap")

    @property
    def cap_bytes(self) -> float:
        """Of memory for snapshots."""
        return math.inf if self.memory_cap is None else parse_bytes(self.memory_cap, "memory_cap")

    @classmethod
    def of(cls, given: Mapping[str, Any] | None) -> SpikeGuard | None:
        """From an argument of a user; None: there is no guard.

        Raises:
            ValueError: If it has a key that there is not.
        """
        if given is None:
            return None
        known = [field.name for field in fields(cls)]
        if not isinstance(given, Mapping):
            raise ValueError(f"spike_guard={given!r} must be a dict with some of {', '.join(known)}, or None.")
        for name in given:
            if name not in known:
                raise ValueError(f"spike_guard has {name!r}; there are {', '.join(known)}.")
        return cls(**given)


class Level:
    """What a value has been in the last steps.

    Args:
        factor: See :class:`SpikeGuard`.
        window: Likewise.
    """

    def __init__(self, factor: float, window: int) -> None:
        self._factor, self._least = factor, (window + 1) // 2
        self._values: deque[float] = deque(maxlen=window)
        self._limit: float | None = None

    @property
    def usual(self) -> float:
        """The median; not a number before there is one."""
        return statistics.median(self._values) if self._values else math.nan

    @property
    def limit(self) -> float:
        """Beyond which a value is a spike."""
        if self._limit is None:
            self._limit = self._beyond() if len(self._values) >= self._least else math.inf
        return self._limit

    def _beyond(self) -> float:
        median = statistics.median(self._values)
        scatter = statistics.median(abs(value - median) for value in self._values)
        room = max((self._factor - 1) * abs(median), _SCATTERS * _NORMAL * scatter)
        return median + room if room else math.inf  # nothing but zeros so far

    def add(self, value: float) -> None:
        """A healthy one."""
        if math.isfinite(value):
            self._values.append(value)
            self._limit = None

    def forget(self) -> None:
        """It will be another one."""
        self._values.clear()
        self._limit = None

    def state_dict(self) -> list[float]:
        """The values."""
        return list(self._values)

    def load_state_dict(self, values: list[float]) -> None:
        """What :meth:`state_dict` returned; of a longer window, the last."""
        self._values.clear()
        self._values.extend(values)
        self._limit = None


def judge(loss: Tensor, norm: Tensor, limits: tuple[float, float], *, scaled: bool) -> Tensor:
    """A verdict, as a tensor, so that ranks can agree on it before anyone reads it.

    Args:
        loss: One element.
        norm: Of the gradient; one element.
        limits: Of both.
        scaled: Whether a loss scaler has multiplied the gradient.

    Returns:
        ``[3]``: the verdict, the loss and the norm; float64.
    """
    loss, norm = loss.detach().reshape(()).double(), norm.detach().reshape(()).double()
    verdict = torch.where(loss > limits[0], SPIKE, torch.where(norm > limits[1], STEEP, HEALTHY))
    verdict = torch.where(norm.isfinite(), verdict, OVERFLOW if scaled else NOT_FINITE)
    return torch.stack([torch.where(loss.isfinite(), verdict, NOT_FINITE).double(), loss, norm])

"""A series of measurements that never outgrows a fixed length, however long the run."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch

__all__ = ["Point", "Series", "quantile"]

_WIDTH = 4


class Point(NamedTuple):
    """One value and when it was measured, on the three clocks that a comparison of runs needs.

    Attributes:
        step: The logged step (Lightning's x-axis).
        seconds: Wall-clock seconds of training so far, without validation.
        cpu_seconds: CPU seconds of the process while training so far, without validation.
        value: The measured value, in the unit that its tag names.
    """

    step: int
    seconds: float
    cpu_seconds: float
    value: float


class Series:
    """Points in the order in which they came; beyond ``limit`` every second one is dropped.

    After each such halving only every second (fourth, eighth, ...) new point is kept, so that those kept stay evenly
    spaced over the whole run. The largest and the last point always survive.
    """

    def __init__(self, limit: int = 2000) -> None:
        if limit < 2:
            raise ValueError(f"`limit` is {limit}; a series holds at least 2 points.")
        self._limit = limit
        self._kept = array("d")  # flat rows of four: a tenth of the memory of tuples
        self._every = 1
        self._seen = 0
        self._last: tuple[int, Point] | None = None
        self._largest: tuple[int, Point] | None = None

    def __len__(self) -> int:
        return len(self._kept) // _WIDTH

    @property
    def last(self) -> float | None:
        """The newest value, or None."""
        return None if self._last is None else self._last[1].value

    def append(self, step: int, seconds: float, cpu_seconds: float, value: float) -> None:
        """Add a point; several may have the same step."""
        point = Point(step, seconds, cpu_seconds, value)
        if self._seen % self._every == 0:
            self._kept.extend(point)
            if len(self) > self._limit:
                self._halve()
        self._last = (self._seen, point)
        if self._largest is None or math.isnan(self._largest[1].value) or value > self._largest[1].value:
            self._largest = (self._seen, point)
        self._seen += 1

    def points(self) -> tuple[Point, ...]:
        """The points kept, oldest first."""
        rows = {index * self._every: point for index, point in enumerate(self._rows())}
        for extra in (self._largest, self._last):
            if extra is not None:
                rows[extra[0]] = extra[1]
        return tuple(rows[index] for index in sorted(rows))

    def state_dict(self) -> dict[str, Any]:
        """Numbers and tensors only, so that a checkpoint that holds it loads under ``weights_only=True``."""
        return {
            "kept": torch.tensor(self._kept, dtype=torch.float64).view(-1, _WIDTH),
            "every": self._every,
            "seen": self._seen,
            "last": _pack(self._last),
            "largest": _pack(self._largest),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from :meth:`state_dict`."""
        self._kept = array("d", state["kept"].flatten().tolist())
        self._every = state["every"]
        self._seen = state["seen"]
        self._last = _unpack(state["last"])
        self._largest = _unpack(state["largest"])
        while len(self) > self._limit:
            self._halve()

    def _rows(self) -> Iterator[Point]:
        for start in range(0, len(self._kept), _WIDTH):
            step, seconds, cpu_seconds, value = self._kept[start : start + _WIDTH]
            yield Point(int(step), seconds, cpu_seconds, value)

    def _halve(self) -> None:
        kept = array("d")
        for start in range(0, len(self._kept), 2 * _WIDTH):
            kept.extend(self._kept[start : start + _WIDTH])
        self._kept = kept
        self._every *= 2


def quantile(values: list[float], share: float) -> float:
    """The value below which ``share`` of ``values`` lie, interpolated between neighbours; NaN for no values."""
    if not values:
        return float("nan")
    ordered = sorted(values)
    position = share * (len(ordered) - 1)
    below = int(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


def _pack(entry: tuple[int, Point] | None) -> list[float]:
    return [] if entry is None else [entry[0], *entry[1]]


def _unpack(row: list[float]) -> tuple[int, Point] | None:
    if not row:
        return None
    index, step, seconds, cpu_seconds, value = row
    return int(index), Point(int(step), seconds, cpu_seconds, value)

"""How fast the machine is at this moment: a fixed piece of work, timed.

On a shared machine the same step takes half as long again a minute later. Times of different processes are compared by
what this piece of work took beside them.
"""

from __future__ import annotations

import statistics
import time

import torch

__all__ = ["Yardstick"]

_WIDTH, _COPIED = 256, 1 << 20  # a product of matrices, and elements of a copy: about two milliseconds


class Yardstick:
    """Times a product of matrices and a copy, between steps of the training."""

    def __init__(self) -> None:
        self._matrix = torch.full((_WIDTH, _WIDTH), 0.5)
        self._copied = torch.zeros(_COPIED)
        self._seconds: list[tuple[float, float]] = []

    def measure(self) -> None:
        """Once; takes about two milliseconds."""
        with torch.no_grad():
            wall, cpu = time.perf_counter(), time.process_time()
            for _ in range(2):
                torch.mm(self._matrix, self._matrix)
            self._copied.add_(1.0)
            self._seconds.append((time.perf_counter() - wall, time.process_time() - cpu))

    @property
    def seconds(self) -> tuple[float, float]:
        """The medians by the clock and of the processors; 0 if nothing was measured."""
        if not self._seconds:
            return 0.0, 0.0
        walls, cpus = zip(*self._seconds, strict=True)
        return statistics.median(walls), statistics.median(cpus)

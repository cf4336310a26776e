"""How fast the machine is at this moment: a fixed piece of work, timed.

On a shared machine the same step takes half as long again a minute later. Times of different processes are compared by
what this piece of work took before and after them.
"""

from __future__ import annotations

import statistics
import time

import torch

__all__ = ["Yardstick"]

_WIDTH, _CHANGED = 512, 1 << 20  # of a product of matrices, and elements that are changed: about two milliseconds
_TIMES = 10
_LOOK, _IDLE, _MOST = 0.005, 0.1, 0.5  # seconds of a look, the part of it that a quiet process works, seconds to wait


class Yardstick:
    """Times a product of matrices and a change of a large tensor, before and after what is compared.

    It waits until the process's other threads have done what they do behind the training, and allocates nothing: a
    disk's work, or what the C library is told for a technique, would be in its time, and not the machine's.
    """

    def __init__(self) -> None:
        self._matrix = torch.full((_WIDTH, _WIDTH), 0.5)
        self._product = torch.zeros(_WIDTH, _WIDTH)
        self._changed = torch.zeros(_CHANGED)
        self._seconds: list[tuple[float, float]] = []

    def measure(self) -> None:
        """Once; takes about 30 milliseconds."""
        _wait_until_quiet()
        times = []
        with torch.no_grad():
            for _ in range(_TIMES):
                wall, cpu = time.perf_counter(), time.process_time()
                torch.mm(self._matrix, self._matrix, out=self._product)
                self._changed.add_(1.0)
                times.append((time.perf_counter() - wall, time.process_time() - cpu))
        walls, cpus = zip(*times, strict=True)
        self._seconds.append((statistics.median(walls), statistics.median(cpus)))

    @property
    def seconds(self) -> tuple[float, float]:
        """The means by the clock and of the processors; 0 if nothing was measured."""
        if not self._seconds:
            return 0.0, 0.0
        walls, cpus = zip(*self._seconds, strict=True)
        return statistics.fmean(walls), statistics.fmean(cpus)


def _wait_until_quiet() -> None:
    end = time.perf_counter() + _MOST
    while time.perf_counter() < end:
        before = time.process_time()
        time.sleep(_LOOK)
        if time.process_time() - before < _IDLE * _LOOK:
            return

"""Wall-clock and CPU time of training steps, with validation counted apart."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["StepTime", "StepTimer"]


@dataclass(frozen=True)
class StepTime:
    """What one training batch took.

    Attributes:
        step_ms: Wall-clock time from the start of the batch to its end.
        step_cpu_ms: CPU time of all threads of the process in that span.
        data_wait_ms: Wall-clock time since the end of the batch before (or the start of training), without validation:
            waiting for data, and whatever else ran between the two batches, logging and checkpoints included.
    """

    step_ms: float
    step_cpu_ms: float
    data_wait_ms: float


class StepTimer:
    """A stop-watch that is told when batches and validations start and end.

    It reads two clocks and never waits for the device: on a GPU a single step's time is that of its launches, while
    sums over many steps are right, since the host cannot run ahead for long.

    Args:
        wall_clock: Nanoseconds of wall-clock time.
        cpu_clock: Nanoseconds of CPU time of the process.
    """

    def __init__(
        self,
        wall_clock: Callable[[], int] = time.perf_counter_ns,
        cpu_clock: Callable[[], int] = time.process_time_ns,
    ) -> None:
        self._wall_clock = wall_clock
        self._cpu_clock = cpu_clock
        self._start = self._read()
        self._validation = (0, 0)  # nanoseconds, both clocks
        self._paused_at: tuple[int, int] | None = None
        self._batch_start = self._start
        self._batch_end = self._start[0]
        self._validation_at_end = 0
        self._stopped_at: tuple[int, int] | None = None

    def batch_start(self) -> None:
        """A training batch starts."""
        self._batch_start = self._read()

    def batch_end(self) -> StepTime:
        """The training batch that started last has ended."""
        wall, cpu = self._read()
        start_wall, start_cpu = self._batch_start
        gap = start_wall - self._batch_end - (self._validation[0] - self._validation_at_end)
        self._batch_end, self._validation_at_end = wall, self._validation[0]
        return StepTime((wall - start_wall) / 1e6, (cpu - start_cpu) / 1e6, gap / 1e6)

    def validation_start(self) -> None:
        """Training pauses for a validation."""
        self._paused_at = self._read()

    def validation_end(self) -> None:
        """Training goes on."""
        if self._paused_at is not None:
            wall, cpu = self._read()
            self._validation = (
                self._validation[0] + wall - self._paused_at[0],
                self._validation[1] + cpu - self._paused_at[1],
            )
            self._paused_at = None

    def stop(self) -> None:
        """Training is over, or broken off, maybe inside a validation: all sums stay as they are now."""
        self.validation_end()
        self._stopped_at = self._stopped_at or self._read()

    def train_seconds(self) -> tuple[float, float]:
        """Wall-clock and CPU seconds since the timer was made, without validation."""
        wall, cpu = self._stopped_at or self._paused_at or self._read()
        validation_wall, validation_cpu = self._validation
        return (wall - self._start[0] - validation_wall) / 1e9, (cpu - self._start[1] - validation_cpu) / 1e9

    def validation_seconds(self) -> float:
        """Wall-clock seconds of the validations that have ended."""
        return self._validation[0] / 1e9

    def _read(self) -> tuple[int, int]:
        return self._wall_clock(), self._cpu_clock()

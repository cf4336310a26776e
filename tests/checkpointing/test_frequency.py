"""The interval keeps the overhead under its bound, follows a changing machine, and does not swing (C11)."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import pairwise

import pytest

from lightning_efficient.checkpointing.frequency import FrequencyTuner, interval


@pytest.mark.parametrize(
    ("step", "overhead", "in_flight", "bound", "expected"),
    [
        (1.0, 0.0, 0.5, 0.035, 1),  # free, and written within a step
        (1.0, 0.0, 3.2, 0.035, 4),  # free, but the disk is slow
        (1.0, 0.35, 0.5, 0.035, 10),  # paid for by ten steps
        (0.1, 0.014, 0.5, 0.035, 5),  # both, the disk decides
        (0.1, 0.1, 0.2, 0.01, 100),
    ],
)
def test_algorithm_1_c11(step: float, overhead: float, in_flight: float, bound: float, expected: int) -> None:
    assert interval(step, overhead, in_flight, bound) == expected


def simulate(
    tuner: FrequencyTuner, steps: int, cost: Callable[[int], float], in_flight: float = 0.05, noise: float = 0.05
) -> tuple[float, list[int]]:
    """A run of steps of 0.1 s; the overhead of its second half, and every interval."""
    chance = random.Random(0)
    since, remaining, extra, intervals = 0, 0, [], []
    for i in range(steps):
        seconds = 0.1 * (1 + chance.uniform(-noise, noise))
        since += 1
        save = since >= (tuner.interval or 10)
        if save:
            since, remaining = 0, max(1, round(in_flight / 0.1))
        busy = save or remaining > 0
        if save:
            seconds += cost(i)
            extra.append((i, cost(i)))
            tuner.written(in_flight)
        else:
            remaining = max(0, remaining - 1)
        tuner.step(seconds, busy=busy)
        intervals.append(tuner.interval or 0)
    late = sum(amount for i, amount in extra if i >= steps // 2)
    return late / (0.1 * (steps - steps // 2)), intervals


@pytest.mark.parametrize("cost", [0.0, 0.002, 0.02, 0.2])
def test_the_overhead_stays_under_its_bound_c11(cost: float) -> None:
    tuner = FrequencyTuner(0.035)
    overhead, intervals = simulate(tuner, 3000, lambda _: cost)
    assert overhead <= 0.035 * 1.15
    least = interval(0.1, cost, 0.05, 0.035)
    assert least * 0.7 <= intervals[-1] <= max(5, least * 2.5)


def test_it_follows_a_disk_that_becomes_slow_and_well_again_c11() -> None:
    tuner = FrequencyTuner(0.035)
    _, intervals = simulate(tuner, 9000, lambda i: 0.2 if 3000 <= i < 6000 else 0.005)
    assert intervals[2990] < 12
    assert intervals[5990] >= 50
    assert intervals[-1] < 20


def test_it_does_not_swing_c11() -> None:
    tuner = FrequencyTuner(0.035)
    _, intervals = simulate(tuner, 4000, lambda _: 0.02, noise=0.15)
    settled = intervals[2000:]
    assert max(settled) <= 2 * min(settled)
    assert sum(a != b for a, b in pairwise(settled)) < 60


def test_before_it_has_seen_enough_there_is_no_interval_c11() -> None:
    tuner = FrequencyTuner(0.035)
    for _ in range(14):
        tuner.step(0.1, busy=False)
    assert tuner.step_seconds is None
    tuner.step(0.1, busy=False)
    assert tuner.step_seconds == pytest.approx(0.1)
    assert (tuner.interval, tuner.overhead) == (None, None)


def test_the_interval_is_kept_through_a_checkpoint_c11() -> None:
    tuner = FrequencyTuner(0.035)
    simulate(tuner, 500, lambda _: 0.02)
    other = FrequencyTuner(0.035)
    other.load_state_dict(tuner.state_dict())
    assert other.interval == tuner.interval

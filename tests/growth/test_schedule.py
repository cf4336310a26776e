"""When a phase ends: what a user may write, the caps, and the smoothed loss."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest

from lightning_efficient.growth.schedule import LossTracker, Until, parse_until


def parse(value: Any) -> Until:
    return parse_until(value, where="until", default_fraction=0.25)


# -- what a user may write ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, Until(fraction=0.25)),
        (100, Until(step=100)),
        (0.5, Until(fraction=0.5)),
        ({}, Until(fraction=0.25)),
        ({"step": 7}, Until(step=7)),
        ({"step": 7.0}, Until(step=7)),
        ({"step": 7, "fraction": 0.5}, Until(step=7, fraction=0.5)),
        ({"step": None, "loss_below": 2}, Until(fraction=0.25, loss_below=2)),
        ({"plateau": 30, "step": 5}, Until(step=5, plateau=30)),
        ({"loss_below": -1.5}, Until(fraction=0.25, loss_below=-1.5)),
        ({"correlation_below": 1}, Until(fraction=0.25, correlation_below=1)),
        ({"correlation_below": 0.0, "fraction": 0.1}, Until(fraction=0.1, correlation_below=0.0)),
    ],
    ids=str,
)
def test_valid_conditions_g5(value: Any, expected: Until) -> None:
    assert parse(value) == expected
    assert isinstance(parse(value).step, int | None)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (True, r"until=True: expected a step"),
        ("0.5", r"until='0.5': expected a step"),
        ([100], r"until=\[100\]: expected a step"),
        (0, r"until\.step=0: expected a whole number of steps, at least 1"),
        (-3, r"until\.step=-3"),
        (1.0, r"until\.fraction=1\.0: expected a number between 0 and 1"),
        (0.0, r"until\.fraction=0\.0"),
        (-0.1, r"until\.fraction=-0\.1"),
        (100.0, r"until\.fraction=100\.0"),
        (math.nan, r"until\.fraction=nan: expected a finite number"),
        ({"steps": 3}, r"until has unknown keys \['steps'\]; allowed are \['step', 'fraction', 'loss_below'"),
        ({"step": 2.5}, r"until\.step=2\.5: expected a whole number"),
        ({"plateau": 0}, r"until\.plateau=0"),
        ({"plateau": "10"}, r"until\.plateau='10': expected a finite number"),
        ({"loss_below": True}, r"until\.loss_below=True"),
        ({"loss_below": math.inf}, r"until\.loss_below=inf: expected a finite number"),
        ({"correlation_below": -1}, r"until\.correlation_below=-1: expected a correlation"),
        ({"correlation_below": 1.1}, r"until\.correlation_below=1\.1"),
    ],
    ids=str,
)
def test_invalid_conditions_name_the_argument_g5(value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(value)


def test_the_name_of_the_argument_is_the_users_g5() -> None:
    with pytest.raises(ValueError, match=r"^stages\[1\]\.until\.step=0"):
        parse_until(0, where="stages[1].until", default_fraction=0.5)


# -- caps --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("until", "total", "cap"),
    [
        (Until(step=30), 100, 30),
        (Until(step=30), math.inf, 30),
        (Until(fraction=0.1), 1000, 100),
        (Until(fraction=0.125), 100, 12),
        (Until(step=30, fraction=0.1), 1000, 30),
        (Until(step=300, fraction=0.1), 1000, 100),
    ],
)
def test_the_first_cap_wins_g5(until: Until, total: float, cap: int) -> None:
    assert until.cap(total) == cap


@pytest.mark.parametrize("until", [Until(fraction=0.5), Until(step=3, fraction=0.5)])
def test_a_fraction_of_an_endless_run_is_refused_g5(until: Until) -> None:
    with pytest.raises(ValueError, match=r"fraction: 0\.5.*max_steps.*until=\{step: N\}"):
        until.cap(math.inf)


# -- the smoothed loss -------------------------------------------------------------------------------------------------


def smoothed(losses: list[float], halflife: float) -> float:
    """The weighted mean in which a reading counts half after ``halflife`` later ones."""
    weights = [0.5 ** ((len(losses) - 1 - i) / halflife) for i in range(len(losses))]
    return sum(w * x for w, x in zip(weights, losses, strict=True)) / sum(weights)


@pytest.mark.parametrize("halflife", [1.0, 10.0])
@pytest.mark.parametrize("seed", range(5))
def test_value_and_minimum_are_those_of_brute_force_g5(seed: int, halflife: float) -> None:
    chance = random.Random(seed)
    losses = [chance.uniform(0, 5) for _ in range(60)]
    tracker = LossTracker(halflife)
    values: list[float] = []
    for step, loss in enumerate(losses):
        tracker.update(loss, 10 * step)
        values.append(smoothed(losses[: step + 1], halflife))
        assert tracker.value == pytest.approx(values[-1], rel=1e-12)
        assert tracker.best == pytest.approx(min(values), rel=1e-12)
        assert tracker.best_step == 10 * values.index(min(values))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_readings_that_are_not_finite_are_left_out_g5(bad: float) -> None:
    tracker, reference = LossTracker(), LossTracker()
    tracker.update(bad, 0)
    assert math.isnan(tracker.value)
    for step, loss in enumerate([3.0, 2.0]):
        tracker.update(loss, step)
        tracker.update(bad, step)
        reference.update(loss, step)
    assert tracker.state_dict() == reference.state_dict()


def test_restart_forgets_the_minimum_but_not_the_loss_g5() -> None:
    tracker = LossTracker()
    tracker.update(1.0, 5)
    tracker.restart(8)
    assert (tracker.value, tracker.best, tracker.best_step) == (1.0, math.inf, 8)
    tracker.update(2.0, 9)
    assert (tracker.best, tracker.best_step) == (tracker.value, 9)


def test_state_round_trip_goes_on_bit_for_bit_g5() -> None:
    one, other = LossTracker(), LossTracker()
    for step in range(20):
        one.update(1 / (step + 1), step)
    other.load_state_dict(one.state_dict())
    for step in range(20, 40):
        one.update(math.sin(step), step)
        other.update(math.sin(step), step)
    assert other.state_dict() == one.state_dict()

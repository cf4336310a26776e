"""The conditions that end a phase, fed step by step without a Trainer."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_efficient.growth.schedule import parse_until
from lightning_efficient.growth.settings import Phase, WidthSettings
from lightning_efficient.growth.triggers import PATIENCE, Triggers
from tests.growth.networks import Residual, arrangement_of
from tests.growth.test_schedule import smoothed

FULL = tuple(range(4))
TOTAL = 1000


def alone(value: Tensor) -> Tensor:
    """The mean over one rank."""
    return value


def triggers(*untils: Any, check_every: int = 1, width: Any = None, **options: Any) -> Triggers:
    """One phase for each condition, and the last one."""
    parsed = [parse_until(u, where="until", default_fraction=0.9) for u in untils]
    result = Triggers(None, check_every, 2, **options)
    settings = width and WidthSettings(2, parse_until(width, where="width", default_fraction=0.9))
    phases = [Phase((0,) * (i + 1), until) for i, until in enumerate(parsed)]
    result.start([*phases, Phase(FULL, None)], settings, TOTAL)
    return result


def feed(trigger: Triggers, losses: list[float], start: int = 1) -> None:
    for step, loss in enumerate(losses, start):
        trigger.read_loss(torch.tensor(loss), step, alone)


# -- steps -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("until", "cap"), [(30, 30), (0.1, 100), ({"loss_below": 1}, 900), ({"plateau": 9}, 900)])
def test_every_phase_ends_at_its_cap_g5(until: Any, cap: int) -> None:
    trigger = triggers(until)
    trigger.restart(cap - 1)
    assert trigger.due(0, cap - 1) is None
    assert trigger.due(0, cap) == f"as planned, at step {cap}"
    assert trigger.due(0, cap + 50) is not None
    assert trigger.due(1, TOTAL) is None


def test_caps_must_increase_g5() -> None:
    with pytest.raises(ValueError, match=r"Stage 1 would end at step 20, not after stage 0, which ends at step 30"):
        triggers(30, 20)


@pytest.mark.parametrize("until", [TOTAL + 1, {"step": 10 * TOTAL}])
def test_a_cap_behind_the_end_of_the_run_is_refused_g5(until: Any) -> None:
    """Else the run would end with the small model, without a word."""
    with pytest.raises(ValueError, match=r"step 10*\d*"):
        triggers(until)


def test_width_has_a_condition_of_its_own_g5() -> None:
    trigger = triggers(30, width=50)
    assert (trigger.width_due(49), trigger.width_due(50)) == (None, "as planned, at step 50")
    assert triggers(30).width_due(TOTAL) is None
    assert "30" in trigger.plan_text(0)
    assert "50" in trigger.plan_text(0)


# -- the loss ----------------------------------------------------------------------------------------------------------


def test_loss_below_is_of_the_smoothed_loss_g5() -> None:
    trigger = triggers({"loss_below": 1.0})
    losses = [3.0, 0.5, 0.5, 0.4, 0.3, 0.2, 0.1]
    for step, loss in enumerate(losses, 1):
        feed(trigger, [loss], step)
        expected = smoothed(losses[:step], 10.0) < 1.0
        assert (trigger.due(0, step) is not None) == expected, step
    assert "smoothed training loss" in str(trigger.due(0, len(losses)))


def test_no_reading_is_no_reason_g5() -> None:
    trigger = triggers({"loss_below": 100.0})
    assert trigger.due(0, 5) is None
    trigger.read_loss(None, 5, alone)
    assert trigger.due(0, 5) is None


def test_nan_is_no_reason_either_g5() -> None:
    trigger = triggers({"loss_below": 100.0})
    feed(trigger, [math.nan] * 5)
    assert trigger.due(0, 5) is None


def test_plateau_counts_steps_without_a_new_minimum_g5() -> None:
    trigger = triggers({"plateau": 4})
    feed(trigger, [3.0, 2.0, 1.0])
    for step in range(4, 7):
        feed(trigger, [5.0], step)
        assert trigger.due(0, step) is None
    feed(trigger, [5.0], 7)
    assert "has not improved on" in str(trigger.due(0, 7))


def test_plateau_counts_anew_after_a_switch_g5() -> None:
    trigger = triggers({"plateau": 3, "step": 50}, {"plateau": 3})
    feed(trigger, [1.0, *[5.0] * 5])
    assert trigger.due(0, 6) is not None
    trigger.restart(6)
    assert trigger.due(1, 6) is None
    feed(trigger, [9.0, 9.0], 7)
    assert trigger.due(1, 8) is None


@pytest.mark.parametrize("check_every", [1, 3, 4])
def test_a_reading_is_the_mean_of_the_batches_since_the_last_g5(check_every: int) -> None:
    trigger, seen = triggers({"loss_below": -1.0}, check_every=check_every), []
    losses = [float(i * i % 7) for i in range(1, 13)]
    for step, loss in enumerate(losses, 1):
        trigger.read_loss(torch.tensor(loss), step, lambda value: seen.append(value.item()) or value)
    chunks = [losses[i : i + check_every] for i in range(0, 12, check_every)]
    assert seen == pytest.approx([sum(chunk) / check_every for chunk in chunks])


def test_accumulated_batches_of_one_step_are_averaged_g5() -> None:
    trigger, seen = triggers({"loss_below": -1.0}), []
    for loss, step in [(1.0, 0), (3.0, 1), (5.0, 1), (7.0, 2)]:
        trigger.read_loss(torch.tensor(loss), step, lambda value: seen.append(value.item()) or value)
    assert seen == [2.0, 6.0]


def test_what_decides_is_the_mean_over_the_ranks_g5() -> None:
    trigger = triggers({"loss_below": 1.0})
    trigger.read_loss(torch.tensor(0.1), 1, lambda value: value * 100)
    assert trigger.due(0, 1) is None
    assert trigger.loss.value == pytest.approx(10.0)


@pytest.mark.parametrize(("until", "needed"), [(30, False), ({"loss_below": 1}, True), ({"plateau": 3}, True)])
def test_the_loss_is_read_only_where_a_condition_needs_it_g5(until: Any, needed: bool) -> None:
    assert triggers(until).needs_loss(0) == needed
    assert not triggers(until).needs_loss(1)
    assert triggers(5, width={"plateau": 3}).needs_loss(1)


# -- correlation -------------------------------------------------------------------------------------------------------


def read_correlation(trigger: Triggers, leaders: tuple[int, ...], cosine: float) -> None:
    """A reading in which every pair of neighbours has the same correlation."""
    network = Residual(4)
    arrangement = arrangement_of(network)
    arrangement.arrange(leaders)
    trigger.watch(arrangement)
    network(torch.randn(2, 3)).sum().backward()
    trigger.unwatch()
    trigger.judge_correlation(0, lambda products: torch.tensor([[cosine, 1.0, 1.0]] * len(products)))


def test_low_correlation_must_last_three_readings_g5() -> None:
    trigger = triggers({"correlation_below": 0.5})
    for cosine in (0.1, 0.1, 0.9, 0.1, 0.1):
        read_correlation(trigger, (0, 0, 0, 0), cosine)
        assert trigger.due(0, 1) is None
    read_correlation(trigger, (0, 0, 0, 0), 0.1)
    assert "correlated less than 0.5" in str(trigger.due(0, 1))
    assert PATIENCE == 3


def test_splitting_by_groups_ends_no_phase_g5() -> None:
    trigger = triggers({"correlation_below": 0.5}, by_groups=True)
    for _ in range(5):
        read_correlation(trigger, (0, 0, 0, 0), 0.1)
    assert trigger.due(0, 1) is None
    assert trigger.correlations == {(0, 1): pytest.approx(0.1), (1, 2): pytest.approx(0.1), (2, 3): pytest.approx(0.1)}


def test_correlation_is_read_every_so_many_steps_g5() -> None:
    trigger = triggers({"correlation_below": 0.5})
    assert [trigger.correlation_due(0, step) for step in range(5)] == [True, False, True, False, True]
    assert not triggers(30).correlation_due(0, 0)


def test_a_single_live_layer_has_no_correlation_to_read_g5() -> None:
    trigger = triggers({"correlation_below": 0.5})
    read_correlation(trigger, (0,), 0.1)
    assert trigger.due(0, 1) is None


# -- state -------------------------------------------------------------------------------------------------------------


def plain(value: Any) -> Any:
    """Tensors as lists, so that states compare."""
    if isinstance(value, Tensor):
        return value.tolist()
    return {k: plain(v) for k, v in value.items()} if isinstance(value, Mapping) else value


def test_state_round_trip_in_the_middle_of_everything_g8() -> None:
    one = triggers({"plateau": 20, "correlation_below": 0.5}, check_every=3)
    feed(one, [3.0, 2.0, 1.0, 4.0])
    read_correlation(one, (0, 0, 0, 0), 0.1)
    other = triggers({"plateau": 20, "correlation_below": 0.5}, check_every=3)
    other.load_state_dict(one.state_dict())
    json.dumps(plain(one.state_dict()))
    for trigger in (one, other):
        feed(trigger, [5.0] * 30, 5)
        for _ in range(2):
            read_correlation(trigger, (0, 0, 0, 0), 0.1)
    assert plain(other.state_dict()) == plain(one.state_dict())
    assert other.due(0, 35) == one.due(0, 35)
    assert one.due(0, 35) is not None


def test_measurements_show_what_is_known() -> None:
    trigger = triggers({"plateau": 20, "correlation_below": 0.5})
    assert trigger.measurements() == {}
    feed(trigger, [2.0, 3.0])
    read_correlation(trigger, (0, 0, 0, 0), 0.25)
    assert trigger.measurements()["growth/plateau_steps"] == 1.0
    assert trigger.measurements()["growth/mean_correlation"] == pytest.approx(0.25)

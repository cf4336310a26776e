"""The model of memory and time, by numbers that one can follow by hand."""

from __future__ import annotations

import pytest

from lightning_efficient.planning.facts import Seconds
from lightning_efficient.planning.model import Alone, Interplay, Parts, predict

PARTS = Parts(
    base=100, parameters=100, gradients=100, optimizer_state=200, saved=400, peak=950, update_peak=520
)  # rest: 50 where forward ends, 20 in the update
PLAIN = Seconds(1.0, 2.0)


def alone(key: str, slot: str, seconds: Seconds, peak: int, **more: object) -> Alone:
    return Alone(key, slot, seconds, peak, **more)  # type: ignore[arg-type]


# 100 + 100 + 100 + 200 + a tenth of 400 + 50 = 590, and it took 10 more for its own
FEW_BITS = alone("4bit", "activation", Seconds(1.2, 2.3), 600, keeps={"saved": 0.1})
# 100 + 100 + 100 + 400 + 50 = 750 by the sum; without gradients, and with 30 of buffers, it took 680
STATE_AWAY = alone(
    "state", "offload", Seconds(1.5, 2.2), 680, keeps={"optimizer_state": 0.0}, busy=0.6, waited=0.3,
    writes_checkpoints=True,
)  # fmt: skip


def test_plain_training_is_what_was_measured() -> None:
    found = predict(PARTS, PLAIN, [])
    assert found.peak == 950
    assert found.seconds == found.step == PLAIN


def test_one_technique_is_what_it_did_alone() -> None:
    assert predict(PARTS, PLAIN, [FEW_BITS]).peak == 600
    found = predict(PARTS, PLAIN, [STATE_AWAY])
    assert (found.peak, found.seconds.wall, found.seconds.cpu) == (680, pytest.approx(1.5), pytest.approx(2.2))


def test_two_techniques_take_their_kinds_and_bring_their_own() -> None:
    found = predict(PARTS, PLAIN, [FEW_BITS, STATE_AWAY])
    # 100 + 100 + 100 + 40 + 50 = 390; 10 for few bits; the other is 70 below its sum
    assert found.peak == 390 + 10 - 70


def test_the_update_may_be_the_peak_of_what_is_left() -> None:
    parts = Parts(base=100, parameters=100, gradients=100, optimizer_state=200, saved=400, peak=950, update_peak=800)
    nothing_kept = alone("none", "activation", PLAIN, 810, keeps={"saved": 0.0})
    assert predict(parts, PLAIN, [nothing_kept]).peak == 810  # 800 in the update, and 10
    both = predict(parts, PLAIN, [nothing_kept, alone("s", "offload", PLAIN, 750, keeps={"optimizer_state": 0.0})])
    assert both.peak == 600 + 10 + 0  # the update without state; forward by itself: 350


def test_the_model_is_made_in_memory_whatever_comes_then() -> None:
    all_away = alone(
        "all", "offload", PLAIN, 560, keeps=dict.fromkeys(("parameters", "gradients", "optimizer_state"), 0.0)
    )
    nothing_kept = alone("none", "activation", PLAIN, 550, keeps={"saved": 0.0})
    assert predict(PARTS, PLAIN, [all_away, nothing_kept]).peak == 200


def test_disk_work_that_was_hidden_is_hidden_in_proportion() -> None:
    # Computing takes 1.2 alone, with few bits 1.4: 0.3 of the disk's 0.6 were hidden, now 0.35 are.
    found = predict(PARTS, PLAIN, [FEW_BITS, STATE_AWAY])
    assert found.seconds.wall == pytest.approx(1.0 + 0.2 + 0.2 + (0.6 - 0.3 * 1.4 / 1.2))
    assert found.seconds.cpu == pytest.approx(2.0 + 0.3 + 0.2)


def test_a_faster_step_waits_longer_for_the_disk() -> None:
    fast = alone("int8", "precision", Seconds(0.4, 0.8), 950)
    found = predict(PARTS, PLAIN, [fast, STATE_AWAY])
    assert found.seconds.wall == pytest.approx(0.4 + 0.2 + (0.6 - 0.3 * 0.6 / 1.2))


def test_growth_takes_its_part_of_all_that_the_others_add() -> None:
    growth = alone("growth", "growth", Seconds(0.4, 0.8), 950, shares=((0.25, 0.4), (0.25, 0.6)))
    found = predict(PARTS, PLAIN, [growth, FEW_BITS])
    assert found.step.wall == pytest.approx(1.2)
    assert found.seconds.wall == pytest.approx(1.2 * (0.5 + 0.25 * 0.4 + 0.25 * 0.6))
    assert found.peak == 600  # growth ends with the whole model


def test_a_pair_that_was_tried_together_is_more_than_its_sum() -> None:
    pair = Interplay((("activations-4bit", "others"), ("int8",)), Seconds(0.3, 0.4), -30)
    few, fast = (
        alone("others", "activation", Seconds(1.2, 2.3), 600),
        alone("int8", "precision", Seconds(0.4, 0.8), 950),
    )
    without, found = (predict(PARTS, PLAIN, [few, fast], interplay=known) for known in ((), [pair]))
    assert found.seconds.wall == pytest.approx(without.seconds.wall + 0.3)
    assert found.seconds.cpu == pytest.approx(without.seconds.cpu + 0.4)
    assert found.peak == without.peak - 30
    assert predict(PARTS, PLAIN, [fast], interplay=[pair]) == predict(PARTS, PLAIN, [fast])


def test_data_and_checkpoints_come_on_top() -> None:
    asynchronous = alone("async", "checkpoint", PLAIN, 960, save_seconds=0.5, writes_checkpoints=True)
    arguments = {"waits": lambda seconds: 0.1, "save_seconds": 5.0, "save_interval": 10}
    assert predict(PARTS, PLAIN, [], **arguments).seconds.wall == pytest.approx(1.6)
    assert predict(PARTS, PLAIN, [asynchronous], **arguments).seconds.wall == pytest.approx(1.15)


def test_a_checkpoint_that_the_training_writes_may_be_the_peak() -> None:
    parts = Parts(
        base=100, parameters=100, gradients=100, optimizer_state=200, saved=0, peak=520, update_peak=510,
        checkpoint_peak=900,
    )  # fmt: skip
    assert predict(parts, PLAIN, []).peak == 900
    asynchronous = alone("async", "checkpoint", PLAIN, 820, save_seconds=0.1, writes_checkpoints=True)
    assert predict(parts, PLAIN, [asynchronous]).peak == 820

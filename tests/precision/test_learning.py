"""How long operations learn, and whether low bits pay (P1)."""

from __future__ import annotations

import pytest

from lightning_efficient.precision.learning import Learning


def test_so_many_batches_however_often_it_is_computed_in_one_p1() -> None:
    learning = Learning(3)
    done = []
    for batch in range(5):
        for _ in range(2):
            learning.begin(batch, (1.0,))
        done.append(learning.done)
    assert done == [False, False, False, True, True]


def test_none_at_all() -> None:
    learning = Learning(0)
    learning.begin(0, (1.0,))
    assert learning.done


def test_until_the_limits_settle_p1() -> None:
    growing, settled = Learning(None), Learning(None)
    for batch in range(60):
        growing.begin(batch, (float(batch), 1.0))
        settled.begin(batch, (float(min(batch, 15)), 1.0))
    assert not growing.done
    assert settled.done
    assert settled.batches == 15 + 1 + 10
    for batch in range(60, 260):
        growing.begin(batch, (float(batch), 1.0))
    assert growing.done
    assert growing.batches == 201


@pytest.mark.parametrize(("low", "pays"), [(0.9, True), (1.1, False)])
def test_low_bits_pay_if_the_median_batch_was_faster(low: float, pays: bool) -> None:
    learning = Learning(5, timed=True)
    for batch in range(6):
        learning.begin(batch, ())
        for _ in range(3):  # the first batch is slow, and the third was disturbed
            learning.took(100.0 if batch in (0, 2) else low, 1.0)
    assert learning.low_pays is pays


@pytest.mark.parametrize(("low", "batches"), [(1.3, 9), (1.1, 51), (0.9, 51)])
def test_whoever_clearly_does_not_gain_is_left_alone_at_once(low: float, batches: int) -> None:
    learning = Learning(50, timed=True)
    for batch in range(60):
        learning.begin(batch, ())
        learning.took(100.0 if batch in (0, 2) else low, 1.0)
        assert learning.done == (batch + 1 >= batches)
    assert learning.batches == batches
    assert learning.low_pays is (low < 1)


def test_a_rank_that_gains_goes_with_one_that_does_not() -> None:
    gains, loses = Learning(50, timed=True), Learning(50, timed=True)
    for batch in range(10):
        for learning, low in ((gains, 0.9), (loses, 1.3)):
            learning.begin(batch, ())
            learning.took(low, 1.0)
    assert (gains.done, loses.done) == (False, True)
    values = [max(pair) for pair in zip(gains.agreed(), loses.agreed(), strict=True)]
    for learning in (gains, loses):
        learning.agree(values)
        assert learning.done
        assert learning.low_pays is False


def test_what_was_learnt_is_kept() -> None:
    one, other = Learning(None, timed=True), Learning(None, timed=True)
    for batch in range(12):
        one.begin(batch, (float(batch),))
        one.took(0.5, 1.0)
    other.load_state_dict(one.state_dict())
    for batch in range(12, 40):
        for learning in (one, other):
            learning.begin(batch, (11.0,))
            learning.took(0.5, 1.0)
    assert one.done
    assert one.low_pays
    assert one.state_dict() == other.state_dict()


def test_times_that_nobody_asks_for_are_in_no_checkpoint() -> None:
    states = []
    for seconds in (0.5, 0.7):
        learning = Learning(5)
        learning.begin(0, (1.0,))
        learning.took(seconds, 1.0)
        states.append(learning.state_dict())
    assert states[0] == states[1]

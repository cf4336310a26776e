"""What was needed in the last step tells what is needed in this one."""

from __future__ import annotations

import math

from lightning_efficient.offload.streaming.access_order import AccessOrder


def steps(order: AccessOrder, *parts: int, gradients: bool = True) -> list[bool]:
    return [order.note(part, gradients) for part in parts]


def test_o6_before_there_was_a_step_parts_come_in_their_order_and_then_backwards() -> None:
    order = AccessOrder(range(3))
    order.expect(True)
    assert list(order.upcoming(9)) == [0, 1, 2]
    assert steps(order, 0, 0, 1) == [True, False, True]
    assert list(order.upcoming(9)) == [2, 1, 0]
    assert [order.distance(part) for part in range(4)] == [3, 2, 0, math.inf]


def test_o6_a_step_is_expected_to_go_as_the_last_of_its_kind() -> None:
    order = AccessOrder(range(3))
    steps(order, 2, 0, 1, 0)
    order.finish()
    steps(order, 1, 2, gradients=False)
    order.finish()
    order.expect(True)
    assert list(order.upcoming(2)) == [2, 0]
    steps(order, 2, 0)
    assert list(order.upcoming(2)) == [1, 0]
    assert order.distance(2) == 2  # in the next step
    order.finish()
    order.expect(False)
    assert list(order.upcoming(9)) == [1, 2]


def test_o6_what_is_skipped_or_unexpected_does_not_confuse_it() -> None:
    order = AccessOrder(range(5))
    steps(order, 0, 3)
    assert list(order.upcoming(2)) == [4, 3]
    steps(order, 7)
    assert list(order.upcoming(2)) == [4, 3]
    steps(order, 0)
    assert list(order.upcoming(2)) == []
    steps(order, 0, 1)  # from the beginning
    assert list(order.upcoming(1)) == [2]


def test_o6_a_step_without_accesses_is_forgotten() -> None:
    order = AccessOrder([1, 0])
    order.expect(True)
    order.finish()
    order.expect(True)
    assert list(order.upcoming(9)) == [1, 0]

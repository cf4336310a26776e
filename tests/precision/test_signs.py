"""Signs just over and just under their limits, and limits that are learnt (P2, P6-P9, P12)."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from lightning_efficient.precision.nodes import Node
from lightning_efficient.precision.signs import HISTORY, Limits, Measured, Probe, Tracker, apart, shared_exponent
from lightning_efficient.precision.status import ReturnPolicy

HEALTHY = Measured(exponent=5)


def tracker(**limits: float) -> Tracker:
    made = Tracker(Limits(**limits))
    assert made.sign(HEALTHY) == ""
    return made


def test_values_that_are_not_finite_p2() -> None:
    assert "not finite" in tracker().sign(replace(HEALTHY, finite=False))


def test_sampled_zeros_are_a_sign_only_where_there_were_values_before_p8() -> None:
    zeros = Measured(exponent=None, all_zero=True)
    assert Tracker().sign(zeros) == "", "a layer that begins with zeros"
    assert "zero" in tracker().sign(zeros)


@pytest.mark.parametrize("name", ["overflow", "underflow"])
def test_ratios_over_their_limits_p9(name: str) -> None:
    assert tracker().sign(replace(HEALTHY, **{name: 0.01})) == ""
    assert name in tracker().sign(replace(HEALTHY, **{name: 0.0101}))
    assert tracker(**{name: 0.6}).sign(replace(HEALTHY, **{name: 0.6})) == ""
    assert name in tracker(**{name: 0.6}).sign(replace(HEALTHY, **{name: 0.61}))


def test_the_quantization_error_p12() -> None:
    assert tracker().sign(replace(HEALTHY, error=0.03)) == ""
    assert "error" in tracker().sign(replace(HEALTHY, error=0.031))


def test_the_range_of_exponents_over_the_last_operations_p7() -> None:
    varying = tracker()
    for exponent in (5, 9, 13):
        assert varying.sign(Measured(exponent)) == ""
    assert "varies by 9" in varying.sign(Measured(14))
    assert varying.last == 13, "what failed is not remembered"
    for _ in range(HISTORY):
        assert varying.sign(Measured(13)) == ""
    assert varying.sign(Measured(14)) == "", "the first ones are forgotten"


@pytest.mark.parametrize(("first", "second", "is_sign"), [(5, 5, False), (11, 5, False), (12, 5, True), (5, 12, True)])
def test_operands_whose_exponents_are_apart_p6(first: int, second: int, is_sign: bool) -> None:
    assert bool(apart((first, second), usual=0, allowed=6)) == is_sign
    assert bool(apart((first + 20, second), usual=20, allowed=6)) == is_sign


def test_an_operand_of_zeros_is_not_apart_p6() -> None:
    assert apart((None, 5), usual=0, allowed=0) == ""


def test_limits_lie_beyond_what_was_healthy_p1() -> None:
    """Where most gradients are too small in health, it takes more than that; activations stay strict."""
    gradients, activations = Tracker(), Tracker()
    for underflow in (0.57, 0.96):
        gradients.learn(replace(HEALTHY, underflow=underflow))
    activations.learn(replace(HEALTHY, underflow=0.047))
    assert gradients.sign(replace(HEALTHY, underflow=0.98)) == ""
    assert gradients.sign(replace(HEALTHY, underflow=0.999)) != ""
    assert activations.sign(replace(HEALTHY, underflow=0.1)) == ""
    assert activations.sign(replace(HEALTHY, underflow=0.5)) != ""


def test_nothing_sick_is_learnt() -> None:
    sick = Tracker()
    sick.learn(Measured(exponent=3, overflow=1.0, underflow=1.0, finite=False))
    sick.learn(Measured(exponent=None, all_zero=True, underflow=1.0))
    assert sick.limits == Limits()
    assert sick.last is None


def test_the_state_goes_on() -> None:
    one, other = Tracker(), Tracker()
    for exponent in (3, 6, 4):
        one.learn(Measured(exponent, overflow=0.02, underflow=0.3, error=0.1))
    other.load_state_dict(one.state_dict())
    assert other.state_dict() == one.state_dict()
    assert other.exponent_range == one.exponent_range == 3


@pytest.mark.parametrize("largest", [1.0, 0.999, 1.001, 127.0, 128.0, 2.0**-140, 3e38, 5e-324])
def test_the_largest_value_fits_its_code(largest: float) -> None:
    exponent = shared_exponent(largest, 8)
    assert exponent is not None
    code = largest * 2.0 ** min(exponent, 1000) * 2.0 ** max(0, exponent - 1000)
    assert 63.5 <= code <= 128


def test_zero_has_no_exponent_and_infinity_is_refused() -> None:
    assert shared_exponent(0.0, 8) is None
    for bad in (math.inf, math.nan):
        with pytest.raises(ValueError, match="does not exist"):
            shared_exponent(bad, 8)


def test_of_gradients_most_may_become_zero_late_in_training_p9() -> None:
    node = Node("a layer", "linear", ReturnPolicy())
    late = replace(HEALTHY, underflow=0.97, error=0.5)
    assert node.sign_of_operands("grad_weight", late, HEALTHY) == ""
    assert "input: underflow" in node.sign_of_operands("forward", late, HEALTHY)
    assert "gradient: underflow" in node.sign_of_operands("grad_weight", replace(late, underflow=0.991), HEALTHY)
    assert "gradient: quantization error" in node.sign_of_operands("grad_weight", replace(late, error=0.71), HEALTHY)
    given = Node("a layer", "linear", ReturnPolicy(), Limits())
    assert "gradient: underflow" in given.sign_of_operands("grad_weight", late, HEALTHY)


def test_a_block_that_happens_to_be_next_to_nothing_is_no_sign_p2() -> None:
    """What it is off is held against the largest of the last blocks."""
    node, fine = Node("a layer", "linear", ReturnPolicy()), Measured(3)
    assert "1.50 off" in node.sign_of_result("grad_input", fine, Probe(1.5, 1.0)), "nothing else is known"
    assert node.sign_of_result("grad_input", fine, Probe(0.5, 100.0)) == ""
    for _ in range(HISTORY - 1):
        assert node.sign_of_result("grad_input", fine, Probe(0.5, 0.01)) == ""
    assert node.sign_of_result("grad_input", fine, Probe(0.0, 0.0)) == "", "a block of zeros that is right"
    assert "off" in node.sign_of_result("grad_input", fine, Probe(150.0, 0.01))
    assert "off" in node.sign_of_result("grad_input", fine, Probe(math.nan, 1.0))
    assert node.sign_of_result("grad_input", fine, Probe(0.005, 0.01)) == ""
    assert "50.00 off" in node.sign_of_result("grad_input", fine, Probe(0.5, 0.01)), "the large one is forgotten"
    assert node.sign_of_result("forward", fine, None) == ""


def test_how_far_off_a_block_may_be_is_learnt_p1() -> None:
    node, fine = Node("a layer", "linear", ReturnPolicy()), Measured(3)
    node.learn("grad_input", fine, fine, 3, Probe(0.8, 1.0))
    node.learn("forward", fine, fine, 3, Probe(0.01, 1.0))
    assert node.sign_of_result("grad_input", fine, Probe(3.1, 1.0)) == ""
    assert "limit 3.20" in node.sign_of_result("grad_input", fine, Probe(3.3, 1.0))
    assert "limit 0.25" in node.sign_of_result("forward", fine, Probe(0.26, 1.0)), "it is never less than that"

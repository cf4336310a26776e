"""What the user may ask for, and what is said where it is wrong."""

from __future__ import annotations

from typing import Any

import pytest

from lightning_efficient import ActivationCompressionPlugin
from lightning_efficient.activation_compression.classify import BOUNDED, EXACT, FP8
from lightning_efficient.activation_compression.rates import LayerRates, fits
from lightning_efficient.activation_compression.schedule import CubicSchedule
from lightning_efficient.activation_compression.settings import parse_schedule

SCHEDULE = {"initial_bits": 8, "final_bits": 2, "begin": 0.05, "end": 0.5}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bits": 0}, r"bits=0 is not allowed. Use 1 to 8, 'fp8', or 'lossless'"),
        ({"bits": 9}, "bits=9"),
        ({"bits": True}, "bits=True"),
        ({"bits": "4"}, "bits='4'"),
        ({"overrides": {"head": "exact"}}, r"overrides\['head'\]='exact' is not allowed. Use 1 to 8, 'fp8', or 'raw'"),
        ({"overrides": {"head": 16}}, r"overrides\['head'\]=16"),
        ({"group_size": 100}, "group_size=100 is not allowed. Use a power of two from 64 to 65536"),
        ({"schedule": {"initial_bits": 8}}, "must have the keys initial_bits, final_bits, begin, end"),
        ({"schedule": SCHEDULE | {"steps": 3}}, "must have the keys"),
        ({"schedule": SCHEDULE | {"final_bits": 0}}, r"schedule\['final_bits'\]=0 is not allowed. Use 1 to 8"),
        ({"schedule": SCHEDULE | {"begin": -1}}, r"schedule\['begin'\]=-1 is not allowed"),
        ({"schedule": SCHEDULE | {"end": 1.5}}, r"schedule\['end'\]=1.5 is not allowed. Use a step .* up to 1.0"),
        ({"schedule": SCHEDULE | {"end": 0.01}}, "ends before it begins"),
        ({"schedule": SCHEDULE, "bits": "lossless"}, "schedule=.* and bits='lossless' are ways to say the same"),
        ({"schedule": SCHEDULE, "error_bound": 0.1}, "error_bound=0.1 and schedule=.* are ways to say the same"),
        ({"bits": 4, "error_bound": 0.1}, "error_bound=0.1 and bits=4 are ways to say the same"),
        ({"bits": 4, "memory_budget": "1GiB"}, "memory_budget='1GiB' and bits=4 are ways to say the same"),
        ({"memory_budget": 1.5}, "memory_budget=1.5 is not allowed. Use bytes"),
        ({"memory_budget": "much"}, "memory_budget='much' is no amount of memory"),
        ({"schedule": {"initial_memory_budget": 0.5, "final_memory_budget": 9, "begin": 0, "end": 5}}, "Use bytes"),
        ({"adaptive": {"every": 100}}, "must have the keys every and target, may have guard, and no others"),
        ({"adaptive": {"every": 1, "target": 0.1}}, r"adaptive\['every'\]=1 is not allowed. Use a number of steps"),
        ({"adaptive": {"every": 9, "target": 0}}, r"adaptive\['target'\]=0 is not allowed"),
        ({"adaptive": {"every": 9, "target": 0.1}, "bits": "lossless"}, "bits='lossless' leaves no choice"),
        ({"error_bound": 0}, "error_bound=0 is not allowed. Use a number above zero"),
        ({"schedule": SCHEDULE | {"initial_error_bound": 0.1}}, "must have the keys initial_error_bound"),
        (
            {"schedule": {"initial_error_bound": 0, "final_error_bound": 1, "begin": 0, "end": 5}},
            r"schedule\['initial_error_bound'\]=0 is not allowed",
        ),
    ],
)
def test_what_is_wrong_is_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ActivationCompressionPlugin(**arguments)


def test_the_schedule_is_the_cubic_curve_a3() -> None:
    curve = CubicSchedule(initial=8, final=2, begin=10, end=110)
    assert [curve.at(step) for step in (0, 10, 110, 500)] == [8, 8, 2, 2]
    assert curve.at(60) == 2 + 6 * 0.5**3
    values = [curve.at(step) for step in range(120)]
    assert values == sorted(values, reverse=True)


def test_fractions_are_of_the_run_a2() -> None:
    schedule = parse_schedule(SCHEDULE)
    assert schedule is not None
    assert schedule.uses_fractions
    assert schedule.over(200) == CubicSchedule(8, 2, 10, 100)
    with pytest.raises(ValueError, match="a run that has no end"):
        schedule.over(float("inf"))
    bounds = parse_schedule({"initial_error_bound": 1e-3, "final_error_bound": 0.1, "begin": 0, "end": 10})
    assert bounds is not None
    assert bounds.of == "error_bound"
    assert bounds.over(float("inf")).at(5) == 0.1 + (1e-3 - 0.1) / 8
    steps = parse_schedule(SCHEDULE | {"begin": 3, "end": 7})
    assert steps is not None
    assert not steps.uses_fractions
    assert steps.over(float("inf")) == CubicSchedule(8, 2, 3, 7)
    mixed = parse_schedule(SCHEDULE | {"begin": 30})
    assert mixed is not None
    assert mixed.over(40) == CubicSchedule(8, 2, 30, 31)


@pytest.mark.parametrize(
    ("pattern", "layer", "expected"),
    [
        ("head", "head", True),
        ("head", "model.head", True),
        ("head", "model.head.projection", True),
        ("head", "model.header", False),
        ("blocks.*.mlp", "model.blocks.3.mlp.up", True),
        ("blocks.*.mlp", "model.blocks.3.attention", False),
        ("blocks.[12]", "blocks.2.mlp", True),
        ("blocks.[12]", "blocks.3.mlp", False),
        ("*", "anything", True),
    ],
)
def test_patterns_name_modules_and_what_is_in_them(pattern: str, layer: str, expected: bool) -> None:
    assert fits(pattern, layer) is expected


def test_rates_have_floors_and_overrides() -> None:
    rates = LayerRates(2, {"head": "raw", "blocks.0": 1})
    assert rates.of("linear", "blocks.1.mlp.up")[0] == 2
    assert rates.of("attention", "blocks.1.attention")[0] == 4
    assert rates.of("loss", "")[0] == 8
    assert rates.of("linear", "head")[0] == EXACT
    assert rates.of("attention", "blocks.0.attention")[0] == 1
    floats = LayerRates(FP8, {"head": 4, "blocks.0": "fp8"})
    assert floats.of("linear", "blocks.1") == floats.of("attention", "blocks.1") == (FP8, FP8)
    assert floats.of("loss", "")[0] == 8, "log-probabilities need absolute precision"
    assert floats.of("linear", "head")[0] == 4
    assert LayerRates(2, {"blocks.0": "fp8"}).of("loss", "blocks.0")[0] == FP8
    rates.bits = 6
    assert rates.of("attention", "blocks.1.attention")[0] == 6
    for least, expected in ((2, 4), (4, 4), (6, 6)):
        beside = LayerRates(2, least=least)  # a schedule is at 2 bits
        assert beside.of("attention", "")[0] == beside.of("other", "")[0] == expected, "no floor is lowered"
        assert [beside.of(kind, "")[0] for kind in ("linear", "normalization", "block", "loss")] == [2, 2, 8, 8]
    bounded = LayerRates(4, {"head": "raw"}, error_bound=0.1)
    assert bounded.of("loss", "")[0] == BOUNDED
    assert bounded.of("loss", "head")[0] == EXACT
    assert rates.unused(["head", "blocks.1"]) == ["blocks.0"]

"""What the user asked for, turned into phases."""

from __future__ import annotations

from typing import Any

import pytest

from lightning_efficient.growth import GrowAndUnshareCallback
from lightning_efficient.growth.schedule import Until
from lightning_efficient.growth.settings import Phase, check_stages, make_phases, parse_width


def phases(mode: str | None, stages: Any = None, depth: int = 8, **options: Any) -> list[Phase]:
    defaults: dict[str, Any] = {"unit": None, "sharing": "cycle", "until": None, "lr_scale": 1.0}
    return make_phases(mode, stages, full_depth=depth, **{**defaults, **options})


def depths(mode: str, depth: int) -> list[tuple[int, float | None]]:
    return [(len(p.leaders), p.until.fraction if p.until else None) for p in phases(mode, depth=depth)]


# -- defaults ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["stack", "interleave", "middle"])
@pytest.mark.parametrize(
    ("depth", "expected"),
    [
        (2, [(1, 0.50), (2, None)]),
        (3, [(1, 0.50), (3, None)]),
        (4, [(1, 0.25), (2, 0.50), (4, None)]),
        (8, [(2, 0.25), (4, 0.50), (8, None)]),
        (12, [(3, 0.25), (6, 0.50), (12, None)]),
    ],
)
def test_depth_grows_from_a_quarter_over_a_half_g3(mode: str, depth: int, expected: Any) -> None:
    assert depths(mode, depth) == expected


@pytest.mark.parametrize("depth", range(2, 30))
def test_default_depths_always_grow_g3(depth: int) -> None:
    found = [len(p.leaders) for p in phases("stack", depth=depth)]
    assert found == sorted(set(found))
    assert found[-1] == depth


@pytest.mark.parametrize(
    ("sharing", "unit", "leaders"),
    [
        ("cycle", None, (0,) * 8),
        ("cycle", 2, (0, 1) * 4),
        ("sequence", None, (0, 0, 2, 2, 4, 4, 6, 6)),
        ("sequence", 4, (0, 0, 0, 0, 4, 4, 4, 4)),
        ("all", None, (0,) * 8),
    ],
)
def test_sharing_lasts_a_tenth_of_the_run_g1(sharing: str, unit: int | None, leaders: tuple[int, ...]) -> None:
    first, last = phases("share", sharing=sharing, unit=unit)
    assert (first.leaders, first.until) == (leaders, Until(fraction=0.10))
    assert (last.leaders, last.until) == (tuple(range(8)), None)


def test_width_alone_has_one_phase_g4() -> None:
    assert phases(None) == [Phase(tuple(range(8)), None)]


def test_learning_rates_are_scaled_before_the_last_phase_only_g8() -> None:
    assert [p.lr_scale for p in phases("stack", lr_scale=0.5)] == [0.5, 0.5, 1.0]
    stages = [{"depth": 2, "lr_scale": 0.1}, {"depth": 4}, {"depth": 8, "lr_scale": 2}]
    assert [p.lr_scale for p in phases("stack", stages, lr_scale=0.5)] == [0.1, 0.5, 2.0]


def test_stages_as_given_g3() -> None:
    found = phases("stack", [{"depth": 2, "until": 10}, {"depth": 3, "until": {"plateau": 5}}, {}])
    assert [len(p.leaders) for p in found] == [2, 3, 8]
    assert [p.until for p in found] == [Until(step=10), Until(fraction=0.5, plateau=5), None]


def test_sharing_in_stages_splits_the_groups_g1() -> None:
    found = phases("share", [{"unit": 1, "until": 5}, {"unit": 4, "until": 9}, {}])
    assert [p.leaders for p in found] == [(0,) * 8, (0, 1, 2, 3) * 2, tuple(range(8))]


@pytest.mark.parametrize(
    ("leaders", "text"), [((0, 1, 2), "3 layers"), ((0, 1, 0, 1), "4 layers with 2 sets of weights")]
)
def test_a_phase_as_text(leaders: tuple[int, ...], text: str) -> None:
    assert str(Phase(leaders, None)) == text


# -- what does not fit the model ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "stages", "message"),
    [
        ("stack", [{"depth": 2}, {"depth": 4}], r"last stage is 4 layers, but the model has 8.*full model"),
        ("stack", [{"depth": 9}, {}], r"stages\[0\]\.depth=9, but the model has 8"),
        ("stack", [{"depth": 4}, {"depth": 2}, {}], r"stages\[1\] \(2 layers\) does not continue stages\[0\]"),
        ("stack", [{"depth": 8}, {}], r"stages\[1\] \(8 layers\) does not continue"),
        ("share", [{"unit": 3}, {}], r"unit=3 does not divide the 8 layers"),
        ("share", [{"unit": 8}, {}], r"stages\[1\] .* does not continue"),
    ],
)
def test_stages_that_do_not_fit_are_named_g3(mode: str, stages: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        phases(mode, stages)


def test_sharing_stages_that_do_not_refine_are_refused_g1() -> None:
    """A unit of three has more layers of its own than a unit of two, but does not split its groups."""
    with pytest.raises(ValueError, match=r"stages\[1\] .*split its groups"):
        phases("share", [{"unit": 2}, {"unit": 3}, {}], depth=6)


# -- what never fits ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "deepen"}, r"mode='deepen': expected one of \['share', 'stack', 'interleave', 'middle'\]"),
        ({"mode": "stack", "unit": 2}, r"unit=2 is for mode='share', not for mode='stack'"),
        ({"mode": "stack", "until": 0.5}, r"until=0\.5 is for mode='share'"),
        ({"mode": "share", "unit": 2, "stages": [{"unit": 2}, {}]}, r"either `stages` or `unit`"),
        ({"mode": "share", "unit": 0}, r"unit=0"),
        ({"mode": "share", "unit": -1}, r"unit=-1"),
        ({"mode": "share", "unit": True}, r"unit=True"),
        ({"mode": "share", "until": 0}, r"until\.step=0"),
        ({"mode": "stack", "stages": [{"depth": 2}]}, r"expected at least two"),
        ({"mode": "stack", "stages": [{"unit": 2}, {}]}, r"stages\[0\] has unknown keys \['unit'\]; mode='stack'"),
        ({"mode": "share", "stages": [{"depth": 2}, {}]}, r"stages\[0\] has unknown keys \['depth'\]; mode='share'"),
        ({"mode": "stack", "stages": [{"depth": 0}, {}]}, r"stages\[0\]\.depth=0: expected a number of layers"),
        ({"mode": "stack", "stages": [{}, {}]}, r"stages\[0\]\.depth=None"),
        ({"mode": "stack", "stages": [{"depth": True}, {}]}, r"stages\[0\]\.depth=True"),
        ({"mode": "stack", "stages": [{"depth": 2}, {"until": 5}]}, r"stages\[1\]\.until: the last stage lasts"),
        ({"mode": "stack", "stages": [{"depth": 2, "lr_scale": 0}, {}]}, r"stages\[0\]\.lr_scale=0"),
        ({"mode": "stack", "stages": [{"depth": 2, "until": "x"}, {}]}, r"stages\[0\]\.until='x'"),
        ({"width": {"factor": 2}, "stages": [{"depth": 2}, {}]}, r"with a `mode`"),
    ],
    ids=str,
)
def test_arguments_are_checked_in_the_constructor_by_name(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GrowAndUnshareCallback(**arguments)


def test_valid_stages_pass() -> None:
    check_stages("stack", [{"depth": 2, "until": 0.1, "lr_scale": 0.5}, {"depth": 8}], None, None)
    check_stages("share", [{"unit": 2}, {}], None, None)


# -- width -------------------------------------------------------------------------------------------------------------


def test_width_defaults_to_a_fifth_of_the_run_g4() -> None:
    settings = parse_width({"factor": 2, "readout": "norm", "arguments": None})
    assert settings is not None
    assert (settings.factor, settings.until, settings.readout) == (2, Until(fraction=0.20), "norm")
    assert settings.arguments is None
    assert parse_width(None) is None


@pytest.mark.parametrize(
    ("width", "message"),
    [
        ({}, r"width\.factor=None: expected an integer of at least 2"),
        ({"factor": 1}, r"width\.factor=1"),
        ({"factor": 2.0}, r"width\.factor=2\.0"),
        ({"factor": True}, r"width\.factor=True"),
        ({"factor": 2, "by": 3}, r"width has unknown keys \['by'\]; allowed are \['factor', 'until'"),
        ({"factor": 2, "until": 0}, r"width\.until\.step=0"),
        ({"factor": 2, "until": {"correlation_below": 0.5}}, r"width\.until\.correlation_below.*mode='share'"),
    ],
    ids=str,
)
def test_width_settings_are_checked_by_name_g4(width: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_width(width)

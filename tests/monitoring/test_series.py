"""A series stays short, evenly spaced, and keeps what a reader looks for."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from lightning_efficient.monitoring.series import Series, quantile


def _filled(count: int, limit: int = 10) -> Series:
    series = Series(limit)
    for step in range(count):
        series.append(step, step / 10, step / 20, float(step % 7))
    return series


def test_a_short_series_keeps_all() -> None:
    assert [point.step for point in _filled(10).points()] == list(range(10))


@pytest.mark.parametrize("count", [11, 100, 12_345])
def test_a_long_series_is_bounded_and_evenly_spaced(count: int) -> None:
    series = _filled(count)
    kept = [point.step for point in series.points()]
    assert len(series) <= 10
    assert len(kept) <= 12  # the largest value, first met at step 6, and the last one are kept wherever they fall
    assert (kept[0], kept[-1]) == (0, count - 1)
    assert 6 in kept
    spaced = [step for step in kept[:-1] if step != 6]
    assert len({after - before for before, after in pairwise(spaced)} - {spaced[1]}) <= 1


def test_the_largest_survives_a_first_value_that_is_none() -> None:
    series = Series(4)
    for step in range(101):
        series.append(step, 0.0, 0.0, math.nan if step in (0, 50) else 99.0 if step == 37 else 1.0)
    assert 99.0 in [point.value for point in series.points()]


def test_the_largest_and_the_last_value_survive() -> None:
    series = Series(4)
    for step in range(101):
        series.append(step, 0.0, 0.0, 99.0 if step == 37 else 1.0)
    assert max(point.value for point in series.points()) == 99.0
    assert series.points()[-1].step == 100
    assert series.last == 1.0


def test_state_goes_through_a_weights_only_checkpoint(tmp_path) -> None:
    series = _filled(57)
    torch.save(series.state_dict(), tmp_path / "state.pt")
    restored = Series(10)
    restored.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert restored.points() == series.points()
    for one in (series, restored):
        for step in range(57, 90):
            one.append(step, 0.0, 0.0, 1.0)
    assert restored.points() == series.points()


def test_an_empty_series() -> None:
    restored = Series()
    restored.load_state_dict(Series().state_dict())
    assert restored.points() == ()
    assert restored.last is None


def test_too_small_a_limit_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 2"):
        Series(1)


def test_quantiles() -> None:
    assert quantile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert quantile([0.0, 10.0], 0.25) == 2.5
    assert math.isnan(quantile([], 0.5))

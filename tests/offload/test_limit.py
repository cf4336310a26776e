"""The fraction of the limit, from made-up times."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from lightning_efficient.offload import limit
from lightning_efficient.offload.limit import LimitMeter, Work


def meter(monkeypatch: pytest.MonkeyPatch, *, step: float, disk: float, waited: float, steps: int) -> LimitMeter:
    clock: Sequence[float] = [step * number for number in range(steps)]
    found, times = LimitMeter(), iter(clock)
    monkeypatch.setattr(limit.time, "perf_counter", lambda: next(times))
    for number in range(steps):
        found.step(Work(disk * number, waited * number))
    return found


def test_a_step_that_waits_for_nothing_is_at_its_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    values = meter(monkeypatch, step=1.0, disk=0.6, waited=0.0, steps=6).measurements()
    assert values["fraction_of_limit"] == pytest.approx(1.0)
    assert values["overlap"] == pytest.approx(1.0)
    assert values["step_ms"] == pytest.approx(1000)
    assert values["disk_busy_ms"] == pytest.approx(600)


def test_where_the_disk_binds_it_is_the_disks_part(monkeypatch: pytest.MonkeyPatch) -> None:
    values = meter(monkeypatch, step=1.0, disk=0.9, waited=0.5, steps=6).measurements()
    assert values["fraction_of_limit"] == pytest.approx(0.9)
    assert values["overlap"] == pytest.approx(1 - 0.5 / 0.9)


def test_where_neither_binds_time_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    values = meter(monkeypatch, step=1.0, disk=0.4, waited=0.4, steps=6).measurements()
    assert values["fraction_of_limit"] == pytest.approx(0.6)
    assert values["overlap"] == pytest.approx(0.0)


def test_nothing_is_said_of_the_first_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    assert meter(monkeypatch, step=1.0, disk=0.4, waited=0.4, steps=3).measurements() == {}

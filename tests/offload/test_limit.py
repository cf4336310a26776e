"""The fraction of the limit, and how long steps wait."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from lightning_efficient import OffloadStrategy
from lightning_efficient.offload import limit, tier_set
from lightning_efficient.offload.batches.batch_control import BatchController, StepMeasurement
from lightning_efficient.offload.limit import LimitMeter, Work
from tests.helpers.fitting import fit
from tests.offload.slow_disk import slow_disk


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


def test_batch_feedback_is_told_how_long_a_step_waited_o7(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tier_set, "DiskTier", slow_disk(10e6))
    seen: list[StepMeasurement] = []
    observe = BatchController.observe

    def spied(self: BatchController, step: StepMeasurement) -> None:
        seen.append(step)
        observe(self, step)

    monkeypatch.setattr(BatchController, "observe", spied)
    strategy = OffloadStrategy(
        batch_feedback=True, place={"optimizer_state": "disk"}, schedule="after_backward", staging="256KiB"
    )
    state = sum(2 * 4 * p.numel() for p in fit(None, build={"strategy": strategy}, max_steps=6).module.parameters())
    assert seen[0].idle_s == seen[0].step_s == 0  # nothing came before
    idle = [step.idle_s for step in seen[2:]]  # the first update has no state to wait for
    assert all(0 < step.idle_s <= step.step_s for step in seen[2:])
    assert sum(idle) / len(idle) > 0.5 * state / 10e6  # no step before it is long enough to hide that

"""The fraction of the limit, and how long steps wait."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_efficient import OffloadStrategy
from lightning_efficient.offload import limit, tier_set
from lightning_efficient.offload.batches.batch_control import BatchController, StepMeasurement
from lightning_efficient.offload.limit import LimitMeter, Work
from lightning_efficient.offload.tiers import disk_bandwidth
from tests.helpers.fitting import fit, make_trainer
from tests.offload.slow_disk import slow_disk

STATE = {"optimizer_state": "disk"}


def meter(
    monkeypatch: pytest.MonkeyPatch,
    *,
    step: float = 1.0,
    disk: float = 0.0,
    waited: float = 0.0,
    steps: int = 6,
    longer: Mapping[int, float] | None = None,
    **arguments: Any,
) -> LimitMeter:
    """After steps of these times; those in ``longer`` had an evaluation behind them, of so long."""
    work, now = [Work(disk * number, waited * number, disk_bytes=8.0 * number) for number in range(steps)], [0.0]
    found = LimitMeter(lambda: work[0], **arguments)
    monkeypatch.setattr(limit.time, "perf_counter", lambda: now[0])
    for number in range(steps):
        found.step()
        now[0] += step
        if number in (longer or {}):
            found.interrupt()
            now[0] += longer[number]
        work[:1] = []
    return found


def test_a_step_that_waits_for_nothing_is_at_its_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    values = meter(monkeypatch, disk=0.6).measurements()
    assert values["fraction_of_limit"] == pytest.approx(1.0)
    assert values["overlap"] == pytest.approx(1.0)
    assert values["step_ms"] == pytest.approx(1000)
    assert values["disk_busy_ms"] == pytest.approx(600)


def test_where_the_disk_binds_it_is_the_disks_part(monkeypatch: pytest.MonkeyPatch) -> None:
    found = meter(monkeypatch, disk=0.9, waited=0.5)
    assert found.measurements()["fraction_of_limit"] == pytest.approx(0.9)
    assert found.measurements()["overlap"] == pytest.approx(1 - 0.5 / 0.9)
    found.disk_bytes_per_second = 8 / 0.7  # it was busy for longer than it had to be
    assert found.measurements()["fraction_of_limit"] == pytest.approx(0.7)


def test_where_neither_binds_time_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    values = meter(monkeypatch, disk=0.4, waited=0.4).measurements()
    assert values["fraction_of_limit"] == pytest.approx(0.6)
    assert values["overlap"] == pytest.approx(0.0)


def test_evaluations_and_saves_are_no_part_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = meter(monkeypatch, disk=0.9, waited=0.5, steps=9).measurements()
    assert meter(monkeypatch, disk=0.9, waited=0.5, steps=9, longer={4: 7.0, 6: 1.0}).measurements() == pytest.approx(
        plain
    )


def test_of_a_device_that_computes_behind_the_host_nothing_is_guessed(monkeypatch: pytest.MonkeyPatch) -> None:
    values = meter(monkeypatch, disk=0.3, behind=True).measurements()
    assert values == pytest.approx({"step_ms": 1000, "disk_busy_ms": 300})


def test_nothing_is_said_of_the_first_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    assert meter(monkeypatch, disk=0.4, waited=0.4, steps=3).measurements() == {}


class Wide(pl.LightningModule):
    """Two large layers on a small batch: much to move, and little to compute but for a known time."""

    def __init__(self, computing: float) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(1024, 1024), nn.Linear(1024, 1024))
        self.computing = computing

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        time.sleep(self.computing)
        return self.layers(batch[0]).square().mean()

    def validation_step(self, batch: list[Tensor], index: int) -> None:
        time.sleep(0.2)

    def on_train_batch_end(self, *_: Any) -> None:
        time.sleep(0.05)  # which is neither computing nor waiting

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), fused=True)


@pytest.mark.parametrize("computing", [0.4, 0.02])
def test_the_fraction_is_that_by_hand(computing: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a disk of a known rate, and a step that computes for a known time."""
    rate = 200e6
    for place in (tier_set, disk_bandwidth):
        monkeypatch.setattr(place, "DiskTier", slow_disk(rate))
    monkeypatch.setattr(disk_bandwidth, "_WORTH", 1)
    strategy = OffloadStrategy(place=STATE, staging="12MiB", schedule="in_backward")
    module, data = Wide(computing), DataLoader(TensorDataset(torch.randn(8, 1024)))
    make_trainer(strategy=strategy, max_steps=8, limit_val_batches=1, val_check_interval=4).fit(module, data, data)
    values = strategy.measurements()
    state = 2 * 4 * sum(p.numel() for p in module.parameters())
    by_hand = max(computing, 2 * state / rate) / (values["offload/step_ms"] / 1e3)
    assert values["offload/fraction_of_limit"] == pytest.approx(by_hand, rel=0.2)  # of a machine that others use too
    assert values["offload/fraction_of_limit"] < 0.95


def test_batch_feedback_is_told_how_long_a_step_waited_o7(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tier_set, "DiskTier", slow_disk(10e6))
    seen: list[StepMeasurement] = []
    observe = BatchController.observe

    def spied(self: BatchController, step: StepMeasurement) -> None:
        seen.append(step)
        observe(self, step)

    monkeypatch.setattr(BatchController, "observe", spied)
    strategy = OffloadStrategy(batch_feedback=True, place=STATE, schedule="after_backward", staging="256KiB")
    state = sum(2 * 4 * p.numel() for p in fit(None, build={"strategy": strategy}, max_steps=6).module.parameters())
    assert seen[0].idle_s == seen[0].step_s == 0  # nothing came before
    idle = [step.idle_s for step in seen[2:]]  # the first update has no state to wait for
    assert all(0 < step.idle_s <= step.step_s for step in seen[2:])
    assert sum(idle) / len(idle) > 0.5 * state / 10e6  # no step before it is long enough to hide that

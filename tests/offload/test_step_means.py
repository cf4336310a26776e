"""What is logged is of a batch, and of those since the last log."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest

from lightning_efficient import EfficiencyMonitor, OffloadStrategy
from lightning_efficient.offload.step_means import StepMeans
from lightning_efficient.offload.tiers.disk import DiskTier
from tests.helpers.fitting import ListLogger, fit, make_trainer
from tests.technique_settings import demo_data, demo_model

DISK = {"optimizer_state": "disk"}


def test_means_are_of_the_steps_since_the_last_look() -> None:
    totals = {"bytes": 100.0}
    means = StepMeans(lambda: totals)
    means.step()
    means.look()  # no step has ended
    totals["bytes"] += 10
    assert means.means() == {"bytes": 10}
    for _ in range(4):
        means.step()
        totals["bytes"] += 2
    means.look()
    assert means.means() == {"bytes": (10 + 4 * 2) / 4}
    totals["bytes"] = 6.0  # begun anew
    assert means.means() == {"bytes": (10 + 4 * 2) / 4}
    means.step()
    means.step()
    totals["more"] = 4.0
    means.look()
    assert means.means() == {"bytes": 3.0, "more": 2.0}


def test_bytes_are_those_of_a_batch_and_totals_have_their_name() -> None:
    run = fit(None, build={"strategy": OffloadStrategy(offload_dir="swap", place=DISK, schedule="after_backward")})
    state = sum(2 * 4 * p.numel() for p in run.module.parameters())
    logged = [metrics for _, metrics in run.logged if "offload/disk_written_bytes" in metrics]
    means = [metrics["offload/disk_written_bytes"] for metrics in logged]
    # What a step asked to be written may be written in the next one.
    assert (len(means) - 3) * state < sum(means[1:]) < 1.1 * len(means) * state
    totals = [metrics["offload/total_disk_written_bytes"] for metrics in logged]
    assert totals == sorted(totals)


class Keeps(pl.Callback):
    def on_train_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.last = dict(trainer.strategy.measurements())


def test_they_can_be_asked_for_when_training_has_ended() -> None:
    keeps = Keeps()
    run = fit(None, build={"strategy": OffloadStrategy(offload_dir="swap", place=DISK)}, after=[keeps])
    values = run.trainer.strategy.measurements()
    moving = {"offload/total_disk_read_bytes", "offload/total_disk_written_bytes"}  # by what was on its way then
    assert all(values[name] >= keeps.last[name] for name in moving)
    assert values == pytest.approx(keeps.last | {name: values[name] for name in moving})
    assert values["offload/states_elsewhere"] == len(list(run.module.parameters()))
    assert values["offload/disk_bytes"]


def test_waiting_for_a_commit_is_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    import time

    real = DiskTier.commit

    def slow(self: DiskTier) -> None:
        time.sleep(0.05)
        real(self)

    monkeypatch.setattr(DiskTier, "commit", slow)
    strategy = OffloadStrategy(offload_dir="swap", place=DISK, schedule="after_backward")
    run = fit(None, build={"strategy": strategy}, max_steps=4)
    assert run.trainer.strategy.measurements()["offload/wait_ms"] >= 50


@pytest.mark.parametrize(
    ("kinds", "most"), [(["optimizer_state"], "2 MiB"), (["optimizer_state", "activation", "gradient"], "3.5 MiB")]
)
def test_the_start_says_where_how_much_and_why(
    kinds: list[str], most: str, caplog: pytest.LogCaptureFixture, tmp_path: Any
) -> None:
    with caplog.at_level("INFO"):
        strategy = OffloadStrategy(offload_dir=tmp_path / "swap", place=dict.fromkeys(kinds, "disk"), staging="2MiB")
        fit(None, build={"strategy": strategy}, max_steps=1)
    line = next(text for text in caplog.messages if "OffloadStrategy: " in text)
    assert "schedule in_backward: nothing needs all gradients together" in line
    assert f"staging up to {most}, beside the budget" in line
    assert f"files in {tmp_path / 'swap'}" in line


def test_the_report_has_them(tmp_path: Any) -> None:
    strategy = OffloadStrategy(offload_dir="swap", place=DISK)
    monitor = EfficiencyMonitor(report_dir=str(tmp_path))
    trainer = make_trainer(monitor, strategy=strategy, max_steps=6, logger=ListLogger())
    trainer.fit(demo_model(), demo_data())
    text = (tmp_path / "efficiency_report.md").read_text()
    assert "| states elsewhere |" in text
    assert "GB/s" in text

"""A resumed run is one run: its totals, its series and its events go on."""

from __future__ import annotations

import pytest
import torch

from lightning_efficient.monitoring import EfficiencyMonitor, read_report

from .tiny import FakeTechnique, TinyModel, ValidatedModel, loader, trainer


def test_totals_and_series_carry_over(tmp_path) -> None:
    first = EfficiencyMonitor(report=False)
    runner = trainer(tmp_path, FakeTechnique(), first, max_epochs=2)
    runner.fit(ValidatedModel(), loader(), loader(8))
    runner.save_checkpoint(tmp_path / "a.ckpt")
    before = first.run_report()

    second = EfficiencyMonitor()
    runner = trainer(tmp_path, FakeTechnique(), second, max_epochs=3)
    runner.fit(ValidatedModel(), loader(), loader(8), ckpt_path=tmp_path / "a.ckpt")  # weights_only, by default
    report = read_report(tmp_path)
    assert (report.resumed, report.totals["batches"], report.totals["optimizer_steps"]) == (1, 24, 24)
    assert report.totals["train_seconds"] > before.totals["train_seconds"]
    assert report.totals["validation_seconds"] > before.totals["validation_seconds"]
    old = before.series["efficiency/step_ms"]
    assert report.series["efficiency/step_ms"][: len(old)] == old
    assert [point.step for point in report.metrics["val_loss"]] == [7, 15, 23]
    seconds = [point.seconds for point in report.series["efficiency/step_ms"]]
    assert seconds == sorted(seconds)
    assert report.events == before.events  # the same one, told twice
    assert "resumed once" in (tmp_path / "efficiency_report.md").read_text()

    third = EfficiencyMonitor(report=False)
    runner.save_checkpoint(tmp_path / "b.ckpt")
    trainer(tmp_path, third, max_epochs=4).fit(ValidatedModel(), loader(), loader(8), ckpt_path=tmp_path / "b.ckpt")
    assert third.run_report().resumed == 2
    assert third.run_report().totals["batches"] == 32


def test_a_resumed_run_reports_where_it_did_before(tmp_path) -> None:
    trainer(tmp_path, EfficiencyMonitor()).fit(TinyModel(), loader())
    runner = trainer(tmp_path, EfficiencyMonitor())
    runner.fit(TinyModel(), loader())
    runner.save_checkpoint(tmp_path / "a.ckpt")
    trainer(tmp_path, EfficiencyMonitor(), max_epochs=2).fit(TinyModel(), loader(), ckpt_path=tmp_path / "a.ckpt")
    folders = sorted(file.parent for file in tmp_path.rglob("efficiency_report.json"))
    assert folders == [tmp_path, tmp_path / "version_1"]
    assert [read_report(folder).totals["batches"] for folder in folders] == [8, 16]


def test_validating_a_checkpoint_leaves_the_last_fit_alone(tmp_path) -> None:
    monitor = EfficiencyMonitor(report=False)
    runner = trainer(tmp_path, monitor, max_steps=2)
    runner.fit(TinyModel(), loader())
    runner.save_checkpoint(tmp_path / "a.ckpt")
    runner = trainer(tmp_path, monitor, max_steps=5)
    runner.fit(TinyModel(), loader())
    runner.validate(ValidatedModel(), loader(8), ckpt_path=tmp_path / "a.ckpt", verbose=False)
    assert monitor.run_report().totals["batches"] == 5
    assert monitor.run_report().resumed == 0


def test_the_state_is_small_and_loads_with_weights_only(tmp_path) -> None:
    monitor = EfficiencyMonitor(report=False)
    trainer(tmp_path, FakeTechnique(), monitor).fit(TinyModel(), loader())
    torch.save(monitor.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert state["version"] == 1
    fresh = EfficiencyMonitor()
    fresh.load_state_dict(state)
    assert fresh.run_report().series == monitor.run_report().series


def test_a_state_of_a_later_release_is_refused() -> None:
    with pytest.raises(ValueError, match="version 2"):
        EfficiencyMonitor().load_state_dict({"version": 2})

"""What each technique cost and saved: collected while training, over resumes, and per batch in the report."""

from __future__ import annotations

import math
from typing import Any

import lightning.pytorch as pl
import pytest

from lightning_efficient.monitoring import EfficiencyMonitor, RunReport, read_report
from lightning_efficient.monitoring.balance import FullSize, batch_ms, full_size, phase_medians, trades
from lightning_efficient.monitoring.layout import chart_groups
from lightning_efficient.monitoring.markdown import render
from lightning_efficient.monitoring.report import BalanceWords
from lightning_efficient.monitoring.series import Point

from .tiny import Costly, TinyModel, loader, trainer


def _points(*values: float) -> tuple[Point, ...]:
    return tuple(Point(i, i / 10, i / 10, value) for i, value in enumerate(values))


def _report(**series: tuple[Point, ...]) -> RunReport:
    named = {name.replace("__", "/"): points for name, points in series.items()}
    return RunReport("x", totals={"batches": 10.0, "train_seconds": 1.0}, series=named)


def test_a_fit_collects_it_and_a_resumed_one_goes_on(tmp_path) -> None:
    first = EfficiencyMonitor(report=False)
    runner = trainer(tmp_path, Costly(before=100), first)  # of an earlier fit: not this one's
    runner.fit(TinyModel(), loader())
    runner.save_checkpoint(tmp_path / "a.ckpt")
    (trade,) = trades(first.run_report())
    assert (trade.technique, trade.cost_ms, trade.gain_ms) == ("costly", 2.0, 0.5)

    runner = trainer(tmp_path, Costly(), EfficiencyMonitor(), max_epochs=2)
    runner.fit(TinyModel(), loader(), ckpt_path=tmp_path / "a.ckpt")
    report = read_report(tmp_path)
    assert report.totals["batches"] == 16
    (trade,) = trades(report)
    assert (trade.cost_ms, trade.gain_ms) == (2.0, 0.5)
    assert trade.words == BalanceWords("costly", "By counting.", "", "It was worth it.")
    text = (tmp_path / "efficiency_report.md").read_text()
    assert "| costly | 2 ms | 500 us |" in text or "| costly | 2 ms | 0.5 ms |" in text
    assert "- **costly**: It was worth it. By counting." in text


def test_it_is_logged_so_that_a_killed_run_has_it(tmp_path) -> None:
    logged: dict[str, float] = {}

    class Logger(pl.loggers.CSVLogger):
        def log_metrics(self, metrics: Any, step: int | None = None) -> None:
            logged.update(metrics)

    trainer(tmp_path, Costly(), EfficiencyMonitor(report=False), logger=Logger(tmp_path)).fit(TinyModel(), loader())
    assert (logged["costly/cost_total_ms"], logged["costly/gain_total_ms"]) == (16.0, 4.0)


def test_per_batch_and_in_percent_of_the_batch_without_it() -> None:
    report = _report(
        a__cost_total_ms=_points(100.0, 200.0), a__spared_bytes=_points(5.0, 9.0, 3.0), b__other=_points(1.0)
    )
    one, other = trades(report)
    assert batch_ms(report) == 100.0
    assert (one.cost_ms, one.net_ms, one.percent) == (20.0, 20.0, 25.0)
    assert math.isnan(one.gain_ms)
    assert one.spared_bytes == 9.0
    assert one.cells() == ("20 ms", "not measured", "+25.0 %", "9 B", "not measured")
    assert other.cells() == ("not measured",) * 5  # rather than a guess
    assert "| b | not measured |" in render(report, {})


def test_a_total_that_began_anew_is_the_sum_of_its_parts() -> None:
    report = _report(a__cost_total_ms=_points(10.0, 30.0, 5.0, 20.0))
    assert trades(report)[0].cost_ms == 5.0


def test_phases_are_held_against_the_last_one() -> None:
    steps = _points(*[40.0] * 4, 500.0, *[100.0] * 7)  # the 500: a switch, of which the phase is not certain
    phase = (Point(0, 0, 0, 0.0), Point(4, 0, 0, 0.0), Point(5, 0, 0, 1.0), Point(12, 0, 0, 1.0))
    report = _report(efficiency__step_ms=steps, g__phase=phase, g__cost_total_ms=_points(0.0, 10.0))
    assert phase_medians(report, "g") == (40.0, 100.0)
    (trade,) = trades(report)
    assert trade.gain_ms == pytest.approx(4 * 60 / 11)
    assert trade.cost_ms == 1.0
    assert "earlier phases" in trade.words.time
    full = full_size(report)
    assert (full.batch_ms, full.phased) == (100.0, True)
    assert full_size(_report(a__cost_total_ms=_points(100.0, 200.0))) == FullSize(100.0, 20.0, phased=False)


def test_costs_at_full_size_are_those_of_the_last_phase() -> None:
    cost = (Point(4, 0, 0, 8.0), Point(5, 0, 0, 10.0), Point(9, 0, 0, 50.0))
    phase = (Point(0, 0, 0, 0.0), Point(4, 0, 0, 0.0), Point(5, 0, 0, 1.0), Point(9, 0, 0, 1.0))
    report = _report(efficiency__step_ms=_points(*[40.0] * 5, *[100.0] * 5), g__phase=phase, a__cost_total_ms=cost)
    assert full_size(report).cost_ms == pytest.approx(10.0)  # 40 ms in four batches


def test_a_run_that_never_left_its_first_phase_has_saved_nothing_that_is_known() -> None:
    report = _report(efficiency__step_ms=_points(*[40.0] * 6), g__phase=(Point(0, 0, 0, 0.0), Point(5, 0, 0, 0.0)))
    assert math.isnan(trades(report)[0].gain_ms)


def test_it_has_charts_of_its_own() -> None:
    groups = chart_groups(["a/kept_bytes", "a/cost_total_ms", "a/gain_total_ms", "a/spared_bytes"])
    assert groups["a"]["cost and gain (ms)"] == ["a/cost_total_ms", "a/gain_total_ms"]
    assert groups["a"]["memory (bytes)"] == ["a/kept_bytes"]

"""Runs as they lie on the disk: reports, logs of runs that left none, and folders that are no runs."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from lightning_efficient.monitoring import EfficiencyMonitor, RunReport, write_report
from lightning_efficient.monitoring.balance import trades
from lightning_efficient.monitoring.runs import RunError, read_run

from .tiny import Costly, FakeTechnique, ValidatedModel, loader, trainer


@pytest.fixture(scope="module")
def logged(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The folders of both loggers of a run that left no report, as if it had been killed."""
    root = tmp_path_factory.mktemp("logged")
    board, table = TensorBoardLogger(root, "board"), CSVLogger(root, "table")
    callbacks = [Costly(), FakeTechnique(), EfficiencyMonitor(report=False)]
    trainer(root, *callbacks, logger=[board, table]).fit(ValidatedModel(), loader(), loader(8))
    return Path(board.log_dir), Path(table.log_dir)


def test_a_run_without_a_report_is_read_from_tensorboard(logged: tuple[Path, Path]) -> None:
    run = read_run(logged[0])
    assert run.name == "board/version_0"
    assert run.source == "TensorBoard's event files"
    assert [point.step for point in run.report.metrics["val_loss"]] == [7]
    assert "epoch" not in run.report.metrics
    assert [point.step for point in run.report.series["efficiency/step_ms"]] == [1, 3, 5, 7]
    assert run.report.totals["peak_memory_bytes"] > 0
    assert run.report.totals["parameters"] == 46
    seconds = [point.seconds for point in run.report.series["efficiency/step_ms"]]
    assert seconds == sorted(seconds)
    assert "costly/cost_total_ms" in run.report.series
    (trade,) = trades(run.report)
    assert (trade.technique, trade.cost_ms, trade.gain_ms) == ("costly", 2.0, 0.5)
    assert "left no report" in run.report.notes[0]
    assert "validation included" in run.report.notes[1]


def test_a_run_without_a_report_is_read_from_csv(logged: tuple[Path, Path]) -> None:
    run = read_run(logged[1])
    assert run.source == "metrics.csv"
    assert [point.step for point in run.report.metrics["val_loss"]] == [7]
    assert math.isnan(run.report.metrics["val_loss"][0].seconds)
    assert run.report.totals["step_ms_median"] > 0


def test_a_run_that_died_before_its_first_log_has_no_number(tmp_path: Path) -> None:
    board = TensorBoardLogger(tmp_path, "board")
    board.log_hyperparams({"width": 4})  # which logs hp_metric
    board.save()
    board.finalize("failed")
    with pytest.raises(RunError, match="without a single number"):
        read_run(board.log_dir)
    (tmp_path / "metrics.csv").write_text("epoch,step\n0,3\n")
    with pytest.raises(RunError, match="without a single number"):
        read_run(tmp_path)


def test_its_own_report_comes_first(logged: tuple[Path, Path], tmp_path: Path) -> None:
    for file in logged[0].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    write_report(tmp_path, RunReport("mine"))
    assert read_run(tmp_path).report.title == "mine"
    assert read_run(tmp_path / "efficiency_report.json", "named").name == "named"


def test_what_is_no_run_says_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="gone does not exist"):
        read_run(tmp_path / "gone")
    with pytest.raises(RunError, match="is not a run: it has neither"):
        read_run(tmp_path)
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(RunError, match="is a file"):
        read_run(tmp_path / "notes.txt")
    write_report(tmp_path / "a" / "version_0", RunReport("x"))
    with pytest.raises(RunError, match=r"has some in it: .*version_0\. Give one"):
        read_run(tmp_path)
    (tmp_path / "metrics.csv").write_text("step,val_loss\n")
    with pytest.raises(RunError, match="without a single number"):
        read_run(tmp_path)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"format": 1, "ti', "cut off"),
        ("[1, 2]", "not the report of a run"),
        ('{"format": 1}', "not the report of a run"),
        (json.dumps({"format": 2}), "reads format 1. Read it with the version"),
    ],
)
def test_a_report_that_cannot_be_read_is_named(text: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "efficiency_report.json").write_text(text)
    with pytest.raises(RunError, match=says) as caught:
        read_run(tmp_path)
    assert "efficiency_report.json" in str(caught.value)

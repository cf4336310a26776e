"""EfficiencyMonitor in a Trainer: what it logs, measures and writes, whatever the loggers and however the fit ends."""

from __future__ import annotations

import signal
import sys
import threading
import time
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from torch.utils.data import DataLoader

from lightning_efficient import RollbackPrecision, telemetry
from lightning_efficient.monitoring import EfficiencyMonitor, read_report

from .tiny import FakeTechnique, TinyModel, ValidatedModel, loader, trainer

_TAGS = {
    f"efficiency/{name}"
    for name in (
        "step_ms",
        "step_cpu_ms",
        "data_wait_ms",
        "samples_per_s",
        "peak_memory_bytes",
        "parameters",
        "gradient_bytes",
        "optimizer_state_bytes",
    )
}


class TokenModel(TinyModel):
    """Batches of token numbers, and a head that is tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Embedding(10, 4), torch.nn.Linear(4, 10))
        self.net[1].weight = self.net[0].weight

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.net(batch).square().mean()


class SlowValidation(ValidatedModel):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        time.sleep(0.15)
        super().validation_step(batch, batch_idx)


class Failing(TinyModel):
    def __init__(self, exception: BaseException, at: int) -> None:
        super().__init__()
        self.exception, self.at = exception, at

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        if batch_idx == self.at:
            raise self.exception
        return super().training_step(batch, batch_idx)


class Hungry(TinyModel):
    """Needs 64 MiB for a moment, in one step."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        if batch_idx == 2:
            torch.ones(64 * 1024**2, dtype=torch.uint8)
        return super().training_step(batch, batch_idx)


class Manual(TinyModel):
    """Two optimizer steps in each batch, one of them past Lightning's hooks."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        optimizer = self.optimizers()
        for step in (optimizer.step, optimizer.optimizer.step):
            loss = self.net(batch[0]).square().mean()
            optimizer.zero_grad()
            self.manual_backward(loss)
            step()
        return {"loss": loss.detach()}


def _events(folder: str) -> EventAccumulator:
    accumulator = EventAccumulator(folder, size_guidance={"tensors": 0, "scalars": 0})
    accumulator.Reload()
    return accumulator


def test_tensorboard_and_csv_together(tmp_path) -> None:
    monitor = EfficiencyMonitor()
    board, table = TensorBoardLogger(tmp_path, "board"), CSVLogger(tmp_path, "table")
    trainer(tmp_path, FakeTechnique(), monitor, logger=[board, table]).fit(ValidatedModel(), loader(), loader(8))

    events = _events(board.log_dir)
    assert set(events.Tags()["scalars"]) >= _TAGS | {"fake/saved_bytes", "fake/steps"}
    assert [event.step for event in events.Scalars("efficiency/parameters")] == [1, 3, 5, 7]
    assert {event.value for event in events.Scalars("efficiency/parameters")} == {8 * 4 + 4 + 4 * 2 + 2}
    assert all(event.value > 0 for event in events.Scalars("efficiency/step_ms"))

    layout = layout_pb2.Layout.FromString(events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])
    assert len(events.Tensors("custom_scalars__config__")) == 1
    charts = {category.title: {chart.title for chart in category.chart} for category in layout.category}
    assert set(charts) == {"efficiency", "fake"}
    assert charts["fake"] == {"memory (bytes)", "steps"}
    patterns = [tag for category in layout.category for chart in category.chart for tag in chart.multiline.tag]
    assert {pattern.removesuffix("$") for pattern in patterns} == _TAGS | {"fake/saved_bytes", "fake/steps"}

    with open(f"{table.log_dir}/metrics.csv", encoding="utf-8") as rows:
        assert set(next(rows).strip().split(",")) >= _TAGS
    assert read_report(board.log_dir).totals["batches"] == 8


def test_the_layout_is_written_anew_when_a_technique_measures_something_new(tmp_path) -> None:
    class Late(FakeTechnique):
        def measurements(self) -> dict[str, float]:
            values = super().measurements()
            return values | ({"fake/late": 1.0} if values["fake/steps"] > 4 else {})

    board = TensorBoardLogger(tmp_path, "board")
    trainer(tmp_path, Late(), EfficiencyMonitor(report=False), logger=board).fit(ValidatedModel(), loader(), loader(8))
    layouts = _events(board.log_dir).Tensors("custom_scalars__config__")
    assert len(layouts) == 2
    [last] = layouts[-1].tensor_proto.string_val  # which is the one that TensorBoard shows
    fake = layout_pb2.Layout.FromString(last).category[1]
    assert [chart.title for chart in fake.chart] == ["memory (bytes)", "steps", "late"]


def test_a_technique_that_has_charts_of_its_own_keeps_them(tmp_path) -> None:
    class Charted(FakeTechnique):
        def charts(self) -> dict[str, dict[str, list[object]]]:
            return {"fake": {"all that it has": ["Multiline", ["fake/.*"]]}}

    board = TensorBoardLogger(tmp_path, "board")
    trainer(tmp_path, Charted(), EfficiencyMonitor(report=False), logger=board).fit(TinyModel(), loader())
    [layout] = _events(board.log_dir).Tensors("custom_scalars__config__")
    efficiency, fake = layout_pb2.Layout.FromString(layout.tensor_proto.string_val[0]).category
    assert efficiency.title == "efficiency"
    assert [(chart.title, *chart.multiline.tag) for chart in fake.chart] == [("all that it has", "fake/.*")]
    assert isinstance(RollbackPrecision(), telemetry.Charted)


def test_without_a_logger_the_report_goes_to_the_root_folder(tmp_path) -> None:
    torch.manual_seed(0)
    monitor = EfficiencyMonitor()
    model = ValidatedModel()
    trainer(tmp_path, FakeTechnique(), monitor, max_epochs=2).fit(model, loader(), loader(8))
    report = read_report(tmp_path)
    assert report.to_dict() == monitor.run_report().to_dict()

    weights = 4 * (8 * 4 + 4 + 4 * 2 + 2)
    totals = report.totals
    assert (totals["batches"], totals["optimizer_steps"], totals["samples"]) == (16, 16, 64)
    assert totals["samples_per_s"] == pytest.approx(64 / totals["train_seconds"])
    assert totals["parameters"] == totals["trainable_parameters"] == weights / 4
    assert totals["parameter_bytes"] == totals["gradient_bytes"] == weights
    assert totals["optimizer_state_bytes"] == 2 * weights + 4 * 4
    assert totals["peak_memory_bytes"] > totals["peak_memory_growth_bytes"] >= 0
    steps = report.series["efficiency/step_ms"]
    spent = sum(point.value for point in steps) / 1e3 + totals["data_wait_seconds"]
    assert spent == pytest.approx(totals["train_seconds"], rel=0.2)

    assert [point.step for point in report.metrics["val_loss"]] == [7, 15]
    losses = [point.value for point in report.metrics["train_loss"]]
    assert [point.step for point in report.metrics["train_loss"]] == [0, 1, 3, 5, 7, 9, 11, 13, 15]
    assert losses[-1] < losses[0]
    assert report.series["fake/steps"][0].value == 1
    assert report.series["fake/steps"][-1].value == 16
    assert [tuple(event) for event in report.events] == [(2, "fake", "switched | over")]
    text = (tmp_path / "efficiency_report.md").read_text()
    assert "## Fake" in text
    assert "switched \\| over" in text
    assert (tmp_path / "efficiency_fake.png").exists()


class OtherLogger(Logger):
    """Has a folder, and a name and a version if they are given."""

    def __init__(self, folder: str | None, name: Any = None, version: Any = None) -> None:
        super().__init__()
        self._folder, self._name, self._version = folder, name, version

    @property
    def save_dir(self) -> str | None:
        return self._folder

    @property
    def name(self) -> Any:
        return self._name

    @property
    def version(self) -> Any:
        return self._version

    def log_metrics(self, metrics: Any, step: Any = None) -> None:
        pass

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        pass


@pytest.mark.parametrize(
    ("name", "version", "where"),
    [("mine", "a1b2", "logs/mine/a1b2"), ("mine", 3, "logs/mine/version_3"), (None, object(), "logs")],
)
def test_another_logger_has_a_folder_for_each_run(tmp_path, name: Any, version: Any, where: str) -> None:
    for _ in range(2):  # the second is a run of its own, whatever the logger says
        logger = OtherLogger(str(tmp_path / "logs"), name, version)
        trainer(tmp_path, EfficiencyMonitor(), logger=logger).fit(TinyModel(), loader(8))
    folders = sorted(file.parent for file in tmp_path.rglob("efficiency_report.json"))
    assert folders == [tmp_path / where, tmp_path / where / "version_1"]
    trainer(tmp_path, EfficiencyMonitor(), logger=OtherLogger(None, "remote", "x")).fit(TinyModel(), loader(8))
    assert (tmp_path / "remote" / "x" / "efficiency_report.json").exists()


def test_without_a_logger_no_run_overwrites_another(tmp_path) -> None:
    monitor = EfficiencyMonitor()
    runner = trainer(tmp_path, monitor)
    runner.fit(TinyModel(), loader())
    runner.fit_loop.max_epochs = 2
    runner.fit(TinyModel(), loader(16))  # the same Trainer again: the record begins anew
    trainer(tmp_path, EfficiencyMonitor(), max_steps=3).fit(TinyModel(), loader())
    folders = [tmp_path, tmp_path / "version_1", tmp_path / "version_2"]
    assert [read_report(folder).totals["batches"] for folder in folders] == [8, 4, 3]
    for steps in (2, 1):
        trainer(tmp_path, EfficiencyMonitor(report_dir=tmp_path / "mine"), max_steps=steps).fit(TinyModel(), loader())
    assert read_report(tmp_path / "mine").totals["batches"] == 1  # where the user says so


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's high-water mark is Linux's")
def test_memory_that_a_step_needs_for_a_moment_is_in_the_peak(tmp_path) -> None:
    trainer(tmp_path, EfficiencyMonitor(report=False)).fit(Hungry(), loader())  # must not count for the next fit
    monitors = []
    for model in (TinyModel(), Hungry()):
        monitors.append(EfficiencyMonitor(report=False))
        trainer(tmp_path, monitors[-1]).fit(model, loader())
    if "sampled" in " ".join(monitors[0].run_report().notes):
        pytest.skip("this system does not let a process set its high-water mark back")
    plain, hungry = (monitor.run_report().totals["peak_memory_growth_bytes"] for monitor in monitors)
    assert plain < 32 * 1024**2
    assert 60 * 1024**2 < hungry < 96 * 1024**2


def test_tokens_are_counted_and_tied_weights_once(tmp_path) -> None:
    monitor = EfficiencyMonitor(report=False)
    data = DataLoader(torch.randint(0, 10, (20, 16)), batch_size=4)
    trainer(tmp_path, monitor).fit(TokenModel(), data)
    report = monitor.run_report()
    assert report.batch_unit == "tokens"
    assert report.totals["tokens"] == 20 * 16
    assert report.totals["parameter_bytes"] == report.totals["gradient_bytes"] == 4 * (10 * 4 + 10)
    assert list(tmp_path.iterdir()) == []


def test_tokens_that_the_user_gives_and_an_interval_of_its_own(tmp_path) -> None:
    monitor = EfficiencyMonitor(tokens_per_batch=1000, every_n_steps=4, report_dir=tmp_path / "there")
    board = TensorBoardLogger(tmp_path, "board")
    trainer(tmp_path, monitor, logger=board).fit(TinyModel(), loader())
    assert read_report(tmp_path / "there").totals["tokens"] == 8000
    assert [event.step for event in _events(board.log_dir).Scalars("efficiency/tokens_per_s")] == [3, 7]


def test_accumulation_logs_once_per_optimizer_step(tmp_path) -> None:
    monitor = EfficiencyMonitor(report=False)
    board = TensorBoardLogger(tmp_path, "board")
    trainer(tmp_path, monitor, logger=board, accumulate_grad_batches=2).fit(TinyModel(), loader())
    totals = monitor.run_report().totals
    assert (totals["batches"], totals["optimizer_steps"]) == (8, 4)
    assert [event.step for event in _events(board.log_dir).Scalars("efficiency/step_ms")] == [1, 3]


def test_manual_optimization(tmp_path) -> None:
    monitor = EfficiencyMonitor(report=False)
    trainer(tmp_path, monitor).fit(Manual(), loader())
    report = monitor.run_report()
    assert report.totals["gradient_bytes"] == report.totals["parameter_bytes"]
    assert report.totals["optimizer_steps"] == 8  # those that Lightning counts
    assert len(report.metrics["train_loss"]) == 5


def test_validation_is_no_training_time(tmp_path) -> None:
    monitor = EfficiencyMonitor(report=False)
    trainer(tmp_path, monitor, val_check_interval=4).fit(SlowValidation(), loader(), loader(4))
    totals = monitor.run_report().totals
    assert totals["validation_seconds"] > 0.3
    assert totals["train_seconds"] < 0.3
    assert max(point.value for point in monitor.run_report().series["efficiency/data_wait_ms"]) < 140


@pytest.mark.parametrize("at", [0, 5])
def test_an_exception_is_not_masked_and_still_gives_a_report(tmp_path, at: int) -> None:
    error = ValueError("the real reason")
    with pytest.raises(ValueError, match="the real reason") as caught:
        trainer(tmp_path, FakeTechnique(), EfficiencyMonitor()).fit(Failing(error, at), loader())
    assert caught.value is error
    report = read_report(tmp_path)
    assert (report.interrupted, report.totals["batches"]) == ("ValueError", at)
    assert report.totals["peak_memory_bytes"] > 0
    assert "interrupted (ValueError)" in (tmp_path / "efficiency_report.md").read_text()


def test_a_keyboard_interrupt_gives_a_report(tmp_path) -> None:
    handler = signal.getsignal(signal.SIGINT)  # Lightning turns it off for the rest of the process
    try:
        with pytest.raises(SystemExit):
            trainer(tmp_path, EfficiencyMonitor()).fit(Failing(KeyboardInterrupt(), 5), loader())
    finally:
        signal.signal(signal.SIGINT, handler)
    assert read_report(tmp_path).interrupted == "KeyboardInterrupt"


def test_a_report_that_fails_does_not_hide_what_ended_the_run(tmp_path) -> None:
    (tmp_path / "file").write_text("in the way")
    monitor = EfficiencyMonitor(report_dir=str(tmp_path / "file"))
    with pytest.raises(ValueError, match="the real reason"):
        trainer(tmp_path, monitor).fit(Failing(ValueError("the real reason"), 5), loader())
    with pytest.warns(UserWarning, match="could not be written"):
        trainer(tmp_path, monitor).fit(TinyModel(), loader())


def test_fast_dev_run_writes_nothing(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    trainer(tmp_path, EfficiencyMonitor(), fast_dev_run=2, logger=True).fit(ValidatedModel(), loader(), loader())
    assert list(tmp_path.iterdir()) == []


def test_a_remote_folder_is_refused_with_a_word(tmp_path) -> None:
    with pytest.warns(UserWarning, match="no local folder"):
        trainer(tmp_path, EfficiencyMonitor(report_dir="s3://bucket/run")).fit(TinyModel(), loader())


def test_a_second_fit_starts_anew_and_validation_alone_measures_nothing(tmp_path) -> None:
    monitor = EfficiencyMonitor(report=False)
    runner = trainer(tmp_path, monitor)
    runner.fit(TinyModel(), loader())
    trainer(tmp_path, monitor, max_steps=3).fit(TinyModel(), loader())
    assert monitor.run_report().totals["batches"] == 3
    runner.validate(ValidatedModel(), loader(8), verbose=False)
    assert monitor.run_report().totals["batches"] == 3


def test_the_result_of_training_does_not_change(tmp_path) -> None:
    weights = []
    for callbacks in ([], [EfficiencyMonitor(report=False, every_n_steps=1)]):
        pl.seed_everything(3, verbose=False)
        model = ValidatedModel()
        trainer(tmp_path, *callbacks).fit(model, loader(), loader(8))
        weights.append(torch.cat([parameter.flatten() for parameter in model.parameters()]))
    assert torch.equal(*weights)


def test_nothing_is_left_behind(tmp_path) -> None:
    threads = set(threading.enumerate())
    model = TinyModel()
    trainer(tmp_path, EfficiencyMonitor()).fit(model, loader())
    assert set(threading.enumerate()) == threads
    hooks = [
        name
        for module in model.modules()
        for name, value in vars(module).items()
        if name.endswith("hooks") and len(value or ())
    ]
    assert hooks == []
    assert all(not parameter._backward_hooks for parameter in model.parameters())


@pytest.mark.parametrize("name", ["every_n_steps", "tokens_per_batch"])
def test_numbers_must_be_positive(name: str) -> None:
    with pytest.raises(ValueError, match=f"`{name}` is 0"):
        EfficiencyMonitor(**{name: 0})

"""Each private symbol that ``compat`` uses still exists and still means what we take it for."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging
from lightning.pytorch.strategies import DDPStrategy

from lightning_efficient import compat

from .monitoring.tiny import TinyModel, ValidatedModel, loader, trainer


class Recorder(pl.Callback):
    """Asks ``compat`` in each hook where the suite asks it."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.logs: list[bool] = []
        self.accumulates: list[bool] = []
        self.validations: list[dict[str, float]] = []
        self.averaged: list[torch.nn.Module] = []

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self.logs.append(compat.should_log(trainer))

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.steps.append(compat.log_step(trainer))
        self.accumulates.append(compat.accumulating(trainer))
        assert compat.should_log(trainer) == self.logs[-1]

    def on_validation_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.validations.append(compat.validation_metrics(trainer))

    def on_train_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.averaged = compat.averaged_models(trainer)


def test_the_logged_step_and_interval_and_accumulation(tmp_path) -> None:
    recorder = Recorder()
    trainer(tmp_path, recorder, accumulate_grad_batches=2).fit(TinyModel(), loader())
    assert recorder.steps == [0, 0, 1, 1, 2, 2, 3, 3]
    assert recorder.logs == [False, False, True, True] * 2
    assert recorder.accumulates == [True, False] * 4


class TwoMetrics(ValidatedModel):
    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = super().training_step(batch, batch_idx)
        self.log("train_metric", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        if self.current_epoch == 0:
            self.log("only_at_first", 1.0)


def test_validation_metrics_are_those_of_this_validation(tmp_path) -> None:
    recorder = Recorder()
    model = TwoMetrics()
    runner = trainer(tmp_path, recorder, max_epochs=2, num_sanity_val_steps=0)
    runner.fit(model, loader(), loader(8))
    assert [set(metrics) for metrics in recorder.validations] == [{"val_loss", "only_at_first"}, {"val_loss"}]
    assert recorder.validations[-1]["val_loss"] == pytest.approx(float(runner.callback_metrics["val_loss"]))


@pytest.mark.parametrize(
    ("averaging", "copies"),
    [
        (lambda: EMAWeightAveraging(decay=0.5), 1),
        (lambda: StochasticWeightAveraging(swa_lrs=1e-2, swa_epoch_start=1), 1),
        (pl.Callback, 0),
    ],
    ids=["ema", "swa", "none"],
)
def test_the_copies_of_averaging_callbacks_are_found(tmp_path, averaging, copies: int) -> None:
    recorder, model = Recorder(), TinyModel()
    trainer(tmp_path, recorder, averaging(), max_epochs=2).fit(model, loader())
    assert len(recorder.averaged) == copies
    for copy in recorder.averaged:
        assert isinstance(copy, TinyModel)
        assert copy is not model


class CountingDDP(DDPStrategy):
    def __init__(self) -> None:
        super().__init__()
        self.wrapped: list[object] = []

    def configure_ddp(self) -> None:
        self.wrapped.append(self.model)


def test_ddp_wraps_the_bare_module_anew() -> None:
    strategy = CountingDDP()
    with pytest.raises(RuntimeError, match="no LightningModule"):
        compat.rewrap_ddp(strategy)
    model = TinyModel()
    strategy.connect(model)
    strategy.model = torch.nn.Identity()  # stands for the wrapper of before
    compat.rewrap_ddp(strategy)
    assert strategy.wrapped == [model]

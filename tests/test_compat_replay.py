"""Each private symbol that ``compat_replay`` uses still exists and still means what we take it for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging

from lightning_efficient import compat, compat_replay

from .monitoring.tiny import TinyModel, loader, trainer


class Twice(TinyModel):
    """Does its third batch twice, and lets the optimizer take no step in its fifth."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[int] = []
        self.scheduled = 0

    def on_fit_start(self) -> None:
        self.end = compat_replay.intercept_batches(self.trainer, self)

    def on_fit_end(self) -> None:
        self.end()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.log("seen", 1.0, on_step=False, on_epoch=True, reduce_fx="sum")
        return super().training_step(batch, batch_idx)

    def on_before_backward(self, loss: torch.Tensor) -> None:
        self.log("hook", 1.0, on_step=False, on_epoch=True, reduce_fx="sum")

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        self.scheduled += 1
        scheduler.step()

    def batch(self, run: Any, optimizer: Any, batch_idx: int, arguments: Any) -> Any:
        self.number = batch_idx
        if batch_idx == 4:
            return {}
        if batch_idx != 2:
            return run(optimizer, batch_idx, arguments)
        count, undo = compat_replay.counted(self.trainer), compat_replay.logged(self.trainer)
        name = self._current_fx_name
        assert next(iter(arguments)) == "batch"
        run(optimizer, batch_idx, arguments)
        assert (self.trainer.global_step, self._current_fx_name) == (3, name)
        count()
        undo()
        assert self.trainer.global_step == 2
        assert not compat.accumulating(self.trainer)
        return run(optimizer, batch_idx, arguments)

    def stepped(self) -> bool:
        return self.number != 4

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Steps(pl.Callback):
    """Lets the optimizer step with the gradients that are there, and looks at the averages."""

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 4:
            before, rate = trainer.global_step, trainer.optimizers[0].param_groups[0]["lr"]
            compat_replay.step_with_what_is_there(trainer, batch_idx)
            assert (trainer.global_step, trainer.optimizers[0].param_groups[0]["lr"]) == (before + 1, rate)
        ((average, model),) = compat_replay.with_averages(trainer)
        assert average.state_dict() == {"latest_update_step": model.n_averaged + (0 if batch_idx <= 4 else 1)}


def test_batches_are_intercepted_counted_and_undone(tmp_path: Path) -> None:
    model = Twice()
    fitted = trainer(tmp_path, EMAWeightAveraging(), Steps(), limit_train_batches=6, max_epochs=1)
    fitted.fit(model, loader())
    assert fitted.global_step == 6  # one of them without a batch
    assert model.scheduled == 5
    assert fitted.logged_metrics["seen"] == fitted.logged_metrics["hook"] == 5
    assert "run" not in fitted.fit_loop.epoch_loop.automatic_optimization.__dict__

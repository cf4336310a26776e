"""Each private symbol that ``compat_steps`` uses still exists and still means what we take it for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torchmetrics import MeanMetric

from lightning_efficient import compat_steps

from .monitoring.tiny import TinyModel, loader, trainer


class Logging(TinyModel):
    """Has its logs kept, undone, and logged again by ``compat_steps``."""

    def __init__(self) -> None:
        super().__init__()
        self.metric = MeanMetric()
        self.made: list[tuple[float, Any, int]] = []
        self.kept: list[tuple[str, float]] = []

    def on_fit_start(self) -> None:
        self.end = compat_steps.watch_steps(self.trainer, self.see)

    def on_fit_end(self) -> None:
        self.end()

    def see(self, result: compat_steps.ClosureResult, divided_by: int) -> None:
        self.made.append((float(result.loss), dict(result.extra), divided_by))
        result.loss, result.extra = torch.tensor(7.0), {"other": 1}

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        undo = compat_steps.logged_in_training_step(self.trainer)
        self.log("undone", loss, on_step=True)
        undo()
        self.metric(loss)
        self.log("metric", self.metric, on_step=True, on_epoch=True)
        with compat_steps.logs_kept(self.trainer) as kept:
            self.log("later", 3 * loss, on_step=True, on_epoch=True, batch_size=2)
            self.log("never", loss)
        assert [one.name for one in kept] == ["later", "never"]
        assert kept[0].arguments["batch_size"] == 2
        assert not kept[0].value.requires_grad
        self.kept.append((kept[0].name, float(kept[0].value)))
        compat_steps.log_value(self.trainer, kept[0])
        assert compat_steps.metrics_logged_per_step(self.trainer) == [self.metric]
        return {"loss": loss, "more": 2}

    def on_before_backward(self, loss: torch.Tensor) -> None:
        with compat_steps.as_training_step(self), compat_steps.logs_kept(self.trainer) as kept:
            self.log("in_hook", 1.0)
        assert [one.name for one in kept] == ["in_hook"]


class Outputs(pl.Callback):
    """Notes what callbacks are given."""

    def __init__(self) -> None:
        self.outputs: list[dict[str, Any]] = []
        self.logged: set[str] = set()

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, *_: Any) -> None:
        self.outputs.append(outputs)
        self.logged |= set(trainer.logged_metrics)
        assert float(trainer.logged_metrics["later_step"]) == pytest.approx(module.kept[-1][1])


def test_logs_are_kept_undone_and_logged_and_results_changed(tmp_path: Path) -> None:
    outputs, model = Outputs(), Logging()
    fitted = trainer(tmp_path, outputs, accumulate_grad_batches=2)
    fitted.fit(model, loader())
    assert {"later_step", "later_epoch", "metric_step"} <= set(fitted.logged_metrics)
    assert not {"undone", "never", "in_hook"} & (outputs.logged | set(fitted.logged_metrics))
    assert {divided_by for _, _, divided_by in model.made} == {2}
    assert all(extra == {"more": 2} for _, extra, _ in model.made)
    assert all(given == {"loss": torch.tensor(7.0), "other": 1} for given in outputs.outputs)
    assert "log" not in vars(fitted.fit_loop.epoch_loop._results)


def test_ddp_has_what_preparing_a_backward_sets() -> None:
    import inspect

    from torch.nn.parallel import DistributedDataParallel

    source = inspect.getsource(compat_steps.prepare_for_backward)
    assert "prepare_for_backward(args)" in source
    assert "require_forward_param_sync" in inspect.getsource(DistributedDataParallel)

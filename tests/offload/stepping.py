"""A strategy with nothing but micro-batches, models that log all there is to log, and a record of what came of it."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchmetrics import MeanMetric, MeanSquaredError, Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score
from torchmetrics.utilities import dim_zero_cat

from lightning_efficient.offload.batches.batch_control import BatchController
from lightning_efficient.offload.batches.feedback import BatchFeedback
from lightning_efficient.offload.batches.micro_batches import MicroBatchMixin, agree_by

__all__ = ["Model", "Record", "Split", "SplitDDP", "SplitsAt", "data", "fit", "out_of_memory_at"]

CLASSES = 4


class _Wiring(MicroBatchMixin):
    # Without reserve and with that patience the control changes nothing by itself.
    settings: dict[str, Any] = {"margin": 0.9, "reserve": 0.0, "patience": 10**6}  # noqa: RUF012

    def __init__(self, parts: int | None = None, feedback: dict[str, Any] | None = None, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.parts, self.arguments = parts, feedback

    def setup(self, trainer: pl.Trainer) -> None:
        super().setup(trainer)
        if self.arguments is not None:
            self.control = BatchController(**self.settings, agree=agree_by(self))
            if self.parts:
                self.control.split(self.parts, 8)
            self.start_batch_feedback(trainer, BatchFeedback(self.control, **self.arguments))

    def teardown(self) -> None:
        self.stop_batch_feedback()
        super().teardown()


class Split(_Wiring, SingleDeviceStrategy):
    """On one device."""

    def __init__(self, parts: int | None = None, feedback: dict[str, Any] | None = None) -> None:
        super().__init__(parts, feedback, device="cpu")


class SplitDDP(_Wiring, DDPStrategy):
    """On several."""


class _Data(Dataset):
    def __init__(self, samples: int, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(7)
        self.x = torch.randn(samples, 6, generator=generator, dtype=dtype)
        self.y = torch.randint(0, CLASSES, (samples,), generator=generator)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {"x": self.x[i], "pair": (self.y[i], f"sample {i}")}


def data(samples: int = 21, batch_size: int = 8, dtype: torch.dtype = torch.float64) -> DataLoader:
    """Batches of 8, 8 and 5 samples: a dictionary with a tensor, and a pair of labels and texts."""
    return DataLoader(_Data(samples, dtype), batch_size=batch_size)


class Model(pl.LightningModule):
    """Logs in each way.

    Args:
        dropout: Probability.
        output: What ``training_step`` returns: the loss, or a dictionary with more.
        reduction: Of its loss.
        hook: Called in each forward.
        backward_hook: Called in each backward, when the later layers have their gradients.
        metrics: Whether to log metric objects too.
    """

    def __init__(
        self,
        *,
        dropout: float = 0.0,
        output: str = "tensor",
        reduction: str = "mean",
        hook: Callable[[], None] = lambda: None,
        backward_hook: Callable[[], None] = lambda: None,
        metrics: bool = True,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.net = nn.Sequential(
            nn.Linear(6, 9), nn.Tanh(), nn.Dropout(dropout), nn.Linear(9, 9), nn.Tanh(), nn.Linear(9, CLASSES)
        ).to(dtype)
        self.output, self.reduction, self.log_metrics = output, reduction, metrics
        self.hook, self.backward_hook = hook, backward_hook
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("constant", torch.ones(3))
        if metrics:
            self.accuracy = MulticlassAccuracy(CLASSES)
            self.median = _Median()
            self.mean = MeanMetric()
            self.several = MetricCollection({
                "f1": MulticlassF1Score(CLASSES),
                "macro": MulticlassAccuracy(CLASSES, average="macro"),
                "squares": _Squares(),
            })  # fmt: skip
        self.seen: list[float] = []

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Any:
        labels, texts = batch["pair"]
        assert len(texts) == len(labels)
        self.hook()
        self.calls += 1
        hidden = self.net[:3](batch["x"])
        if hidden.requires_grad:
            hidden.register_hook(lambda gradient: self.backward_hook())
        logits = self.net[3:](hidden)
        self.seen.append(random.random())
        loss = F.cross_entropy(logits, labels, reduction=self.reduction)
        self.log("loss", loss, on_step=True, on_epoch=True, prog_bar=True)
        self.log("given", loss, on_step=True, on_epoch=True, batch_size=len(labels))
        self.log("constant", 0.25, on_step=True, on_epoch=True)
        self.log("count", torch.tensor(float(len(labels))), on_step=True, on_epoch=True, reduce_fx="sum")
        self.log("largest", batch["x"].max(), on_step=True, on_epoch=True, reduce_fx="max")
        self.log("smallest", batch["x"].min(), on_epoch=True, on_step=False, reduce_fx="min")
        if self.log_metrics:
            self.accuracy(logits, labels)
            self.log("accuracy", self.accuracy, on_step=True, on_epoch=True)
            self.median(logits[:, 0].detach())
            self.log("median", self.median, on_step=True, on_epoch=True)
            self.mean(loss.detach())
            self.log("mean", self.mean, on_step=True, on_epoch=True)
            self.several.update(logits.argmax(-1), labels)  # members with the same states share them
            self.log_dict(self.several, on_step=False, on_epoch=True)
        if self.output == "tensor":
            return loss
        return {
            "loss": loss,
            "logits": logits.detach(),
            "norm": logits.detach().norm(dim=1).mean(),
            "texts": list(texts),
        }

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.3, momentum=0.9)


class _Squares(MeanSquaredError):
    def update(self, preds: Tensor, target: Tensor) -> None:
        super().update(preds.double(), target.double())


class _Median(Metric):
    """Keeps all values, in a list."""

    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        self.add_state("values", [], dist_reduce_fx="cat")

    def update(self, values: Tensor) -> None:
        self.values.append(values)

    def compute(self) -> Tensor:
        return dim_zero_cat(self.values).median()


class SplitsAt(pl.Callback):
    """Tells the control of a ``Split`` to make parts from a batch on."""

    def __init__(self, batch: int, parts: int) -> None:
        self.batch, self.parts = batch, parts

    def on_train_batch_start(self, trainer: pl.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.current_epoch == 0 and batch_idx == self.batch:
            trainer.strategy.control.split(self.parts, 8)


@dataclass
class Record(pl.Callback):
    """What callbacks are given and find."""

    hooks: list[str] = field(default_factory=list)
    outputs: list[dict[str, Any]] = field(default_factory=list)
    gradients: list[list[Tensor]] = field(default_factory=list)
    logged: list[dict[str, float]] = field(default_factory=list)

    def on_before_zero_grad(self, *_: Any) -> None:
        self.hooks.append("zero_grad")

    def on_before_backward(self, *_: Any) -> None:
        self.hooks.append("before")

    def on_after_backward(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.hooks.append("after")
        self.gradients.append([p.grad.clone() for p in module.parameters()])

    def on_before_optimizer_step(self, *_: Any) -> None:
        self.hooks.append("step")

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, *_: Any) -> None:
        self.outputs.append(outputs)
        self.logged.append({name: float(value) for name, value in trainer.logged_metrics.items()})

    def on_train_epoch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.logged.append({name: float(value) for name, value in trainer.callback_metrics.items()})


def fit(
    path: Path, model: pl.LightningModule, strategy: Any, loader: DataLoader | None = None, **arguments: Any
) -> tuple[pl.Trainer, Record]:
    """Two epochs; the generators begin the same."""
    torch.manual_seed(11)
    random.seed(11)
    record = Record()
    callbacks = [record, *arguments.pop("callbacks", [])]
    trainer = pl.Trainer(
        **{"max_epochs": 2, "accelerator": "cpu", "devices": 1, **arguments},
        strategy=strategy,
        callbacks=callbacks,
        logger=CSVLogger(path),
        default_root_dir=path,
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.fit(model, loader or data())
    return trainer, record


def out_of_memory_at(*calls: int) -> Callable[[], None]:
    """A function whose calls with these numbers, counted from 1, find no memory."""
    count = 0

    def call() -> None:
        nonlocal count
        count += 1
        if count in calls:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    return call

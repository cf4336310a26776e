"""Whole healthy runs with the Trainer: how much of them is in few bits, and what that does to the loss."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.activation_losses import Difference, Digits, digits_loaders, language
from benchmarks.harness import Options, Table, spread
from benchmarks.precision_training import Counts, counted, rollback
from lightning_efficient.precision.precision import RollbackPrecision

__all__ = ["HEALTHY_ARMS", "Healthy", "measured_health"]

HEALTHY_ARMS: dict[str, dict[str, Any] | None] = {
    "fp32": None,
    "int8": {"low": "int8", "high": "fp32"},
    "int8, rounded to nearest": {"low": "int8", "high": "fp32", "stochastic_rounding": False},
    "int8, rounded at random": {"low": "int8", "high": "fp32", "stochastic_rounding": True},
    "fp8": {"low": "fp8", "high": "fp32"},
}
CLAIMED = ("int8",)
"""Arms whose shares are the benchmark's figures."""
Task = Literal["byte language model", "MLP on digits", "ResNet with GELU on digits"]
TASKS: tuple[Task, ...] = ("byte language model", "MLP on digits", "ResNet with GELU on digits")


class DigitsMlp(pl.LightningModule):
    """Three layers, on scikit-learn's digits."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1], label_smoothing=0.1)

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1], label_smoothing=0.1))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


class _Counter(pl.Callback):
    """Counts what is computed once pre-learning is over."""

    def __init__(self, precision: RollbackPrecision, pre_learning_steps: int) -> None:
        self.precision, self.pre_learning_steps = precision, pre_learning_steps
        self.before = Counts(low=0, high=0, retries=0)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, index: int) -> None:
        if trainer.global_step == self.pre_learning_steps:
            self.before = counted(self.precision.nodes)

    @property
    def found(self) -> Counts:
        return counted(self.precision.nodes).since(self.before)


@dataclass(frozen=True)
class Healthy:
    """One arm on one task, for each seed.

    Attributes:
        losses: On validation data, in the end.
        low: Part of the operations of main learning that were in few bits.
        retries: Of those, the part that was computed again.
    """

    losses: Sequence[float]
    low: Sequence[float] = ()
    retries: Sequence[float] = ()


def trained(
    task: Task, arguments: dict[str, Any] | None, seed: int, steps: int, validation_batches: int | float = 1.0
) -> tuple[float, Counts | None]:
    """The final loss, and what was counted in main learning; with all random choices as ``seed`` says."""
    pl.seed_everything(seed, verbose=False)
    model: pl.LightningModule
    if task == "byte language model":
        model, data = language(seed)
    else:
        loaders = digits_loaders(seed)
        assert loaders is not None
        model = Digits() if task == "ResNet with GELU on digits" else DigitsMlp()
        data = {"train_dataloaders": loaders[0], "val_dataloaders": loaders[1]}
    pre_learning_steps = min(50, steps // 4)
    precision = rollback(**arguments, pre_learning_steps=pre_learning_steps) if arguments is not None else None
    counter = _Counter(precision, pre_learning_steps) if precision is not None else None
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=steps,
        max_epochs=-1,
        limit_val_batches=validation_batches,
        num_sanity_val_steps=0,
        check_val_every_n_epoch=None,
        val_check_interval=steps,
        plugins=[precision] if precision is not None else [],
        callbacks=[counter] if counter is not None else [],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, **data)
    return float(trainer.callback_metrics["val_loss"]), counter.found if counter is not None else None


def measured_health(options: Options) -> tuple[list[Table], dict[str, dict[str, Healthy]]]:
    """A table for each task, and what was found by task and arm."""
    steps, validation_batches = (8, 1) if options.quick else (300, 1.0)
    tasks = [task for task in TASKS if task == "byte language model" or digits_loaders(0) is not None]
    found: dict[str, dict[str, Healthy]] = {}
    tables = []
    header = (
        "", "final validation loss", "difference", "gap (SE)", "smallest that would show (2 SE)",
        "in few bits", "computed again",
    )  # fmt: skip
    for task in tasks:
        found[task], rows = {}, []
        for name, arguments in HEALTHY_ARMS.items():
            runs = [trained(task, arguments, seed, steps, validation_batches) for seed in options.seeds]
            counts = [count for _, count in runs if count is not None]
            healthy = Healthy(
                [loss for loss, _ in runs],
                [count.low_share for count in counts],
                [count.retry_share for count in counts],
            )
            found[task][name] = healthy
            rows.append((name, spread(healthy.losses, 4), *_columns(healthy, found[task]["fp32"])))
            print(f"{task}  " + "  ".join(rows[-1]), flush=True)
        tables.append(Table(f"{task}, {steps} steps, {len(options.seeds)} seeds", header, rows))
    return tables, found


def _columns(healthy: Healthy, exact: Healthy) -> tuple[str, ...]:
    if not healthy.low:
        return ("-",) * 5
    one = Difference.of(healthy.losses, exact.losses)
    shares = f"{statistics.fmean(healthy.low):.3f}", f"{statistics.fmean(healthy.retries):.4f}"
    return (f"{one.mean:+.4f}", f"{one.gap:+.1f}", f"{one.detectable:.4f}", *shares)

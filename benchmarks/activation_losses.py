"""Whole runs with the Trainer: what compression does to the loss, against runs without it of the same seed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.harness import Options, Table, spread
from lightning_efficient import ActivationCompressionPlugin
from lightning_efficient.demos import ByteLanguageModel, StdlibDataModule

__all__ = [
    "BLANKET", "CLAIMED", "ISSUE", "LOSS_ARMS", "Difference", "Digits", "digits_loaders", "language", "measured_losses",
]  # fmt: skip

LOSS_ARMS: dict[str, dict[str, Any] | None] = {
    "none": None,
    "4 bits": {"bits": 4},
    "2 bits where linear": {"bits": 2},
    "adaptive, 4 bits": {"bits": 4, "adaptive": {"every": 50, "target": 0.1}},
    "8 to 2 bits where linear": {"schedule": {"initial_bits": 8, "final_bits": 2, "begin": 0.05, "end": 0.5}},
    "4 bits, adaptive, from 8 to 2, head raw": {
        "bits": 4,
        "schedule": {"initial_bits": 8, "final_bits": 2, "begin": 0.05, "end": 0.5},
        "adaptive": {"every": 50, "target": 0.1},
        "overrides": {"head": "raw"},
    },
    "2 bits everywhere": {"bits": 2, "overrides": {"*": 2}},
}
CLAIMED = ("4 bits", "2 bits where linear", "adaptive, 4 bits")
"""Arms that shall not hurt."""
ISSUE = "4 bits, adaptive, from 8 to 2, head raw"
BLANKET = "2 bits everywhere"
"""What the floors are there to prevent."""


@dataclass(frozen=True)
class Difference:
    """From the runs of the same seeds without compression.

    Attributes:
        mean: Of the final losses.
        error: Of the mean, its standard error; infinite where there is one seed.
    """

    mean: float
    error: float

    @classmethod
    def of(cls, losses: Sequence[float], plain_losses: Sequence[float]) -> Difference:
        differences = [loss - plain for loss, plain in zip(losses, plain_losses, strict=True)]
        enough = len(differences) > 1
        error = statistics.stdev(differences) / math.sqrt(len(differences)) if enough else math.inf
        return cls(statistics.fmean(differences), error)

    @property
    def gap(self) -> float:
        """The mean over its standard error."""
        return self.mean / self.error if self.error else 0.0

    @property
    def detectable(self) -> float:
        """The smallest difference that these seeds would show: two standard errors."""
        return 2 * self.error


class Digits(pl.LightningModule):
    """A small ResNet with GELU, which has a floor, on scikit-learn's digits (8 by 8 pixels)."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.GELU())
        self.blocks = nn.Sequential(*[_ResidualBlock(width) for _ in range(3)])
        self.head = nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(images)).mean((2, 3)))

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1], label_smoothing=0.1)  # or a few images are all of the loss

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1], label_smoothing=0.1))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class _ResidualBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.GELU(),
            nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(x + self.branch(x))


def digits_loaders(seed: int) -> tuple[Any, Any] | None:
    """Loaders for training and validation; None where scikit-learn is not installed."""
    try:
        from sklearn.datasets import load_digits  # type: ignore[import-not-found, import-untyped, unused-ignore]
    except ImportError:
        return None
    images, labels = load_digits(return_X_y=True)
    data = torch.utils.data.TensorDataset(
        torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16, torch.tensor(labels)
    )
    train, validation = torch.utils.data.random_split(data, [1297, 500], torch.Generator().manual_seed(0))
    order = torch.Generator().manual_seed(seed)
    return (
        torch.utils.data.DataLoader(train, batch_size=64, shuffle=True, generator=order),
        torch.utils.data.DataLoader(validation, batch_size=500),
    )


def language(seed: int) -> tuple[pl.LightningModule, dict[str, Any]]:
    model = ByteLanguageModel(layers=2, width=64, heads=4, context=64, learning_rate=1e-3, warmup_steps=20)
    return model, {"datamodule": StdlibDataModule(context=64, batch_size=16, seed=seed, validation_bytes=65536)}


def _final_loss(task: str, arguments: dict[str, Any] | None, seed: int, options: Options) -> float:
    pl.seed_everything(seed, verbose=False)
    steps = 8 if options.quick else 300
    if task == "byte language model":
        model, data = language(seed)
    else:
        loaders = digits_loaders(seed)
        assert loaders is not None
        model, data = Digits(), {"train_dataloaders": loaders[0], "val_dataloaders": loaders[1]}
    trainer = pl.Trainer(
        accelerator="gpu" if options.device == "cuda" else "cpu",
        devices=1,
        max_steps=steps,
        max_epochs=-1,
        limit_val_batches=1.0 if not options.quick else 1,
        num_sanity_val_steps=0,
        check_val_every_n_epoch=None,
        val_check_interval=steps,
        callbacks=[ActivationCompressionPlugin(**arguments)] if arguments is not None else [],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, **data)
    return float(trainer.callback_metrics["val_loss"])


def measured_losses(options: Options) -> tuple[list[Table], dict[str, dict[str, list[float]]]]:
    """A table for each task, and the final losses by task and arm."""
    tasks = ["byte language model"] + (["ResNet with GELU on digits"] if digits_loaders(0) is not None else [])
    found: dict[str, dict[str, list[float]]] = {}
    tables = []
    header = "", "final validation loss", "difference", "gap (SE)", "smallest that would show (2 SE)"
    for task in tasks:
        found[task] = {}
        rows = []
        for name, arguments in LOSS_ARMS.items():
            found[task][name] = [_final_loss(task, arguments, seed, options) for seed in options.seeds]
            one = Difference.of(found[task][name], found[task]["none"])
            shown = (f"{one.mean:+.4f}", f"{one.gap:+.1f}", f"{one.detectable:.4f}")
            rows.append((name, spread(found[task][name], 4), *(shown if name != "none" else ("-",) * 3)))
            print(f"{task}  " + "  ".join(rows[-1]), flush=True)
        tables.append(Table(f"{task}, {len(options.seeds)} seeds", header, rows))
    return tables, found

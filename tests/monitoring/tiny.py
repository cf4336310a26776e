"""A model, data and a fake technique, as small as the tests allow."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_efficient.core.balance import Balance
from lightning_efficient.telemetry import Event, log


class TinyModel(pl.LightningModule):
    """Two linear layers, trained to output zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, 2))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.net(batch[0]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class ValidatedModel(TinyModel):
    """The same, with a metric of validation."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.net(batch[0]).square().mean())


class FakeTechnique(pl.Callback):
    """Measures that it counts steps, and reports one event."""

    def __init__(self) -> None:
        self.steps = 0

    def measurements(self) -> dict[str, float]:
        return {"fake/saved_bytes": 1024.0 * self.steps, "fake/steps": float(self.steps)}

    def events(self) -> Sequence[Event]:
        return [Event(2, "fake", "switched | over")] if self.steps > 2 else []

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.steps += 1
        log(trainer, self.measurements())


class Costly(pl.Callback):
    """Says that each batch cost it 2 ms and saved 0.5 ms, in this object's life."""

    def __init__(self, before: int = 0) -> None:
        self.batches = before

    def on_train_batch_end(self, *_: Any) -> None:
        self.batches += 1

    def balance(self) -> Balance:
        return Balance(
            "costly", cost_ms=2.0 * self.batches, gain_ms=0.5 * self.batches, spared_bytes=1024.0 * (self.batches == 3),
            time="By counting.", verdict="It was worth it.",
        )  # fmt: skip


def loader(samples: int = 32, batch_size: int = 4) -> DataLoader:
    """Eight batches of four samples, unless told otherwise."""
    values = torch.randn(samples, 8, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(values), batch_size=batch_size)


def trainer(root: Path, *callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    """A quiet Trainer on the CPU that logs every second step."""
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "default_root_dir": root,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 2,
        "max_epochs": 1,
    }
    return pl.Trainer(callbacks=list(callbacks), **(defaults | options))

"""A configuration that trains in no time, and what a plan of it found, made up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import yaml
from torch import Tensor, nn

from lightning_efficient.planning.facts import Layer, Profile, Sample, ShortRun

__all__ = [
    "Breaks",
    "SmallData",
    "SmallModel",
    "TakesTooMuch",
    "TwoInputs",
    "TwoLoaders",
    "Validates",
    "configuration",
    "profile",
]

MIB = 1 << 20


class SmallModel(pl.LightningModule):
    """Linear layers; batches of different lengths."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*[nn.Linear(16, 16) for _ in range(4)])

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = self.blocks(batch).square().mean()
        self.log("loss", loss)
        self.logger.experiment.add_scalar("own", 1.0)  # type: ignore[union-attr]
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-3)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plateau, "monitor": "val_loss"}}


class Breaks(SmallModel):
    """A user's mistake."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        raise KeyError("no such column")


class TakesTooMuch(SmallModel):
    """Parameters beyond all limits of a test."""

    def __init__(self) -> None:
        super().__init__()
        self.large = nn.Parameter(torch.zeros(1 << 46))


class Validates(SmallModel):
    """It also looks at what it has not learnt from."""

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val_loss", self.blocks(batch).square().mean())

    def val_dataloader(self) -> Any:
        return [torch.randn(2, 16)]


class TwoInputs(SmallModel):
    """A batch of one loader, and one of another."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(torch.cat([batch["one"], batch["other"]]), batch_idx)


class TwoLoaders(pl.LightningDataModule):
    """``[2, 16]`` of either; the shorter one begins anew."""

    def train_dataloader(self) -> Any:
        def loader(items: int) -> Any:
            return torch.utils.data.DataLoader([torch.randn(16) for _ in range(items)], batch_size=2)  # type: ignore[arg-type]

        return {"one": loader(40), "other": loader(10)}


class SmallData(pl.LightningDataModule):
    """``[length, 16]``, with lengths of 1 to 6."""

    def train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(  # no batches: each item is one
            [torch.randn(1 + number % 6, 16) for number in range(60)],
            batch_size=None,  # type: ignore[arg-type]
        )


def configuration(folder: Path, model: str = "SmallModel", **trainer: Any) -> Path:
    """The file of a user."""
    path = folder / "my.yaml"
    plain = {"accelerator": "cpu", "devices": 1, "max_epochs": 4, "enable_checkpointing": False}
    module = SmallModel.__module__
    content = {
        "seed_everything": 0,
        "model": {"class_path": f"{module}.{model}"},
        "data": {"class_path": f"{module}.SmallData"},
        "trainer": plain | trainer,
    }
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


def profile(**changed: Any) -> Profile:
    """Of a training with 100 MiB of parameters and 400 of activations, a second a batch."""
    samples = tuple(Sample(64, 1.0, 1.0, 0.3, 0.6, 0.1) for _ in range(4))
    facts = {
        "run": ShortRun(100 * MIB, 950 * MIB, samples, yardstick=(0.002, 0.002), save_seconds=2.0),
        "module": "MyModule", "device": "cpu", "hardware": "a processor", "threads": 2, "memory": "resident memory",
        "parameters": 100 * MIB, "gradients": 100 * MIB, "optimizer_state": 200 * MIB, "saved": {64: 400 * MIB},
        "update_peak": 520 * MIB, "checkpoint": 300 * MIB, "checkpoint_peak": 900 * MIB,
        "largest_parameter": 4 * MIB, "largest_module": 5 * MIB,
        "layers": (Layer("blocks.*.mlp", "Mlp", 4, 300 * MIB, 0.2),), "sizes": (64, 64), "all_batches": False,
        "data_seconds": 0.01, "save_interval": 0, "batches": 1000, "precision": "32-true", "taken": {},
    }  # fmt: skip
    return Profile(**(facts | changed))  # type: ignore[arg-type]

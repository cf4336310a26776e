"""A tiny model with all that a repeated step could count twice, its data, and what a test wants to know of a run."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchmetrics import MeanMetric

from lightning_efficient.precision.precision import RollbackPrecision
from tests.helpers.fitting import ListLogger, make_trainer

__all__ = ["AtBatch", "Batches", "Net", "Result", "guarded", "train"]

GUARD = {"factor": 3.0, "window": 6, "snapshot_every": 3}


class Batches(Dataset[Any]):
    """Whole batches of 32 samples; of some the targets are multiplied.

    Args:
        count: Of batches.
        bad: By number, the factor.
        without: Numbers of batches that are not there.
        rank: Others for each.
    """

    def __init__(
        self, count: int = 16, bad: dict[int, float] | None = None, without: tuple[int, ...] = (), rank: int = 0
    ):
        numbers = torch.Generator().manual_seed(7 + rank)
        pairs = [(torch.randn(32, 8, generator=numbers), torch.randn(32, 1, generator=numbers)) for _ in range(count)]
        bad = bad or {}
        self.pairs = [(x, y * bad.get(n, 1.0)) for n, (x, y) in enumerate(pairs) if n not in without]

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, place: int) -> Any:
        return self.pairs[place]

    def loader(self) -> DataLoader[Any]:
        return DataLoader(self, batch_size=None)


class Net(pl.LightningModule):
    """Linear layers with batch statistics, dropout, a metric, logged values and a schedule by steps.

    Args:
        plain: Without batch statistics and dropout.
        ignored: Batches of which the loss counts nothing.
    """

    def __init__(self, *, plain: bool = False, ignored: tuple[int, ...] = ()) -> None:
        super().__init__()
        torch.manual_seed(0)
        extras = [] if plain else [nn.BatchNorm1d(16), nn.Dropout(0.2)]
        self.net = nn.Sequential(nn.Linear(8, 16), *extras, nn.ReLU(), nn.Linear(16, 1))
        self.metric = MeanMetric(nan_strategy="disable")
        self.ignored = ignored
        self.hooks: list[str] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        loss = F.mse_loss(self.net(x).float(), y)
        self.metric(loss.detach())
        self.log("loss", loss, on_step=True, on_epoch=True)
        self.log("metric", self.metric, on_step=False, on_epoch=True)
        return loss * 0 if batch_idx in self.ignored else loss

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.hooks.append(f"start {batch_idx}")

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.hooks.append(f"end {batch_idx}")

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=3e-3)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.9)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class AtBatch(Callback):
    """Does something when a batch begins.

    Args:
        at: Which.
        action: Gets the module.
    """

    def __init__(self, at: int, action: Any) -> None:
        self.at, self.action = at, action

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.at:
            self.action(pl_module)


@dataclass
class Result:
    """What a run led to."""

    trainer: pl.Trainer
    module: Any
    plugin: RollbackPrecision
    logged: list[tuple[int, dict[str, float]]] = field(default_factory=list)

    @property
    def state(self) -> dict[str, Any]:
        """All that later steps depend on, or that a user looks at."""
        return {
            "weights": {name: value.clone() for name, value in self.module.state_dict().items()},
            "optimizer": copy.deepcopy(self.trainer.optimizers[0].state_dict()),
            "scheduler": self.trainer.lr_scheduler_configs[0].scheduler.state_dict(),
            "steps": self.trainer.global_step,
        }

    @property
    def logged_of_model(self) -> list[tuple[int, dict[str, float]]]:
        """By step; without what the plugin says of itself."""
        own = [
            (step, {k: v for k, v in values.items() if not k.startswith("precision/")}) for step, values in self.logged
        ]
        return [entry for entry in own if entry[1]]

    @property
    def counts(self) -> dict[str, int]:
        """Of incidents."""
        return dict(self.plugin._guard.incidents.counts) if self.plugin._guard else {}


def guarded(**more: Any) -> RollbackPrecision:
    """All in high bits (float32), with a spike guard, if ``more`` does not say otherwise."""
    return RollbackPrecision(
        **{"high": "fp32", "pre_learning_steps": 1000, "only_if_faster": False, "spike_guard": GUARD, **more}
    )


def train(
    plugin: RollbackPrecision, *callbacks: Callback, data: Batches | None = None, module: Any = None,
    root: Path | None = None, ckpt_path: Any = None, **arguments: Any,
) -> Result:  # fmt: skip
    """One epoch over the data, logged at each step."""
    torch.set_num_threads(1)
    logger = ListLogger()
    settings: dict[str, Any] = {"max_epochs": 1, "max_steps": -1, "logger": logger, "default_root_dir": root}
    trainer = make_trainer(*callbacks, plugins=[plugin], **(settings | arguments))
    module = module or Net()
    torch.manual_seed(1)
    trainer.fit(module, (data or Batches()).loader(), ckpt_path=ckpt_path)
    return Result(trainer, module, plugin, logger.entries)

"""What growth asks of the Trainer, and which Trainers it refuses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.optim import Optimizer

from lightning_efficient import compat
from lightning_efficient.coordination import Offloader, find
from lightning_efficient.growth.moments import unsupported_optimizer
from lightning_efficient.growth.progress import Progress
from lightning_efficient.growth.settings import Settings

__all__ = [
    "check_optimizers_kept",
    "refuse_combinations",
    "refuse_optimizers",
    "reported_loss",
]


def refuse_combinations(trainer: pl.Trainer, settings: Settings, *, offload_on_switch: bool) -> None:
    """Refuse a strategy or callback that cannot follow, in ``setup``.

    Raises:
        MisconfigurationException: Naming it, and what to do instead.
    """
    strategy = trainer.strategy
    if strategy.restore_checkpoint_after_setup or not strategy.lightning_restore_optimizer:
        raise MisconfigurationException(
            f"GrowAndUnshareCallback cannot change parameters that {type(strategy).__name__} shards. Run the first "
            "phases with strategy='auto' or 'ddp', then build the full model from their checkpoint with "
            "`lightning_efficient.load_grown(..., grown=True)` and train it with this strategy."
        )
    if offload_on_switch and find(trainer, Offloader) is None:
        raise MisconfigurationException(
            f"offload_on_switch=True needs a strategy whose offload can be turned on, and "
            f"{type(strategy).__name__} has none. Use a strategy that offloads, or leave offload_on_switch out."
        )
    if settings.width and (callbacks := compat.averaging_callbacks(trainer)):
        raise MisconfigurationException(
            f"Width growth cannot widen the averaged model of {type(callbacks[0]).__name__}. Start to average "
            "after the growth in a second run, or use depth growth."
        )


def refuse_optimizers(trainer: pl.Trainer, progress: Progress) -> None:
    """Refuse an optimizer whose state cannot be carried over, when training begins.

    Raises:
        MisconfigurationException: Naming it, and why.
    """
    settings = progress.settings
    scaled = settings.width is not None or (settings.mode == "share" and settings.gradient == "sum")
    scaled = scaled and settings.optimizer_state == "copy" and not progress.complete
    for optimizer in trainer.optimizers:
        if reason := unsupported_optimizer(optimizer, scaled=scaled):
            raise MisconfigurationException(
                f"GrowAndUnshareCallback cannot follow {type(optimizer).__name__}: it {reason}. Use an optimizer "
                "that updates parameter by parameter, such as AdamW or SGD."
            )


def check_optimizers_kept(trainer: pl.Trainer, planned: Sequence[Optimizer]) -> None:
    """Whether the Trainer still has the optimizers that growth has planned for.

    Raises:
        MisconfigurationException: If user code replaced them.
    """
    if len(planned) != len(trainer.optimizers) or any(
        a is not b for a, b in zip(planned, trainer.optimizers, strict=True)
    ):
        raise MisconfigurationException(
            "The Trainer's optimizers were replaced while it runs, and GrowAndUnshareCallback would add new layers "
            "to the old ones. Change the optimizers' settings instead of building them anew."
        )


def reported_loss(trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, monitor: str | None) -> Any:
    """The value that loss conditions read after a batch: a logged metric, or what ``training_step`` returned.

    Args:
        trainer: The running Trainer.
        pl_module: Its module.
        outputs: What ``on_train_batch_end`` got.
        monitor: Name of the metric; None: the training loss.
    """
    if monitor:
        return trainer.callback_metrics.get(monitor)
    loss = outputs["loss"] if isinstance(outputs, Mapping) else outputs
    if isinstance(loss, Tensor) and pl_module.automatic_optimization:
        loss = loss * trainer.accumulate_grad_batches  # Lightning reports the share of the accumulated loss
    return loss

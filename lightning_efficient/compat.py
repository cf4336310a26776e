"""Every private symbol of Lightning or torch that the suite uses, in one place.

``tests/test_compat.py`` asserts that each still exists, so that a new release that moves one fails there, by name.
"""

from __future__ import annotations

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.strategies import DDPStrategy

__all__ = ["averaged_models", "log_step", "rewrap_ddp", "should_log"]


def log_step(trainer: pl.Trainer) -> int:
    """The x-axis that Lightning's own loggers use: batches that ended in an optimizer step."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def should_log(trainer: pl.Trainer) -> bool:
    """Whether ``log_every_n_steps`` says that this step is logged."""
    return trainer._logger_connector.should_update_logs


def rewrap_ddp(strategy: DDPStrategy) -> None:
    """Wrap the module anew, so that parameters that came after the first wrapping are reduced too.

    ``DistributedDataParallel`` reads the parameters once, when it is built; later ones are silently never reduced.
    """
    module = strategy.lightning_module
    if module is None:
        raise RuntimeError("The strategy has no LightningModule to wrap: this must run inside `Trainer.fit`.")
    strategy.model = module
    strategy.configure_ddp()


def averaged_models(trainer: pl.Trainer) -> list[torch.nn.Module]:
    """The copies of the LightningModule that Lightning's averaging callbacks hold (EMA, SWA)."""
    models: list[torch.nn.Module] = []
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, WeightAveraging) and callback._average_model is not None:
            models.append(callback._average_model.module)
        elif isinstance(callback, StochasticWeightAveraging) and callback._average_model is not None:
            models.append(callback._average_model)
    return models

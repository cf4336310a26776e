"""A LightningCLI that makes what the user's configuration says, and trains it for a few batches only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Checkpoint, EarlyStopping, ModelCheckpoint, ProgressBar
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers.logger import DummyLogger

from lightning_efficient import compat
from lightning_efficient.monitoring import EfficiencyMonitor

__all__ = ["ShortCLI", "save_interval"]

_LEFT_OUT = (Checkpoint, EarlyStopping, ProgressBar, EfficiencyMonitor)


class ShortCLI(LightningCLI):
    """``fit`` as the user would call it, without loggers, checkpoints, validation and progress bars.

    Args:
        configs: Files, the later ones first in what they say.
        folder: In place of the Trainer's ``default_root_dir``.
        least_steps: A run that is planned to be shorter is made as long.
        watch: The callback that measures.
        before_model: Called when all is read, before anything is made.
        before_fit: Called with what was made.
    """

    def __init__(
        self,
        *,
        configs: list[str],
        folder: str,
        least_steps: int,
        watch: pl.Callback,
        before_model: Callable[[], None],
        before_fit: Callable[[ShortCLI], None],
    ) -> None:
        self._folder, self._least_steps, self._watch = folder, least_steps, watch
        self._before_model, self._before_fit = before_model, before_fit
        self.saves: list[pl.Callback] = []
        self.plugins: list[Any] = []
        self.saves_by_default = True
        super().__init__(
            pl.LightningModule,
            pl.LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_callback=None,
            parser_kwargs={"prog": "lightning-efficient", "exit_on_error": False, "fit": {"exit_on_error": False}},
            args=["fit", *(f"--config={config}" for config in configs), "--ckpt_path=null"],
        )

    def before_instantiate_classes(self) -> None:
        """The configuration is read; nothing is made yet."""
        self._before_model()

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """The user's, but for what would write, or stop it too early."""
        given = self.config_init["fit"]["trainer"]
        callbacks, self.plugins = _as_list(given["callbacks"]), _as_list(given["plugins"])
        self.saves = [callback for callback in callbacks if isinstance(callback, Checkpoint)]
        self.saves_by_default = given["enable_checkpointing"] is not False
        if 0 < given["max_steps"] < self._least_steps:
            kwargs["max_steps"] = self._least_steps
        kept = [callback for callback in callbacks if not isinstance(callback, _LEFT_OUT)]
        return super().instantiate_trainer(
            callbacks=[self._watch, *kept],
            default_root_dir=self._folder,
            logger=DummyLogger(),
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            limit_val_batches=0,
            num_sanity_val_steps=0,
            fast_dev_run=False,
            min_epochs=None,
            min_steps=None,
            max_time=None,
            profiler=None,
            **kwargs,
        )

    def before_fit(self) -> None:
        """All is made."""
        self._before_fit(self)


def _as_list(given: Any) -> list[Any]:
    return given if isinstance(given, list) else [] if given is None else [given]


def save_interval(cli: ShortCLI, epoch: int) -> int:
    """Batches between the checkpoints of the configuration, 0 if it saves none.

    Args:
        cli: Made from it.
        epoch: Batches of an epoch, 0 for no end.
    """
    if not cli.saves_by_default:
        return 0
    steps = [compat.saves_every_n_steps(save) for save in cli.saves if isinstance(save, ModelCheckpoint)]
    accumulate = cli.trainer.accumulate_grad_batches
    return min((each * accumulate for each in steps if each), default=epoch)

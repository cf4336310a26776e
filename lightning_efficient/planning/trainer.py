"""A LightningCLI that makes what the user's configuration says, and trains it for a few batches only."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Checkpoint, EarlyStopping, ModelCheckpoint, ProgressBar
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities.model_helpers import is_overridden

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
        trainer = self.config["fit"]["trainer"]
        for each in [*_as_list(trainer["callbacks"]), *_as_list(trainer["plugins"])]:
            if getattr(each, "class_path", "").rpartition(".")[2] == "AsyncCheckpointIO":
                self._keep_from_the_users_files(each.init_args)
        self._before_model()

    def _keep_from_the_users_files(self, arguments: Any) -> None:
        """Checkpoints that it writes by itself are not to stand among those of the training, nor to be gone on from."""
        for name in ("dirpath", "local_dir"):
            if arguments[name] is not None:
                arguments[name] = str(Path(self._folder) / name)
        arguments["resume"] = None

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """The user's, but for what would write, or stop it too early."""
        given = self.config_init["fit"]["trainer"]
        callbacks, self.plugins = _as_list(given["callbacks"]), _as_list(given["plugins"])
        self.saves = [callback for callback in callbacks if isinstance(callback, Checkpoint)]
        self.saves_by_default = given["enable_checkpointing"] is not False
        self.val_check_interval, self.may_validate = given["val_check_interval"], given["limit_val_batches"] != 0
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


def save_interval(cli: ShortCLI, epoch: int, seconds: float) -> int:
    """Batches between the checkpoints of the configuration, on average; 0 if it saves none.

    Args:
        cli: Made from it.
        epoch: Batches of an epoch, 0 for no end.
        seconds: Of a batch.
    """
    if not cli.saves_by_default:
        return 0
    saves = cli.saves or [ModelCheckpoint()]  # which is what the Trainer would add
    if not any(isinstance(save, ModelCheckpoint) for save in saves):
        return epoch
    found = [
        _interval(cli, compat.save_triggers(save), epoch, seconds)
        for save in saves
        if isinstance(save, ModelCheckpoint) and (save.save_top_k or save.save_last)
    ]
    return min((each for each in found if each), default=0)


def _interval(cli: ShortCLI, triggers: compat.SaveTriggers, epoch: int, seconds: float) -> int:
    """Of one callback, as it decides where to save."""
    if triggers.steps:
        return triggers.steps * cli.trainer.accumulate_grad_batches
    if triggers.seconds:
        return max(1, round(triggers.seconds / seconds))
    every, between = cli.trainer.check_val_every_n_epoch, cli.val_check_interval or 1.0
    by_clock = compat.validation_seconds(cli.trainer)
    at_epoch_end = triggers.at_epoch_end
    if at_epoch_end is None:
        at_epoch_end = not by_clock and every == 1 and (not _validates(cli) or between == 1.0)
    if at_epoch_end or not triggers.epochs:
        return epoch * triggers.epochs
    # It saves behind each validation of every so manyth epoch.
    if by_clock:
        validation = max(1, round(by_clock / seconds))
    else:
        validation = max(1, int(epoch * between)) if isinstance(between, float) else int(between)
    if every is None or not epoch:
        return validation * triggers.epochs if epoch or triggers.epochs == 1 else 0
    return max(validation, math.lcm(every, triggers.epochs) * epoch // max(1, epoch // validation))


def _validates(cli: ShortCLI) -> bool:
    if not cli.may_validate or not is_overridden("validation_step", cli.model):
        return False
    data = cli.datamodule
    return is_overridden("val_dataloader", cli.model) or (
        data is not None and is_overridden("val_dataloader", data, pl.LightningDataModule)
    )

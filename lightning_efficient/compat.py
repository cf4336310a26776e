"""Every private symbol of Lightning or torch that the suite uses, in one place; for resuming, in ``compat_resume.py``.

``tests/test_compat.py`` asserts that each still exists, so that a new release that moves one fails there, by name.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy

from lightning_efficient.core.torch_internals import compiled_entry

__all__ = [
    "SaveTriggers",
    "accumulating",
    "averaged_models",
    "averaging_callbacks",
    "compiled_parts",
    "defer_links",
    "leaves_training",
    "log_step",
    "rewrap_ddp",
    "save_triggers",
    "shard_over_all",
    "should_log",
    "step_is_compiled",
    "trainer_of",
    "validation_metrics",
    "validation_seconds",
    "writes_files",
]


def log_step(trainer: pl.Trainer) -> int:
    """The x-axis that Lightning's own loggers use: batches that ended in an optimizer step."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def should_log(trainer: pl.Trainer) -> bool:
    """Whether ``log_every_n_steps`` says that this step is logged."""
    return trainer._logger_connector.should_update_logs


def accumulating(trainer: pl.Trainer) -> bool:
    """Whether the batch in progress only adds to the gradients and ends without an optimizer step."""
    return trainer.fit_loop._should_accumulate()


def validation_metrics(trainer: pl.Trainer) -> dict[str, float]:
    """The scalars that the validation in progress has logged; to be asked in ``on_validation_end``.

    ``trainer.callback_metrics`` mixes them with those of training and with older ones.
    """
    metrics = trainer._logger_connector.metrics["callback"]
    return {name: float(value) for name, value in metrics.items() if torch.as_tensor(value).numel() == 1}


def rewrap_ddp(strategy: DDPStrategy) -> None:
    """Wrap the module anew, so that parameters that came after the first wrapping are reduced too.

    ``DistributedDataParallel`` reads the parameters once, when it is built; later ones are silently never reduced.
    """
    module = strategy.lightning_module
    if module is None:
        raise RuntimeError("The strategy has no LightningModule to wrap: this must run inside `Trainer.fit`.")
    strategy.model = module
    strategy.configure_ddp()


def shard_over_all(strategy: ModelParallelStrategy) -> None:
    """Where nobody said among how many ranks parameters are sharded: all that tensor parallelism leaves."""
    if strategy._data_parallel_size == "auto":
        ranks = strategy.num_nodes * strategy.num_processes
        strategy._data_parallel_size = max(1, ranks // int(strategy._tensor_parallel_size))


def writes_files(strategy: Strategy) -> bool:
    """Whether checkpoints of this strategy are files that go through its checkpoint IO."""
    if isinstance(strategy, ModelParallelStrategy):
        return not strategy._save_distributed_checkpoint
    return strategy.lightning_restore_optimizer and not strategy.restore_checkpoint_after_setup


def defer_links(
    callback: ModelCheckpoint, link: Callable[[str, str], None], exists: Callable[[str], bool]
) -> Callable[[], None]:
    """Let others make the links of a ``ModelCheckpoint`` (``save_last="link"``), and say which files will exist.

    Args:
        callback: Changed on the instance only.
        link: Called with the target and the link, on rank zero, in place of what makes the link at once.
        exists: Called with a path that is not there yet.

    Returns:
        What undoes it.
    """
    own_exists = callback.file_exists

    def link_later(trainer: pl.Trainer, filepath: str, linkpath: str) -> None:
        if trainer.is_global_zero and os.path.abspath(filepath) != os.path.abspath(linkpath):
            link(filepath, linkpath)
        trainer.strategy.barrier()

    def exists_or_will(filepath: Any, trainer: pl.Trainer) -> bool:
        coming = trainer.strategy.broadcast(exists(str(filepath)))  # asked first: it may come while it is looked for
        return coming or own_exists(filepath, trainer)

    callback.__dict__["_link_checkpoint"] = link_later
    callback.__dict__["file_exists"] = exists_or_will

    def undo() -> None:
        callback.__dict__.pop("_link_checkpoint", None)
        callback.__dict__.pop("file_exists", None)

    return undo


class SaveTriggers(NamedTuple):
    """When a ``ModelCheckpoint`` saves; one of the first three is not 0, or it never does.

    Attributes:
        steps: Its ``every_n_train_steps``.
        seconds: Its ``train_time_interval``.
        epochs: Its ``every_n_epochs``.
        at_epoch_end: Its ``save_on_train_epoch_end``; None: Lightning decides.
    """

    steps: int
    seconds: float
    epochs: int
    at_epoch_end: bool | None


def save_triggers(callback: ModelCheckpoint) -> SaveTriggers:
    """When it saves, as its constructor understood what it was given."""
    interval = callback._train_time_interval
    seconds = interval.total_seconds() if interval is not None else 0.0
    return SaveTriggers(
        callback._every_n_train_steps, seconds, callback._every_n_epochs, callback._save_on_train_epoch_end
    )


def validation_seconds(trainer: pl.Trainer) -> float:
    """Between validations, where they follow the clock; 0 where they follow batches or epochs."""
    return getattr(trainer, "_val_check_time_interval", None) or 0.0


def leaves_training(trainer: pl.Trainer) -> bool:
    """Whether the batch in progress is followed by a validation, the end of its epoch, or that of the training."""
    loop, fetcher = trainer.fit_loop.epoch_loop, trainer.fit_loop._data_fetcher
    if loop.batch_progress.is_last_batch or loop._is_training_done or trainer.should_stop:
        return True
    return fetcher is not None and loop._should_check_val_fx(fetcher)


def before_validations(trainer: pl.Trainer, call: Callable[[], object]) -> Callable[[], None]:
    """Let ``call`` be called before each validation of a fit begins, ahead of all hooks.

    Returns:
        What undoes it.
    """
    loop = trainer.fit_loop.epoch_loop.val_loop
    own_run = loop.run

    def run() -> Any:
        call()
        return own_run()

    loop.__dict__["run"] = run

    def undo() -> None:
        if loop.__dict__.get("run") is run:
            del loop.__dict__["run"]

    return undo


def compiled_parts(module: pl.LightningModule) -> list[str]:
    """Names of the modules that ``torch.compile`` has taken; the empty name is that of the LightningModule."""
    names = [name for name, part in module.named_modules() if compiled_entry(part) is not None]
    return [*([""] if step_is_compiled(module) and "" not in names else []), *names]


def step_is_compiled(module: pl.LightningModule) -> bool:
    """Whether its ``training_step`` is compiled as a whole (``torch.compile`` of the LightningModule)."""
    return module._compiler_ctx is not None


def trainer_of(module: pl.LightningModule) -> pl.Trainer | None:
    """The Trainer that ``module`` is attached to, if it is; ``module.trainer`` raises if not."""
    return module._trainer


def averaging_callbacks(trainer: pl.Trainer) -> list[WeightAveraging | StochasticWeightAveraging]:
    """Lightning's callbacks that keep an averaged copy of the LightningModule."""
    kinds = (WeightAveraging, StochasticWeightAveraging)
    return [callback for callback in trainer.callbacks if isinstance(callback, kinds)]  # type: ignore[attr-defined]


def averaged_models(trainer: pl.Trainer) -> list[torch.nn.Module]:
    """The copies of the LightningModule that Lightning's averaging callbacks hold (EMA, SWA)."""
    models: list[torch.nn.Module] = []
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, WeightAveraging) and callback._average_model is not None:
            models.append(callback._average_model.module)
        elif isinstance(callback, StochasticWeightAveraging) and callback._average_model is not None:
            models.append(callback._average_model)
    return models

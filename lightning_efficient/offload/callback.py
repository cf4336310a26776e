"""Weights that are up to date before any callback puts others in their place."""

from __future__ import annotations

from collections.abc import Callable

import lightning.pytorch as pl

__all__ = ["finish_first"]


class FinishUpdates(pl.Callback):
    """Asks for what is late before validation, at the end of an epoch, and at the end of training.

    Those who average weights swap them then, and a strategy hears of it only behind all callbacks: a late update would
    change the averages, and be gone with them.
    """

    def __init__(self, finish: Callable[[], None]) -> None:
        self._finish = finish

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._finish()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._finish()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._finish()


def finish_first(trainer: pl.Trainer, finish: Callable[[], None]) -> Callable[[], None]:
    """Let ``finish`` be called before the callbacks of ``trainer``.

    Returns:
        What undoes it.
    """
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    first = FinishUpdates(finish)
    callbacks.insert(0, first)

    def undo() -> None:
        if first in callbacks:
            callbacks.remove(first)

    return undo

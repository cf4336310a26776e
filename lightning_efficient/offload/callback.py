"""Weights that are up to date, or whole, before any callback looks at them or puts others in their place."""

from __future__ import annotations

from collections.abc import Callable

import lightning.pytorch as pl

__all__ = ["finish_first"]


class FinishUpdates(pl.Callback):
    """Asks for what is late before validation, at the end of an epoch, and at the end of training.

    Those who average weights swap them then, and a strategy hears of it only behind all callbacks: a late update would
    change the averages, and be gone with them. Behind backward it waits for what the host has begun in it, so that who
    reads weights there, or writes to them, finds them whole.
    """

    reads_gradients = False

    def __init__(self, finish: Callable[[], None], join: Callable[[], None]) -> None:
        self._finish, self._join = finish, join

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._join()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._finish()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._finish()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._finish()


def finish_first(trainer: pl.Trainer, finish: Callable[[], None], join: Callable[[], None]) -> Callable[[], None]:
    """Let ``finish``, and behind backward ``join``, be called before the callbacks of ``trainer``.

    Returns:
        What undoes it.
    """
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    first = FinishUpdates(finish, join)
    callbacks.insert(0, first)

    def undo() -> None:
        if first in callbacks:
            callbacks.remove(first)

    return undo

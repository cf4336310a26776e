"""How long a run will be, for what the user gives as a fraction of it."""

from __future__ import annotations

import lightning.pytorch as pl

__all__ = ["length_is_a_default", "steps_done", "total_steps"]


def total_steps(trainer: pl.Trainer) -> float:
    """How many optimizer steps the run will make; infinite where nothing says.

    To be asked in ``on_train_start``, not earlier: it builds the loaders, and Lightning then forgets to restore them.
    """
    total = float(trainer.estimated_stepping_batches)
    if trainer.max_steps > 0 and total >= trainer.max_steps:
        total = trainer.max_steps / max(1, len(trainer.optimizers))
    return total


def steps_done(trainer: pl.Trainer) -> int:
    """Optimizer steps so far, on the scale of :func:`total_steps`: several optimizers step together."""
    return trainer.global_step // max(1, len(trainer.optimizers))


def length_is_a_default(trainer: pl.Trainer) -> bool:
    """Whether the run has the length that Lightning plans where nobody gives one."""
    return trainer.max_steps == -1 and trainer.max_epochs == 1000

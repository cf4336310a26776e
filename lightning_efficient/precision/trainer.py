"""What doing batches again asks of a Trainer: what it cannot be used with."""

from __future__ import annotations

import lightning.pytorch as pl
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch.optim import LBFGS

from lightning_efficient.coordination import StateHolder, find, members

__all__ = ["can_do_again", "refuse_combinations"]


def refuse_combinations(trainer: pl.Trainer) -> None:
    """Refuse what a spike guard cannot take back, when a fit begins.

    Raises:
        MisconfigurationException: Naming it, and what to do instead.
    """
    if reason := _reason(trainer):
        raise MisconfigurationException(
            f"spike_guard does a batch again, from the snapshot of an earlier step if need be, and {reason}. Leave one "
            "of the two out."
        )


def can_do_again(trainer: pl.Trainer) -> bool:
    """Whether nothing of that is there."""
    return not _reason(trainer)


def _reason(trainer: pl.Trainer) -> str:
    module, holder = trainer.lightning_module, find(trainer, StateHolder)
    if not module.automatic_optimization:
        return "with manual optimization training_step itself updates the weights"
    if any(isinstance(optimizer, LBFGS) for optimizer in trainer.optimizers):
        return "LBFGS runs a batch several times within each of its steps"
    if trainer.strategy.handles_gradient_accumulation:
        return f"{type(trainer.strategy).__name__} updates the weights by itself"
    if holder is not None:
        return f"{type(holder).__name__} keeps optimizer state elsewhere, where it cannot be put back"
    if is_param_in_hook_signature(module.training_step, "dataloader_iter", explicit=True):
        return "a training_step with dataloader_iter fetches its batches by itself"
    for member in members(trainer):
        if getattr(member, "optimizer_in_backward", False):
            return f"{type(member).__name__}(optimizer_in_backward=True) updates weights before a batch can be judged"
    return ""

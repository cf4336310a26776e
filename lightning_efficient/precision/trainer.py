"""What doing batches again asks of a Trainer: what it cannot be used with."""

from __future__ import annotations

import lightning.pytorch as pl
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch.optim import LBFGS

from lightning_efficient.coordination import SnapshotSource, StateHolder, find, members
from lightning_efficient.precision.spikes import SpikeGuard

__all__ = ["can_do_again", "others_keep_states", "refuse_combinations"]


def refuse_combinations(trainer: pl.Trainer, settings: SpikeGuard) -> None:
    """Refuse what a spike guard cannot take back, when a fit begins.

    Args:
        trainer: Of the fit.
        settings: Of the guard.

    Raises:
        MisconfigurationException: Naming it, and what to do instead.
    """
    if reason := _reason(trainer):
        raise MisconfigurationException(
            f"spike_guard does a batch again, from the snapshot of an earlier step if need be, and {reason}. Leave one "
            "of the two out."
        )
    holder = find(trainer, StateHolder)
    if holder is None or not settings.snapshots or others_keep_states(trainer):
        return
    alone = (
        "Add AsyncCheckpointIO(in_memory=1) to the callbacks, beside a ModelCheckpoint that saves every few steps: it "
        "goes back to those. Or let it not go back"
    )
    raise MisconfigurationException(
        f"{type(holder).__name__} keeps optimizer state elsewhere, of which spike_guard has no snapshots of its own. "
        f"{alone if trainer.world_size == 1 else 'On several ranks it cannot go back'}: with "
        "spike_guard={'snapshots': 0, ...} a batch that spikes is done again in high bits, and left out if it spikes "
        "there too."
    )


def others_keep_states(trainer: pl.Trainer) -> bool:
    """Whether somebody keeps snapshots of the whole run in memory; of several ranks only one would have them."""
    source = find(trainer, SnapshotSource)
    return source is not None and source.keeps_states and trainer.world_size == 1


def can_do_again(trainer: pl.Trainer) -> bool:
    """Whether nothing of that is there, and optimizer state is in the optimizers."""
    return not _reason(trainer) and find(trainer, StateHolder) is None


def _reason(trainer: pl.Trainer) -> str:
    module = trainer.lightning_module
    if not module.automatic_optimization:
        return "with manual optimization training_step itself updates the weights"
    if any(isinstance(optimizer, LBFGS) for optimizer in trainer.optimizers):
        return "LBFGS runs a batch several times within each of its steps"
    if trainer.strategy.handles_gradient_accumulation:
        return f"{type(trainer.strategy).__name__} updates the weights by itself"
    if getattr(trainer.strategy, "splits_batches", False):
        return f"{type(trainer.strategy).__name__}(batch_feedback=True) does parts of it again by itself"
    if is_param_in_hook_signature(module.training_step, "dataloader_iter", explicit=True):
        return "a training_step with dataloader_iter fetches its batches by itself"
    for member in members(trainer):
        if getattr(member, "optimizer_in_backward", False):
            return f"{type(member).__name__}(optimizer_in_backward=True) updates weights before a batch can be judged"
    return ""

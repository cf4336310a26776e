"""What Lightning leaves undone when a run is resumed: to find its place in the epoch, and in the data."""

from __future__ import annotations

from collections.abc import Callable
from inspect import isgenerator
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch.utils.data import (
    BatchSampler,
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from lightning_efficient import compat_resume
from lightning_efficient.core.resumable import ResumableDataLoader

__all__ = ["ExactResume"]

_WITHOUT_STATE = (DistributedSampler, RandomSampler, SequentialSampler, SubsetRandomSampler, WeightedRandomSampler)


class ExactResume:
    """Lets a fit go on from a checkpoint with the batch, or the validation, that was next when it was taken.

    Its methods are to be called in a callback's hooks of the same names; a new object for each fit.
    """

    def __init__(self) -> None:
        self._point: compat_resume.ResumePoint | None = None
        self._states: list[dict[str, Any]] | None = None
        self._end_notes: Callable[[], None] = lambda: None

    def on_load_checkpoint(self, trainer: pl.Trainer, checkpoint: dict[str, Any]) -> None:
        """Note where the checkpoint was taken, and correct its counters."""
        if trainer.state.fn == TrainerFn.FITTING and "loops" in checkpoint:
            self._point = compat_resume.resume_point(checkpoint, trainer.accumulate_grad_batches)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Count no batch that was fetched and not trained on."""
        if self._states:
            compat_resume.replace_loader_states(checkpoint, self._states)

    def on_train_start(self, trainer: pl.Trainer) -> None:
        """Find the place in the epoch.

        Random generators are to be restored *after* this, wherever the checkpoint was taken: what was drawn before
        belongs to iterators that an uninterrupted run has made earlier, or makes later.
        """
        self._find_place(trainer)
        self._end_notes()
        self._states, self._end_notes = compat_resume.keep_loader_states(trainer)

    def _find_place(self, trainer: pl.Trainer) -> None:
        point = self._point
        if point is None:
            return
        if point.place == "batch":
            compat_resume.finish_batch(trainer)
        if point.place == "end":
            compat_resume.begin_next_epoch(trainer)
        if not point.last:
            compat_resume.load_waiting_loader_states(trainer)
            _warn_of_lost_places(compat_resume.train_loaders(trainer))
            self._point = None

    def on_train_epoch_start(self, trainer: pl.Trainer) -> None:
        """Find the beginning of the next epoch, if no batch of the last one was to come: its iterators are made now."""
        point, self._point = self._point, None
        if point is None:
            return
        compat_resume.begin_next_epoch(trainer)
        compat_resume.forget_loader_states(trainer)
        every: int = trainer.reload_dataloaders_every_n_epochs  # type: ignore[attr-defined]
        if every and trainer.current_epoch % every == 0:
            return  # the uninterrupted run would have new loaders here
        loaders = [loader for loader in compat_resume.train_loaders(trainer) if _has_state(loader)]
        if len(loaders) == len(point.loader_states):  # else the user has other data for this epoch
            for loader, state in zip(loaders, point.loader_states, strict=True):
                _leave_epoch(trainer, loader, state, point.batches)

    def teardown(self) -> None:
        """Leave the Trainer as it was."""
        self._end_notes()
        self._states = self._point = None


def _has_state(loader: Any) -> bool:
    return hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict")


def _leave_epoch(trainer: pl.Trainer, loader: Any, state: dict[str, Any], batches: int) -> None:
    """Load ``state``, of after the ``batches`` of an epoch, such that the loader's next iterator begins the next one.

    In a run that goes on, a new iterator is a new epoch. After ``load_state_dict`` that depends on the loader: some
    begin the next epoch if the state is at the end of one; some (torchdata's) make an iterator that yields
    nothing, for the old epoch is not over before ``StopIteration``; and if the epoch was cut short, by
    ``limit_train_batches`` or a shorter loader beside it, the iterator yields what was left out. So one is tried.
    """

    def load() -> None:
        loader.load_state_dict(state)
        compat_resume.name_epoch(trainer, loader)

    if isinstance(loader, ResumableDataLoader):
        return  # Lightning has just told it which epoch comes
    load()
    cut_short = _is_cut_short(trainer, loader, batches)
    with isolate_rng():
        iterator = iter(loader)
        if cut_short and not isgenerator(iterator):
            return  # has taken up the state, and a batch would be missing where data goes on from epoch to epoch
        left = next(iterator, load) is not load
    if left and not cut_short:
        load()  # that was the next epoch's first batch


def _is_cut_short(trainer: pl.Trainer, loader: Any, batches: int) -> bool:
    """Whether an epoch of so many batches leaves the loader within an epoch of its own."""
    try:
        length = len(loader)
    except (TypeError, NotImplementedError):
        return trainer.num_training_batches != float("inf")  # something else set an end
    return batches % length > 0 if compat_resume.cycles_loaders(trainer) else batches < length


def _warn_of_lost_places(loaders: list[Any]) -> None:
    """Say which of the loaders are known to begin their epoch again."""
    for loader in loaders:
        batch_sampler = getattr(loader, "batch_sampler", None)
        sampler = getattr(loader if batch_sampler is None else batch_sampler, "sampler", None)
        own = batch_sampler is not None and type(batch_sampler) is not BatchSampler
        if _has_state(loader) or own or type(sampler) not in _WITHOUT_STATE:
            continue  # or may keep its place in a way that we do not know
        rank_zero_warn(
            f"The run goes on in the middle of an epoch, and a {type(loader).__name__} with a {type(sampler).__name__} "
            "has forgotten its place: it begins an epoch from its first batch, so that in this epoch some items are "
            "seen twice and some not at all. Use lightning_efficient.ResumableDataLoader, another "
            "loader with state_dict and load_state_dict, or checkpoints of the ends of epochs."
        )
        return

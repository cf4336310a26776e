"""The private symbols of Lightning that finding one's place again needs: its loops' counters, and its train loaders.

As in ``compat.py``, of which this is a part, ``tests/test_compat.py`` asserts that each still exists.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.fabric.utilities.data import _set_sampler_epoch
from lightning.pytorch.loops.fetchers import _PrefetchDataFetcher

__all__ = [
    "ResumePoint",
    "begin_next_epoch",
    "cycles_loaders",
    "finish_batch",
    "forget_loader_states",
    "keep_loader_states",
    "load_waiting_loader_states",
    "name_epoch",
    "replace_loader_states",
    "resume_point",
    "train_loaders",
]


@dataclass(frozen=True)
class ResumePoint:
    """Where in its epoch a checkpoint was taken.

    Attributes:
        place: In the hooks of a ``"batch"``, before the validation that may follow it; in or after that
            (``"validation"``); or at the ``"end"`` of the epoch, with the next one to come.
        last: Whether no batch of the epoch is to come.
        batches: Of the epoch, up to there.
        loader_states: Of those train loaders that have a state.
    """

    place: Literal["batch", "validation", "end"]
    last: bool
    batches: int
    loader_states: list[dict[str, Any]]


def resume_point(checkpoint: dict[str, Any], accumulate_grad_batches: int) -> ResumePoint | None:
    """Where ``checkpoint`` was taken; its counters are changed such that Lightning goes on from there.

    By themselves, Lightning 2.6's loops go on wrongly from

    - the end of an epoch, with ``max_steps``: back into that epoch, which has no batches left;
    - a batch after which a validation is due, or the epoch ends: without the validation and the hooks of the epoch's
      end, and as if one epoch fewer had begun than has ended, so that a checkpoint in the middle of a later epoch is
      taken for one at its end;
    - an epoch that ``max_steps`` or ``should_stop`` cut short: with the next one.

    To be called in ``on_load_checkpoint``; what cannot be said in counters, :func:`finish_batch` and
    :func:`begin_next_epoch` do later.

    Returns:
        None if no batch was trained on, or the checkpoint was taken as an epoch or a batch began.
    """
    loops = checkpoint["loops"]["fit_loop"]
    epoch, batch = loops["epoch_progress"], loops["epoch_loop.batch_progress"]
    last, batches = batch["is_last_batch"], batch["current"]["ready"]
    states = loops["state_dict"].get("combined_loader", [])
    begun = epoch["total"]["started"] == epoch["total"]["ready"]
    trained = batch["total"]["processed"] == batch["total"]["ready"]
    if not (batches and begun and trained):
        return None
    if epoch["total"]["processed"] == epoch["total"]["ready"]:  # counted as ended
        if last:
            for count in epoch["total"], epoch["current"]:
                count["processed"] = count["completed"] = count["ready"]
            return ResumePoint("end", last, batches, states)
        for count in epoch["total"], epoch["current"]:
            count["processed"] = count["completed"] = count["ready"] - 1
        for count in batch["total"], batch["current"]:
            count["completed"] -= 1  # as if in the hooks of the last batch, where Lightning takes a validation as done
        loops["epoch_loop.state_dict"]["_batches_that_stepped"] -= batches % accumulate_grad_batches == 0
        return ResumePoint("validation", last, batches, states)
    if batch["total"]["completed"] == batch["total"]["processed"]:
        return ResumePoint("validation", last, batches, states)
    for count in batch["total"], batch["current"]:
        count["completed"] = count["processed"]
    validated = loops["epoch_loop.val_loop.batch_progress"]
    validated["current"] = dict.fromkeys(validated["current"], 0)
    for name in "ready", "started":  # as if the validation had begun: Lightning goes on with it, if it is due
        validated["total"][name] = validated["total"]["completed"] + 1
    return ResumePoint("batch", last, batches, states)


def finish_batch(trainer: pl.Trainer) -> None:
    """Go on after the hooks of a batch; to be called in ``on_train_start`` if the resume point is a ``"batch"``."""
    loop = trainer.fit_loop.epoch_loop
    validated: Any = loop.val_loop.batch_progress.total
    validated.ready = validated.started = validated.completed
    if trainer.fit_loop._data_fetcher is not None and not loop._should_check_val_fx(trainer.fit_loop._data_fetcher):
        loop._batches_that_stepped += not loop._should_accumulate()
        loop.val_loop._has_run = True  # if that was the last batch, the epoch is at its end


def begin_next_epoch(trainer: pl.Trainer) -> None:
    """Let the loops begin an epoch as in the midst of a run: counting from 0, with new iterators of the train loaders.

    To be called in ``on_train_start`` if the resume point is an ``"end"``, and in the first ``on_train_epoch_start``.
    """
    loop = trainer.fit_loop
    loop.on_iteration_done()  # it is no restart any more
    loop.epoch_loop.restarting = False
    loop.epoch_loop.on_iteration_done()


def keep_loader_states(trainer: pl.Trainer) -> tuple[list[dict[str, Any]] | None, Callable[[], None]]:
    """Note the states of the train loaders before each fetch, where Lightning fetches a batch ahead.

    It does so for loaders without a length, to know which batch is the last one, and then saves states that count a
    batch which was not trained on. To be called in ``on_train_start``.

    Returns:
        A list that always holds the states of before the last fetch, or None if nothing is fetched ahead; and what
        ends it.
    """
    fetcher, loop = trainer.fit_loop._data_fetcher, trainer.fit_loop.epoch_loop
    states: list[dict[str, Any]] = []
    own = loop._on_before_fetch

    def note() -> None:
        if trainer.fit_loop._combined_loader is not None:
            states[:] = trainer.fit_loop._combined_loader._state_dicts()
        own()

    if not isinstance(fetcher, _PrefetchDataFetcher) or fetcher.length is not None:
        return None, lambda: None
    loop.__dict__["_on_before_fetch"] = note
    return states, lambda: loop.__dict__.pop("_on_before_fetch", None)


def replace_loader_states(checkpoint: dict[str, Any], states: list[dict[str, Any]]) -> None:
    """Save these states of the train loaders; to be called in ``on_save_checkpoint``."""
    checkpoint["loops"]["fit_loop"]["state_dict"]["combined_loader"] = list(states)


def train_loaders(trainer: pl.Trainer) -> list[Any]:
    """The train loaders of the fit in progress."""
    combined = trainer.fit_loop._combined_loader
    return [] if combined is None else combined.flattened


def cycles_loaders(trainer: pl.Trainer) -> bool:
    """Whether a train loader that is at its end begins again while others go on."""
    combined = trainer.fit_loop._combined_loader
    return combined is not None and combined._mode == "max_size_cycle"


def name_epoch(trainer: pl.Trainer, loader: Any) -> None:
    """Call ``set_epoch`` of the loader's samplers, as Lightning does when an epoch begins."""
    ended: Any = trainer.fit_loop.epoch_progress.current
    _set_sampler_epoch(loader, ended.processed)


def load_waiting_loader_states(trainer: pl.Trainer) -> None:
    """Load the states of train loaders that Lightning has read and not loaded; to be called in ``on_train_start``.

    It loads them when it builds the loaders, but ``trainer.estimated_stepping_batches`` (in ``configure_optimizers`` or
    ``on_fit_start``) builds them before it has read the states. By now they have an iterator, which may have begun.
    """
    loop = trainer.fit_loop
    if loop._combined_loader is None or loop._data_fetcher is None or not loop._combined_loader_states_to_load:
        return
    loop._combined_loader.reset()  # ends workers that have begun
    loop._combined_loader._load_state_dicts(loop._combined_loader_states_to_load)
    forget_loader_states(trainer)
    for loader in loop._combined_loader.flattened:
        name_epoch(trainer, loader)
    iter(loop._data_fetcher)  # makes its iterator anew


def forget_loader_states(trainer: pl.Trainer) -> None:
    """Drop the states of train loaders that Lightning has read and not loaded."""
    trainer.fit_loop._combined_loader_states_to_load = []

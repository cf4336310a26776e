"""The private symbols of Lightning that doing batches again needs: its loop over them, its counters, what is logged.

As in ``compat.py``, of which this is a part; ``tests/test_compat_replay.py`` asserts that each still exists.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.tuner.lr_finder import _LRCallback

__all__ = [
    "Batches",
    "counted",
    "intercept_batches",
    "logged",
    "searches_rate",
    "step_with_what_is_there",
    "with_averages",
]

RunBatch = Callable[[torch.optim.Optimizer, int, Mapping[str, Any]], dict[str, Any]]
"""Of an optimizer, the number of a batch in its epoch, and the arguments of ``training_step``: forward, backward, and
the optimizer's step if it is due. Returns what callbacks are given."""


class Batches(Protocol):
    """Who stands between the loop and its batches."""

    def batch(
        self, run: RunBatch, optimizer: torch.optim.Optimizer, batch_idx: int, arguments: Mapping[str, Any]
    ) -> dict[str, Any]:
        """In place of ``run``."""

    def stepped(self) -> bool:
        """Whether the optimizer has taken the step that was due in this batch."""


def intercept_batches(trainer: pl.Trainer, batches: Batches) -> Callable[[], None]:
    """Stand between the loop of automatic optimization and its batches; schedulers see no step that was not taken.

    Returns:
        What ends it.
    """
    loop = trainer.fit_loop.epoch_loop
    own, update = loop.automatic_optimization.run, loop.update_lr_schedulers

    def run(optimizer: torch.optim.Optimizer, batch_idx: int, kwargs: Any) -> dict[str, Any]:
        module = trainer.lightning_module
        name = module._current_fx_name

        def once(optimizer: torch.optim.Optimizer, batch_idx: int, arguments: Mapping[str, Any]) -> dict[str, Any]:
            try:
                return own(optimizer, batch_idx, arguments)  # type: ignore[arg-type]
            finally:
                module._current_fx_name = name  # which hooks leave as it is when they are left by an exception

        return batches.batch(once, optimizer, batch_idx, kwargs)

    def update_if_stepped(interval: str, update_plateau_schedulers: bool) -> None:
        if interval != "step" or batches.stepped():
            update(interval, update_plateau_schedulers)

    loop.automatic_optimization.__dict__["run"] = run
    loop.__dict__["update_lr_schedulers"] = update_if_stepped

    def end() -> None:
        loop.automatic_optimization.__dict__.pop("run", None)
        loop.__dict__.pop("update_lr_schedulers", None)

    return end


def counted(trainer: pl.Trainer) -> Callable[[], None]:
    """Note what the loops have counted; returns what puts it back, as often as it is called."""
    loop = trainer.fit_loop.epoch_loop
    counters = (trainer.fit_loop.epoch_progress, loop.batch_progress, loop.automatic_optimization.optim_progress)
    states = [counter.state_dict() for counter in counters]
    accumulated = trainer.accumulate_grad_batches

    def back() -> None:
        for counter, state in zip(counters, states, strict=True):
            counter.load_state_dict(state)
        trainer.accumulate_grad_batches = accumulated

    return back


def logged(trainer: pl.Trainer) -> Callable[[], None]:
    """Note all that was logged in training; returns what undoes all that is logged from then on."""
    results = trainer.fit_loop.epoch_loop._results
    # A value is never changed in place, so that the attributes are all there is.
    before = {key: (one, dict(one.__dict__)) for key, one in results.items()}

    def undo() -> None:
        for key in [key for key in results if key not in before]:
            del results[key]
        for one, attributes in before.values():
            one.__dict__.clear()
            one.__dict__.update(attributes)

    return undo


def searches_rate(trainer: pl.Trainer) -> bool:
    """Whether Lightning's search for a learning rate is going on, in which the loss is to run away."""
    return any(isinstance(callback, _LRCallback) for callback in trainer.callbacks)  # type: ignore[attr-defined]


def step_with_what_is_there(trainer: pl.Trainer, batch_idx: int) -> None:
    """The optimizer's step without a batch, with all hooks that belong to it."""
    nothing = torch.zeros((), device=trainer.strategy.root_device)
    trainer.fit_loop.epoch_loop.automatic_optimization._optimizer_step(batch_idx, lambda: nothing)


def with_averages(trainer: pl.Trainer) -> list[tuple[WeightAveraging, torch.nn.Module]]:
    """Lightning's callbacks that average weights after each step, and what they hold."""
    return [
        (callback, callback._average_model)
        for callback in trainer.callbacks  # type: ignore[attr-defined]
        if isinstance(callback, WeightAveraging) and callback._average_model is not None
    ]

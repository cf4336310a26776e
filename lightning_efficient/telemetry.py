"""From measurements to loggers: one way in, whatever loggers the user has, or none.

A technique measures with plain numbers under tags ``<technique>/<quantity>_<unit>``. Its adapter hands them to
:func:`log` on the main thread; :class:`~lightning_efficient.EfficiencyMonitor` collects those of all adapters that are
:class:`Measured` for the report at the end of the run. What a person reads in the terminal goes through :func:`say`:
one line at the start, said together (:func:`introduce`), and what happens later.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import lightning
import lightning.pytorch as pl
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from tqdm import tqdm  # type: ignore[import-untyped]

import lightning_efficient
from lightning_efficient import compat
from lightning_efficient.coordination import members
from lightning_efficient.core.balance import Balance

__all__ = [
    "Balance",
    "Balanced",
    "Charted",
    "Described",
    "Event",
    "Eventful",
    "Measured",
    "balances",
    "beside_the_bar",
    "events",
    "introduce",
    "lay_out",
    "log",
    "measurements",
    "run_facts",
    "say",
]


@dataclass(frozen=True)
class Event:
    """Something that happened once: a growth switch, a rollback, a fall-back.

    Attributes:
        step: The logged step at which it happened (Lightning's x-axis).
        technique: Who reports it, as in the tags: ``growth``, ``checkpoint``, ...
        text: One sentence for a person.
    """

    step: int
    technique: str
    text: str


@runtime_checkable
class Balanced(Protocol):
    """An adapter that can say what it cost and saved in this fit."""

    def balance(self) -> Balance:
        """Up to now; after the fit, of all of it."""


@runtime_checkable
class Measured(Protocol):
    """An adapter that can say what it costs and saves, at any moment of a fit."""

    def measurements(self) -> Mapping[str, float]:
        """The current value of each of its tags."""


@runtime_checkable
class Eventful(Protocol):
    """An adapter that keeps the list of what happened to it during the run."""

    def events(self) -> Sequence[Event]:
        """All events of the run so far, oldest first."""


@runtime_checkable
class Described(Protocol):
    """A callback or strategy that has a part in the line at the start of a run; it calls :func:`introduce`."""

    def start_line(self, trainer: pl.Trainer) -> str:
        """What it does in this run and what that is expected to bring, in a few words, its name first."""


@runtime_checkable
class Charted(Protocol):
    """An adapter that knows best which of its tags belong in one chart of TensorBoard's page."""

    def charts(self) -> Mapping[str, Mapping[str, list[object]]]:
        """As the ``layout`` of :func:`lay_out`."""


def due(trainer: pl.Trainer) -> bool:
    """Whether this batch is one that is logged; for measurements that cost time, asked before they are taken."""
    return compat.should_log(trainer) and not compat.accumulating(trainer)


def log(trainer: pl.Trainer, metrics: Mapping[str, float], *, force: bool = False) -> None:
    """Send ``metrics`` to all loggers of the run, at Lightning's own x-axis and interval.

    Args:
        trainer: The running Trainer.
        metrics: Tag to value; empty is allowed.
        force: Log now, whatever ``log_every_n_steps`` and gradient accumulation say: for what changes once in a run.
    """
    if not metrics or not (force or due(trainer)):
        return
    step = compat.log_step(trainer)
    for logger in trainer.loggers:
        logger.log_metrics(dict(metrics), step=step)


def introduce(trainer: pl.Trainer, member: Described) -> None:
    """Say, once and in one line, which techniques are on; each calls it at the end of its ``on_train_start``.

    The last one to start says it for all: by then every one knows what it is about to do.

    Args:
        trainer: The running Trainer.
        member: Who has started.
    """
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    there = [one for one in (*callbacks, trainer.strategy) if isinstance(one, Described)]  # in the order of the hook
    if there[-1:] == [member]:
        lines = (one.start_line(trainer) for one in there)
        say(trainer, " | ".join((f"lightning-efficient {lightning_efficient.__version__}", *lines)))


def say(trainer: pl.Trainer | None, text: str) -> None:
    """A line in the log of rank 0, for a person."""
    with beside_the_bar(trainer):
        rank_zero_info(text)


def beside_the_bar(trainer: pl.Trainer | None) -> AbstractContextManager[None]:
    """What is written to the terminal within it has lines of its own: the progress bar of the run makes way."""
    if trainer is not None and isinstance(trainer.progress_bar_callback, TQDMProgressBar):
        bars: AbstractContextManager[None] = tqdm.external_write_mode()
        return bars
    return contextlib.nullcontext()


def measurements(trainer: pl.Trainer) -> dict[str, float]:
    """The current value of each tag of every :class:`Measured` member of the run."""
    values: dict[str, float] = {}
    for member in members(trainer):
        if isinstance(member, Measured):
            values.update({tag: float(value) for tag, value in member.measurements().items()})
    return values


def events(trainer: pl.Trainer) -> list[Event]:
    """What happened to every :class:`Eventful` member of the run so far, by member."""
    return [event for member in members(trainer) if isinstance(member, Eventful) for event in member.events()]


def balances(trainer: pl.Trainer) -> list[Balance]:
    """What every :class:`Balanced` member of the run cost and saved so far."""
    return [member.balance() for member in members(trainer) if isinstance(member, Balanced)]


def lay_out(trainer: pl.Trainer, layout: Mapping[str, Mapping[str, list[object]]]) -> None:
    """Give TensorBoard's custom-scalars page its ``layout``; other loggers have no such page.

    The page shows the last that is written, so that each has the charts of every :class:`Charted` member.

    Args:
        trainer: The running Trainer.
        layout: Category to chart title to ``["Multiline", [regular expressions of tags]]`` or ``["Margin", [tag of a
            value, of its lower and of its upper bound]]``. A category that a member gives counts in place of one here.
    """
    whole = dict(layout)
    for member in members(trainer):
        if isinstance(member, Charted):
            whole |= member.charts()
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_custom_scalars({category: dict(charts) for category, charts in whole.items()})


def run_facts(trainer: pl.Trainer, module: pl.LightningModule) -> dict[str, str]:
    """What a reader of a report must know of the Trainer and the model, as label and value."""
    ranks = f", {trainer.world_size} ranks" if trainer.world_size > 1 else ""
    facts = {
        "lightning": lightning.__version__,
        "lightning_efficient": lightning_efficient.__version__,
        "Model": type(module).__name__,
        "Strategy": f"{type(trainer.strategy).__name__}{ranks}",
        "Precision": f"{trainer.precision} ({type(trainer.precision_plugin).__name__})",
        "Batches per optimizer step": str(trainer.accumulate_grad_batches),
        "Gradient clipping": str(trainer.gradient_clip_val or "none"),
        "Seed": os.environ.get("PL_GLOBAL_SEED", "not set"),  # where seed_everything leaves it
    }
    # A name is enough for a reader: what the techniques were told is in the run's own configuration.
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    names = dict.fromkeys(type(callback).__name__ for callback in callbacks)
    facts["Callbacks"] = ", ".join(name for name in names if not name.startswith("_"))
    return facts

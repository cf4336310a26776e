"""From measurements to loggers: one way in, whatever loggers the user has, or none.

A technique measures with plain numbers under tags ``<technique>/<quantity>_<unit>``. Its adapter hands them to
:func:`log` on the main thread; :class:`~lightning_efficient.EfficiencyMonitor` collects those of all adapters that are
:class:`Measured` for the report at the end of the run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import lightning.pytorch as pl

from lightning_efficient import compat

__all__ = ["Event", "Eventful", "Measured", "log"]


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
class Measured(Protocol):
    """An adapter that can say what it costs and saves, at any moment of a fit."""

    def measurements(self) -> Mapping[str, float]:
        """The current value of each of its tags."""


@runtime_checkable
class Eventful(Protocol):
    """An adapter that keeps the list of what happened to it during the run."""

    def events(self) -> Sequence[Event]:
        """All events of the run so far, oldest first."""


def log(trainer: pl.Trainer, metrics: Mapping[str, float], *, force: bool = False) -> None:
    """Send ``metrics`` to all loggers of the run, at Lightning's own x-axis and interval.

    Args:
        trainer: The running Trainer.
        metrics: Tag to value; empty is allowed.
        force: Log now, whatever ``log_every_n_steps`` says: for values that change once in a run.
    """
    if not metrics or not (force or compat.should_log(trainer)):
        return
    step = compat.log_step(trainer)
    for logger in trainer.loggers:
        logger.log_metrics(dict(metrics), step=step)

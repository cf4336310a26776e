"""How the techniques hear of one another: the Trainer is the registry, and small Protocols say what.

Nobody holds a reference to another technique. One who changes something calls :func:`announce`; one who needs a role
played calls :func:`find`. Both look at the Trainer as it is at that moment.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, runtime_checkable

import lightning.pytorch as pl
from lightning.pytorch.utilities.exceptions import MisconfigurationException

__all__ = [
    "BackgroundCopier",
    "KeptState",
    "Offloader",
    "ParameterChange",
    "ParameterListener",
    "SnapshotSource",
    "StateHolder",
    "announce",
    "announce_before",
    "find",
    "members",
]

T = TypeVar("T")


@dataclass(frozen=True)
class ParameterChange:
    """What happened to the parameters of the LightningModule, by name; it never holds a tensor.

    Attributes:
        added: Names that exist now and did not before.
        removed: Names that existed before and do not now.
        replaced: Names that exist before and after, whose tensor is another object or has another shape.
        reason: Why, in words for a log.
    """

    added: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    replaced: tuple[str, ...] = ()
    reason: str = ""


@runtime_checkable
class ParameterListener(Protocol):
    """Whoever plans over the parameters: placements, snapshot pools, low-bit nodes, averaged models."""

    def on_parameters_changed(self, trainer: pl.Trainer, change: ParameterChange) -> None:
        """Called after the change, at a safe point, on every rank."""


@runtime_checkable
class StateHolder(Protocol):
    """Whoever keeps optimizer state elsewhere than in the optimizers."""

    def before_parameters_change(self, trainer: pl.Trainer) -> None:
        """Put it back, for parameters are about to come or go; :class:`ParameterListener` hears what did."""


@runtime_checkable
class BackgroundCopier(Protocol):
    """Whoever copies parameters and optimizer state while training goes on, up to the next update."""

    def finish_copies(self, trainer: pl.Trainer) -> None:
        """Copy the rest now, for they are about to change by other means than an update."""


@runtime_checkable
class Offloader(Protocol):
    """A strategy whose offload can be turned on while training runs."""

    def enable_offload(self, trainer: pl.Trainer) -> None:
        """Start to offload, from the next step on."""


class KeptState(Protocol):
    """A state of the run that is kept in memory."""

    @property
    def step(self) -> int:
        """Optimizer steps when it was taken."""

    def load(self) -> Any:
        """The checkpoint, as ``Trainer`` makes it, in new tensors."""


@runtime_checkable
class SnapshotSource(Protocol):
    """Whoever keeps the last complete states of the run in memory, to be gone back to at once."""

    @property
    def keeps_states(self) -> bool:
        """Whether it is told to keep any."""

    def last_good(self) -> KeptState | None:
        """The newest complete one, or None."""

    def discard_after(self, step: int) -> None:
        """Forget those of later steps: the run is about to go back to ``step``, and to put other weights in place."""


def members(trainer: pl.Trainer) -> Iterator[object]:
    """Everyone who takes part in a run, in the order in which they are told.

    The precision plugin and the plugins it wraps (``.inner``), the strategy, the checkpoint IO and the ones it wraps
    (``.checkpoint_io``), then the callbacks. An object that plays two roles comes once.
    """
    seen: set[int] = set()
    for first, link in (
        (trainer.precision_plugin, "inner"),
        (trainer.strategy, None),
        (trainer.strategy.checkpoint_io, "checkpoint_io"),
    ):
        member: object | None = first
        while member is not None and id(member) not in seen:
            seen.add(id(member))
            yield member
            member = getattr(member, link, None) if link else None
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if id(callback) not in seen:
            seen.add(id(callback))
            yield callback


def announce_before(trainer: pl.Trainer) -> None:
    """Tell every :class:`BackgroundCopier` and :class:`StateHolder` of the run that parameters are about to change."""
    for member in members(trainer):
        if isinstance(member, BackgroundCopier):
            member.finish_copies(trainer)
    for member in members(trainer):
        if isinstance(member, StateHolder):
            member.before_parameters_change(trainer)


def announce(trainer: pl.Trainer, change: ParameterChange) -> None:
    """Tell every :class:`ParameterListener` of the run that parameters changed."""
    for member in members(trainer):
        if isinstance(member, ParameterListener):
            member.on_parameters_changed(trainer, change)


def find(trainer: pl.Trainer, role: type[T]) -> T | None:
    """The one object of the run that plays ``role`` (a runtime-checkable Protocol), or None.

    Raises:
        MisconfigurationException: If several objects play it.
    """
    players = [member for member in members(trainer) if isinstance(member, role)]
    if len(players) > 1:
        names = ", ".join(type(player).__name__ for player in players)
        raise MisconfigurationException(
            f"{len(players)} objects of this Trainer can be its {role.__name__}: {names}. Keep one of them."
        )
    return players[0] if players else None

"""What became of the saves of a run: heard on the training thread, on all ranks alike, and told."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import lightning.pytorch as pl
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_efficient import compat, telemetry
from lightning_efficient.checkpointing.engine import CheckpointEngine
from lightning_efficient.checkpointing.places import Places
from lightning_efficient.checkpointing.snapshot import TornSnapshotError
from lightning_efficient.checkpointing.uploads import RemoteFailure, Uploaded
from lightning_efficient.checkpointing.writer import Failure, Written

__all__ = ["CheckpointSaveError", "OnError", "Outcomes"]

OnError = Literal["raise", "warn", "retry"]


class CheckpointSaveError(RuntimeError):
    """A checkpoint that was asked for could not be written; the ones before it are intact."""


class Outcomes:
    """Asks the engine what became of its saves, and raises or warns.

    Args:
        engine: Is asked.
        places: Likewise, of what is done remotely.
        on_error: Whether a failure raises, and when it is too late to try again.
        on_written: Called with each checkpoint that has become durable.

    Attributes:
        events: Every failure, in words.
        failing: Whether the user's own exception is on its way, which none of ours may mask.
        unresolved: Whether a save was asked for of which not all ranks know how it ended.
    """

    def __init__(
        self,
        engine: CheckpointEngine,
        places: Places,
        on_error: OnError,
        on_written: Callable[[Written | Uploaded], None],
    ) -> None:
        self.events: list[telemetry.Event] = []
        self.failing = False
        self.unresolved = False
        self._engine = engine
        self._places = places
        self._on_error = on_error
        self._on_written = on_written

    def begin(self) -> None:
        """A fit begins."""
        self.failing = self.unresolved = False

    def poll(self, trainer: pl.Trainer | None) -> None:
        """Hear of earlier saves, on all ranks alike, of which only one writes, from a save on until all is done.

        If that ended alone, the others would wait for it for ever. With an exception on its way nobody knows where the
        others are, and each rank hears for itself.

        Raises:
            CheckpointSaveError: If one failed and errors shall end the run.
        """
        together = trainer is not None and trainer.world_size > 1 and self.unresolved and not self.failing
        if trainer is None or not together:
            if error := self._heard(trainer):
                raise error
            return
        pending = self._places.pending()  # before: what fails in between is heard of the next time
        error = self._heard(trainer) if trainer.is_global_zero else None
        text, self.unresolved = trainer.strategy.broadcast((str(error or ""), pending))
        if text:
            raise error or CheckpointSaveError(f"On rank zero: {text}")

    def poll_together(self, trainer: pl.Trainer) -> None:
        """The same between two batches; of several ranks, only if there may be something to hear of.

        Raises:
            CheckpointSaveError: On all ranks alike.
        """
        if trainer.world_size == 1 or self.unresolved:
            self.poll(trainer)

    def _heard(self, trainer: pl.Trainer | None) -> CheckpointSaveError | None:
        for written in self._places.take_written():
            self._on_written(written)
        failures: list[Failure | RemoteFailure] = [*self._engine.take_failures(), *self._places.take_failures()]
        if not failures:
            return None
        text = "; ".join(str(failure) for failure in failures)
        step = compat.log_step(trainer) if trainer is not None else 0
        self.events.append(telemetry.Event(step, "checkpoint", text))
        if self.failing or all(self._is_let_pass(failure) for failure in failures):
            rank_zero_warn(f"AsyncCheckpointIO: {text}. The checkpoints before it are intact.")
            return None
        error = CheckpointSaveError(
            f"{text}. The checkpoints before it are intact. To go on training without it, use on_error='warn'."
        )
        error.__cause__ = failures[0].cause
        return error

    def _is_let_pass(self, failure: Failure | RemoteFailure) -> bool:
        if self._on_error == "retry":  # what has changed meanwhile cannot be copied again; the next save sees to it
            return isinstance(failure.cause, TornSnapshotError)
        return self._on_error == "warn"

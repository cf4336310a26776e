"""What is said of a run that offloads: lines of the log, loggers' values, events.

A part of ``common.py``.
"""

from __future__ import annotations

from collections.abc import Mapping

import lightning.pytorch as pl

from lightning_efficient import compat, telemetry
from lightning_efficient.offload.batches.batch_control import BatchController
from lightning_efficient.offload.session import OffloadSession
from lightning_efficient.offload.settings import Settings

__all__ = ["Account", "in_words"]


def in_words(name: str, session: OffloadSession | None, schedule: str, why: str, settings: Settings) -> str:
    """What is where, when it is updated, and what that does to the results; for the line at the start of a run.

    Args:
        name: Of the strategy.
        session: None: nothing is offloaded yet.
        schedule: Of updates.
        why: It is that one.
        settings: Of the user.
    """
    if session is None:
        return f"{name} waits: nothing is offloaded yet"
    if schedule == "delayed":
        results = (
            f"each update from step {settings.delay_after + 1} on comes one step late, so that results differ from "
            "those of plain training"
        )
    elif settings.master_weights:
        results = "updates in full precision"
    else:
        rounded = " but for the host's rounding" if session.updates_on_host else ""
        whole = " while no batch is split" if settings.batch_feedback else ""
        results = f"the same weights as in memory{rounded}{whole}"
    parts = session.summary(), f"schedule {schedule}: {why}", *session.ways(), results
    return f"{name}: {'; '.join(parts)}"


class Account:
    """Of one run; when that is over, of its end.

    Attributes:
        events: What was placed anew.

    Args:
        name: Of the strategy.
    """

    def __init__(self, name: str) -> None:
        self.events: list[telemetry.Event] = []
        self._name = name
        self._last: tuple[Mapping[str, float], telemetry.Balance] | None = None

    def placed_anew(self, trainer: pl.Trainer, session: OffloadSession, why: str) -> None:
        """Say so."""
        text = f"{session.summary()} ({why})"
        self.events.append(telemetry.Event(compat.log_step(trainer), "offload", text))
        telemetry.say(trainer, f"{self._name}, placed anew: {text}")

    def measurements(self, session: OffloadSession | None, control: BatchController | None) -> Mapping[str, float]:
        """Where bytes are, and what their ways cost a training batch."""
        if self._last is not None:
            return self._last[0]
        values = session.measurements() if session is not None else {}
        if control is not None and control.limit is not None:
            values["samples_per_part"] = float(control.limit)
        return {f"offload/{name}": value for name, value in values.items()}

    def balance(self, session: OffloadSession | None, *, enabled: bool) -> telemetry.Balance:
        """What computing waited, and what is elsewhere; ``enabled``: whether that began with the run."""
        if self._last is not None:
            return self._last[1]
        if session is None:
            return telemetry.Balance("offload", verdict="Nothing was offloaded yet." if enabled else "It was off.")
        return session.balance()

    def close(self, session: OffloadSession | None, control: BatchController | None, *, enabled: bool) -> None:
        """The run is over: what is true now stays."""
        self._last = self.measurements(session, control), self.balance(session, enabled=enabled)

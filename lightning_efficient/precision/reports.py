"""What a spike guard has done, for logs, loggers and the report at the end of a run.

A part of ``guard.py``.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import lightning.pytorch as pl

from lightning_efficient import compat, telemetry
from lightning_efficient.core.units import human_bytes
from lightning_efficient.precision.incidents import Incidents
from lightning_efficient.precision.ring import KeptBatch, Ring

__all__ = ["Reports", "place"]

_OUTCOMES = ("healed", "healed_from_snapshot", "confirmed", "skipped", "scale_retries")
_LINES = 20  # for outcomes; then a line for every hundredth
_log = logging.getLogger(__name__)


def place(trainer: pl.Trainer, batch: KeptBatch) -> str:
    """Which batch that is."""
    return f"Epoch {trainer.current_epoch}, batch {batch.batch_idx}, step {batch.step}"


class Reports:
    """Of one guard.

    Args:
        incidents: Are counted there.
    """

    def __init__(self, incidents: Incidents) -> None:
        self._incidents = incidents
        self._said_memory = False

    def note(self, trainer: pl.Trainer, batch: KeptBatch, outcome: str, words: str, *, event: bool = True) -> None:
        """Count an outcome, and say it; not all of them if there are many."""
        counts, text = self._incidents.counts, f"{place(trainer, batch)}: {words}"
        counts[outcome] += 1
        if event:
            self._incidents.lines.append((compat.log_step(trainer), text))
        count = sum(counts[name] for name in _OUTCOMES)
        if trainer.is_global_zero and (count <= _LINES or count % 100 == 0):
            with telemetry.beside_the_bar(trainer):
                _log.warning(text)

    def lost(self, buffers: Sequence[str]) -> None:
        """These could not be put back."""
        if buffers:
            _log.warning("Buffers that changed for the first time could not be put back: %s.", ", ".join(buffers))

    def level_forgotten(self, skipped: int) -> None:
        """So many batches in a row were left out."""
        _log.warning("%d batches in a row were skipped: what is usual is learnt anew.", skipped)

    def memory(self, trainer: pl.Trainer, ring: Ring) -> None:
        """Once, when an optimizer has its state."""
        if not self._said_memory and trainer.global_step and ring.needed_bytes:
            self._said_memory = True
            text = f"up to {ring.most} snapshots of {human_bytes(ring.needed_bytes)} in the host's memory"
            if ring.most:
                telemetry.say(trainer, f"The spike guard keeps {text}.")
            else:
                _log.warning("The spike guard has no memory for a snapshot: memory_cap must be at least %s.",
                             human_bytes(ring.needed_bytes))  # fmt: skip

    def measurements(self, ring: Ring | None) -> dict[str, float]:
        """By tag."""
        names = ("spikes", *_OUTCOMES, "rollbacks")
        found = {f"precision/{name}": float(self._incidents.counts[name]) for name in names}
        return found | ({"precision/snapshot_bytes": float(ring.nbytes)} if ring is not None else {})

    def events(self) -> list[telemetry.Event]:
        """Each batch that was not healthy at first."""
        return [telemetry.Event(step, "precision", text) for step, text in self._incidents.lines]

"""Saving by itself, as often as it may cost, or saying how often that would be."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from lightning_efficient import compat
from lightning_efficient.checkpointing.engine import CheckpointEngine
from lightning_efficient.checkpointing.frequency import FrequencyTuner
from lightning_efficient.checkpointing.places import Places
from lightning_efficient.checkpointing.remote_file import is_remote

__all__ = ["Autosave"]


class Autosave(Callback):
    """Finds how often to checkpoint and, where it is asked to, does so.

    To save, it joins the Trainer's callbacks as the last one, so that the state of all others is that after the batch.

    Args:
        engine: Writes.
        places: Knows where to.
        max_overhead: Part of the run's time that checkpoints may take.
        drive: Whether to save; else the interval is advice.
        dirpath: Where to; None: in ``checkpoints`` under the Trainer's ``default_root_dir``.
        keep: Newest files that stay.
    """

    def __init__(
        self,
        engine: CheckpointEngine,
        places: Places,
        max_overhead: float,
        *,
        drive: bool,
        dirpath: str | None,
        keep: int,
    ) -> None:
        self.tuner = FrequencyTuner(max_overhead)
        self.drives = drive
        self._engine = engine
        self._places = places
        self._dirpath = dirpath
        self._keep = keep
        self._kept: list[str] = []
        self._loaded: list[str] = []  # those of the run that is resumed
        self._batches = 0  # that ended in an optimizer step, in this fit
        self._next: int | None = None
        self._began: float | None = None
        self._busy = False

    def join(self, trainer: pl.Trainer) -> None:
        """Be called by ``trainer`` after all its other callbacks."""
        if self.drives and self not in trainer.callbacks:  # type: ignore[attr-defined]
            trainer.callbacks.append(self)  # type: ignore[attr-defined]

    def leave(self, trainer: pl.Trainer) -> None:
        """Undo :meth:`join`."""
        if self in trainer.callbacks:  # type: ignore[attr-defined]
            trainer.callbacks.remove(self)  # type: ignore[attr-defined]

    def begin(self, trainer: pl.Trainer) -> None:
        """A fit begins."""
        directory, loaded = self.directory(trainer), self._loaded
        self._kept = [path for path in loaded if path.rpartition("/")[0] == directory]  # others are not ours
        self._loaded = []
        self.tuner.begin()
        self._began = None
        self._batches = 0
        self._next = self.tuner.skip_steps + self.tuner.profile_steps

    def directory(self, trainer: pl.Trainer) -> str:
        """Where the files are."""
        path = self._dirpath or f"{str(trainer.default_root_dir).rstrip('/')}/checkpoints"
        return path.rstrip("/") if is_remote(path) else os.path.abspath(path)

    def note_save(self) -> None:
        """A checkpoint was taken, by whoever asked for it."""
        self._busy = True

    def skip(self) -> None:
        """The step in progress is none to be timed: a validation is in it."""
        self._began = None

    def batch_start(self) -> None:
        """A batch begins, and with it the last one ends."""
        now = time.perf_counter()
        pending = self._engine.pending()
        if self._began is not None:
            self.tuner.step(now - self._began, busy=self._busy or pending)
        self._began, self._busy = now, pending

    def due_after_this_batch(self) -> bool:
        """Whether the batch in progress will be followed by a save, as far as can be told."""
        return self.drives and self._next is not None and self._batches + 1 >= self._next

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """After a batch that ended in an optimizer step: save, if it is time to; on all ranks alike."""
        if compat.accumulating(trainer):
            return
        self._batches += 1
        if self._next is None or self._batches < self._next:
            return
        # While the interval is not known, one save after the other, with steps beside none to compare with.
        busy = self._busy or self._engine.pending() or not self.tuner.ready
        busy, known = trainer.strategy.broadcast((busy, self.tuner.interval))
        if known is None and busy:
            return
        self._save(trainer)
        self._next = self._batches + max(1, round((known or 1) / trainer.accumulate_grad_batches))

    def _save(self, trainer: pl.Trainer) -> None:
        directory = self.directory(trainer)
        path = f"{directory}/step={trainer.global_step}.ckpt"
        kept = [*(name for name in self._kept if name != path), path]
        self._kept = kept[-self._keep :]  # before it is saved itself, for who goes on from there
        trainer.save_checkpoint(path)
        if trainer.is_global_zero:
            if not is_remote(directory):  # which has no links
                self._engine.link(Path(path), Path(directory) / "last.ckpt")
            for old in kept[: -self._keep]:
                self._engine.remove(self._places.file(old))

    def found(self) -> dict[str, float]:
        """The interval, and what it costs."""
        values: dict[str, float] = {}
        if self.tuner.interval is not None:
            values["checkpoint/interval_batches"] = float(self.tuner.interval)
        if self.tuner.overhead is not None:
            values["checkpoint/overhead_percent"] = 100 * self.tuner.overhead
        return values

    def progress(self) -> dict[str, Any]:
        """What another run goes on from."""
        return {**self.tuner.state_dict(), "kept": list(self._kept)}

    def load_progress(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`progress` returned."""
        self.tuner.load_state_dict(state)
        self._loaded = list(state["kept"])

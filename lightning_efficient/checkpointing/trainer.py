"""What asynchronous checkpoints ask of a Trainer: its ModelCheckpoints, and the times of its steps."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import CheckpointIO, TorchCheckpointIO
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden

from lightning_efficient import compat
from lightning_efficient.checkpointing.engine import CheckpointEngine
from lightning_efficient.checkpointing.frequency import FrequencyTuner

__all__ = ["Autosave", "SavedByModelCheckpoint", "refuse_combinations", "refuse_in_backward"]

FIRST_STEPS = 10  # between checkpoints while the interval is not known


def refuse_combinations(trainer: pl.Trainer, present: CheckpointIO, kind: type) -> None:
    """Refuse what would write checkpoints beside an object of class ``kind``, in ``setup``.

    Raises:
        MisconfigurationException: Naming it, and what to do instead.
    """
    own = [callback for callback in trainer.callbacks if isinstance(callback, kind)]  # type: ignore[attr-defined]
    if len(own) > 1 or isinstance(present, kind):
        raise MisconfigurationException(
            f"This Trainer has two {kind.__name__} objects. Keep one; in both `callbacks` and `plugins` it must be the "
            "same object."
        )
    if type(present) is not TorchCheckpointIO:
        raise MisconfigurationException(
            f"{kind.__name__} and {type(present).__name__} would both write the checkpoints of this Trainer. Keep one "
            "of them."
        )
    strategy = trainer.strategy
    if strategy.restore_checkpoint_after_setup or not strategy.lightning_restore_optimizer:
        raise MisconfigurationException(
            f"{type(strategy).__name__} writes checkpoints by itself, past any checkpoint IO, so that {kind.__name__} "
            f"would not see them. Use strategy='auto' or 'ddp', or leave {kind.__name__} out."
        )


def refuse_in_backward(trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
    """Refuse ``optimizer_in_backward`` where an update needs more than its own gradient.

    Raises:
        MisconfigurationException: Naming what needs it, and what to do instead.
    """
    reasons = {
        "gradient clipping (gradient_clip_val)": bool(trainer.gradient_clip_val),
        "a configure_gradient_clipping of your module": is_overridden("configure_gradient_clipping", pl_module),
        "manual optimization": not pl_module.automatic_optimization,
        "several ranks": trainer.world_size > 1,
        "a gradient scaler (precision='16-mixed')": getattr(trainer.precision_plugin, "scaler", None) is not None,
    }
    for what, present in reasons.items():
        if present:
            raise MisconfigurationException(
                f"optimizer_in_backward=True updates each parameter as soon as its own gradient is there, and {what} "
                "needs all of them, or looks at them, before any update. Leave one of the two out."
            )


class SavedByModelCheckpoint:
    """The ``ModelCheckpoint`` callbacks of a run, which take a file to be there as soon as they have asked for it.

    Args:
        engine: Knows better.
    """

    def __init__(self, engine: CheckpointEngine) -> None:
        self._engine = engine
        self._callbacks: list[ModelCheckpoint] = []
        self._undo: list[Callable[[], None]] = []

    def attach(self, trainer: pl.Trainer) -> None:
        """From now on links are made, and names chosen, with regard to what is still to be written."""
        self.detach()
        self._callbacks = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)]
        self._undo = [compat.defer_links(callback, self._link, self._will_exist) for callback in self._callbacks]

    def detach(self) -> None:
        """Leave the callbacks as they were."""
        while self._undo:
            self._undo.pop()()
        self._callbacks = []

    def directories(self) -> set[Path]:
        """Where they save, as far as they know it yet."""
        return {Path(callback.dirpath) for callback in self._callbacks if callback.dirpath}

    def correct_paths(self) -> None:
        """After a failure that the user let pass: no path of theirs names a file that is not there."""
        for callback in self._callbacks:
            kept = {path: value for path, value in callback.best_k_models.items() if Path(path).exists()}
            if len(kept) < len(callback.best_k_models):
                callback.best_k_models = kept
            if callback.best_model_path and not Path(callback.best_model_path).exists():
                best = min if callback.mode == "min" else max
                callback.best_model_path = best(kept, key=lambda path: kept[path].item()) if kept else ""
            if callback.last_model_path and not Path(callback.last_model_path).exists():
                callback.last_model_path = ""

    def _link(self, target: str, link: str) -> None:
        self._engine.link(Path(target).absolute(), Path(link).absolute())

    def _will_exist(self, path: str) -> bool:
        return self._engine.pending(Path(path).absolute())


class Autosave:
    """Finds how often to checkpoint and, where it is asked to, does so.

    Args:
        engine: Writes.
        max_overhead: Part of the run's time that checkpoints may take.
        drive: Whether to save; else the interval is advice.
        dirpath: Where to; None: in ``checkpoints`` under the Trainer's ``default_root_dir``.
        keep: Newest files that stay.
    """

    def __init__(
        self, engine: CheckpointEngine, max_overhead: float, *, drive: bool, dirpath: str | None, keep: int
    ) -> None:
        self.tuner = FrequencyTuner(max_overhead)
        self._engine = engine
        self.drives = drive
        self._dirpath = dirpath
        self._keep = keep
        self._kept: list[str] = []
        self._next: int | None = None
        self._began: float | None = None
        self._busy = False

    def begin(self) -> None:
        """A fit begins."""
        self.tuner.begin()
        self._began = self._next = None

    def directory(self, trainer: pl.Trainer) -> Path:
        """Where the files are."""
        return Path(self._dirpath or Path(trainer.default_root_dir) / "checkpoints").absolute()

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

    def batch_end(self, trainer: pl.Trainer) -> None:
        """After a batch that ended in an optimizer step: save, if it is time to; on all ranks alike."""
        if not self.drives:
            return
        if self._next is None:
            self._next = trainer.global_step + self.tuner.skip_steps + self.tuner.profile_steps
        if trainer.global_step < self._next:
            return
        directory = self.directory(trainer)
        path = directory / f"step={trainer.global_step}.ckpt"
        trainer.save_checkpoint(path)
        steps = (self.tuner.interval or FIRST_STEPS) / trainer.accumulate_grad_batches
        self._next = trainer.global_step + max(1, trainer.strategy.broadcast(round(steps)))
        self._kept = [*(name for name in self._kept if name != str(path)), str(path)]
        if trainer.is_global_zero:
            self._engine.link(path, directory / "last.ckpt")
            for old in self._kept[: -self._keep]:
                self._engine.remove(Path(old))
        self._kept = self._kept[-self._keep :]

    def measurements(self) -> dict[str, float]:
        """The interval, and what it costs."""
        values: dict[str, float] = {}
        if self.tuner.interval is not None:
            values["checkpoint/interval_batches"] = float(self.tuner.interval)
        if self.tuner.overhead is not None:
            values["checkpoint/overhead_percent"] = 100 * self.tuner.overhead
        return values

    def state_dict(self) -> dict[str, Any]:
        return {**self.tuner.state_dict(), "kept": list(self._kept), "dirpath": self._dirpath}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.tuner.load_state_dict(state)
        self._kept = list(state["kept"]) if state["dirpath"] == self._dirpath else []  # another run's are not ours

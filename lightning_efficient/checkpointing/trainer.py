"""What asynchronous checkpoints ask of a Trainer: what it may not have beside them, and its ModelCheckpoints."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import CheckpointIO, TorchCheckpointIO
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden

from lightning_efficient import compat
from lightning_efficient.checkpointing.engine import CheckpointEngine
from lightning_efficient.checkpointing.places import Places

__all__ = ["SavedByModelCheckpoint", "refuse_combinations", "refuse_in_backward"]


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
        "an on_before_optimizer_step of your module": is_overridden("on_before_optimizer_step", pl_module),
        "a parameter in two optimizers": _shared_by_optimizers(trainer),
    }
    for what, present in reasons.items():
        if present:
            raise MisconfigurationException(
                f"optimizer_in_backward=True updates each parameter as soon as its own gradient is there, and {what} "
                "needs all of them, or looks at them, before any update. Leave one of the two out."
            )


def _shared_by_optimizers(trainer: pl.Trainer) -> bool:
    parameters = [p for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"]]
    return len(parameters) != len(set(parameters))


class SavedByModelCheckpoint:
    """The ``ModelCheckpoint`` callbacks of a run, which take a file to be there as soon as they have asked for it.

    Loggers that upload a checkpoint are told of it when it is there.

    Args:
        engine: Makes links.
        places: Knows better.
    """

    def __init__(self, engine: CheckpointEngine, places: Places) -> None:
        self._engine = engine
        self._places = places
        self._callbacks: list[ModelCheckpoint] = []
        self._undo: list[Callable[[], None]] = []
        self._untold: list[tuple[Callable[[Any], None], Any]] = []
        self._newest: dict[Path, Path] = {}  # durable file, by directory

    def attach(self, trainer: pl.Trainer) -> None:
        """From now on links are made, names chosen and loggers told with regard to what is still to be written."""
        self.detach()
        self._callbacks = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)]
        self._undo = [compat.defer_links(callback, self._link, self._will_exist) for callback in self._callbacks]
        for logger in trainer.loggers:
            logger.__dict__["after_save_checkpoint"] = partial(self._tell_later, logger.after_save_checkpoint)
            self._undo.append(partial(logger.__dict__.pop, "after_save_checkpoint", None))

    def detach(self) -> None:
        """Leave the callbacks and loggers as they were."""
        while self._undo:
            self._undo.pop()()
        self._callbacks = []

    def directories(self) -> set[str]:
        """Where they save, as far as they know it yet."""
        return {str(callback.dirpath) for callback in self._callbacks if callback.dirpath}

    def save_after(self, step: int) -> bool:
        """Whether they will save after optimizer step ``step``, as far as can be told."""
        return any((every := compat.saves_every_n_steps(c)) and step % every == 0 for c in self._callbacks)

    def note_written(self, path: Path) -> None:
        """A file has become durable."""
        self._newest[path.parent] = path

    def tell_loggers(self) -> None:
        """Of all that was saved, if it is there."""
        if self._untold and not self._places.pending():
            untold, self._untold = self._untold, []
            for tell, callback in untold:
                tell(callback)

    def correct_paths(self) -> None:
        """After a failure that the user let pass: no path of theirs names a file that is not there."""
        exists = self._places.exists
        for callback in self._callbacks:
            kept = {path: value for path, value in callback.best_k_models.items() if exists(path)}
            if len(kept) < len(callback.best_k_models):
                callback.best_k_models = kept
            if callback.best_model_path and not exists(callback.best_model_path):
                best = min if callback.mode == "min" else max
                newest = self._newest.get(self._places.file(callback.best_model_path).parent)
                if kept:
                    callback.best_model_path = best(kept, key=lambda path: kept[path].item())
                else:
                    callback.best_model_path = str(newest) if newest is not None and newest.exists() else ""
            if callback.last_model_path and not exists(callback.last_model_path):
                callback.last_model_path = ""

    def _tell_later(self, tell: Callable[[Any], None], callback: Any) -> None:
        self._untold.append((tell, callback))

    def _link(self, target: str, link: str) -> None:
        self._engine.link(Path(target).absolute(), Path(link).absolute())

    def _will_exist(self, path: str) -> bool:
        return self._places.pending(path)

"""What asynchronous checkpoints ask of a Trainer: what it may not have beside them, and its ModelCheckpoints."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import CheckpointIO, TorchCheckpointIO
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden

from lightning_efficient import compat
from lightning_efficient.checkpointing.engine import CheckpointEngine
from lightning_efficient.checkpointing.places import Places

__all__ = ["SavedByModelCheckpoint", "refuse_combinations", "refuse_in_backward", "refuse_past_loading"]

# Gloo's threads need Python's lock to let go of what was sent. A process of ``ddp_spawn`` may end right after this, and
# they abort it if they have not had the lock by then (torch 2.13).
_GLOO_SECONDS = 0.02


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
    if not compat.writes_files(strategy):
        instead = "strategy='auto' or 'ddp'"
        if isinstance(strategy, ModelParallelStrategy):
            instead = f"{type(strategy).__name__}(save_distributed_checkpoint=False)"
        raise MisconfigurationException(
            f"{type(strategy).__name__} writes checkpoints by itself, past any checkpoint IO, so that {kind.__name__} "
            f"would not see them. Use {instead}, or leave {kind.__name__} out."
        )


def refuse_past_loading(trainer: pl.Trainer, **given: Any) -> None:
    """Refuse arguments that say how a checkpoint is loaded, where the strategy loads it by itself.

    Args:
        trainer: The Trainer.
        **given: Their values; None: not given.

    Raises:
        MisconfigurationException: Naming it, and what to do instead.
    """
    for name, value in given.items():
        if value is not None and trainer.strategy.restore_checkpoint_after_setup:
            raise MisconfigurationException(
                f"{type(trainer.strategy).__name__} loads checkpoints by itself, past any checkpoint IO, so that "
                f"AsyncCheckpointIO({name}={value!r}) would do nothing there. Leave {name} out."
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
        "a parameter that is updated twice": _shared_by_optimizers(trainer),
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
        self._trainer: pl.Trainer | None = None
        self._callbacks: list[ModelCheckpoint] = []
        self._undo: list[Callable[[], None]] = []
        self._untold: list[tuple[Callable[[Any], None], Any]] = []
        self._may_be_there = False  # what loggers are to be told of
        self._corrected = False

    def attach(self, trainer: pl.Trainer) -> None:
        """From now on links are made, names chosen and loggers told with regard to what is still to be written."""
        self.detach()
        self._trainer = trainer
        self._corrected = False
        self._callbacks = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)]
        self._undo = [compat.defer_links(callback, self._link, self._will_exist) for callback in self._callbacks]
        for logger in {id(logger): logger for logger in trainer.loggers}.values():
            self._undo.append(partial(_set_back, logger, logger.__dict__.get("after_save_checkpoint")))
            logger.__dict__["after_save_checkpoint"] = partial(self._tell_later, logger.after_save_checkpoint)

    def detach(self) -> None:
        """Leave the callbacks and loggers as they were."""
        while self._undo:
            self._undo.pop()()
        self._trainer = None
        self._callbacks = []
        self._untold = []

    def directories(self) -> set[str]:
        """Where they save, as far as they know it yet."""
        return {str(callback.dirpath) for callback in self._callbacks if callback.dirpath}

    def save_after(self, step: int) -> bool:
        """Whether they will save after optimizer step ``step``, as far as can be told."""
        return any((every := compat.save_triggers(c).steps) and step % every == 0 for c in self._callbacks)

    def tell_loggers(self) -> None:
        """Of all that was saved, when nothing is pending; not while a callback names a file that did not come."""
        if not self._may_be_there or self._places.pending():
            return
        self._may_be_there = False
        untold, self._untold = self._untold, []
        for tell, callback in untold:
            if all(map(self._places.exists, _named(callback))):
                tell(callback)
            else:
                self._untold.append((tell, callback))

    def correct_paths(self) -> None:
        """At the end of a run: no path of theirs names a file that is not there, for a failure that the user let pass.

        On all ranks alike, of which only one knows, except with an exception on its way: nobody knows where the others
        are.
        """
        trainer = self._trainer
        if trainer is None or self._corrected:
            return
        self._corrected = True
        instead = self._lost() if trainer.is_global_zero else {}
        if trainer.world_size > 1 and not trainer.interrupted:
            instead = trainer.strategy.broadcast(instead)
            time.sleep(_GLOO_SECONDS)
        for callback in self._callbacks if instead else ():
            _correct(callback, instead)
        self._may_be_there = bool(self._untold)

    def _lost(self) -> dict[str, str]:
        """What is named and not there, and for each what was written last beside it, if anything was."""
        named = {path for callback in self._callbacks for path in (*_named(callback), *callback.best_k_models)}
        return {path: self._places.newest_beside(path) or "" for path in named if not self._places.exists(path)}

    def _tell_later(self, tell: Callable[[Any], None], callback: Any) -> None:
        self._untold.append((tell, callback))
        self._may_be_there = True

    def _link(self, target: str, link: str) -> None:
        self._engine.link(Path(target).absolute(), Path(link).absolute())

    def _will_exist(self, path: str) -> bool:
        return self._places.pending(path)


def _set_back(logger: Any, own: Callable[[Any], None] | None) -> None:
    """Let ``logger`` have its own ``after_save_checkpoint``: that of its class, if it had no other."""
    if own is None:
        logger.__dict__.pop("after_save_checkpoint", None)
    else:
        logger.__dict__["after_save_checkpoint"] = own


def _named(callback: Any) -> set[str]:
    """The files that loggers look for first."""
    return {callback.best_model_path, callback.last_model_path} - {""}


def _correct(callback: ModelCheckpoint, instead: Mapping[str, str]) -> None:
    """Replace what is not there by the best or newest that is."""
    kept = {path: score for path, score in callback.best_k_models.items() if path not in instead}
    callback.best_k_models = kept
    if (lost := callback.best_model_path) in instead:
        best = min if callback.mode == "min" else max
        callback.best_model_path = best(kept, key=lambda path: kept[path].item()) if kept else instead[lost]
        callback.best_model_score = kept.get(callback.best_model_path)
    if callback.last_model_path in instead:
        callback.last_model_path = ""

"""Asynchronous checkpoints as one object that is a Lightning Callback and a CheckpointIO."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins.io import CheckpointIO, TorchCheckpointIO
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from lightning_efficient import compat, telemetry
from lightning_efficient.checkpointing.account import Account
from lightning_efficient.checkpointing.arguments import check_arguments
from lightning_efficient.checkpointing.autosave import Autosave
from lightning_efficient.checkpointing.engine import CheckpointEngine, WhenBusy
from lightning_efficient.checkpointing.exact_resume import ExactResume
from lightning_efficient.checkpointing.outcomes import CheckpointSaveError, OnError, Outcomes
from lightning_efficient.checkpointing.places import Places
from lightning_efficient.checkpointing.random_state import RandomStates
from lightning_efficient.checkpointing.staging import Staging
from lightning_efficient.checkpointing.trainer import (
    SavedByModelCheckpoint,
    refuse_combinations,
    refuse_in_backward,
    refuse_past_loading,
)
from lightning_efficient.checkpointing.updates_in_backward import UpdatesInBackward
from lightning_efficient.checkpointing.uploads import Uploaded
from lightning_efficient.checkpointing.verification import CheckpointDamagedError, verify
from lightning_efficient.checkpointing.writer import Written
from lightning_efficient.coordination import KeptState, ParameterChange
from lightning_efficient.core.units import parse_bytes

__all__ = ["AsyncCheckpointIO", "CheckpointSaveError"]

FORMAT = 1
RETRIES = 3


class AsyncCheckpointIO(Callback, CheckpointIO):
    """Checkpoints that are copied while the next step runs, written in the background, and safe against ``kill -9``.

    Put it into ``Trainer(callbacks=[...])``: it makes itself the Trainer's checkpoint IO and knows when the weights
    change. In ``plugins=[...]`` alone it cannot know, and copies everything before training goes on. In both, it must
    be the same object.

    ``ModelCheckpoint`` decides what is saved, when, and what is kept, as always. A file appears under its name only
    when it is complete and on the disk, and the one that it replaces is removed only then. Stock ``torch.load`` and
    stock Trainers read the files.

    Args:
        memory_cap: Memory for copies, in bytes or as ``"2GiB"``; None: no cap. A state that does not fit is written at
            once, through a small buffer.
        in_memory: How many of the last checkpoints stay in memory after they are written.
        when_busy: What a save does while the ones before are still being written and hold all memory: ``"wait"``,
            ``"skip"`` this one (after a batch only, not at the end), or take more, past the cap (``"eager"``).
        staging: Where a GPU's tensors are copied first: to ``"host"`` memory, beside the training; within the
            ``"device"``, which is quicker and takes as much of its memory for a moment; ``"auto"``: on the device if
            there is room and updates would wait for the other.
        verify: ``"checksum"`` compares a checksum of every tensor before its copy with one of the copy.
        resume: ``"auto"``: where the checkpoint to load is damaged, take the newest intact one beside it.
        on_error: What follows when a file cannot be written: ``"raise"`` ends the run at the next batch, ``"warn"``
            goes on, ``"retry"`` tries three more times and then raises. A tensor that changed before its copy cannot be
            tried again: there ``"retry"`` warns.
        max_overhead: Part of the run's time that checkpoints may take; the interval that keeps to it is measured,
            logged and adapted while training runs.
        frequency: ``"advise"`` leaves saving to ``ModelCheckpoint`` and says the interval; ``"drive"`` saves at it.
        dirpath: For ``"drive"``: where to; None: in ``checkpoints`` under the Trainer's ``default_root_dir``.
        keep: For ``"drive"``: how many of the newest files stay; ``last.ckpt`` links to the newest.
        local_dir: Where copies are of what is saved to remote storage (``ModelCheckpoint(dirpath="s3://bucket/run")``):
            a checkpoint is durable here first, and uploaded from here in the background.
        optimizer_in_backward: Update each parameter as soon as its gradient is there, while the backward of earlier
            layers runs; an update then waits for the copy of its own layer only. Not with gradient clipping.

    Raises:
        ValueError: If an argument is out of range.
        MisconfigurationException: In ``setup``, beside another checkpoint IO or a strategy that writes by itself.
    """

    def __init__(
        self,
        *,
        memory_cap: int | str | None = "2GiB",
        in_memory: int = 0,
        when_busy: WhenBusy = "wait",
        staging: Staging = "auto",
        verify: Literal["none", "checksum"] = "none",
        resume: Literal["auto"] | None = None,
        on_error: OnError = "raise",
        max_overhead: float = 0.035,
        frequency: Literal["advise", "drive"] = "advise",
        dirpath: str | None = None,
        keep: int = 2,
        local_dir: str | None = None,
        optimizer_in_backward: bool = False,
    ) -> None:
        super().__init__()
        self._arguments = {
            "memory_cap": memory_cap, "in_memory": in_memory, "when_busy": when_busy, "staging": staging,
            "verify": verify, "resume": resume, "on_error": on_error, "max_overhead": max_overhead,
            "frequency": frequency, "dirpath": dirpath, "keep": keep, "local_dir": local_dir,
            "optimizer_in_backward": optimizer_in_backward,
        }  # fmt: skip
        check_arguments(self._arguments)
        self.optimizer_in_backward = optimizer_in_backward
        self.resume = resume
        self.engine = CheckpointEngine(
            memory_cap=None if memory_cap is None else parse_bytes(memory_cap, "memory_cap"),
            in_memory=in_memory,
            when_busy=when_busy,
            staging=staging,
            verify=verify == "checksum",
            attempts=1 + RETRIES if on_error == "retry" else 1,
        )
        self._loader = TorchCheckpointIO()
        self._trainer: pl.Trainer | None = None
        self._replaced: CheckpointIO | None = None
        self._save: Callable[..., None] | None = None
        self._in_backward = UpdatesInBackward(self.engine)
        self._places = Places(self.engine, local_dir)
        self._asked_by = SavedByModelCheckpoint(self.engine, self._places)
        self._autosave = Autosave(
            self.engine, self._places, max_overhead, drive=frequency == "drive", dirpath=dirpath, keep=keep
        )
        self._outcomes = Outcomes(self.engine, self._places, on_error, self._note_written)
        self._random = RandomStates()
        self._exact = ExactResume()
        self._in_batch_end = False
        self._place = ""  # in the program, from which the save in progress was asked for
        self._forget_validations: Callable[[], None] = _nothing_to_undo
        self._over = False  # whether a run has ended, and nobody will ask what became of a save
        self._prepared = False
        self._warned_plain = False
        self._account = Account()

    def __reduce__(self) -> Any:
        """A copy, in another process for one, is a new object with the same arguments; a subclass keeps its own."""
        ours = {*vars(AsyncCheckpointIO()), "log", "log_dict"}  # the last two are Lightning's
        return _rebuild, (type(self), self._arguments), {k: v for k, v in vars(self).items() if k not in ours} or None

    # -- as a CheckpointIO -------------------------------------------------------------------------------------------

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Take a snapshot of ``checkpoint`` that will become the file ``path``.

        Raises:
            TypeError: If ``storage_options`` are given.
            CheckpointSaveError: If an earlier one could not be written.
        """
        if storage_options is not None:
            raise TypeError(
                "AsyncCheckpointIO has no storage_options. Leave them out: drivers of remote storage read theirs from "
                "fsspec's configuration."
            )
        file = self._places.file(path)
        file.parent.mkdir(parents=True, exist_ok=True)
        step = int(checkpoint.get("global_step", 0))
        if file.name.startswith("hpc_ckpt"):  # asked for by a signal, just before the end
            self.engine.save_now(checkpoint, file, step)
            self._places.wait(path)
            return
        if self._trainer is None or self._trainer.world_size == 1:
            self._outcomes.poll(self._trainer)
        trainer = self._trainer
        if trainer is None and not self._warned_plain:
            self._warned_plain = True
            rank_zero_warn(
                "AsyncCheckpointIO is in `plugins` only, and cannot know when weights change: it copies everything "
                "before training goes on. Put it into `callbacks` to copy while the next step runs."
            )
        fitting = trainer is not None and self.engine.barrier.attached
        try:
            saved = self.engine.save(
                checkpoint,
                file,
                step,
                owners=trainer.optimizers if trainer is not None and fitting else (),
                place=self._place,
                at_once=not self._in_batch_end or (trainer is not None and compat.leaves_training(trainer)),
                first=self._in_backward.tensors_in_order,
            )
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise CheckpointSaveError(
                f"'{file}' cannot be saved, for something in the checkpoint cannot be pickled: {error}. Look at the "
                "state_dict of your callbacks and at save_hyperparameters."
            ) from error
        if self._over:
            self._places.close()
            self._outcomes.poll(None)
        self._account.saved(saved)
        self._autosave.note_save()

    def load_checkpoint(
        self, path: Any, map_location: Any = lambda storage, _: storage, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Load a checkpoint after comparing its checksums.

        Raises:
            CheckpointDamagedError: Naming the damaged tensor, unless ``resume="auto"`` finds another file.
            FileNotFoundError: If there is no such file.
        """
        trainer = self._trainer
        self.engine.settle()  # who loads will change the weights
        self.engine.drain(self._places.file(path))
        self._places.wait(path)
        if trainer is not None:
            trainer.strategy.barrier()  # only one rank writes, and all read
        try:
            file = self._places.fetch(path)
            if file.exists():
                verify(file)
        except CheckpointDamagedError as error:
            fitting = trainer is None or trainer.state.fn == "fit"
            other = self._places.newest_intact_beside(path, complete=fitting) if self.resume == "auto" else None
            if other is None:
                raise
            rank_zero_warn(f"{error} Loading '{other}' instead, the newest intact checkpoint beside it.")
            file = other
        return self._loader.load_checkpoint(str(file), map_location, weights_only)  # type: ignore[arg-type]

    def remove_checkpoint(self, path: Any) -> None:
        """Remove a file once everything that was saved before is durable."""
        self.engine.remove(self._places.file(path))

    # -- the lifecycle -----------------------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        present = trainer.strategy.checkpoint_io
        if present is not self:
            refuse_combinations(trainer, present, AsyncCheckpointIO)
            refuse_past_loading(trainer, resume=self.resume, local_dir=self._arguments["local_dir"])
            self._replaced = present
            trainer.strategy.checkpoint_io = self
        self._trainer = trainer
        self._outcomes.begin()
        if stage == "fit":
            self._exact = ExactResume()
            self._asked_by.attach(trainer)
            self._autosave.join(trainer)
            # All ranks must know of a save, of which Lightning tells only the one that writes.
            trainer.__dict__["save_checkpoint"] = self._save = partial(self._note_save, trainer.save_checkpoint)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._over = False
        self.engine.forget_places()
        self.engine.forget_recent()
        self.engine.barrier.attach()
        self._forget_validations = compat.before_validations(trainer, self.engine.settle)
        if self.optimizer_in_backward:
            refuse_in_backward(trainer, pl_module)
            self._in_backward.begin(trainer.optimizers, lambda: not compat.accumulating(trainer))
        self._autosave.begin(trainer)
        self._prepared = not (trainer.checkpoint_callbacks or self._autosave.drives)
        directories = self._asked_by.directories()
        if self._autosave.drives:
            directories.add(self._autosave.directory(trainer))
        if trainer.ckpt_path is not None:
            directories.add(str(trainer.ckpt_path).rpartition("/")[0] or ".")
        for directory in sorted(directories):
            self._places.file(f"{directory}/")  # on all ranks alike: says what cannot be
            for stray in self._places.sweep(directory) if trainer.is_global_zero else ():
                rank_zero_info(f"AsyncCheckpointIO removed '{stray}', which a killed run had not finished.")

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._exact.on_load_checkpoint(trainer, checkpoint)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._exact.on_save_checkpoint(checkpoint)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._exact.on_train_start(trainer)
        self._random.restore_again()
        telemetry.introduce(trainer, self)

    def start_line(self, trainer: pl.Trainer) -> str:
        """Who saves, and how."""
        if self._autosave.drives:
            who = f"saves as often as takes {self._arguments['max_overhead']:.1%} of the time"
        elif trainer.checkpoint_callbacks:
            who = "saves when ModelCheckpoint says"
        else:
            return "AsyncCheckpointIO has nothing to save by itself (no ModelCheckpoint, and frequency='advise')"
        return f"AsyncCheckpointIO {who}: copied beside the next step, written in the background"

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._exact.on_train_epoch_start(trainer)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._in_batch_end = False
        self._autosave.batch_start()
        self._outcomes.poll_together(trainer)
        self._asked_by.tell_loggers()
        if self._in_backward.active and self._save_follows(trainer) and not compat.accumulating(trainer):
            self.engine.expect_save(trainer.global_step + 1)
        if not self._prepared and trainer.global_step and trainer.is_global_zero:  # at once in a run that is resumed
            self._prepared = True
            self.engine.prepare(pl_module, trainer.optimizers)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if telemetry.due(trainer):
            telemetry.log(trainer, self.measurements())
        # Who saves comes later. The next update passes the barrier; a validation, or the end of an epoch, may change
        # weights before we hear of it.
        self._in_batch_end = not compat.leaves_training(trainer)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._settle()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._settle()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._settle()
        self._outcomes.poll_together(trainer)

    def finish_copies(self, trainer: pl.Trainer) -> None:
        """Weights are about to change in place, other than by an update."""
        self.engine.settle()

    def on_parameters_changed(self, trainer: pl.Trainer, change: ParameterChange) -> None:
        """The parameters are others now."""
        self.engine.settle()
        self.engine.forget_places()
        self._in_backward.again()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._outcomes.failing = True
        self._finish()
        self._let_go()

    def teardown(self, *args: Any, **kwargs: Any) -> None:
        """As a checkpoint IO (no arguments) and as a callback: everything is written, and nothing stays behind."""
        self._finish()
        if args or kwargs or self._trainer is None:
            self._let_go()
            self._over = True

    def _settle(self) -> None:
        self._in_batch_end = False
        self._autosave.skip()
        self.engine.settle()

    def _finish(self) -> None:
        self._in_batch_end = False
        self._places.close()
        try:
            self._outcomes.poll(self._trainer)
        finally:
            self._asked_by.correct_paths()
            self._asked_by.tell_loggers()

    def _let_go(self) -> None:
        self._exact.teardown()
        self._forget_validations()
        self._forget_validations = _nothing_to_undo
        if self._trainer is not None:
            self._autosave.leave(self._trainer)
            if self._save is not None and self._trainer.__dict__.get("save_checkpoint") is self._save:
                del self._trainer.__dict__["save_checkpoint"]
            if self._replaced is not None:
                self._trainer.strategy.checkpoint_io = self._replaced
        self._replaced = self._trainer = self._save = None
        self._asked_by.detach()
        self._in_backward.end()

    def _note_save(self, save: Callable[..., None], *arguments: Any, **more: Any) -> None:
        self._outcomes.unresolved = True
        caller = sys._getframe(1)
        self._place = f"{caller.f_code.co_filename}:{caller.f_lineno}"
        save(*arguments, **more)

    def _save_follows(self, trainer: pl.Trainer) -> bool:
        return self._autosave.due_after_this_batch() or self._asked_by.save_after(trainer.global_step + 1)

    # -- what is kept in memory ---------------------------------------------------------------------------------------

    @property
    def keeps_states(self) -> bool:
        """Whether checkpoints stay in memory after they are written."""
        return bool(self._arguments["in_memory"])

    def last_good(self) -> KeptState | None:
        """The newest checkpoint in memory, or None; there is none without ``in_memory``."""
        return self.engine.last_good()

    def discard_after(self, step: int) -> None:
        """Forget those in memory of later steps, and finish all copies: weights are about to change."""
        self.engine.discard_after(step)
        self.engine.settle()

    # -- state and telemetry -----------------------------------------------------------------------------------------

    @property
    def state_key(self) -> str:
        """Independent of the arguments, so that a run may resume with others."""
        return "AsyncCheckpointIO"

    def state_dict(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "random": self._random.gather(self._trainer.world_size if self._trainer else 1),
            "autosave": self._autosave.progress(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict["format"] > FORMAT:
            raise MisconfigurationException(
                f"The checkpoint's state of AsyncCheckpointIO has format {state_dict['format']}; this version reads up "
                f"to {FORMAT}. Use the version of lightning_efficient that wrote it, or a newer one."
            )
        self._random.restore(state_dict["random"])  # before the order of the next epoch is drawn
        self._autosave.load_progress(state_dict["autosave"])

    def measurements(self) -> Mapping[str, float]:
        """What the last save cost, and what updates waited for it."""
        return self._account.measurements(self.engine, self._autosave.found())

    def balance(self) -> telemetry.Balance:
        """What saves and stalls cost, and what a save that waits for its file would have cost besides."""
        return self._account.balance(self.engine, self._autosave.tuner.overhead)

    def events(self) -> Sequence[telemetry.Event]:
        """Every failure."""
        return tuple(self._outcomes.events)

    def _note_written(self, written: Written | Uploaded) -> None:
        self._account.written(written)
        if isinstance(written, Written):
            self._autosave.tuner.written(written.seconds)


def _rebuild(kind: type[AsyncCheckpointIO], arguments: Mapping[str, Any]) -> AsyncCheckpointIO:
    new = kind.__new__(kind)
    AsyncCheckpointIO.__init__(new, **arguments)
    return new


def _nothing_to_undo() -> None:
    pass

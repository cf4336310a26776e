"""Asynchronous checkpoints as one object that is a Lightning Callback and a CheckpointIO."""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins.io import CheckpointIO, TorchCheckpointIO
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor

from lightning_efficient import compat, telemetry
from lightning_efficient.checkpointing.durable_file import sweep
from lightning_efficient.checkpointing.engine import CheckpointEngine, WhenBusy
from lightning_efficient.checkpointing.random_state import random_state, restore_random_state
from lightning_efficient.checkpointing.retention import newest_intact
from lightning_efficient.checkpointing.trainer import (
    Autosave,
    SavedByModelCheckpoint,
    refuse_combinations,
    refuse_in_backward,
)
from lightning_efficient.checkpointing.verification import CheckpointDamagedError, verify
from lightning_efficient.checkpointing.writer import Written
from lightning_efficient.coordination import KeptState, ParameterChange
from lightning_efficient.core.step_in_backward import StepInBackward
from lightning_efficient.core.units import parse_bytes

__all__ = ["AsyncCheckpointIO", "CheckpointSaveError"]

FORMAT = 1
RETRIES = 3


class CheckpointSaveError(RuntimeError):
    """A checkpoint that was asked for could not be written; the ones before it are intact."""


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
        when_busy: What a save does while the ones before are still being written: ``"wait"`` for their memory, or take
            more, past the cap (``"eager"``).
        verify: ``"checksum"`` compares a checksum of every tensor before its copy with one of the copy.
        resume: ``"auto"``: where the checkpoint to load is damaged, take the newest intact one beside it.
        on_error: What follows when a file cannot be written: ``"raise"`` ends the run at the next batch, ``"warn"``
            goes on, ``"retry"`` tries three more times and then raises.
        max_overhead: Part of the run's time that checkpoints may take; the interval that keeps to it is measured,
            logged and adapted while training runs.
        frequency: ``"advise"`` leaves saving to ``ModelCheckpoint`` and says the interval; ``"drive"`` saves at it
            (then put this object after callbacks that count batches: what comes later saves its state of before).
        dirpath: For ``"drive"``: where to; None: in ``checkpoints`` under the Trainer's ``default_root_dir``.
        keep: For ``"drive"``: how many of the newest files stay; ``last.ckpt`` links to the newest.
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
        verify: Literal["none", "checksum"] = "none",
        resume: Literal["auto"] | None = None,
        on_error: Literal["raise", "warn", "retry"] = "raise",
        max_overhead: float = 0.035,
        frequency: Literal["advise", "drive"] = "advise",
        dirpath: str | None = None,
        keep: int = 2,
        optimizer_in_backward: bool = False,
    ) -> None:
        super().__init__()
        for name, value, allowed in (
            ("when_busy", when_busy, ("wait", "eager")),
            ("verify", verify, ("none", "checksum")),
            ("resume", resume, (None, "auto")),
            ("on_error", on_error, ("raise", "warn", "retry")),
            ("frequency", frequency, ("advise", "drive")),
        ):
            if value not in allowed:
                raise ValueError(f"{name}={value!r} is not allowed. Use one of {', '.join(map(repr, allowed))}.")
        for name, count, least in (("in_memory", in_memory, 0), ("keep", keep, 1)):
            if isinstance(count, bool) or not isinstance(count, int) or count < least:
                raise ValueError(f"{name}={count!r} is no number of checkpoints. Use {least} or more.")
        if isinstance(max_overhead, bool) or not isinstance(max_overhead, int | float) or not 0 < max_overhead < 1:
            raise ValueError(f"max_overhead={max_overhead!r} is no part of the run's time. Use e.g. 0.035 for 3.5 %.")
        self.in_memory = in_memory
        self.optimizer_in_backward = optimizer_in_backward
        self._stepping: StepInBackward | None = None
        self.verify = verify
        self.resume = resume
        self.on_error = on_error
        self.engine = CheckpointEngine(
            memory_cap=None if memory_cap is None else parse_bytes(memory_cap, "memory_cap"),
            in_memory=in_memory,
            when_busy=when_busy,
            verify=verify == "checksum",
            attempts=1 + RETRIES if on_error == "retry" else 1,
        )
        self._loader = TorchCheckpointIO()
        self._trainer: pl.Trainer | None = None
        self._replaced: CheckpointIO | None = None
        self._asked_by = SavedByModelCheckpoint(self.engine)
        self._autosave = Autosave(self.engine, max_overhead, drive=frequency == "drive", dirpath=dirpath, keep=keep)
        self._in_batch_end = False
        self._failing = False
        self._prepared = False
        self._unresolved = False  # whether a save was asked for of which not all ranks know how it ended
        self._warned_plain = False
        self._random: Mapping[str, Any] | None = None
        self._events: list[telemetry.Event] = []
        self._values: dict[str, float] = {}
        self._saves = 0
        self._saves_written = 0

    # -- as a CheckpointIO -------------------------------------------------------------------------------------------

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Take a snapshot of ``checkpoint`` that will become the file ``path``.

        Raises:
            TypeError: If ``storage_options`` are given.
            CheckpointSaveError: If an earlier one could not be written.
        """
        if storage_options is not None:
            raise TypeError("AsyncCheckpointIO writes local files and has no storage_options. Leave them out.")
        file = _local(path)
        file.parent.mkdir(parents=True, exist_ok=True)
        step = int(checkpoint.get("global_step", 0))
        if file.name.startswith("hpc_ckpt"):  # asked for by a signal, just before the end
            self.engine.save_now(checkpoint, file, step)
            return
        if self._trainer is None or self._trainer.world_size == 1:
            self._poll()
        trainer = self._trainer
        if trainer is None and not self._warned_plain:
            self._warned_plain = True
            rank_zero_warn(
                "AsyncCheckpointIO is in `plugins` only, and cannot know when weights change: it copies everything "
                "before training goes on. Put it into `callbacks` to copy while the next step runs."
            )
        owners = list(trainer.optimizers) if trainer is not None and self._in_batch_end else []
        try:
            first = self._in_order() if owners else ()
            saved = self.engine.save(checkpoint, file, step, owners=owners, place="on_train_batch_end", first=first)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise CheckpointSaveError(
                f"'{file}' cannot be saved, for something in the checkpoint cannot be pickled: {error}. Look at the "
                "state_dict of your callbacks and at save_hyperparameters."
            ) from error
        self._saves += 1
        self._autosave.note_save()
        self._values["checkpoint/blocked_ms"] = saved.seconds * 1e3
        self._values["checkpoint/copied_at_once_bytes"] = float(saved.copied_bytes)
        self._values["checkpoint/copied_later_bytes"] = float(saved.later_bytes)

    def load_checkpoint(
        self, path: Any, map_location: Any = lambda storage, _: storage, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Load a checkpoint after comparing its checksums.

        Raises:
            CheckpointDamagedError: Naming the damaged tensor, unless ``resume="auto"`` finds another file.
            FileNotFoundError: If there is no such file.
        """
        file = _local(path)
        self.engine.drain(file)
        if file.exists():
            try:
                verify(file)
            except CheckpointDamagedError as error:
                other = newest_intact(file.parent, besides=file) if self.resume == "auto" else None
                if other is None:
                    raise
                rank_zero_warn(f"{error} Loading '{other}' instead, the newest intact checkpoint beside it.")
                file = other
        return self._loader.load_checkpoint(str(file), map_location, weights_only)  # type: ignore[arg-type]

    def remove_checkpoint(self, path: Any) -> None:
        """Remove a file once everything that was saved before is durable."""
        self.engine.remove(_local(path))

    # -- the lifecycle -----------------------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        present = trainer.strategy.checkpoint_io
        if present is not self:
            refuse_combinations(trainer, present, AsyncCheckpointIO)
            self._replaced = present
            trainer.strategy.checkpoint_io = self
        self._trainer = trainer
        self._failing = self._unresolved = False
        if stage == "fit":
            self._asked_by.attach(trainer)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.engine.forget_places()
        self.engine.barrier.attach()
        if self.optimizer_in_backward:
            refuse_in_backward(trainer, pl_module)
            self._stepping = StepInBackward(trainer.optimizers, lambda: not compat.accumulating(trainer))
            self._stepping.attach()
        self._autosave.begin()
        self._prepared = not (trainer.checkpoint_callbacks or self._autosave.drives)
        for directory in self._asked_by.directories() | {self._autosave.directory(trainer)}:
            for stray in sweep(directory) if trainer.is_global_zero else ():
                rank_zero_info(f"AsyncCheckpointIO removed '{stray}', which a killed run had not finished.")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # In the middle of an epoch once more: to make the epoch's iterator has drawn numbers that were drawn before.
        if self._random is not None and self._random["mid_epoch"]:
            restore_random_state(self._random)
        self._random = None

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._in_batch_end = False
        self._autosave.batch_start()
        self._poll_together(trainer)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if telemetry.due(trainer):
            telemetry.log(trainer, self.measurements())
        self._in_batch_end = True  # ModelCheckpoint comes last, and the next update passes the barrier
        if not self._prepared and trainer.global_step and trainer.is_global_zero:
            self._prepared = True
            self.engine.prepare(pl_module, trainer.optimizers)
        if not compat.accumulating(trainer):
            self._autosave.batch_end(trainer)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._settle()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._settle()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._settle()
        self._poll_together(trainer)

    def on_parameters_changed(self, trainer: pl.Trainer, change: ParameterChange) -> None:
        """The parameters are others now."""
        self.engine.settle()
        self.engine.forget_places()
        if self._stepping is not None:
            self._stepping.attach()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._failing = True
        self._finish()
        self._let_go()

    def teardown(self, *args: Any, **kwargs: Any) -> None:
        """As a checkpoint IO (no arguments) and as a callback: everything is written, and nothing stays behind."""
        self._finish()
        if args or kwargs or self._trainer is None:
            self._let_go()

    def _settle(self) -> None:
        self._in_batch_end = False
        self._autosave.skip()
        self.engine.settle()

    def _finish(self) -> None:
        self._in_batch_end = False
        self.engine.close()
        try:
            self._poll()
        finally:
            self._asked_by.correct_paths()

    def _let_go(self) -> None:
        if self._trainer is not None and self._replaced is not None:
            self._trainer.strategy.checkpoint_io = self._replaced
        self._replaced = self._trainer = None
        self._asked_by.detach()
        if self._stepping is not None:
            self._stepping.detach()
            self._stepping = None

    def _in_order(self) -> list[Tensor]:
        """What the next updates change, first things first, as far as it is known."""
        parameters = self._stepping.order if self._stepping is not None else []
        optimizers = self._trainer.optimizers if self._trainer is not None else []
        states = [optimizer.state.get(p, {}) for p in parameters for optimizer in optimizers]
        return [*parameters, *(value for state in states for value in state.values() if isinstance(value, Tensor))]

    # -- what is kept in memory ---------------------------------------------------------------------------------------

    def last_good(self) -> KeptState | None:
        """The newest checkpoint in memory, or None; there is none without ``in_memory``."""
        return self.engine.last_good()

    def discard_after(self, step: int) -> None:
        """Forget those in memory of later steps."""
        self.engine.discard_after(step)

    # -- errors ------------------------------------------------------------------------------------------------------

    def _poll(self) -> None:
        """Hear of what became of earlier saves; on the training thread.

        Raises:
            CheckpointSaveError: If one failed and errors shall end the run.
        """
        if error := self._heard():
            raise error

    def _poll_together(self, trainer: pl.Trainer) -> None:
        """The same on all ranks, of which only one writes: if it ended alone, the others would wait for it for ever.

        Asked from a save on, which all ranks know of, until it is done.

        Raises:
            CheckpointSaveError: On all ranks alike.
        """
        if trainer.world_size == 1:
            self._poll()
        elif self._unresolved:
            error = self._heard() if trainer.is_global_zero else None
            text, self._unresolved = trainer.strategy.broadcast((str(error or ""), self.engine.pending()))
            if text:
                raise error or CheckpointSaveError(f"On rank zero: {text}")

    def _heard(self) -> CheckpointSaveError | None:
        for written in self.engine.take_written():
            self._note_written(written)
        failures = self.engine.take_failures()
        if not failures:
            return None
        text = "; ".join(str(failure) for failure in failures)
        self._note(text)
        if self.on_error == "warn" or self._failing:  # never in the way of the user's own exception
            rank_zero_warn(f"AsyncCheckpointIO: {text}. The checkpoints before it are intact.")
            return None
        error = CheckpointSaveError(
            f"{text}. The checkpoints before it are intact. To go on training without it, use on_error='warn'."
        )
        error.__cause__ = failures[0].cause
        return error

    def _note(self, text: str) -> None:
        step = compat.log_step(self._trainer) if self._trainer is not None else 0
        self._events.append(telemetry.Event(step, "checkpoint", text))

    def _note_written(self, written: Written) -> None:
        self._saves_written += 1
        self._autosave.tuner.written(written.seconds)
        self._values |= {
            "checkpoint/copy_ms": written.copy_seconds * 1e3,
            "checkpoint/persist_ms": written.persist_seconds * 1e3,
            "checkpoint/file_bytes": float(written.nbytes),
            "checkpoint/write_gigabytes_per_second": written.nbytes / max(written.persist_seconds, 1e-9) / 1e9,
        }

    # -- state and telemetry -----------------------------------------------------------------------------------------

    @property
    def state_key(self) -> str:
        """Independent of the arguments, so that a run may resume with others."""
        return "AsyncCheckpointIO"

    def state_dict(self) -> dict[str, Any]:
        self._unresolved = True
        progress = self._trainer.fit_loop.epoch_loop.batch_progress if self._trainer is not None else None
        mid_epoch = progress is not None and not progress.is_last_batch
        return {
            "format": FORMAT,
            "random": random_state() | {"mid_epoch": mid_epoch},
            "autosave": self._autosave.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict["format"] > FORMAT:
            raise MisconfigurationException(
                f"The checkpoint's state of AsyncCheckpointIO has format {state_dict['format']}; this version reads up "
                f"to {FORMAT}. Use the version of lightning_efficient that wrote it, or a newer one."
            )
        self._random = state_dict["random"]
        restore_random_state(self._random)  # before the order of the next epoch is drawn
        self._autosave.load_state_dict(state_dict["autosave"])

    def measurements(self) -> Mapping[str, float]:
        """What the last save cost, and what updates waited for it."""
        if not self._saves:
            return {}
        own = {
            "checkpoint/stall_ms": self.engine.last_stall * 1e3,
            "checkpoint/stalled_total_ms": self.engine.stalled_seconds * 1e3,
            "checkpoint/buffer_bytes": float(self.engine.pool.held_bytes),
            "checkpoint/saves": float(self._saves),
            "checkpoint/written": float(self._saves_written),
        }
        return self._values | self._autosave.measurements() | own

    def events(self) -> Sequence[telemetry.Event]:
        """Every failure."""
        return tuple(self._events)


def _local(path: Any) -> Path:
    text = str(path)
    if "://" in text and not text.startswith("file://"):
        raise MisconfigurationException(
            f"AsyncCheckpointIO writes to local file systems, and '{text}' is a remote one. Save to a local directory, "
            "or leave AsyncCheckpointIO out."
        )
    return Path(text.removeprefix("file://")).absolute()

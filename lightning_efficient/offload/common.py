"""What strategies that offload share: when the Trainer's lifecycle lets state leave memory, and needs it back."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
from lightning.pytorch.plugins import TorchCheckpointIO
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils import _pytree as pytree

from lightning_efficient import compat, telemetry
from lightning_efficient.coordination import ParameterChange
from lightning_efficient.offload.account import Account, in_words
from lightning_efficient.offload.batches.batch_control import BatchController
from lightning_efficient.offload.batches.feedback import BatchFeedback
from lightning_efficient.offload.batches.micro_batches import MicroBatchMixin, agree_by
from lightning_efficient.offload.callback import finish_first
from lightning_efficient.offload.checkpoint import load_mapped, own_memory, settle_state
from lightning_efficient.offload.checkpoint_io import streaming
from lightning_efficient.offload.session import OffloadSession
from lightning_efficient.offload.settings import Settings, parse_settings
from lightning_efficient.offload.step_means import Increase
from lightning_efficient.offload.tiers.tier import TierError
from lightning_efficient.offload.timed_steps import TimedStepsMixin
from lightning_efficient.offload.trainer import (
    Schedule,
    accumulates,
    allowed_settings,
    check_run,
    choose_schedule,
    clip_everywhere,
)

__all__ = ["OffloadMixin"]

STATE_KEY = "lightning_efficient.offload"
FORMAT = 1

if TYPE_CHECKING:
    _Base = Strategy
else:
    _Base = object


class OffloadMixin(TimedStepsMixin, MicroBatchMixin, _Base):
    """To be put before a strategy of Lightning, whose constructor calls :meth:`_configure`."""

    @property
    def state_key(self) -> str:
        """What the Trainer asks of callbacks, of which this is none.

        Raises:
            MisconfigurationException: Always.
        """
        raise MisconfigurationException(f"{type(self).__name__} is no callback. Give it as Trainer(strategy=...).")

    def _configure(self, *, enabled: bool, **arguments: Any) -> None:
        """Check what the user gave.

        Args:
            enabled: Whether to offload from the start.
            **arguments: See :func:`~.settings.parse_settings`.

        Raises:
            ValueError: Naming the argument that is not allowed, and what is.
        """
        self.settings = parse_settings(**arguments)
        self.enabled = enabled
        self._begun = enabled
        self._introduced = False
        self._session: OffloadSession | None = None
        self._trainer: pl.Trainer | None = None
        self._account = Account(type(self).__name__)
        self._undo = contextlib.ExitStack()
        self._control: BatchController | None = None
        self._schedule, self._why = "after_backward", ""
        self._in_backward = False  # that of Lightning, not one within the user's step
        self._loaded: Mapping[str, Any] | None = None

    # -- what a user asks --------------------------------------------------------------------------------------------

    def placement(self) -> str:
        """What is where, and why, as a table in Markdown; empty while nothing is offloaded."""
        return self._session.placement.table() if self._session is not None else ""

    def finish_updates(self) -> None:
        """Until the weights are those behind the last step; for code that reads them past their modules."""
        if self._session is not None:
            self._session.finish_updates()

    def measurements(self) -> Mapping[str, float]:
        """Where bytes are, and what their ways cost a training batch; after training, the last values."""
        return self._account.measurements(self._session, self._control)

    def balance(self) -> telemetry.Balance:
        """What computing waited, and what is elsewhere; after training, the last values."""
        return self._account.balance(self._session, enabled=self.enabled)

    def events(self) -> Sequence[telemetry.Event]:
        """What was placed anew."""
        return tuple(self._account.events)

    # -- the roles that it plays for other techniques ------------------------------------------------------------------

    @property
    def splits_batches(self) -> bool:
        """Whether parts of a batch may be done by themselves, and again."""
        return self.settings.batch_feedback

    def enable_offload(self, trainer: pl.Trainer) -> None:
        """Begin to offload, from the next step on."""
        if not self._begun:
            self._begun = True
            self._open(trainer)
            self._start(trainer)
            if self._introduced:
                telemetry.say(trainer, self.start_line(trainer))

    def before_parameters_change(self, trainer: pl.Trainer) -> None:
        """All optimizer state is in the optimizers again."""
        if self._session is not None:
            self._session.bring_back()

    def on_parameters_changed(self, trainer: pl.Trainer, change: ParameterChange) -> None:
        """Everything is placed anew."""
        if self._session is not None:
            self._session.begin_again()
            self._follow_batches(trainer)
            self._account.placed_anew(trainer, self._session, change.reason)

    # -- the Trainer's lifecycle -------------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer) -> None:
        self._end()
        self._account = Account(type(self).__name__)
        self._begun, self._introduced = self.enabled, False
        self._trainer = trainer
        super().setup(trainer)
        if trainer.state.fn != TrainerFn.FITTING:
            if self._begun:
                self._open(trainer)
            return
        check_run(trainer, self.optimizers, self.settings, type(self).__name__)
        schedule, _ = self._choose_schedule(trainer)  # for its errors, before the first step
        if schedule == "delayed":
            self._undo.callback(finish_first(trainer, self.finish_updates, self._join_updates))
        self._allowed_settings(trainer)
        self._control = BatchController(agree=agree_by(self)) if self.settings.batch_feedback else None
        self._follow_batches(trainer)
        if self._begun:
            self._open(trainer)

    def on_train_start(self) -> None:
        super().on_train_start()
        if self._loaded is not None and self._control is not None:
            self._control.load_state_dict(dict(self._loaded["batches"]))
        self._loaded = None
        if self._trainer is not None and self._begun:
            self._start(self._trainer)
        own_memory(self.optimizers)  # what is left in them
        if self._trainer is not None:
            telemetry.introduce(self._trainer, self)
            self._introduced = True

    def start_line(self, trainer: pl.Trainer) -> str:
        """What is where, when it is updated, and what that does to the results."""
        return in_words(type(self).__name__, self._session, self._schedule, self._why, self.settings)

    def part_training_step(self, *args: Any, **kwargs: Any) -> Any:
        if self._session is None:
            return super().part_training_step(*args, **kwargs)
        with self._session.forward(*_tensors_of(args)) as told:
            output = super().part_training_step(*args, **kwargs)
            told(_tensors_of(output))
        return output

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(batch, batch_idx)
        trainer = self._trainer
        if self._session is None or trainer is None:
            return
        self._session.begin_batch(gradients=True)
        if self._session.adapts_now and self._session.adapt():
            self._account.placed_anew(trainer, self._session, "the free memory changed")
        if telemetry.due(trainer):
            self._session.look()
            telemetry.log(trainer, self.measurements())

    def backward(self, *args: Any, **kwargs: Any) -> Tensor:
        self._in_backward = True
        try:
            return super().backward(*args, **kwargs)
        finally:
            self._in_backward = False

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        self._begin_evaluation()
        return super().validation_step(*args, **kwargs)

    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        self._begin_evaluation()
        return super().test_step(*args, **kwargs)

    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        self._begin_evaluation()
        return super().predict_step(*args, **kwargs)

    def _begin_evaluation(self) -> None:
        if self._session is not None:
            self._session.begin_batch(gradients=False)

    def on_validation_start(self) -> None:
        super().on_validation_start()
        self.finish_updates()

    def on_train_end(self) -> None:
        super().on_train_end()
        self.finish_updates()

    def teardown(self) -> None:
        self._account.close(self._session, self._control, enabled=self.enabled)
        self._loaded = None  # what was loaded for an evaluation is not for a fit that follows
        self.stop_batch_feedback()
        self._undo.close()
        if self._session is not None:
            try:
                self._session.rest()
            except TierError as error:
                self._session = None
                rank_zero_warn(
                    f"{type(self).__name__}: optimizer state that was offloaded is lost ({error}). The last "
                    "checkpoint is the last good state of this run."
                )
            finally:
                super().teardown()
        else:
            super().teardown()

    # -- state -------------------------------------------------------------------------------------------------------

    def lightning_module_state_dict(self) -> dict[str, Any]:
        self.finish_updates()
        return super().lightning_module_state_dict()

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        self.finish_updates()
        super().load_model_state_dict(checkpoint, strict=strict)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        if self._session is not None and self._session.torn:
            rank_zero_warn(
                f"{type(self).__name__}: no checkpoint is written to {filepath}. The step in progress has updated some "
                "weights and not the others, so that there is no state to go on from. The last checkpoint is the last "
                "good state of this run."
            )
            return
        if self._control is not None:
            checkpoint[STATE_KEY] = {"format": FORMAT, "batches": self._control.state_dict()}
        with streaming(self):
            super().save_checkpoint(checkpoint, filepath, storage_options)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        checkpoint = None
        if type(self.checkpoint_io) is TorchCheckpointIO:
            checkpoint = load_mapped(checkpoint_path, weights_only)
        if checkpoint is None:
            checkpoint = super().load_checkpoint(checkpoint_path, weights_only=weights_only)
        self._loaded = checkpoint.get(STATE_KEY)
        return checkpoint

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=False):
            in_full = self.settings.master_weights and self._begun  # until then the optimizer steps with what it has
            settle_state(optimizer, state, full_precision=in_full)
            if self._session is not None:
                self._session.take_over(optimizer)

    # -- inside ------------------------------------------------------------------------------------------------------

    def _choose_schedule(self, trainer: pl.Trainer) -> tuple[Schedule, str]:
        """See :func:`~.trainer.choose_schedule`."""
        return choose_schedule(trainer, self.settings.schedule)

    def _allowed_settings(self, trainer: pl.Trainer) -> Settings:
        """See :func:`~.trainer.allowed_settings`."""
        return allowed_settings(trainer, self.settings, self.root_device)

    def _new_session(self, *args: Any, **kwargs: Any) -> OffloadSession:
        """See :class:`~.session.OffloadSession`."""
        return OffloadSession(*args, **kwargs)

    def _open(self, trainer: pl.Trainer) -> None:
        """Place the parameters."""
        settings = self.settings
        fitting = trainer.state.fn == TrainerFn.FITTING
        schedule: Schedule = "after_backward"
        if fitting:
            schedule, self._why = self._choose_schedule(trainer)
            settings = self._allowed_settings(trainer)
            # Also where no gradient is elsewhere yet: one may be later, as with groups that come in the middle.
            self._undo.callback(clip_everywhere(trainer.precision_plugin, lambda: self._session))
        self._schedule = schedule
        self._session = self._new_session(
            trainer.lightning_module,
            self.optimizers if fitting else (),
            settings,
            device=self.root_device,
            directory=Path(trainer.default_root_dir) / (settings.directory or "offload"),
            schedule=schedule,
            complete=lambda: self._in_backward and self.in_last_micro_batch and not compat.accumulating(trainer),
            accumulates=accumulates(trainer),
            delays=lambda: trainer.global_step >= settings.delay_after,
        )

    def _start(self, trainer: pl.Trainer) -> None:
        """Place what belongs to training, and take over the updates."""
        if self._session is not None:
            self._session.start()

    def _join_updates(self) -> None:
        """What the host has begun to update is whole."""
        if self._session is not None and self._session.updates is not None:
            self._session.engine.join()

    def _follow_batches(self, trainer: pl.Trainer) -> None:
        if self._control is None:
            return

        def session_allows() -> bool:
            return self._session is None or self._session.may_retry

        def waited() -> float:
            return self._session.waited_seconds if self._session is not None else 0.0

        def give_up() -> None:
            if self._session is not None:
                self._session.give_up_attempt()

        try:
            self.start_batch_feedback(
                trainer,
                BatchFeedback(
                    self._control,
                    loss_reduction=self.settings.loss_reduction,
                    may_retry=session_allows,
                    abandoned=give_up,
                    idle_s=Increase(waited),
                ),
            )
        except ValueError as error:
            raise MisconfigurationException(f"{type(self).__name__}(batch_feedback=True): {error}") from error

    def _end(self) -> None:
        if self._session is not None:
            self._undo.close()
            self._session.close()
            self._session = None


def _tensors_of(tree: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]

"""Batches that spike, done again: in high bits, then from the last good snapshot, and left out only after that.

A part of ``precision.py``. A batch is judged when its backward pass is over and before the optimizer steps; an
exception leads from there to where Lightning's loop runs batches, and all is as it was before the batch, but for what
Python objects hold. The hooks within a step (``on_before_zero_grad``, ``on_before_backward``, ``on_after_backward``,
``on_before_optimizer_step``) belong to computing it and run each time; those of the batch run once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Protocol

import lightning.pytorch as pl
import torch
import torch.distributed
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor

from lightning_efficient import compat, compat_replay, telemetry
from lightning_efficient.precision.blame import Blame
from lightning_efficient.precision.incidents import Incidents
from lightning_efficient.precision.judgement import JudgedError, Judgement
from lightning_efficient.precision.replay import KeptStep, group_options, versions
from lightning_efficient.precision.reports import Reports, place
from lightning_efficient.precision.ring import KeptBatch
from lightning_efficient.precision.rollback import Kept, Rollback
from lightning_efficient.precision.scaling import lower_scale
from lightning_efficient.precision.spikes import HEALTHY, NOT_FINITE, OVERFLOW, STEEP, SpikeGuard
from lightning_efficient.precision.trainer import can_do_again, refuse_combinations

__all__ = ["Bits", "Guard"]

_SCALES = 16  # that one batch is tried at: from 65536 down to 1

_Attempt = Callable[..., tuple[int, dict[str, Any]]]


class Bits(Protocol):
    """What a guard asks of those who compute in few bits."""

    def compute_high(self, high: bool) -> None:
        """Everything from now on; or as is decided for each product again."""

    def kept(self) -> Callable[[], None]:
        """Note what is known of the network; returns what goes back to that, as often as it is called."""


class Guard:
    """Of one precision plugin.

    Attributes:
        incidents: What there was.

    Args:
        settings: None: only steps that a loss scaler would leave out are done again.
        bits: Who computes.
        scaler: Of losses; None: there is none.
    """

    def __init__(self, settings: SpikeGuard | None, bits: Bits, scaler: Any) -> None:
        self._settings, self._bits, self._scaler = settings, bits, scaler
        self._judgement = Judgement(settings, scaler)
        self.incidents = Incidents((settings or SpikeGuard()).window)
        self._end: Callable[[], None] | None = None
        self._trainer: pl.Trainer
        self._rollback: Rollback | None = None
        self._step: KeptStep | None = None
        self._stepped = True
        self._reports = Reports(self.incidents)
        self._blame: Blame | None = None

    # -- when ---------------------------------------------------------------------------------------------------------

    def attach(self, trainer: pl.Trainer) -> None:
        """Stand between its loop and its batches.

        Raises:
            MisconfigurationException: Where batches cannot be done again.
        """
        self.detach()
        if self._settings is not None:
            refuse_combinations(trainer, self._settings)
            self._rollback = Rollback(trainer, self._settings, self._most)
        elif self._scaler is None or not can_do_again(trainer):
            return
        self._trainer = trainer
        self._end = compat_replay.intercept_batches(trainer, self)

    def detach(self) -> None:
        """Stand there no more."""
        if self._end is not None:
            self._end()
            self._end = self._rollback = self._step = None
            del self._trainer

    def parameters_changed(self) -> None:
        """What was kept is of others."""
        self._step = None
        if self._rollback is not None:
            self._rollback.ring.forget()

    def before_backward(self, loss: Tensor) -> None:
        """Shown the loss, before a scaler multiplies it."""
        self._judgement.before_backward(loss)
        if self._blame is not None:
            self._blame.watch_backward(loss)

    def after_backward(self) -> None:
        """Leads out of the step if it is not healthy."""
        if self._end is not None:
            self._judgement.after_backward(self._trainer)

    # -- one batch ----------------------------------------------------------------------------------------------------

    def stepped(self) -> bool:
        """Whether the optimizer has taken the step that was due."""
        return self._stepped

    def batch(
        self, run: compat_replay.RunBatch, optimizer: Any, batch_idx: int, arguments: Mapping[str, Any]
    ) -> dict[str, Any]:
        """In place of what Lightning does with one."""
        self._stepped = True
        if compat_replay.searches_rate(self._trainer):
            return run(optimizer, batch_idx, arguments)
        kept = self._keep(batch_idx, arguments)
        attempt = partial(self._attempt, partial(run, optimizer, batch_idx, arguments))
        high = self.incidents.begin()
        verdict, output = attempt(high=high)
        if verdict == OVERFLOW:
            verdict, output = self._at_smaller_scales(kept, partial(attempt, high=high))
        if verdict == HEALTHY:
            self._accept(kept)
        elif self._settings is None:  # the scaler does as it always does
            kept.back()
            _, output = attempt(high=high, allowed=NOT_FINITE)
        else:
            output = self._heal(kept, attempt, run, verdict)
        return output

    def _keep(self, batch_idx: int, arguments: Mapping[str, Any]) -> Kept:
        trainer = self._trainer
        begins = batch_idx % trainer.accumulate_grad_batches == 0
        if self._step is None:
            self._step = KeptStep(trainer.lightning_module)
        self._step.keep(adds=not begins or is_overridden("optimizer_zero_grad", trainer.lightning_module))
        batch = KeptBatch(
            arguments, batch_idx, trainer.global_step, begins, self._step.random, group_options(trainer.optimizers),
            compat_replay.counted(trainer), versions(arguments),
        )  # fmt: skip
        if self._rollback is not None:
            self._rollback.add(batch)
            self._reports.memory(trainer, self._rollback.ring)
        return Kept(batch, self._step, compat_replay.logged(trainer), self._bits.kept())

    def _attempt(
        self, run: Callable[[], dict[str, Any]], *, high: bool, allowed: int = HEALTHY
    ) -> tuple[int, dict[str, Any]]:
        """Of a verdict up to ``allowed``, the step is taken."""
        self._judgement.begin(allowed)
        self._bits.compute_high(high)
        try:
            output = run()
            return self._judgement.verdict, output
        except JudgedError as found:
            return found.verdict, {}
        finally:
            self._judgement.allowed = NOT_FINITE
            self._bits.compute_high(False)

    def _at_smaller_scales(self, kept: Kept, attempt: _Attempt) -> tuple[int, dict[str, Any]]:
        """Until one is small enough; if none is, it stays what it was."""
        before, smaller = self._scaler.state_dict(), 1.0
        for _ in range(_SCALES):
            if self._most(kept.batch.changed()):
                break
            factor, scale = lower_scale(self._scaler)
            smaller *= factor
            kept.step.scale_gradients(factor)
            kept.back()
            words = f"gradients are not finite; again with the loss scaled by {scale:g}"
            self._reports.note(self._trainer, kept.batch, "scale_retries", words, event=False)
            verdict, output = attempt()
            if verdict != OVERFLOW:
                return verdict, output
        self._scaler.load_state_dict(before)
        kept.step.scale_gradients(1 / smaller)
        return OVERFLOW, {}

    def _heal(self, kept: Kept, attempt: _Attempt, run: compat_replay.RunBatch, verdict: int) -> dict[str, Any]:
        incidents, words = self.incidents, self._judgement.words()
        incidents.counts["spikes"] += 1
        if self._most(kept.batch.changed()):
            kept.back()
            return self._skip(kept, f"{words}; training_step changes its batch in place, so it cannot be done again")
        self._reports.lost(kept.step.lost())
        kept.back()
        steep = verdict == STEEP
        verdict, output = attempt(high=True, allowed=STEEP)
        if steep and verdict == STEEP:
            self._accept(kept)
            words = f"{words}; in high bits {self._judgement.words()}, so it is right"
            self._reports.note(self._trainer, kept.batch, "confirmed", words, event=False)
            return output
        if verdict in (HEALTHY, STEEP):
            return self._healed(kept, "healed", f"{words}; healthy in high bits", output)
        kept.back()
        step = self._go_back(kept, run)
        if step is not None:
            incidents.counts["rollbacks"] += 1
            verdict, output = attempt(high=True, allowed=STEEP)
            if verdict in (HEALTHY, STEEP):
                words = f"{words}; healthy in high bits from the snapshot of step {step} on"
                return self._healed(kept, "healed_from_snapshot", words, output)
            kept.back()
        if verdict in (NOT_FINITE, OVERFLOW):
            raise self._error(kept.batch, attempt)
        return self._skip(kept, f"{words}; in high bits {self._judgement.words()}")

    def _go_back(self, kept: Kept, run: compat_replay.RunBatch) -> int | None:
        def replay(*batch: Any) -> dict[str, Any]:
            _, output = self._attempt(partial(run, *batch), high=True, allowed=NOT_FINITE)
            return output

        return self._rollback.go_back(kept, replay) if self._rollback is not None else None

    # -- what became of it --------------------------------------------------------------------------------------------

    def _accept(self, kept: Kept) -> None:
        self._judgement.accept()
        kept.step.succeeded()
        self.incidents.was_healthy()

    def _healed(self, kept: Kept, how: str, words: str, output: dict[str, Any]) -> dict[str, Any]:
        self._accept(kept)
        self.incidents.was_healed()
        self._reports.note(self._trainer, kept.batch, how, words)
        return output

    def _skip(self, kept: Kept, words: str) -> dict[str, Any]:
        """The optimizer takes no step, unless earlier batches of the same step have left gradients."""
        trainer, batch, incidents = self._trainer, kept.batch, self.incidents
        batch.skipped = True
        if not compat.accumulating(trainer):
            parameters = [p for group in trainer.optimizers[0].param_groups for p in group["params"]]
            others = not batch.begins and any(parameter.grad is not None for parameter in parameters)
            batch.stepped = self._stepped = others and trainer.world_size == 1
            if batch.stepped:
                compat_replay.step_with_what_is_there(trainer, batch.batch_idx)
            elif others:  # they are this rank's own: the last batch would have reduced them
                words += "; with it the batches whose gradients it should have joined"
                for parameter in parameters:
                    parameter.grad = None
        incidents.skipped.append(
            {"epoch": trainer.current_epoch, "batch": batch.batch_idx, "step": batch.step, "reason": words}
        )
        incidents.skipped_in_a_row += 1
        self._reports.note(trainer, batch, "skipped", f"{words}: skipped")
        if self._settings is not None and incidents.skipped_in_a_row >= self._settings.most_skipped:
            incidents.skipped_in_a_row = 0
            self._judgement.forget()
            self._reports.level_forgotten(self._settings.most_skipped)
        return {}

    def _error(self, batch: KeptBatch, attempt: _Attempt) -> FloatingPointError:
        with Blame(self._trainer.lightning_module) as self._blame:
            attempt(high=True)
        blame, self._blame = self._blame, None
        return FloatingPointError(
            f"{place(self._trainer, batch)}: the {self._judgement.culprit} is not finite, in high bits and from the "
            f"last good snapshot either. It became so at {blame.found()}. Look at the batch and at that operation: "
            "bits are not to blame."
        )

    def _most(self, number: int) -> int:
        """Of all ranks."""
        if self._trainer.world_size == 1:
            return number
        tensor = torch.tensor(number, device=self._trainer.strategy.root_device)
        torch.distributed.all_reduce(tensor, op=torch.distributed.ReduceOp.MAX)
        return int(tensor)

    # -- what is seen and saved ---------------------------------------------------------------------------------------

    def measurements(self) -> dict[str, float]:
        """By tag."""
        return self._reports.measurements(self._rollback.ring if self._rollback is not None else None)

    def events(self) -> list[telemetry.Event]:
        """Each batch that was not healthy at first."""
        return self._reports.events()

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers and text; snapshots are not among it."""
        return {"judgement": self._judgement.state_dict(), "incidents": self.incidents.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """What :meth:`state_dict` returned; None, of an old checkpoint: nothing is known yet."""
        if state:
            self._judgement.load_state_dict(state["judgement"])
            self.incidents.load_state_dict(state["incidents"])

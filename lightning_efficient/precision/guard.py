"""Batches that spike, done again: in high bits, then from the last good snapshot, and left out only after that.

A part of ``precision.py``. A batch is judged when its backward pass is over and before the optimizer steps; an
exception leads from there to where Lightning's loop runs batches, and all is as it was before the batch, but for what
Python objects hold. The hooks within a step (``on_before_zero_grad``, ``on_before_backward``, ``on_after_backward``,
``on_before_optimizer_step``) belong to computing it and run each time; those of the batch run once.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_efficient import compat, compat_replay, telemetry
from lightning_efficient.core.units import human_bytes
from lightning_efficient.precision.blame import Blame
from lightning_efficient.precision.incidents import Incidents
from lightning_efficient.precision.replay import KeptStep, group_options, versions
from lightning_efficient.precision.ring import KeptBatch
from lightning_efficient.precision.rollback import Kept, Rollback
from lightning_efficient.precision.scaling import lower_scale, scale_of
from lightning_efficient.precision.spikes import HEALTHY, NOT_FINITE, OVERFLOW, Level, SpikeGuard, judge
from lightning_efficient.precision.trainer import can_do_again, refuse_combinations

__all__ = ["Bits", "Guard"]

_SCALES = 16  # that one batch is tried at: from 65536 down to 1
_LINES = 20  # for incidents; then a line for every hundredth
_log = logging.getLogger(__name__)

_Attempt = Callable[..., tuple[int, dict[str, Any]]]


class Bits(Protocol):
    """What a guard asks of those who compute in few bits."""

    def compute_high(self, high: bool) -> None:
        """Everything from now on; or as is decided for each product again."""

    def kept(self) -> Callable[[], None]:
        """Note what is known of the network; returns what goes back to that, as often as it is called."""


class _JudgedError(Exception):
    """Leads out of a step that is not healthy."""

    def __init__(self, verdict: int) -> None:
        super().__init__("This batch is done again.")
        self.verdict = verdict


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
        known = settings or SpikeGuard()
        self._losses, self._norms = Level(known.factor, known.window), Level(known.factor, known.window)
        self.incidents = Incidents(known.window)
        self._end: Callable[[], None] | None = None
        self._trainer: pl.Trainer
        self._rollback: Rollback | None = None
        self._step: KeptStep | None = None
        self._loss: Tensor | None = None
        self._judging, self._stepped, self._said_memory = False, True, False
        self._seen = math.nan, math.nan
        self._blame: Blame | None = None

    # -- when ---------------------------------------------------------------------------------------------------------

    def attach(self, trainer: pl.Trainer) -> None:
        """Stand between its loop and its batches.

        Raises:
            MisconfigurationException: Where batches cannot be done again.
        """
        self.detach()
        if self._settings is not None:
            refuse_combinations(trainer)
            self._rollback = Rollback(trainer, self._settings)
        elif self._scaler is None or not can_do_again(trainer):
            return
        self._trainer, self._said_memory = trainer, False
        self._end = compat_replay.intercept_batches(trainer, self)

    def detach(self) -> None:
        """Stand there no more."""
        if self._end is not None:
            self._end()
            self._end = self._rollback = self._step = self._loss = None
            del self._trainer

    def parameters_changed(self) -> None:
        """What was kept is of others."""
        self._step = None
        if self._rollback is not None:
            self._rollback.ring.forget()

    def before_backward(self, loss: Tensor) -> None:
        """Shown the loss, before a scaler multiplies it."""
        self._loss = loss.detach()
        if self._blame is not None:
            self._blame.watch_backward(loss)

    def after_backward(self) -> None:
        """Leads out of the step if it is not healthy."""
        if not self._judging or self._loss is None:
            return
        trainer, guarded = self._trainer, self._settings is not None
        steps = not compat.accumulating(trainer)
        looks = self._scaler is not None or (self._settings is not None and self._settings.gradients and steps)
        norm = self._norm() if looks else None
        limits = (self._losses.limit, self._norms.limit if steps else math.inf) if guarded else (math.inf, math.inf)
        loss = self._loss * trainer.accumulate_grad_batches
        found = judge(loss, torch.zeros_like(loss) if norm is None else norm, limits, scaled=self._scaler is not None)
        if trainer.world_size > 1:
            found[0] = trainer.strategy.reduce(found[0].clone(), reduce_op="max")
        verdict, value, size = found.tolist()
        self._seen = value, size if norm is not None and steps else math.nan
        if verdict != HEALTHY and (guarded or verdict == OVERFLOW):
            raise _JudgedError(int(verdict))

    def _norm(self) -> Tensor | None:
        """Of the gradient, as if no scaler had multiplied it; None if there is none, or not as plain tensors."""
        groups = self._trainer.optimizers[0].param_groups
        gradients = [p.grad for group in groups for p in group["params"] if p.grad is not None]
        if not gradients or any(gradient.layout is not torch.strided for gradient in gradients):
            return None
        norm = torch.nn.utils.get_total_norm(gradients)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        return norm / scale_of(self._scaler, norm.device)

    # -- one batch ----------------------------------------------------------------------------------------------------

    def stepped(self) -> bool:
        """Whether the optimizer has taken the step that was due."""
        return self._stepped

    def batch(
        self, run: compat_replay.RunBatch, optimizer: Any, batch_idx: int, arguments: Mapping[str, Any]
    ) -> dict[str, Any]:
        """In place of what Lightning does with one."""
        self._stepped = True
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
            _, output = attempt(high=high, judged=False)
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
            compat_replay.counted(trainer),
        )  # fmt: skip
        if self._rollback is not None:
            self._rollback.add(batch)
            self._say_memory()
        return Kept(batch, self._step, compat_replay.logged(trainer), self._bits.kept(), versions(arguments))

    def _attempt(
        self, run: Callable[[], dict[str, Any]], *, high: bool, judged: bool = True
    ) -> tuple[int, dict[str, Any]]:
        self._loss, self._judging = None, judged
        self._bits.compute_high(high)
        try:
            return HEALTHY, run()
        except _JudgedError as found:
            return found.verdict, {}
        finally:
            self._judging = False
            self._bits.compute_high(False)

    def _at_smaller_scales(self, kept: Kept, attempt: _Attempt) -> tuple[int, dict[str, Any]]:
        """Until one is small enough; if none is, it stays what it was."""
        before, smaller = self._scaler.state_dict(), 1.0
        for _ in range(_SCALES):
            if self._on_some_rank(kept.changed()):
                break
            factor, scale = lower_scale(self._scaler)
            smaller *= factor
            kept.step.scale_gradients(factor)
            kept.back()
            self._note(
                "scale_retries", f"gradients are not finite; again with the loss scaled by {scale:g}", event=False
            )
            verdict, output = attempt()
            if verdict != OVERFLOW:
                return verdict, output
        self._scaler.load_state_dict(before)
        kept.step.scale_gradients(1 / smaller)
        return OVERFLOW, {}

    def _heal(self, kept: Kept, attempt: _Attempt, run: compat_replay.RunBatch, verdict: int) -> dict[str, Any]:
        incidents, words = self.incidents, self._words(verdict)
        incidents.counts["spikes"] += 1
        if self._on_some_rank(kept.changed()):
            kept.back()
            return self._skip(kept, f"{words}; training_step changes its batch in place, so it cannot be done again")
        self._warn_of(kept.step.lost())
        kept.back()
        verdict, output = attempt(high=True)
        if verdict == HEALTHY:
            return self._healed(kept, "healed", f"{words}; healthy in high bits", output)
        kept.back()
        step = self._go_back(kept, run)
        if step is not None:
            incidents.counts["rollbacks"] += 1
            verdict, output = attempt(high=True)
            if verdict == HEALTHY:
                words = f"{words}; healthy in high bits from the snapshot of step {step} on"
                return self._healed(kept, "healed_from_snapshot", words, output)
            kept.back()
        if verdict in (NOT_FINITE, OVERFLOW):
            raise self._error(verdict, attempt)
        return self._skip(kept, f"{words}; in high bits {self._words(verdict)}")

    def _go_back(self, kept: Kept, run: compat_replay.RunBatch) -> int | None:
        def replay(*batch: Any) -> dict[str, Any]:
            _, output = self._attempt(partial(run, *batch), high=True, judged=False)
            return output

        return self._rollback.go_back(kept, replay) if self._rollback is not None else None

    # -- what became of it --------------------------------------------------------------------------------------------

    def _accept(self, kept: Kept) -> None:
        loss, norm = self._seen
        if self._loss is not None:
            self._losses.add(loss)
            self._norms.add(norm)
        kept.step.succeeded()
        self.incidents.was_healthy()

    def _healed(self, kept: Kept, how: str, words: str, output: dict[str, Any]) -> dict[str, Any]:
        self._accept(kept)
        self.incidents.was_healed()
        self._note(how, words)
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
        self._note("skipped", f"{words}: skipped")
        if self._settings is not None and incidents.skipped_in_a_row >= self._settings.most_skipped:
            incidents.skipped_in_a_row = 0
            self._losses.forget()
            self._norms.forget()
            _log.warning("%d batches in a row were skipped: what is usual is learnt anew.", self._settings.most_skipped)
        return {}

    def _error(self, verdict: int, attempt: _Attempt) -> FloatingPointError:
        with Blame(self._trainer.lightning_module) as self._blame:
            attempt(high=True)
        blame, self._blame = self._blame, None
        what = "loss" if verdict == NOT_FINITE and not math.isfinite(self._seen[0]) else "gradient"
        return FloatingPointError(
            f"{self._place()}: the {what} is not finite, in high bits and from the last good snapshot either. It "
            f"became so at {blame.found()}. Look at the batch and at that operation: bits are not to blame."
        )

    def _words(self, verdict: int) -> str:
        loss, norm = self._seen
        if not math.isfinite(loss) or loss > self._losses.limit:
            return f"loss {loss:.4g} (usual {self._losses.usual:.4g}, limit {self._losses.limit:.4g})"
        if verdict in (NOT_FINITE, OVERFLOW) or norm > self._norms.limit:
            return f"norm of the gradient {norm:.4g} (usual {self._norms.usual:.4g}, limit {self._norms.limit:.4g})"
        return "a spike on another rank"

    def _place(self) -> str:
        loop = self._trainer
        return f"Epoch {loop.current_epoch}, batch {loop.fit_loop.batch_idx}, step {loop.global_step}"

    def _note(self, what: str, words: str, *, event: bool = True) -> None:
        incidents, text = self.incidents, f"{self._place()}: {words}"
        incidents.counts[what] += 1
        if event:
            incidents.lines.append((compat.log_step(self._trainer), text))
        count = incidents.counts.total()
        if self._trainer.is_global_zero and (count <= _LINES or count % 100 == 0):
            _log.warning(text)

    def _warn_of(self, lost: Sequence[str]) -> None:
        if lost:
            _log.warning("Buffers that changed for the first time could not be put back: %s.", ", ".join(lost))

    def _say_memory(self) -> None:
        """Once an optimizer has its state."""
        if (
            self._rollback is None
            or self._said_memory
            or not self._rollback.ring.nbytes
            or not self._trainer.global_step
        ):
            return
        self._said_memory = True
        ring = self._rollback.ring
        _log.info("The spike guard keeps up to %s of snapshots in the host's memory.", human_bytes(ring.most_nbytes))

    def _on_some_rank(self, what: bool) -> bool:
        if self._trainer.world_size == 1:
            return what
        flag = torch.tensor(int(what), device=self._trainer.strategy.root_device)
        return bool(self._trainer.strategy.reduce(flag, reduce_op="max"))

    # -- what is seen and saved ---------------------------------------------------------------------------------------

    def measurements(self) -> dict[str, float]:
        """By tag; nothing if there is nothing to guard."""
        if self._settings is None and self._scaler is None:
            return {}
        names = ("spikes", "healed", "healed_from_snapshot", "rollbacks", "skipped", "scale_retries")
        found = {f"precision/{name}": float(self.incidents.counts[name]) for name in names}
        ring = self._rollback.ring if self._rollback is not None else None
        return found | ({"precision/snapshot_bytes": float(ring.nbytes)} if ring is not None else {})

    def events(self) -> list[telemetry.Event]:
        """Each batch that was not healthy at first."""
        return [telemetry.Event(step, "precision", text) for step, text in self.incidents.lines]

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers and text; snapshots are not among it."""
        return {
            "losses": self._losses.state_dict(), "norms": self._norms.state_dict(),
            "incidents": self.incidents.state_dict(),
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """What :meth:`state_dict` returned; None, of an old checkpoint: nothing is known yet."""
        if state:
            self._losses.load_state_dict(state["losses"])
            self._norms.load_state_dict(state["norms"])
            self.incidents.load_state_dict(state["incidents"])

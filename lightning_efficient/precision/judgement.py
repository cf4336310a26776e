"""Looks at a batch when its backward pass is over, and leads out of the step if it is not healthy.

A part of ``guard.py``.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed
from torch import Tensor

from lightning_efficient import compat
from lightning_efficient.core.torch_internals import gathered
from lightning_efficient.precision.scaling import scale_of
from lightning_efficient.precision.spikes import HEALTHY, NOT_FINITE, OVERFLOW, Level, SpikeGuard, judge

__all__ = ["JudgedError", "Judgement"]

_LARGEST = sys.float_info.max


class JudgedError(Exception):
    """Leads out of a step that is not healthy.

    Args:
        verdict: What it is.
    """

    def __init__(self, verdict: int) -> None:
        super().__init__("This batch is done again.")
        self.verdict = verdict


class Judgement:
    """Of one run, in which it learns what is usual.

    Attributes:
        allowed: Up to this verdict, steps are taken.
        verdict: Of the last step that was.

    Args:
        settings: None: only a scaler's overflow is looked for.
        scaler: Of losses; None: there is none.
    """

    def __init__(self, settings: SpikeGuard | None, scaler: Any) -> None:
        self.allowed, self.verdict = NOT_FINITE, HEALTHY
        self._settings, self._scaler = settings, scaler
        known = settings or SpikeGuard()
        self._losses, self._norms = Level(known.factor, known.window), Level(known.factor, known.window)
        self._loss: Tensor | None = None
        self._seen: tuple[float | None, float | None] = None, None  # loss and norm

    def begin(self, allowed: int) -> None:
        """A batch begins."""
        self.allowed, self.verdict, self._loss, self._seen = allowed, HEALTHY, None, (None, None)

    def before_backward(self, loss: Tensor) -> None:
        """Shown the loss, before a scaler multiplies it."""
        self._loss = loss.detach()

    def after_backward(self, trainer: pl.Trainer) -> None:
        """The gradients are there.

        Raises:
            JudgedError: If they, or the loss, are not healthy.
        """
        loss, self._loss = self._loss, None
        if self.allowed >= NOT_FINITE or loss is None:
            return
        guarded, steps = self._settings is not None, not compat.accumulating(trainer)
        looks = self._scaler is not None or (self._settings is not None and self._settings.gradients and steps)
        norm = self._norm(trainer) if looks else None
        limits = (self._losses.limit, self._norms.limit if steps else math.inf) if guarded else (math.inf, math.inf)
        loss = loss * trainer.accumulate_grad_batches
        found = judge(loss, torch.zeros_like(loss) if norm is None else norm, limits, scaled=self._scaler is not None)
        if trainer.world_size > 1:
            torch.distributed.all_reduce(found[:1], op=torch.distributed.ReduceOp.MAX)
        verdict, value, size = found.tolist()  # the one wait for a device
        self._seen = value, size if norm is not None and (steps or not math.isfinite(size)) else None
        if verdict == OVERFLOW or (guarded and verdict > self.allowed):
            raise JudgedError(int(verdict))
        self.verdict = int(verdict) if guarded else HEALTHY

    def accept(self) -> None:
        """What was seen last is healthy."""
        for level, value in zip((self._losses, self._norms), self._seen, strict=True):
            if value is not None:
                level.add(value)

    def forget(self) -> None:
        """What is usual is learnt anew."""
        self._losses.forget()
        self._norms.forget()

    @property
    def culprit(self) -> str:
        """The loss or the gradient: which was not finite."""
        return "gradient" if self._seen[0] is not None and math.isfinite(self._seen[0]) else "loss"

    def words(self) -> str:
        """What was seen, and what is usual."""
        loss, norm = self._seen
        if loss is not None and not loss <= min(self._losses.limit, _LARGEST):
            return f"loss {loss:.4g} (usual {self._losses.usual:.4g}, limit {self._losses.limit:.4g})"
        if norm is not None and not norm <= min(self._norms.limit, _LARGEST):
            return f"norm of the gradient {norm:.4g} (usual {self._norms.usual:.4g}, limit {self._norms.limit:.4g})"
        return "a spike on another rank"

    def _norm(self, trainer: pl.Trainer) -> Tensor | None:
        """Of the gradient, as if no scaler had multiplied it; None if there is none, or not as plain tensors."""
        groups = trainer.optimizers[0].param_groups
        gradients = [p.grad for group in groups for p in group["params"] if p.grad is not None]
        if not gradients or any(gradient.layout is not torch.strided for gradient in gradients):
            return None
        norm = torch.nn.utils.get_total_norm(gradients)
        return gathered(norm) / scale_of(self._scaler, norm.device)

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers."""
        return {"losses": self._losses.state_dict(), "norms": self._norms.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """What :meth:`state_dict` returned."""
        self._losses.load_state_dict(state["losses"])
        self._norms.load_state_dict(state["norms"])

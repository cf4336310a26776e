"""A step that ran out of memory, taken back to its beginning on all ranks.

A part of ``micro_batches.py``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from lightning_efficient.compat_steps import ClosureResult, logged_in_training_step
from lightning_efficient.core.memory_meter import MemoryMeter
from lightning_efficient.core.random_state import random_state, restore_random_state
from lightning_efficient.core.watched_tensors import WatchedTensors, buffer_slots
from lightning_efficient.offload.batches.feedback import BatchFeedback
from lightning_efficient.offload.batches.free_memory import empty_caches, free_bytes, is_out_of_memory
from lightning_efficient.offload.batches.rewind import KeptGradients
from lightning_efficient.offload.batches.step_logs import StepLogs
from lightning_efficient.offload.batches.step_metrics import StepMetrics

__all__ = ["Recovery", "Step"]

_log = logging.getLogger(__name__)
_END = 2  # what a rank says that cannot go on


@dataclass
class Step:
    """A batch on its way through forward and backward.

    Attributes:
        run: ``training_step``, with autocast and the forward of DistributedDataParallel.
        batch: The whole.
        rest: Further arguments of ``training_step``.
        samples: In the batch.
        free_bytes: That could be had as it began.
        parts: Micro-batches and their shares of the samples.
        sizes: Their samples.
        logs: What they log; None if the batch is whole, and its values are logged at once.
        loss: Of the last forward, with the one reference to its graph.
        losses: Of the parts, without graphs.
        outputs: Of the parts.
        handle: Stands for the loss, without its graph, in what Lightning holds.
        factor: By which Lightning has the gradient multiplied, for accumulation and for a loss scaler.
        result: What Lightning made of the output.
        divided_by: By which it divided the loss.
        failure: Of the attempt, in words; empty if there was none.
        tried: Numbers of parts.
    """

    run: Callable[..., Any]
    batch: Any
    rest: tuple[Any, ...]
    samples: int
    free_bytes: int = 0
    parts: list[tuple[Any, float]] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    logs: StepLogs | None = None
    loss: Tensor | None = None
    losses: list[Tensor] = field(default_factory=list)
    outputs: list[Any] = field(default_factory=list)
    handle: Tensor | None = None
    factor: Tensor | None = None
    result: ClosureResult | None = None
    divided_by: int = 1
    failure: str = ""
    tried: list[int] = field(default_factory=list)


class Recovery:
    """Keeps what a step changes, tells what may be tried again, and goes back.

    Args:
        trainer: That trains.
        feedback: How batches are split.
        agree: The largest of the integers that the ranks give.
        metrics: Of the module.
        meter: Is started anew with each attempt.
    """

    def __init__(
        self,
        trainer: pl.Trainer,
        feedback: BatchFeedback,
        agree: Callable[[int], int],
        metrics: StepMetrics,
        meter: MemoryMeter,
    ) -> None:
        self._trainer, self._feedback, self._agree = trainer, feedback, agree
        self._metrics, self._meter = metrics, meter
        self._device = trainer.strategy.root_device
        self.alone = trainer.world_size == 1 or not feedback.recover
        self._buffers = WatchedTensors(buffer_slots(trainer.lightning_module))
        self._gradients = KeptGradients(trainer.lightning_module)
        self._kept = False

    def begin(self, step: Step) -> None:
        """Before the first forward."""
        self._meter.start()
        self._metrics.keep()
        self._buffers.keep()
        self._undo_logs = logged_in_training_step(self._trainer)
        self._random = random_state()
        self._synchronizes_buffers = getattr(self._trainer.strategy.model, "require_forward_param_sync", False)
        self._kept = True
        step.free_bytes = free_bytes(self._device)

    def begin_backward(self) -> None:
        """Before the first backward, when gradients of the batch before are cleared."""
        self._kept = self._feedback.recover and self._gradients.keep()
        if self._trainer.accumulate_grad_batches > 1 and not self.alone:
            self._kept = not self._agree(int(not self._kept))

    def fails(self, step: Step, action: Callable[[], None], *, reduces: bool = False) -> bool:
        """Whether it ran out of memory; where that is the end, the error goes on, with the reason.

        Args:
            step: Of which it is a part.
            action: What may fail.
            reduces: Whether the ranks reduce their gradients in it, and do not ask each other how it went.
        """
        try:
            action()
            return False
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            if reason := self._why_not_again(step, reduces):
                tried = ", ".join(map(str, step.tried))
                error.add_note(f"Batch of {step.samples} samples, tried in {tried} part(s). Not tried again: {reason}")
                if not self.alone and not reduces:
                    self._agree(_END)
                raise
            step.failure = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        return True  # now the error and its frames are gone, and with them what they held

    def on_some_rank(self, failed: bool) -> bool:
        """Whether the attempt failed here or on another rank."""
        if self.alone:
            return failed
        worst = self._agree(int(failed))
        if worst == _END:
            raise RuntimeError("Another rank ran out of memory and cannot try again; its error says why.")
        return worst == 1

    def start_again(self, step: Step) -> None:
        """Drop what the attempt made, and go back; the control makes smaller parts if it failed here."""
        if step.failure:
            self._feedback.control.out_of_memory(step.samples, len(step.parts), step.free_bytes)
            _log.warning(
                "Out of memory in a batch of %d samples in %d part(s); trying again with smaller ones. (%s)",
                step.samples,
                len(step.parts),
                step.failure,
            )
        if step.result is not None:
            step.result.extra = {}
        step.loss, step.logs, step.failure = None, None, ""
        step.losses, step.outputs, step.parts = [], [], []
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # a backward that fails leaves its streams as they are
        self._feedback.abandoned()
        model = self._trainer.strategy.model
        if isinstance(model, DistributedDataParallel):
            model.require_forward_param_sync = self._synchronizes_buffers  # a forward that failed did not set it
        self.go_back()
        self._gradients.back()
        empty_caches(self._device)
        self._meter.start()

    def go_back(self) -> None:
        """Logged values, metrics, buffers and generators are as the step began."""
        self._undo_logs()
        self._metrics.back()
        self._buffers.back()
        restore_random_state(self._random)

    def succeeded(self) -> None:
        """The step is done."""
        self._buffers.succeeded()
        self._gradients.forget()

    def _why_not_again(self, step: Step, reduces: bool) -> str:
        if not self._feedback.recover:
            return "recovery is off."
        if len(step.parts) == step.samples:
            return "the parts were of one sample."
        if not self._feedback.may_retry():
            return "the weights of some layers were updated already within this step."
        if reduces:
            return "DistributedDataParallel reduces gradients in this backward, which all ranks have to finish."
        if not self._kept:
            return "gradients of earlier batches cannot be put back: the host has no memory for copies of them."
        if lost := [*self._buffers.lost(), *self._metrics.lost()]:
            return f"the step changed {', '.join(lost)} for the first time, of which there is no copy."
        return ""

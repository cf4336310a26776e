"""One step in parts: forward and backward of each micro-batch, and all of it again if memory runs out.

A part of ``micro_batches.py``. Lightning's closure calls ``training_step``, clears the gradients, and calls
``backward``. The first forward runs in the first of these calls, and all the rest in the last: gradients of this batch
may only be there after those of the one before are cleared.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from time import perf_counter
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import ParallelStrategy
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from lightning_efficient.compat_steps import (
    ClosureResult,
    as_training_step,
    metrics_logged_per_step,
    prepare_for_backward,
)
from lightning_efficient.core.memory_meter import MemoryMeter
from lightning_efficient.offload.batches.batch import count_samples, merge_outputs, split_batch
from lightning_efficient.offload.batches.batch_control import StepMeasurement
from lightning_efficient.offload.batches.feedback import BatchFeedback, refuse_batch_statistics
from lightning_efficient.offload.batches.free_memory import memory_pressure
from lightning_efficient.offload.batches.loss_check import check_loss
from lightning_efficient.offload.batches.recovery import Recovery, Step
from lightning_efficient.offload.batches.step_logs import StepLogs
from lightning_efficient.offload.batches.step_metrics import StepMetrics

__all__ = ["SplitSteps"]


class SplitSteps:
    """Runs the steps of one fit.

    Args:
        trainer: That trains; its strategy calls :meth:`training_step` and :meth:`backward`.
        feedback: How to split.
        agree: The largest of the integers that the ranks give.
    """

    def __init__(self, trainer: pl.Trainer, feedback: BatchFeedback, agree: Callable[[int], int]) -> None:
        self._trainer, self._strategy, self._module = trainer, trainer.strategy, trainer.lightning_module
        self._feedback, self._control, self._agree = feedback, feedback.control, agree
        self._sums = feedback.loss_reduction == "sum"
        self._metrics, self._meter = StepMetrics(self._module), MemoryMeter(self._strategy.root_device)
        self._recovery = Recovery(trainer, feedback, agree, self._metrics, self._meter)
        self._step: Step | None = None
        self._looked_at = False
        self._checks, self._splits = feedback.check_loss, 0
        self._began_at = self._step_s = self._idle_s = 0.0
        self._in_last_part = True

    @property
    def in_last_part(self) -> bool:
        """Whether the backward in progress is the last of its batch."""
        return self._in_last_part

    def training_step(self, run: Callable[..., Any], batch: Any, *rest: Any) -> Any:
        """Run the first forward; returns the output, with a loss that stands for that of the whole batch."""
        if not self._looked_at:
            refuse_batch_statistics(self._module)
            self._looked_at = True
        now = perf_counter()
        self._step_s, self._began_at = now - self._began_at if self._began_at else 0.0, now
        self._idle_s = min(self._feedback.idle_s(), self._step_s)  # of the same time
        step = self._step = Step(run, batch, rest, count_samples(batch))
        self._recovery.begin(step)
        self._plan(step)
        while self._recovery.fails(step, lambda: self._forward(step, 0)):
            if not self._recovery.alone:  # the ranks try again together, in backward
                step.handle = torch.zeros((), device=self._strategy.root_device, requires_grad=True)
                return step.handle
            self._recovery.start_again(step)
            self._plan(step)
        output = step.outputs[0]
        if not step.losses:
            return self._without_loss(step)
        if len(step.parts) == 1:
            step.outputs[0] = None  # it is the caller's, with graphs perhaps
        step.handle = step.losses[0].clone().requires_grad_()
        return {**output, "loss": step.handle} if isinstance(output, Mapping) else step.handle

    def backward(self, closure_loss: Tensor, optimizer: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Run all the rest."""
        step, self._step = self._step, None
        if step is None or step.handle is None:
            raise RuntimeError("backward was called without a training_step before it.")
        precision = self._strategy.precision_plugin
        self._strategy.pre_backward(closure_loss)
        scaled: Tensor = precision.pre_backward(closure_loss, self._module)
        (step.factor,) = torch.autograd.grad(scaled, step.handle)
        self._recovery.begin_backward()

        def back(loss: Tensor) -> None:
            precision.backward(loss, self._module, optimizer, *args, **kwargs)

        while not self._attempt(step, back):
            self._recovery.start_again(step)
            self._plan(step)
        self._finish(step)
        post: Tensor = precision.post_backward(scaled, self._module)
        self._strategy.post_backward(post)
        return post

    def made(self, result: ClosureResult, divided_by: int) -> None:
        """Told what Lightning made of the output of :meth:`training_step`."""
        if self._step is not None:
            self._step.result, self._step.divided_by = result, divided_by

    def _plan(self, step: Step) -> None:
        """Split the batch as the control says."""
        parts = self._control.parts(step.samples)
        if self._trainer.world_size > 1 and not isinstance(self._strategy.model, DistributedDataParallel):
            parts = self._agree(parts)  # there may be collectives in each forward
            if parts > step.samples:
                raise ValueError(
                    f"This rank has a batch of {step.samples} samples, and another needs {parts} parts. With a sharded "
                    "model all ranks need the same number: use drop_last=True, or a larger batch."
                )
        step.parts = split_batch(step.batch, parts) if parts > 1 else [(step.batch, 1.0)]
        step.sizes = [round(share * step.samples) for _, share in step.parts]
        step.tried.append(parts)
        if parts > 1 or not self._recovery.alone:  # if the ranks reduce values, they have to do it together
            step.logs = StepLogs(self._trainer)
        if parts == 1:
            return
        refuse_batch_statistics(self._module)  # whose training may have begun since the first step
        self._splits += 1
        if self._checks and self._splits.bit_count() == 1:  # ever more seldom, for it takes a forward of the whole
            weighted = [(part, self._weight(share)) for part, share in step.parts]
            try:
                self._checks = check_loss(self._trainer, step.batch, weighted, step.rest, self._feedback.loss_reduction)
            finally:
                self._recovery.go_back()
        self._metrics.split()

    def _weight(self, share: float) -> float:
        return 1.0 if self._sums else share

    def _forward(self, step: Step, i: int) -> None:
        micro_batch, share = step.parts[i]
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._unsynchronized())
            stack.enter_context(as_training_step(self._module))
            if step.logs is not None:
                stack.enter_context(step.logs.part())
            if len(step.parts) > 1:
                stack.enter_context(self._metrics.part(share))
            output = step.run(micro_batch, *step.rest)
        loss = output.get("loss") if isinstance(output, Mapping) else output
        if isinstance(loss, Tensor):
            step.loss = loss
            step.losses.append(loss.detach().clone())
        if len(step.parts) > 1:
            output = apply_to_collection(output, Tensor, Tensor.detach)
            if i and (output is None) != (step.outputs[0] is None):
                raise RuntimeError(
                    f"training_step returned None for some of the {len(step.parts)} micro-batches of a batch and a "
                    "loss for others; which samples to skip must not depend on how a batch is split. Return a loss "
                    "that is zero for samples to skip, or do not let batches be split."
                )
        step.outputs.append(output)

    def _backward(self, step: Step, i: int, back: Callable[[Tensor], None]) -> None:
        loss, step.loss = step.loss, None
        if loss is None or step.factor is None:
            raise RuntimeError("training_step returned no loss for a micro-batch.")
        weight = self._weight(step.parts[i][1])
        self._in_last_part = i == len(step.parts) - 1
        model = self._strategy.model
        if self._in_last_part and isinstance(model, DistributedDataParallel):
            prepare_for_backward(model, loss)
        with contextlib.nullcontext() if self._in_last_part else self._unsynchronized():
            back(loss * (step.factor * weight))

    def _attempt(self, step: Step, back: Callable[[Tensor], None]) -> bool:
        """Forward and backward of what is still to do; whether all ranks were able to."""
        last = len(step.parts) - 1

        def all_but_the_last_backward() -> None:
            for i in range(last + 1):
                if i == len(step.outputs):
                    self._forward(step, i)
                if i < last:
                    self._backward(step, i, back)

        failed = bool(step.failure) or self._recovery.fails(step, all_but_the_last_backward)
        if self._recovery.on_some_rank(failed):
            return False
        reduces = isinstance(self._strategy.model, DistributedDataParallel)
        return not self._recovery.fails(step, lambda: self._backward(step, last, back), reduces=reduces)

    def _without_loss(self, step: Step) -> Any:
        """The batch is to be skipped, if the output is None; else Lightning says what is wrong with it."""
        self._step, output = None, step.outputs[0]
        if output is None:
            for i in range(1, len(step.parts)):
                self._forward(step, i)
            self._log(step)
        return output

    def _finish(self, step: Step) -> None:
        self._log(step)
        if step.result is not None and len(step.parts) > 1:
            weighted = [loss * self._weight(share) for loss, (_, share) in zip(step.losses, step.parts, strict=True)]
            step.result.loss = torch.stack(weighted).sum(0) / step.divided_by
            extras = [
                {name: value for name, value in output.items() if name != "loss"}
                for output in step.outputs
                if isinstance(output, Mapping)
            ]
            if extras:
                step.result.extra = merge_outputs(extras, step.sizes, "the output of training_step")
        on_host = self._strategy.root_device.type == "cpu"
        self._control.observe(
            StepMeasurement(
                samples=step.samples,
                parts=len(step.parts),
                used_bytes=self._meter.start_bytes,
                free_bytes=step.free_bytes,
                peak_bytes=self._meter.peak_bytes(),
                step_s=self._step_s,
                idle_s=self._idle_s,
                pressure_percent=memory_pressure() if on_host else 0.0,
            )
        )

    def _log(self, step: Step) -> None:
        if step.logs is not None:
            self._metrics.merge()
            step.logs.log(step.sizes, step.losses, sums=self._sums)
        self._metrics.succeeded(metrics_logged_per_step(self._trainer))
        self._recovery.succeeded()

    def _unsynchronized(self) -> contextlib.AbstractContextManager[None]:
        """Forwards and backwards after which gradients are not reduced: only the last backward of a batch does that.

        The forward before it does not prepare it, as it would by itself: another attempt may follow instead.
        """
        strategy = self._strategy
        return strategy.block_backward_sync() if isinstance(strategy, ParallelStrategy) else contextlib.nullcontext()

"""The adapter for one device."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_efficient.offload.common import OffloadMixin
from lightning_efficient.offload.placement import PlaceFunction
from lightning_efficient.offload.settings import LossReduction, ScheduleChoice, SiteChoice

__all__ = ["OffloadStrategy"]


class OffloadStrategy(OffloadMixin, SingleDeviceStrategy):
    """Trains what does not fit: device, host memory and disk as one memory, with results that are the same.

    ``strategy="offload"`` stands for it after ``import lightning_efficient``.

    Example::

        strategy = OffloadStrategy(memory_budget="6GiB", offload_dir="/scratch", place={"optimizer_state": "disk"})
        trainer = Trainer(strategy=strategy, gradient_clip_val=1.0)
        trainer.fit(module, data)  # the weights, and the checkpoints, of a run that has memory for all
        print(strategy.placement())

    Args:
        memory_budget: How much may be in the fastest memory (bytes, or a text such as ``"6GiB"``), or an amount for
            each tier: ``{"device": "auto", "host": "2GiB", "disk": "100GiB"}``. ``auto``, and a tier that is not
            named, is what is free when training begins, less a fifth. An amount for the memory of the host, on a CPU,
            is for all that the strategy holds there; others are of what is placed, and ``staging`` comes on top.
        offload_dir: Folder for what goes to a disk; what is relative, and ``offload`` for None, is below the Trainer's
            ``default_root_dir``.
        place: Where tensors go, whatever the plan would say: from a kind (``parameter``, ``gradient``,
            ``optimizer_state``, or ``activation`` for what backward needs), a pattern of parameter names, or both
            (``"optimizer_state:blocks.*"``), to ``device``, ``host``, ``disk`` or ``numa:N``. In place of a tier, or of
            the whole mapping, a function, or its import path, may stand: it is given an attribute (with ``kind``,
            ``name``, ``nbytes`` and ``position`` in forward) and returns a tier, or None where others decide. It is
            asked again whenever something is placed anew, and not about what the run needs where it is used.
        schedule: When updates take place. ``in_backward``: each as soon as its gradients are there; ``under_forward``:
            each right before the next forward uses it; ``after_backward``: all in the optimizer's step; ``auto``: the
            first of these that the run allows. All of them are exact. ``delayed``: each in the backward of the next
            step, which uses weights that are one update behind: results differ from those of plain training.
        step_on: Where updates of parameters on a GPU are computed whose optimizer state is elsewhere. ``device``:
            there, and the state comes and goes; ``host``: by the CPU, which gets gradients and sends new values, and
            whose kernels may round differently; ``auto``: what is faster, measured when training begins. Without a
            GPU there is one place only.
        staging: Most memory for optimizer state on its way: it is taken as it is needed, and one record (the optimizer
            state of a parameter, or of small neighbours) must fit. None: 256 MiB, or what two of the largest records
            take; where a budget for the host counts it, what that leaves, and one record at least. What else is on its
            way has memory beside it: activations half as much, gradients a quarter, gradients and values of updates on
            the host half, so that all kinds together take up to 2.25 times ``staging``.
        master_weights: Keep parameters of 16 bits in float32 beside them, and update those.
        batch_feedback: Split a batch into micro-batches within the step when memory is short, go back to the step's
            beginning after an out-of-memory error, and merge them again when there is room; the batch that the
            optimizer sees, the logged values and the loss are those of the whole.
        loss_reduction: What the loss of ``training_step`` is over the samples of a batch, ``mean`` or ``sum``; batches
            of other losses cannot be split.
        delay_after: With ``schedule="delayed"``: so many steps at the beginning of the run are exact.
        enabled: False: begin when :meth:`enable_offload` is called, as
            ``GrowAndUnshareCallback(offload_on_switch=True)`` does when the full model begins.

    Raises:
        ValueError: Naming the argument that is not allowed, and what is.
    """

    strategy_name = "offload"
    parallel_devices: list[torch.device] | None = None  # Lightning fills it in; the first one is ours

    def __init__(
        self,
        *,
        memory_budget: int | str | dict[str, int | str] | None = None,
        offload_dir: str | Path | None = None,
        place: Mapping[str, str | PlaceFunction] | str | PlaceFunction | None = None,
        schedule: ScheduleChoice = "auto",
        step_on: SiteChoice = "auto",
        staging: int | str | None = None,
        master_weights: bool = False,
        batch_feedback: bool = False,
        loss_reduction: LossReduction = "mean",
        delay_after: int = 40,
        enabled: bool = True,
        accelerator: pl.accelerators.Accelerator | None = None,
        checkpoint_io: Any = None,
        precision_plugin: Any = None,
    ) -> None:
        super().__init__(accelerator=accelerator, checkpoint_io=checkpoint_io, precision_plugin=precision_plugin)
        self._configure(
            memory_budget=memory_budget,
            offload_dir=offload_dir,
            place=place,
            schedule=schedule,
            step_on=step_on,
            staging=staging,
            master_weights=master_weights,
            batch_feedback=batch_feedback,
            loss_reduction=loss_reduction,
            delay_after=delay_after,
            enabled=enabled,
        )

    @property
    def root_device(self) -> torch.device:
        return self.parallel_devices[0] if self.parallel_devices else torch.device("cpu")

    def setup(self, trainer: pl.Trainer) -> None:
        if self.parallel_devices is not None and len(self.parallel_devices) > 1:
            raise MisconfigurationException(
                f"OffloadStrategy trains on one device, and the Trainer has {len(self.parallel_devices)}. Use "
                "strategy='offload_ddp', or devices=1."
            )
        super().setup(trainer)

    def model_to_device(self) -> None:
        if not self._begun or self.root_device.type == "cpu":
            super().model_to_device()  # else each parameter goes to its place, past the device

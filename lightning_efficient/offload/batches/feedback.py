"""What the strategy is told about splitting batches, and the modules with which it cannot be done."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import nn

from lightning_efficient.core.torch_internals import BatchNorm
from lightning_efficient.offload.batches.batch_control import BatchController

__all__ = ["BatchFeedback", "refuse_batch_statistics"]

_INSTANCE_STATISTICS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)


@dataclass(frozen=True)
class BatchFeedback:
    """How batches are split.

    Attributes:
        control: Decides into how many parts.
        loss_reduction: What the loss of ``training_step`` is over the samples of a batch; another one cannot be split.
        check_loss: Compare, before the first, second, fourth, eighth ... batch that is split, its loss with that of its
            parts, in evaluation mode and without gradients: a batch may have nothing that tells a mean over samples
            from another one (padding, say). A loss that depends on chance cannot be compared.
        recover: Whether to go back to the step's beginning after an out-of-memory error. Needs copies of what a step
            changes in place: buffers, states of metrics, and gradients of earlier batches of an accumulation.
        may_retry: Asked after an error; False if weights have changed within the step.
        abandoned: Called when an attempt is given up, before gradients, buffers and generators are put back: for those
            who have taken anything of it, such as gradients that left ``.grad``.
        idle_s: Seconds that the device waited for data since it was last asked, as each step begins.

    Raises:
        ValueError: For another ``loss_reduction``.
    """

    control: BatchController
    loss_reduction: Literal["mean", "sum"] = "mean"
    check_loss: bool = True
    recover: bool = True
    may_retry: Callable[[], bool] = lambda: True
    abandoned: Callable[[], None] = lambda: None
    idle_s: Callable[[], float] = lambda: 0.0

    def __post_init__(self) -> None:
        if self.loss_reduction not in ("mean", "sum"):
            raise ValueError(
                f"loss_reduction={self.loss_reduction!r}; batches can be split if the loss is a 'mean' or a 'sum' over "
                "their samples."
            )


def refuse_batch_statistics(module: nn.Module) -> None:
    """Parts of a batch have other statistics than the batch.

    Raises:
        ValueError: For each module that uses or keeps those of its batch, by path.
    """
    found = [
        f"{path} ({type(part).__name__})"
        for path, part in module.named_modules()
        if part.training
        and (isinstance(part, BatchNorm) or (isinstance(part, _INSTANCE_STATISTICS) and part.track_running_stats))
    ]
    if found:
        raise ValueError(
            f"Batches cannot be split: {', '.join(found)} would compute or keep statistics of micro-batches instead of "
            "batches, which changes the results. Use GroupNorm or LayerNorm, put those modules into evaluation mode, "
            "or turn batch feedback off."
        )

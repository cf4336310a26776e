"""Steps of a Lightning strategy in micro-batches, as many as memory demands, and again after an out-of-memory error.

For the Trainer, its callbacks and the optimizer it is one step: the hooks run once, gradients, loss, outputs and logged
values are those of the batch. What a user's code does in ``training_step`` itself it does for each micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DDPStrategy, Strategy
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from lightning_efficient.compat_steps import watch_steps
from lightning_efficient.offload.batches.feedback import BatchFeedback
from lightning_efficient.offload.batches.split_step import SplitSteps

__all__ = ["MicroBatchMixin", "agree_by"]

if TYPE_CHECKING:
    _Base = Strategy
else:
    _Base = object


def agree_by(strategy: Strategy) -> Callable[[int], int]:
    """The largest of the integers that the ranks give; all of them must call it."""

    def largest(number: int) -> int:
        tensor = torch.tensor(number, dtype=torch.int64, device=strategy.root_device)
        return int(strategy.reduce(tensor, reduce_op="max"))

    return largest


class MicroBatchMixin(_Base):
    """To be put before a strategy: ``class Offload(MicroBatchMixin, SingleDeviceStrategy)``."""

    _split_steps: SplitSteps | None = None
    _unwatch: Callable[[], None] | None = None

    def start_batch_feedback(self, trainer: pl.Trainer, feedback: BatchFeedback) -> None:
        """Split batches from now on; to be called at the end of ``setup``, when fitting.

        Raises:
            ValueError: If optimization is manual: there the step's parts are the user's own. Or to recover with a
                sharded model: its ranks wait for each other within each layer, and cannot go back together.
        """
        if not trainer.lightning_module.automatic_optimization:
            raise ValueError(
                "Batch feedback needs automatic optimization: with manual optimization training_step itself decides "
                "what a backward and a step are. Turn batch feedback off, or use automatic optimization."
            )
        if feedback.recover and trainer.world_size > 1 and not isinstance(self, DDPStrategy):
            raise ValueError(
                f"recover=True with {trainer.world_size} ranks and {type(self).__name__}: a rank that runs out of "
                "memory would leave the others waiting in the midst of a layer. Set recover=False."
            )
        if isinstance(self.model, DistributedDataParallel) and self.model.static_graph:
            raise ValueError(
                "Batch feedback cannot work with static_graph=True of DistributedDataParallel: the number of forwards "
                "of a step changes. Leave static_graph out, or turn batch feedback off."
            )
        self.stop_batch_feedback()
        steps = SplitSteps(trainer, feedback, agree_by(self))
        self._split_steps, self._unwatch = steps, watch_steps(trainer, steps.made)

    def stop_batch_feedback(self) -> None:
        """Leave the trainer as it was; to be called in ``teardown``."""
        if self._unwatch is not None:
            self._unwatch()
        self._split_steps = self._unwatch = None

    @property
    def in_last_micro_batch(self) -> bool:
        """Whether no backward of this batch comes after the one in progress."""
        return self._split_steps is None or self._split_steps.in_last_part

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Of the batch, or of its first part."""
        if self._split_steps is None:
            return self.part_training_step(*args, **kwargs)
        return self._split_steps.training_step(self.part_training_step, *args, **kwargs)

    def part_training_step(self, *args: Any, **kwargs: Any) -> Any:
        """One forward of a batch, or of a part of one; what a strategy has to do in each forward goes here."""
        return super().training_step(*args, **kwargs)

    def backward(self, closure_loss: Tensor, optimizer: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Of the batch, with the forwards of its other parts."""
        if self._split_steps is None:
            return super().backward(closure_loss, optimizer, *args, **kwargs)
        return self._split_steps.backward(closure_loss, optimizer, *args, **kwargs)

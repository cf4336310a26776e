"""Updates that begin while backward goes on, so that each waits for the copy of its own layer only."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_efficient.checkpointing.engine import CheckpointEngine
from lightning_efficient.core.step_in_backward import StepInBackward

__all__ = ["UpdatesInBackward"]


class UpdatesInBackward:
    """Tells the engine what is updated in backward, and what will be next.

    Args:
        engine: Copies what has been updated ahead of the save that is expected.
    """

    def __init__(self, engine: CheckpointEngine) -> None:
        self._engine = engine
        self._optimizers: Sequence[Optimizer] = ()
        self._stepping: StepInBackward | None = None

    @property
    def active(self) -> bool:
        """Whether updates are in backward now."""
        return self._stepping is not None

    def begin(self, optimizers: Sequence[Optimizer], complete: Callable[[], bool]) -> None:
        """From now on.

        Args:
            optimizers: Those of the run.
            complete: Asked at each gradient, whether it is, or more micro-batches will add to it.
        """
        self._stepping = StepInBackward(optimizers, complete, self._updated)
        self._stepping.attach()
        self._optimizers = optimizers

    def again(self) -> None:
        """The parameters are others now."""
        if self._stepping is not None:
            self._stepping.attach()

    def end(self) -> None:
        """Leave the parameters as they were."""
        if self._stepping is not None:
            self._stepping.detach()
        self._stepping, self._optimizers = None, ()

    def tensors_in_order(self) -> Iterable[Tensor]:
        """What the next updates change, first things first, as far as it is known."""
        parameters = self._stepping.order if self._stepping is not None else []
        states = [optimizer.state.get(p, {}) for p in parameters for optimizer in self._optimizers]
        return [*parameters, *(value for state in states for value in state.values() if isinstance(value, Tensor))]

    def _updated(self, parameter: nn.Parameter, state: Mapping[str, Any]) -> None:
        """In backward, while others still wait for their update."""
        self._engine.ahead.updated([parameter, *(value for value in state.values() if isinstance(value, Tensor))])

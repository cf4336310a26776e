"""Each parameter's update as soon as its gradient is there, while the backward of earlier layers still runs.

The user's optimizer object, its groups and its state stay: for each update it is shown one parameter alone. For
optimizers that update parameter by parameter the result is that of one step for all, bit for bit, and the gradients of
a model are never all alive at once. (Source: Lv et al. 2023, "Full Parameter Fine-tuning for Large Language Models with
Limited Resources", LOMO; and torch's tutorial on fusing the optimizer step into the backward pass.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn
from torch.optim import LBFGS, Optimizer
from torch.utils.hooks import RemovableHandle

__all__ = ["StepInBackward"]


class StepInBackward:
    """Hooks that run ``optimizer.step`` for one parameter when its gradient is complete.

    The step for all that follows finds no gradients and does nothing.

    Attributes:
        order: The parameters in the order in which they were last updated.

    Args:
        optimizers: Of any ``torch.optim`` class that updates parameter by parameter.
        ready: Asked at each gradient: whether it is complete, or more micro-batches will add to it.
        updated: Called with each parameter that has been updated, and its state.

    Raises:
        ValueError: For an optimizer that needs all gradients together.
    """

    def __init__(
        self,
        optimizers: Sequence[Optimizer],
        ready: Callable[[], bool],
        updated: Callable[[nn.Parameter, Mapping[str, Any]], None] = lambda parameter, state: None,
    ) -> None:
        for optimizer in optimizers:
            if isinstance(optimizer, LBFGS):
                raise ValueError(
                    f"{type(optimizer).__name__} needs the gradients of all parameters together and cannot step within "
                    "backward. Use an optimizer that updates parameter by parameter, such as AdamW or SGD."
                )
        self._optimizers = list(optimizers)
        self._ready = ready
        self._updated = updated
        self._handles: list[RemovableHandle] = []
        self.order: list[nn.Parameter] = []

    def attach(self) -> None:
        """From now on; anew after parameters came or went."""
        self.detach()
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    if parameter.requires_grad:
                        self._handles.append(parameter.register_post_accumulate_grad_hook(self._updater(optimizer)))

    def detach(self) -> None:
        """Leave the parameters as they were."""
        while self._handles:
            self._handles.pop().remove()
        self.order.clear()

    def _updater(self, optimizer: Optimizer) -> Callable[[nn.Parameter], None]:
        seen: list[Any] = [None, {}]  # the list of groups that the second is of: loading a state makes a new one

        def update(parameter: nn.Parameter) -> None:
            if not self._ready():
                return
            groups = optimizer.param_groups
            if seen[0] is not groups:
                seen[:] = groups, next(g for g in groups if any(p is parameter for p in g["params"]))
            optimizer.param_groups = [{**seen[1], "params": [parameter]}]
            try:
                optimizer.step()
            finally:
                optimizer.param_groups = groups
            parameter.grad = None
            if len(self.order) == len(self._handles):
                self.order.clear()
            self.order.append(parameter)
            self._updated(parameter, optimizer.state.get(parameter, {}))

        return update

"""One parameter in an update: for that time the user's optimizer finds its state where it looks for it."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_efficient.offload.updates.full_precision import current_master, in_16_bits
from lightning_efficient.offload.updates.layout import MASTER, is_bulk

__all__ = ["Turn", "value_of"]


class Turn:
    """One parameter in the update of its unit.

    Attributes:
        shown: What the optimizer takes for the parameter: itself, or its value in full precision.
        state: All of its state that is known; the bulk alone, while it has not been shown.
    """

    def __init__(self, parameter: nn.Parameter, gradient: Tensor | None, bulk: dict[str, Any]) -> None:
        self.parameter, self.gradient, self.state = parameter, gradient, bulk
        self.shown: Tensor = parameter
        self._own_gradient = parameter.grad

    def show(self, optimizer: Optimizer, *, in_full: bool) -> None:
        """The optimizer finds the state and the gradient where it looks for them."""
        device = self.parameter.device  # what is in a record is on the host
        bulk = {key: value.to(device, non_blocking=True) for key, value in self.state.items()}
        state = {**optimizer.state.get(self.parameter, {}), **bulk}
        master = state.pop(MASTER, None)
        if in_full and in_16_bits(self.parameter):
            self.shown = current_master(master, self.parameter.detach())
        if state:
            optimizer.state[self.shown] = state
        self.shown.grad = self.gradient if self.gradient is None else self.gradient.to(self.shown.dtype)

    def hide(self, optimizer: Optimizer, *, resident: bool) -> None:
        """The optimizer keeps what is small, or all if it is ``resident``, under the parameter itself."""
        known = self.shown in optimizer.state
        self.state = dict(optimizer.state.get(self.shown, {}))
        self.shown.grad = None
        self.parameter.grad = self._own_gradient
        if self.shown is not self.parameter:
            optimizer.state.pop(self.shown, None)
            self.parameter.copy_(self.shown)
            self.state[MASTER] = self.shown
        kept = self.state if resident else {key: value for key, value in self.state.items() if not is_bulk(value)}
        if known or self.state:
            optimizer.state[self.parameter] = dict(kept)


def value_of(state: dict[str, Any]) -> dict[str, Any]:
    """What is left of a state that somebody took out of the optimizer, for a new beginning: the parameter's value."""
    return {key: value for key, value in state.items() if key == MASTER}

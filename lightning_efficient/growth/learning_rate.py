"""A factor on the user's learning rates that leaves the user's schedulers alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

__all__ = ["LearningRateScale"]


class LearningRateScale:
    """Multiplies each group's ``lr`` for the duration of ``optimizer.step`` only.

    Schedulers, among them those that compute the next rate from the present one, see the user's own rates.

    Args:
        factor: Asked at each step.
    """

    def __init__(self, factor: Callable[[], float]) -> None:
        self._factor = factor
        self._handles: list[RemovableHandle] = []
        self._rates: dict[int, list[Any]] = {}

    def attach(self, optimizers: Sequence[Optimizer]) -> None:
        """Start; once for each fit."""
        self.remove()
        for optimizer in optimizers:
            self._handles.append(optimizer.register_step_pre_hook(self._scale))
            self._handles.append(optimizer.register_step_post_hook(self._restore))

    def remove(self) -> None:
        """Stop."""
        while self._handles:
            self._handles.pop().remove()
        self._rates.clear()

    def _scale(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        factor = self._factor()
        self._rates[id(optimizer)] = [group["lr"] for group in optimizer.param_groups]
        if factor != 1.0:
            for group in optimizer.param_groups:
                group["lr"] = group["lr"] * factor

    def _restore(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        for group, rate in zip(optimizer.param_groups, self._rates.pop(id(optimizer), []), strict=False):
            group["lr"] = rate

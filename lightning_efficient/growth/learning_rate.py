"""A factor on the user's learning rates that leaves the user's schedulers alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_efficient.core.before_update import right_before_update

__all__ = ["LearningRateScale"]


class LearningRateScale:
    """Multiplies each group's ``lr`` for the weight update only.

    Schedulers, among them those that compute the next rate from the present one, see the user's own rates; so does
    whatever runs inside a closure, and a checkpoint that is written when it raises.
    """

    def __init__(self) -> None:
        self._factor: Callable[[], float] | None = None
        self._handles: list[RemovableHandle] = []
        self._rates: dict[Optimizer, list[Any]] = {}

    def attach(self, optimizers: Sequence[Optimizer], factor: Callable[[], float]) -> None:
        """Start; once for each fit.

        Args:
            optimizers: Those of the run.
            factor: Asked at each step.
        """
        self.remove()
        self._factor = factor
        for optimizer in optimizers:
            self._handles.append(optimizer.register_step_pre_hook(self._before))
            self._handles.append(optimizer.register_step_post_hook(self._restore))

    def remove(self) -> None:
        """Stop, and give back rates of an update that did not come to its end."""
        while self._handles:
            self._handles.pop().remove()
        for optimizer in list(self._rates):
            self._restore(optimizer)
        self._factor = None

    def _before(self, optimizer: Optimizer, args: Any, kwargs: dict[str, Any]) -> Any:
        return right_before_update(lambda: self._scale(optimizer), args, kwargs)

    def _scale(self, optimizer: Optimizer) -> None:
        factor = self._factor() if self._factor else 1.0
        if factor != 1.0 and optimizer not in self._rates:
            self._rates[optimizer] = [group["lr"] for group in optimizer.param_groups]
            for group in optimizer.param_groups:
                group["lr"] = group["lr"] * factor

    def _restore(self, optimizer: Optimizer, *_: Any) -> None:
        for group, rate in zip(optimizer.param_groups, self._rates.pop(optimizer, []), strict=False):
            group["lr"] = rate

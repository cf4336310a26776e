"""An update that is still to come, with all that it had in the optimizer's step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lightning_efficient.offload.updates.engine import UpdateEngine
from lightning_efficient.offload.updates.gradients import GradientClaim
from lightning_efficient.offload.updates.units import Unit

__all__ = ["HeldUpdate"]


@dataclass(frozen=True, eq=False)
class HeldUpdate:
    """The update of one unit, as the optimizer's step would have done it; to be run once.

    Attributes:
        unit: That it is of.
        group: Its hyperparameters.
        gradients: One for each of its parameters, also if somebody clears those of the parameters meanwhile.
        states: What the optimizer had for each, for one that somebody takes out meanwhile.
    """

    unit: Unit
    group: Mapping[str, Any]
    gradients: list[_Noted | GradientClaim | None]
    states: list[dict[str, Any] | None]

    @classmethod
    def of(cls, unit: Unit, gradients: Iterable[Tensor | GradientClaim | None]) -> HeldUpdate:
        """With what there is of it now."""
        group = {k: v.clone() if isinstance(v, Tensor) else v for k, v in unit.group.items() if k != "params"}
        noted = [_Noted(g, g._version) if isinstance(g, Tensor) else g for g in gradients]
        return cls(unit, group, noted, [unit.optimizer.state.get(parameter) for parameter in unit.parameters])

    @property
    def changes(self) -> list[nn.Parameter]:
        """The parameters that it will change: those that have a gradient."""
        return [p for p, gradient in zip(self.unit.parameters, self.gradients, strict=True) if gradient is not None]

    def begin(self, engine: UpdateEngine) -> None:
        """Let the host do it meanwhile, where it is one that the host steps; :meth:`run` ends it."""
        engine.update(
            self.unit, self.group, [one.gradient if isinstance(one, _Noted) else one for one in self.gradients]
        )

    def run(self, engine: UpdateEngine, *, begun: bool = False) -> None:
        """Update the weights, as they are now; what the host steps is done when it is joined.

        Args:
            engine: Of the unit.
            begun: Whether :meth:`begin` was called.

        Raises:
            RuntimeError: If a gradient was changed meanwhile.
        """
        known = self.unit.optimizer.state
        taken_out: dict[Tensor, dict[str, Any]] = {
            parameter: state
            for parameter, state in zip(self.unit.parameters, self.states, strict=True)
            if state is not None and parameter not in known
        }
        known.update(taken_out)  # what somebody has taken out meanwhile, this update is still to have
        gradients = [one.take() if isinstance(one, _Noted) else one for one in self.gradients]
        if not begun:
            engine.update(self.unit, self.group, gradients)
        if taken_out:
            engine.join([self.unit])  # for the host gives back the state that it had
        for taken in taken_out:
            known.pop(taken, None)


@dataclass(frozen=True, eq=False)
class _Noted:
    """A gradient in memory, and how often it had been changed."""

    gradient: Tensor
    version: int

    def take(self) -> Tensor:
        if self.gradient._version != self.version:
            raise RuntimeError(
                "A gradient was changed in place after the optimizer's step and before its parameter was updated. "
                "Clear gradients with zero_grad(set_to_none=True), or give schedule='after_backward'."
            )
        return self.gradient

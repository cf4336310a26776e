"""A module that grows: its arrangement of layers and its width, changed together with the optimizers' state."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from lightning_efficient.core.named_state import GroupPlan, group_names
from lightning_efficient.growth.arrangement import LayerArrangement
from lightning_efficient.growth.layers import LayerStack
from lightning_efficient.growth.moments import StateMode, transfer_state
from lightning_efficient.growth.narrow import NarrowTwin
from lightning_efficient.growth.operators import Transfer

__all__ = ["Change", "GrowingModule"]


@dataclass(frozen=True)
class Change:
    """What a switch did to the parameters, by name."""

    added: tuple[str, ...]
    removed: tuple[str, ...]
    replaced: tuple[str, ...]

    @classmethod
    def between(cls, before: Mapping[str, nn.Parameter], after: Mapping[str, nn.Parameter]) -> Change:
        return cls(
            added=tuple(name for name in after if name not in before),
            removed=tuple(name for name in before if name not in after),
            replaced=tuple(name for name in after if name in before and after[name] is not before[name]),
        )


class GrowingModule:
    """Takes ``module`` back to a smaller form, and forward again.

    Attributes:
        before_change: Called before parameters and optimizer state change.

    Args:
        module: The full network.
        stacks: Its repeated layers; may be empty where only the width grows.
        twin: The narrow twin, already swapped in, where the width grows.
        wide: The arrangement of the wide layers, taken before the twin was swapped in.
    """

    def __init__(
        self,
        module: nn.Module,
        arrangement: LayerArrangement | None,
        twin: NarrowTwin | None = None,
        wide: LayerArrangement | None = None,
    ) -> None:
        self.module = module
        self.twin = twin
        self.before_change: Callable[[], None] = lambda: None
        self._arrangements = {"narrow": arrangement, "wide": wide} if twin else {"wide": arrangement}
        self._mirrors: list[LayerArrangement] = []
        self._plans: list[GroupPlan] = []

    # -- what there is -------------------------------------------------------------------------------------------

    @property
    def width(self) -> str:
        """``"narrow"`` or ``"wide"``."""
        return self.twin.now if self.twin else "wide"

    @property
    def arrangement(self) -> LayerArrangement | None:
        """The arrangement of the layers that are in the module now."""
        return self._arrangements[self.width]

    @property
    def leaders(self) -> tuple[int, ...]:
        return self.arrangement.leaders if self.arrangement else ()

    @property
    def full_depth(self) -> int:
        return self.arrangement.full_depth if self.arrangement else 0

    @property
    def stacks(self) -> list[LayerStack]:
        return self.arrangement.stacks if self.arrangement else []

    def parameters_text(self) -> str:
        """How many parameters are live, and how many the full model has, for a person."""
        live = sum(parameter.numel() for parameter in self.module.parameters())
        with self.expanded():
            full = sum(parameter.numel() for parameter in self.module.parameters())
        of_all = f" of {full:,}" if full > live else ""
        at_width = " at this width" if self.width == "narrow" else ""
        return f"{live:,}{of_all} parameters{at_width}"

    def optimizers(self) -> list[Optimizer]:
        """Those whose parameters follow the module."""
        return [plan.optimizer for plan in self._plans]

    def optimizer_names(self) -> list[list[list[str]]]:
        """The names of the parameters of each optimizer's groups, by optimizer and group."""
        names = {id(parameter): name for name, parameter in self.module.named_parameters()}
        return [group_names(plan.optimizer, names) for plan in self._plans]

    # -- at the beginning ----------------------------------------------------------------------------------------

    def restore(self, leaders: Sequence[int], width: str) -> None:
        """Take the form of an earlier or later phase, to be loaded over."""
        leaders = tuple(leaders) or tuple(range(self.full_depth))
        if self.twin is not None and width != self.width:
            self.twin.show(width)
            if self.arrangement:
                self.arrangement.arrange(leaders)
            self.twin.empty()
            self.twin.release()
        elif self.arrangement and leaders != self.leaders:
            self.arrangement.arrange(leaders)
        for mirror in self._mirrors:
            if mirror.leaders != leaders:
                mirror.arrange(leaders)

    def mirror(self, twins: Sequence[nn.Module]) -> None:
        """Change these copies of the module (averaged models) wherever the module changes."""
        known = {id(mirror.module) for mirror in self._mirrors}
        if self.arrangement:
            self._mirrors += [self.arrangement.mirror(twin) for twin in twins if id(twin) not in known]

    @contextmanager
    def expanded(self) -> Iterator[dict[int, str]]:
        """See :meth:`LayerArrangement.expanded`."""
        if self.arrangement is None:
            yield {id(parameter): name for name, parameter in self.module.named_parameters()}
        else:
            with self.arrangement.expanded() as names:
                yield names

    def plan_optimizers(self, optimizers: Sequence[Optimizer], names: Mapping[int, str]) -> None:
        """Remember where each parameter of the full model belongs, and leave the live ones in the optimizers."""
        self._plans = [GroupPlan(optimizer, names) for optimizer in optimizers]
        self._apply_plans()

    # -- a switch ------------------------------------------------------------------------------------------------

    def grow_layers(
        self, leaders: Sequence[int], source: Sequence[int], *, state: StateMode, summed_gradient: bool = False
    ) -> Change:
        """Go to another arrangement of the layers, with values and optimizer state.

        Args:
            leaders: The arrangement to reach.
            source: For each layer of it, the present layer that it comes from.
            state: What becomes of the optimizers' state of the layers.
            summed_gradient: See :meth:`LayerArrangement.arrange`.
        """
        if self.arrangement is None:
            raise ValueError("This module has no repeated layers to grow.")
        self.before_change()
        before = dict(self.module.named_parameters())
        transfers = self.arrangement.arrange(leaders, source, summed_gradient=summed_gradient)
        for mirror in self._mirrors:
            mirror.arrange(leaders, source)
        return self._finish(before, transfers, state)

    def grow_width(self, *, state: StateMode) -> Change:
        """Go from the narrow to the wide model, with values and optimizer state."""
        if self.twin is None:
            raise ValueError("This module has no narrow twin to grow from.")
        self.before_change()
        leaders = self.leaders
        before = self.twin.show("wide")
        if self.arrangement:
            self.arrangement.arrange(leaders)
        transfers = self.twin.grow(before)
        self.twin.release()
        return self._finish(before, transfers, state)

    @contextmanager
    def preview_width(self) -> Iterator[None]:
        """For its duration the module is wide, with the weights that growth would give it now; optimizers stay."""
        if self.twin is None:
            raise ValueError("This module has no narrow twin to grow from.")
        leaders = self.leaders
        before = self.twin.show("wide")
        try:
            if self.arrangement:
                self.arrangement.arrange(leaders)
            self.twin.grow(before)
            yield
        finally:
            self.twin.show("narrow")
            self.twin.release()

    def _finish(self, before: Mapping[str, nn.Parameter], transfers: Sequence[Transfer], state: StateMode) -> Change:
        transfer_state(self.optimizers(), transfers, state)
        self._apply_plans()
        return Change.between(before, dict(self.module.named_parameters()))

    def _apply_plans(self) -> None:
        live = dict(self.module.named_parameters())
        for plan in self._plans:
            plan.apply(live)

    # -- for the log ---------------------------------------------------------------------------------------------

    def sizes(self) -> dict[str, float]:
        """Bytes and counts that follow from the parameters that are live now."""
        trainable = [p for p in self.module.parameters() if p.requires_grad]
        gradient = sum(p.numel() * p.element_size() for p in trainable)
        return {
            "parameters": float(sum(p.numel() for p in self.module.parameters())),
            "gradient_bytes": float(gradient),
            "optimizer_state_bytes": float(sum(_state_bytes(plan.optimizer) for plan in self._plans)),
            "all_reduce_bytes": float(gradient),
        }


def _state_bytes(optimizer: Optimizer) -> int:
    def count(value: Any) -> int:
        return value.numel() * value.element_size() if isinstance(value, torch.Tensor) else 0

    return sum(count(value) for state in optimizer.state.values() for value in state.values())

"""Which parameters are updated together, and where their optimizer state is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.optim import Optimizer

from lightning_efficient.core.torch_internals import local_part
from lightning_efficient.offload.tiers.tier import Tier
from lightning_efficient.offload.updates.layout import Layout
from lightning_efficient.offload.updates.staging import Placed

__all__ = ["Unit", "cut_units", "make_units"]


@dataclass(eq=False)
class Unit:
    """Parameters of one group of one optimizer that are next to each other and updated in one go.

    Attributes:
        optimizer: That they belong to.
        group_index: Of their group.
        names: Of the parameters.
        parameters: Themselves.
        tier: Where the bulk of their state is; None: in the optimizer, as always.
        placed: The record of their state, once there is one.
        layout: Of the record.
        keys: The state's names for each parameter, in the optimizer's order.
    """

    optimizer: Optimizer
    group_index: int
    names: list[str]
    parameters: list[nn.Parameter]
    tier: Tier | None
    placed: Placed | None = None
    layout: Layout = field(default_factory=lambda: Layout((), 0))
    keys: list[list[str]] = field(default_factory=list)

    @property
    def group(self) -> dict[str, Any]:
        """Their hyperparameters now."""
        return self.optimizer.param_groups[self.group_index]


def make_units(
    optimizer: Optimizer, names: Mapping[int, str], tier_of: Callable[[str], Tier | None], together_bytes: int
) -> list[Unit]:
    """Cut an optimizer's parameters into units.

    Small neighbours of one group that are to be in the same tier share a unit, so that a disk is asked for pieces that
    are worth it.

    Args:
        optimizer: Of any class.
        names: The name of each parameter by ``id``.
        tier_of: Where the state of a parameter goes, by its name.
        together_bytes: A unit is not made larger than this, in bytes of its parameters, by adding to it.
    """
    return [
        unit
        for index, group in enumerate(optimizer.param_groups)
        for unit in cut_units(optimizer, index, group["params"], names, tier_of, together_bytes)
    ]


def cut_units(
    optimizer: Optimizer,
    index: int,
    parameters: Sequence[nn.Parameter],
    names: Mapping[int, str],
    tier_of: Callable[[str], Tier | None],
    together_bytes: int,
) -> Iterator[Unit]:
    """Cut ``parameters``, neighbours in the group of this ``index``; see :func:`make_units`."""
    unit: Unit | None = None
    nbytes = 0
    for position, parameter in enumerate(parameters):
        name = names.get(id(parameter), f"<unnamed {index}.{position}>")
        tier, size = tier_of(name), local_part(parameter).numel() * parameter.element_size()
        if unit is None or unit.tier is not tier or nbytes + size > together_bytes:
            if unit is not None:
                yield unit
            unit, nbytes = Unit(optimizer, index, [], [], tier), 0
        unit.names.append(name)
        unit.parameters.append(parameter)
        nbytes += size
    if unit is not None:
        yield unit

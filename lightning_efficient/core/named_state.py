"""Which parameter sits where in an optimizer, by name.

A ``torch.optim.Optimizer`` saves its state by *position*. A run whose set of parameters changes, or whose optimizer
lists them in another order after a restart, then loads one parameter's moments into another, silently where the shapes
agree. These functions keep the names beside the positions and restore by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

__all__ = ["GroupPlan", "group_names", "reorder_state"]


def group_names(optimizer: Optimizer, names: Mapping[int, str]) -> list[list[str]]:
    """The names of the parameters of each group, in order.

    Args:
        optimizer: The optimizer.
        names: The name of each parameter by ``id``; one that has none is called ``<unnamed group.position>``.
    """
    return [
        [names.get(id(parameter), f"<unnamed {g}.{i}>") for i, parameter in enumerate(group["params"])]
        for g, group in enumerate(optimizer.param_groups)
    ]


class GroupPlan:
    """Where every parameter of the full model belongs in one optimizer, decided once by the user's own code.

    Args:
        optimizer: As the user built it over the full model.
        names: The name of each parameter of the full model by ``id``.
    """

    def __init__(self, optimizer: Optimizer, names: Mapping[int, str]) -> None:
        self.optimizer = optimizer
        self.groups: list[list[str | nn.Parameter]] = [
            [names.get(id(parameter), parameter) for parameter in group["params"]] for group in optimizer.param_groups
        ]
        self._own_names: list[list[str] | None] = [group.get("param_names") for group in optimizer.param_groups]

    def apply(self, live: Mapping[str, nn.Parameter]) -> None:
        """Give each group the live parameters that belong to it, in the planned order; forget the state of others.

        Args:
            live: The parameters that exist now, by name, each once.

        Raises:
            ValueError: If groups were added since.
        """
        if len(self.optimizer.param_groups) != len(self.groups):
            raise ValueError(
                f"{type(self.optimizer).__name__} had {len(self.groups)} parameter groups when it was built and has "
                f"{len(self.optimizer.param_groups)} now, so that it is not known where parameters that come later "
                "belong. Make all groups in `configure_optimizers`; freeze with requires_grad or a learning rate of 0."
            )
        for group, entries, names in zip(self.optimizer.param_groups, self.groups, self._own_names, strict=True):
            chosen = [live.get(entry) if isinstance(entry, str) else entry for entry in entries]
            group["params"] = [parameter for parameter in chosen if parameter is not None]
            if names is not None:  # torch keeps them where it was given named parameters
                group["param_names"] = [n for n, parameter in zip(names, chosen, strict=True) if parameter is not None]
        kept = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        for parameter in [p for p in self.optimizer.state if isinstance(p, Tensor) and id(p) not in kept]:
            del self.optimizer.state[parameter]


def reorder_state(
    state_dict: Mapping[str, Any], saved: Sequence[Sequence[str]], present: Sequence[Sequence[str]]
) -> dict[str, Any]:
    """An optimizer's ``state_dict`` with its positions in the order of the present optimizer.

    Args:
        state_dict: As ``Optimizer.state_dict`` gave it.
        saved: Names by group at that time, from :func:`group_names`.
        present: Names by group now.

    Returns:
        A new dict; tensors are not copied.

    Raises:
        ValueError: If a group does not hold the same parameters as when it was saved, naming some that differ.
    """
    if len(saved) != len(present):
        raise ValueError(
            f"The checkpoint's optimizer has {len(saved)} parameter groups, the present one {len(present)}. "
            "`configure_optimizers` must build the groups as it did when the checkpoint was written."
        )
    position_of: dict[str, int] = {}
    for group, names in zip(state_dict["param_groups"], saved, strict=True):
        position_of.update(zip(names, group["params"], strict=True))
    groups: list[dict[str, Any]] = []
    state: dict[int, Any] = {}
    position = 0
    for i, (group, before, now) in enumerate(zip(state_dict["param_groups"], saved, present, strict=True)):
        if set(before) != set(now):
            gone, new = sorted(set(before) - set(now)), sorted(set(now) - set(before))
            raise ValueError(
                f"Parameter group {i} holds other parameters than in the checkpoint: only there {gone[:3]}, "
                f"only here {new[:3]}. `configure_optimizers` must sort parameters as it did then."
            )
        for k, name in enumerate(now):
            if position_of[name] in state_dict["state"]:
                state[position + k] = state_dict["state"][position_of[name]]
        groups.append({**group, "params": list(range(position, position + len(now)))})
        if "param_names" in group:
            groups[-1]["param_names"] = list(now)
        position += len(now)
    return {**state_dict, "state": state, "param_groups": groups}

"""Where the parameters of repeated layers live, and which of them belong to one layer alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from lightning_efficient.growth.layers import LayerStack

__all__ = ["Slot", "find_slots"]


@dataclass(frozen=True)
class Slot:
    """Where a parameter lives in a layer: the same place in every layer of a stack."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}" if self.module else self.name

    def get(self, layer: nn.Module) -> nn.Parameter:
        parameter = layer.get_submodule(self.module)._parameters[self.name]
        if parameter is None:
            raise LookupError(f"{self.module}.{self.name}")
        return parameter

    def set(self, layer: nn.Module, parameter: nn.Parameter) -> None:
        layer.get_submodule(self.module)._parameters[self.name] = parameter


def find_slots(
    module: nn.Module, stacks: Sequence[LayerStack], layers: Sequence[Sequence[nn.Module]]
) -> tuple[list[list[Slot]], set[tuple[int, int, Slot]]]:
    """The places of parameters that belong to one layer alone; a parameter tied elsewhere is left as it is.

    Args:
        module: The network.
        stacks: Its repeated layers.
        layers: The layers of each stack.

    Returns:
        The slots of each stack, and (stack, layer, slot) of each place whose parameter is tied to another owner.

    Raises:
        ValueError: Naming a parameter of a layer that cannot be copied.
    """
    owners: dict[int, set[object]] = {}
    inside: set[int] = set()
    for stack, members in zip(stacks, layers, strict=True):
        for i, layer in enumerate(members):
            inside.update(id(sub) for sub in layer.modules())
            for name, parameter in layer.named_parameters():
                _check_kind(parameter, f"{stack.path(i)}.{name}")
                owners.setdefault(id(parameter), set()).add((stack.parent, i))
    for sub in module.modules():
        if id(sub) not in inside:
            for parameter in sub.parameters(recurse=False):
                owners.setdefault(id(parameter), set()).add("outside")
    found: list[list[Slot]] = []
    tied: set[tuple[int, int, Slot]] = set()
    for s, members in enumerate(layers):
        places = [
            Slot(path, name)
            for path, sub in members[0].named_modules()
            for name, parameter in sub._parameters.items()
            if parameter is not None
        ]
        here = {(s, i, x) for i, layer in enumerate(members) for x in places if len(owners[id(x.get(layer))]) > 1}
        found.append([x for x in places if sum((s, i, x) in here for i in range(len(members))) < len(members)])
        tied |= here
    return found, tied


def _check_kind(parameter: nn.Parameter, path: str) -> None:
    if isinstance(parameter, nn.parameter.UninitializedParameter):
        raise ValueError(f"'{path}' is a lazy parameter; run the model once before training so that it has a shape.")
    if type(parameter) is not nn.Parameter:
        raise ValueError(f"'{path}' is a {type(parameter).__name__}; growth copies plain parameters only.")
    if hasattr(parameter, "placements"):
        raise ValueError(f"'{path}' is sharded (DTensor); growth changes whole parameters. See the card, 'refuses'.")

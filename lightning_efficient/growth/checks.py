"""Whether an arrangement of layers can do what is asked of it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lightning_efficient.growth.arrangement import LayerArrangement
from lightning_efficient.growth.layers import signature

__all__ = ["check_depth_can_change", "check_layers_still_equal", "mixed_weights"]


def mixed_weights(arrangement: LayerArrangement, state_dict: Mapping[str, object], prefix: str = "") -> str | None:
    """Why a state dict cannot be loaded while layers share: it has other weights for each, and the last would win.

    Args:
        arrangement: The layers as they are now.
        state_dict: Names as in the module.
        prefix: What they begin with.

    Returns:
        The path of a layer that differs from its leader, or None.
    """
    for stack, slots in zip(arrangement.stacks, arrangement.slots, strict=True):
        for i, leader in enumerate(arrangement.leaders):
            for slot in slots if leader != i else []:
                one, other = (state_dict.get(f"{prefix}{stack.path(k)}.{slot}") for k in (i, leader))
                if isinstance(one, Tensor) and isinstance(other, Tensor) and not torch.equal(one, other):
                    return stack.path(i)
    return None


def check_depth_can_change(arrangement: LayerArrangement) -> None:
    """Whether every stack sits in a container whose users iterate over it.

    Raises:
        ValueError: Naming the container that cannot be shortened, and why.
    """
    for stack in arrangement.stacks:
        container = arrangement.module.get_submodule(stack.parent)
        where = f"'{stack.parent}' ({type(container).__name__})"
        if not isinstance(container, nn.ModuleList | nn.Sequential | nn.ModuleDict):
            raise ValueError(
                f"Depth growth needs the layers in an nn.ModuleList, nn.Sequential or nn.ModuleDict that forward "
                f"iterates over; {where} holds them as attributes. Use mode='share', or move them into a list."
            )
        if isinstance(container, nn.ModuleList) and list(container._modules)[-1] != stack.keys[-1]:
            raise ValueError(
                f"{where} holds other modules after the repeated layers, so that shortening it would renumber "
                "them. Keep the repeated layers in a list of their own."
            )


def check_layers_still_equal(arrangement: LayerArrangement) -> None:
    """Whether the layers that are not live still fit the live ones, after others converted the module.

    Raises:
        ValueError: Naming the layer whose class was changed.
    """
    for stack, layers in zip(arrangement.stacks, arrangement.layers, strict=True):
        for i, layer in enumerate(layers):
            if signature(layer) != signature(layers[0]):
                raise ValueError(
                    f"'{stack.path(i)}' no longer has the structure of '{stack.path(0)}': a precision plugin or "
                    "another callback replaced modules in the live layers only. It must convert modules after "
                    "growth has ended, or in place without changing their class."
                )

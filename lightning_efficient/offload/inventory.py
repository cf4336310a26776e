"""What a module and its optimizers have that can be placed."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import nn
from torch.optim import Optimizer

from lightning_efficient.core.torch_internals import local_part
from lightning_efficient.offload.placement import Attribute
from lightning_efficient.offload.settings import Settings
from lightning_efficient.offload.updates.subset_step import state_bytes_per_element

__all__ = ["attributes_of", "to_device"]


def attributes_of(
    module: nn.Module,
    optimizers: Sequence[Optimizer],
    settings: Settings,
    *,
    gradients_stay: bool = True,
    steps_of_gradients: int = 1,
    values_stay: bool = False,
) -> list[Attribute]:
    """What there is to place: of each parameter itself, its gradient and its optimizer state, and the rest by kind.

    Of what is spread over ranks, it is this rank's part.

    Args:
        module: Whose parameters they are.
        optimizers: Of its parameters.
        settings: Of the user.
        gradients_stay: Whether all gradients are alive at a time; else the largest one counts.
        steps_of_gradients: Of how many steps they are.
        values_stay: Whether the values of parameters are beside their state too, and not only those in full precision.
    """
    groups = [(optimizer, group) for optimizer in optimizers for group in optimizer.param_groups]
    by_parameter = {id(p): (optimizer, group) for optimizer, group in groups for p in group["params"]}
    ratios: dict[tuple[int, int], float] = {}
    largest = 0
    found = []
    for position, (name, parameter) in enumerate(module.named_parameters()):
        elements = local_part(parameter).numel()
        nbytes = elements * parameter.element_size()
        found.append(Attribute("parameter", name, nbytes, position))
        if not parameter.requires_grad or id(parameter) not in by_parameter:
            continue
        if gradients_stay:
            found.append(Attribute("gradient", name, steps_of_gradients * nbytes, position))
        largest = max(largest, nbytes)
        optimizer, group = by_parameter[id(parameter)]
        in_full = settings.master_weights and parameter.element_size() < 4  # beside the state, which is in full too
        key = id(group), parameter.dim()
        if key not in ratios:
            like = torch.empty([0] * parameter.dim()) if in_full else parameter
            ratios[key] = state_bytes_per_element(optimizer, group, like)
        values = 4 if in_full else parameter.element_size() * values_stay
        state_bytes = (ratios[key] + values) * elements
        found.append(Attribute("optimizer_state", name, int(state_bytes), position))
    if not gradients_stay:
        found.append(Attribute("gradient", "*", largest))
    found += [Attribute(kind, "*", 0) for kind in ("activation", "input_batch", "checkpoint")]
    return found


def to_device(module: nn.Module, device: torch.device, without: Collection[str]) -> None:
    """Everything of ``module`` but the parameters ``without``, which stay the same objects."""
    for name, parameter in module.named_parameters():
        if name not in without and parameter.device != device:
            parameter.data = parameter.data.to(device)
    for part in module.modules():
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = buffer.to(device)

"""Checkpoints larger than memory: optimizer state that is read from the file where it is needed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_efficient.offload.updates.layout import is_bulk

__all__ = ["load_mapped", "own_memory", "settle_state"]


def load_mapped(path: Any, weights_only: bool | None) -> dict[str, Any] | None:
    """A checkpoint whose tensors lie in the file, and take memory only while they are read; None if that cannot be."""
    try:
        local = Path(path)
        if not local.is_file():
            return None
        return torch.load(local, map_location="cpu", mmap=True, weights_only=weights_only)
    except (RuntimeError, TypeError):  # an older format, or no path
        return None


def own_memory(optimizers: Sequence[Optimizer]) -> None:
    """Whatever state is in the optimizers lies in memory of its own beside its parameter, and in no file."""
    for optimizer in optimizers:
        for parameter, state in optimizer.state.items():
            for key, value in state.items() if isinstance(parameter, Tensor) else ():
                if is_bulk(value):
                    state[key] = value.to(parameter.device, copy=True)


def settle_state(optimizer: Optimizer, state_dict: Mapping[str, Any], *, full_precision: bool) -> None:
    """``Optimizer.load_state_dict`` without taking memory for what will be offloaded.

    Tensors stay where they are in ``state_dict``: on the host, or in a file.

    Args:
        optimizer: To load into.
        state_dict: As ``Optimizer.state_dict`` gave it.
        full_precision: Keep state of more bits than its parameter has, which torch would round.
    """
    bulk: dict[int, dict[str, Tensor]] = {}
    light: dict[Any, Any] = {}
    for position, state in state_dict["state"].items():
        if isinstance(position, int) and isinstance(state, Mapping):
            bulk[position] = {key: value for key, value in state.items() if is_bulk(value)}
            light[position] = {key: value for key, value in state.items() if not is_bulk(value)}
        else:
            light[position] = state
    optimizer.load_state_dict({**state_dict, "state": light})
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for position, tensors in bulk.items():
        parameter = parameters[position]
        for key, value in tensors.items():
            kept = value if full_precision or not value.is_floating_point() else value.to(parameter.dtype)
            optimizer.state[parameter][key] = kept

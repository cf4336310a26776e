"""Values in full precision beside parameters of 16 bits, and when they count."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["current_master", "in_16_bits", "in_full_precision"]


def in_16_bits(parameter: Tensor) -> bool:
    """Whether it is one that has a value in full precision beside it, where the user wants that."""
    return parameter.dtype in (torch.bfloat16, torch.float16)


def in_full_precision(state: Mapping[str, Any]) -> dict[str, Any]:
    """A parameter's optimizer state, as an optimizer makes it for a value in full precision.

    That of a run without such values has the parameter's own few bits, and no optimizer steps with both.
    """
    return {
        key: value.float() if isinstance(value, Tensor) and value.is_floating_point() else value
        for key, value in state.items()
    }


def current_master(master: Tensor | None, value: Tensor) -> Tensor:
    """The value in full precision of a parameter.

    Where ``master`` does not round to what the parameter has, somebody has written to the parameter, or trained it
    without ``master``: there it is what the parameter has.

    Args:
        master: That was made with the last update, in float32; changed in place. None: there was no update.
        value: Of the parameter now.
    """
    if master is None:
        return value.float()
    return torch.where(master.to(value.dtype) == value, master, value.float(), out=master)

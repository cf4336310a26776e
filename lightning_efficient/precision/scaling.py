"""A loss scaler's factor: what gradients are multiplied by, and a smaller one for a batch whose gradients overflow.

(Micikevicius et al. 2018, "Mixed precision training", 3.2; that the batch is tried again, not lost, is our own.)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["lower_scale", "scale_of"]


def scale_of(scaler: Any, device: torch.device) -> Tensor:
    """By which it multiplies a loss; known without a wait for the device. One, if there is no scaler."""
    one = torch.ones((), device=device)
    if scaler is None:
        return one
    scaled: Tensor = scaler.scale(one)
    return scaled


def lower_scale(scaler: Any) -> tuple[float, float]:
    """Make it smaller, as the scaler itself does when it leaves out a step.

    Returns:
        The factor by which it is smaller, and what it is now.
    """
    state, factor = scaler.state_dict(), float(scaler.get_backoff_factor())
    scaler.load_state_dict(state | {"scale": state["scale"] * factor, "_growth_tracker": 0})
    return factor, state["scale"] * factor

"""Gradient clipping where not all gradients are in memory: as torch does it, from norms taken on the way out."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from lightning_efficient.offload.updates.gradients import GradientStore

__all__ = ["clip_norm_", "clip_value_"]


def clip_norm_(parameters: Iterable[nn.Parameter], max_norm: float, store: GradientStore) -> Tensor:
    """``torch.nn.utils.clip_grad_norm_`` (2-norm), also of gradients that are in ``store``.

    Returns:
        The norm of all gradients together, a scalar.
    """
    parameters = [p for p in parameters if p.grad is not None or store.holds(p)]
    norms = [torch.linalg.vector_norm(p.grad) if p.grad is not None else store.norm(p) for p in parameters]
    if not norms:
        return torch.tensor(0.0)
    total = torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms]))
    factor = torch.clamp(max_norm / (total + 1e-6), max=1.0)  # without asking the device whether it clips
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad.mul_(factor.to(parameter.grad.device))
    store.clip(lambda gradient: gradient.mul_(factor.to(gradient.device)))
    return total


def clip_value_(parameters: Iterable[nn.Parameter], clip_value: float, store: GradientStore) -> None:
    """``torch.nn.utils.clip_grad_value_``, also of gradients that are in ``store``."""
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad.clamp_(-clip_value, clip_value)
    store.clip(lambda gradient: gradient.clamp_(-clip_value, clip_value))

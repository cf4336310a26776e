"""What one training batch says: how much data it holds, and its loss."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from lightning_efficient.monitoring.memory import nested_tensors

__all__ = ["MeanLoss", "batch_amount"]

_TOKEN_DTYPES = (torch.int16, torch.int32, torch.int64)


def batch_amount(batch: object) -> tuple[int, str]:
    """Tokens of a batch of sequences, else samples.

    The first integer tensor of shape ``[batch, sequence]`` (``input_ids``, in most batches) says that there are tokens
    and how many. One-dimensional integers are class labels and bytes are pixels, so that neither counts as tokens.

    Returns:
        The number, and ``tokens`` or ``samples``; samples are the first dimension of the first tensor that has one.
    """
    samples: int | None = None
    for tensor in nested_tensors(batch):
        if tensor.ndim == 2 and tensor.dtype in _TOKEN_DTYPES:
            return tensor.numel(), "tokens"
        if samples is None and tensor.ndim:
            samples = tensor.shape[0]
    return samples or 0, "samples"


class MeanLoss:
    """The mean of the training losses since it was last asked for; summed on the device, so that nothing waits."""

    def __init__(self) -> None:
        self._sum: torch.Tensor | None = None
        self._count = 0

    def add(self, outputs: object) -> None:
        """Take the loss from what ``training_step`` returned: a tensor, or a mapping with ``loss``; else ignore it."""
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if isinstance(loss, torch.Tensor) and loss.numel() == 1:
            loss = loss.detach().float().reshape(())
            self._sum = loss if self._sum is None else self._sum + loss
            self._count += 1

    def take(self) -> float | None:
        """The mean, or None for no losses; reads a number from the device."""
        mean = None if self._sum is None else float(self._sum) / self._count
        self._sum, self._count = None, 0
        return mean

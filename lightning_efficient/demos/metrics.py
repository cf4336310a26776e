"""Bits per byte: the cost of a text under a byte-level model."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric

__all__ = ["IGNORED", "BitsPerByte"]

IGNORED = -100  # a target that is not scored; torch's own default for cross-entropy


class BitsPerByte(Metric):
    """Mean negative log2-likelihood of the scored bytes, over all batches and ranks; 8 is a uniform guess."""

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    nats: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("nats", default=torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("count", default=torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, logits: Tensor, targets: Tensor) -> None:
        """Score ``targets`` ``[n]`` under ``logits`` ``[n, vocabulary]``; targets of -100 are not scored."""
        self.nats += F.cross_entropy(logits.float(), targets, ignore_index=IGNORED, reduction="sum")
        self.count += (targets != IGNORED).sum()

    def compute(self) -> Tensor:
        """Bits per byte of everything since the last reset."""
        return self.nats / (self.count * math.log(2))

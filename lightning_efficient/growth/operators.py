"""How weights and optimizer state of one model become those of another.

A *growth operator* maps layers of the small model to layers of the large one ([Gong et al. 2019], Alg. 1: stacking).
A :class:`Transfer` carries one parameter over and says how its optimizer state follows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

__all__ = ["DEPTH_OPERATORS", "Operator", "Scaled", "Transfer", "interleave", "middle", "stack"]


class Operator(Protocol):
    """Maps a tensor that belongs to the source parameter to one that belongs to the target."""

    @property
    def exact_copy(self) -> bool:
        """Whether weights and every kind of state are copied unchanged."""

    def weight(self, source: Tensor) -> Tensor:
        """The target's weight: a new tensor."""

    def moment(self, source: Tensor, order: int) -> Tensor:
        """A statistic that is homogeneous of degree ``order`` in the gradient (1: mean, 2: square): a new tensor."""


@dataclass(frozen=True)
class Scaled:
    """The weight is copied; the gradient of the target is ``gradient`` times that of the source."""

    gradient: float = 1.0

    @property
    def exact_copy(self) -> bool:
        return self.gradient == 1.0

    def weight(self, source: Tensor) -> Tensor:
        return source.clone()

    def moment(self, source: Tensor, order: int) -> Tensor:
        return source.clone() if self.exact_copy or order == 0 else source * self.gradient**order


@dataclass(frozen=True)
class Transfer:
    """One parameter after a switch, the one before it that it comes from, and how.

    Attributes:
        source: The parameter before the switch.
        target: The parameter after it; the same object where the parameter stays.
        operator: How its statistics follow.
    """

    source: nn.Parameter
    target: nn.Parameter
    operator: Operator

    @property
    def nothing_to_do(self) -> bool:
        return self.source is self.target and self.operator.exact_copy


def stack(old: int, new: int) -> tuple[int, ...]:
    """Layer ``i`` of the deep model comes from layer ``i mod old`` ([Gong et al. 2019])."""
    return tuple(i % old for i in range(new))


def interleave(old: int, new: int) -> tuple[int, ...]:
    """Layer ``i`` comes from layer ``floor(i old / new)``: each layer is followed by its copies."""
    return tuple(i * old // new for i in range(new))


def middle(old: int, new: int) -> tuple[int, ...]:
    """The first and the last layers stay, the block of the middle half is repeated between them ([MIDAS 2024])."""
    block = max(1, old // 2)
    head = (old - block) // 2
    tail = old - block - head
    return (
        *range(head),
        *(head + i % block for i in range(new - head - tail)),
        *range(old - tail, old),
    )


DEPTH_OPERATORS = {"stack": stack, "interleave": interleave, "middle": middle}


def like(parameter: nn.Parameter, data: Tensor) -> nn.Parameter:
    """A parameter with other data and the same ``requires_grad`` and Python attributes."""
    new = nn.Parameter(data, requires_grad=parameter.requires_grad)
    new.__dict__.update(parameter.__dict__)
    return new


def hollow(parameter: nn.Parameter) -> nn.Parameter:
    """A stand-in of the same shape, dtype and device that occupies one element."""
    data = torch.zeros((), dtype=parameter.dtype, device=parameter.device).expand(parameter.shape)
    return like(parameter, data)

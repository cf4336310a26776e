"""The operations that can be in few bits: each its three products, in high bits and of what few bits stand for."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_efficient.precision.formats import Encoded
from lightning_efficient.precision.integers import can_multiply, multiply
from lightning_efficient.precision.probes import Operand, probe_of
from lightning_efficient.precision.signs import Probe

__all__ = ["Convolution", "Kind", "Linear", "MatMul", "Shapes"]

Shapes = tuple[torch.Size, torch.Size]
"""Of the input and of the weight."""

_Sides = Mapping[str, tuple[tuple[int, bool], tuple[int, bool]]]
"""Of each product, the operand whose rows are multiplied, and by those of which one; true: its columns instead."""


class Kind(ABC):
    """An operation of an input, a weight, and perhaps a bias that is added."""

    name: str

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """In floating point."""
        raise NotImplementedError

    @abstractmethod
    def grad_input(self, gradient: Tensor, weight: Tensor, shapes: Shapes) -> Tensor:
        """Likewise."""

    @abstractmethod
    def grad_weight(self, gradient: Tensor, x: Tensor, shapes: Shapes) -> Tensor:
        """Likewise."""

    @abstractmethod
    def grad_bias(self, gradient: Tensor) -> Tensor:
        """The sum of what it was added to."""

    def work(self, x: Tensor, weight: Tensor) -> int:
        """Multiplications of one of the three products."""
        raise NotImplementedError

    def in_integers(
        self, role: str, one: Encoded, other: Encoded, bias: Tensor | None, shapes: Shapes, dtype: torch.dtype
    ) -> Tensor | None:
        """A product by the kernels for integers, of this type; None where there are none for it."""
        return None

    def reads_columns(self, weight: Tensor) -> bool:
        """Whether probes look at columns of operands."""
        return False

    def probe(
        self, role: str, one: Tensor, other: Tensor, bias: Tensor | None, result: Tensor, at: int,
        encoded: Sequence[Encoded],
    ) -> Probe | None:  # fmt: skip
        """How far off some results of a product are, computed again exactly; None: it cannot be told."""
        return None


class MatMul(Kind):
    """``x @ weight``, of matrices or batches of them."""

    name = "matmul"
    _sides: ClassVar[_Sides] = {
        "forward": ((0, False), (1, True)),
        "grad_input": ((0, False), (1, False)),
        "grad_weight": ((1, True), (0, True)),
    }

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        result = torch.matmul(x, weight)
        return result if bias is None else result + bias

    def work(self, x: Tensor, weight: Tensor) -> int:
        columns = self._columns(weight)
        batches = torch.broadcast_shapes(x.shape[:-2], weight.shape[:-2]) if weight.dim() > 2 else x.shape[:-2]
        return batches.numel() * x.shape[-2] * x.shape[-1] * columns if x.dim() > 1 else x.numel() * columns

    def grad_input(self, gradient: Tensor, weight: Tensor, shapes: Shapes) -> Tensor:
        return torch.matmul(gradient, weight.transpose(-1, -2)).sum_to_size(shapes[0])

    def grad_weight(self, gradient: Tensor, x: Tensor, shapes: Shapes) -> Tensor:
        if len(shapes[1]) == 2:  # one product over all rows
            return x.reshape(-1, shapes[0][-1]).t() @ gradient.reshape(-1, gradient.shape[-1])
        return torch.matmul(x.transpose(-1, -2), gradient).sum_to_size(shapes[1])

    def grad_bias(self, gradient: Tensor) -> Tensor:
        return gradient.reshape(-1, gradient.shape[-1]).sum(0)

    def in_integers(
        self, role: str, one: Encoded, other: Encoded, bias: Tensor | None, shapes: Shapes, dtype: torch.dtype
    ) -> Tensor | None:
        if len(shapes[1]) != 2 or one.integers is None or other.integers is None:
            return None
        a, b, exponent = one.integers.codes, other.integers.codes, one.integers.exponent + other.integers.exponent
        matrices = self._matrices(role, a, b)
        if not can_multiply(*matrices):
            return None
        result = multiply(*matrices, exponent, bias, dtype)
        return result if role == "grad_weight" else result.view(*a.shape[:-1], -1)

    def probe(
        self, role: str, one: Tensor, other: Tensor, bias: Tensor | None, result: Tensor, at: int,
        encoded: Sequence[Encoded],
    ) -> Probe | None:  # fmt: skip
        if (result if role == "grad_weight" else other).dim() != 2:
            return None
        kept = [part.integers.kept if part.integers is not None else None for part in encoded]
        (first, across), (second, down) = self._sides[role]
        operands = one, other
        left, right = Operand(operands[first], across, kept[first]), Operand(operands[second], down, kept[second])
        return probe_of(left, right, bias, result, at)

    def reads_columns(self, weight: Tensor) -> bool:
        return weight.dim() == 2

    def _columns(self, weight: Tensor) -> int:
        """Of the result."""
        return weight.shape[-1]

    def _matrices(self, role: str, *operands: Tensor) -> tuple[Tensor, Tensor]:
        """What is multiplied by what, of the operands of a product whose weight is a matrix."""
        (one, across), (other, down) = self._sides[role]
        left, right = (operands[which].reshape(-1, operands[which].shape[-1]) for which in (one, other))
        return left.t() if across else left, right if down else right.t()


class Linear(MatMul):
    """``x @ weight.T + bias``."""

    name = "linear"
    _sides: ClassVar[_Sides] = {
        "forward": ((0, False), (1, False)),
        "grad_input": ((0, False), (1, True)),
        "grad_weight": ((0, True), (1, True)),
    }

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)

    def grad_input(self, gradient: Tensor, weight: Tensor, shapes: Shapes) -> Tensor:
        return gradient @ weight

    def grad_weight(self, gradient: Tensor, x: Tensor, shapes: Shapes) -> Tensor:
        return gradient.reshape(-1, gradient.shape[-1]).t() @ x.reshape(-1, x.shape[-1])

    def _columns(self, weight: Tensor) -> int:
        return weight.shape[0]


@dataclass(frozen=True)
class Convolution(Kind):
    """Of one, two or three dimensions, also transposed.

    Attributes:
        arguments: stride, padding, dilation, transposed, output padding, groups.
    """

    arguments: tuple[Any, ...]
    name: str = "convolution"

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return torch.convolution(x, weight, bias, *self.arguments)

    def grad_input(self, gradient: Tensor, weight: Tensor, shapes: Shapes) -> Tensor:
        return self._backward(gradient, weight.new_empty(shapes[0]), weight, 0)

    def grad_weight(self, gradient: Tensor, x: Tensor, shapes: Shapes) -> Tensor:
        return self._backward(gradient, x, x.new_empty(shapes[1]), 1)

    def work(self, x: Tensor, weight: Tensor) -> int:
        stride, padding, dilation, transposed, _, _ = self.arguments
        places = x.shape[2:].numel()  # that a kernel is laid on
        if not transposed:
            sides = zip(x.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True)
            places = math.prod((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in sides)
        return x.shape[0] * places * weight.numel()

    def grad_bias(self, gradient: Tensor) -> Tensor:
        return gradient.sum([0, *range(2, gradient.dim())])

    def _backward(self, gradient: Tensor, x: Tensor, weight: Tensor, which: int) -> Tensor:
        mask = [number == which for number in range(3)]
        found = torch.ops.aten.convolution_backward(gradient, x, weight, None, *self.arguments, mask)
        return found[which]


def sized(value: int | Sequence[int], dimensions: int) -> list[int]:
    """A number for each dimension."""
    return [value] * dimensions if isinstance(value, int) else list(value)

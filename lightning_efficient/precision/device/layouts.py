"""A product of two tensors as one of matrices: ``a @ b.T``, in codes and in high bits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_efficient.precision.device.codes import Codes
from lightning_efficient.precision.device.forms import INT8
from lightning_efficient.precision.device.rows import FLAG
from lightning_efficient.precision.integers import LARGEST
from lightning_efficient.precision.kinds import Kind, Linear
from lightning_efficient.precision.nodes import Role

__all__ = ["Product", "layout", "most_terms"]

Layout = tuple[tuple[int, bool], tuple[int, bool]]
"""For each side: which operand it is, and whether the other way round."""
_LINEAR: dict[Role, Layout] = {
    "forward": ((0, False), (1, False)), "grad_input": ((0, False), (1, True)), "grad_weight": ((0, True), (1, True)),
}  # fmt: skip
_MATMUL: dict[Role, Layout] = {
    "forward": ((0, False), (1, True)), "grad_input": ((0, False), (1, False)), "grad_weight": ((1, True), (0, True)),
}  # fmt: skip


def layout(kind: Kind, role: Role) -> Layout:
    """Of a linear layer's products, or of those of ``x @ weight``."""
    return (_LINEAR if isinstance(kind, Linear) else _MATMUL)[role]


def most_terms(low: str) -> int | None:
    """Of a sum that cannot overflow, in the type in which it is summed."""
    return ((1 << 31) - 1) // (LARGEST * LARGEST) if low == "int8" else None


@dataclass(frozen=True)
class Product:
    """One of an operation's products, yet to be computed.

    Attributes:
        role: Which.
        tensors: Its operands, of two dimensions.
        sides: See :data:`Layout`.
        bias: ``[N]``, of the forward.
        dtype: Of the result.
        high_bits: Type of many bits.
        operations: The kernels, or the eager code.
        measured: What is measured of all tensors of the step.
        encoded: Makes the operands' codes.
        in_high: Computes it in high bits at once, by torch, in whatever shape.
    """

    role: Role
    tensors: tuple[Tensor, Tensor]
    sides: Layout
    bias: Tensor | None
    dtype: torch.dtype
    high_bits: torch.dtype
    operations: Any
    measured: Callable[[], Tensor]
    encoded: Callable[[], tuple[Codes, Codes]]
    in_high: Callable[[], Tensor]

    @property
    def a(self) -> Tensor:
        """``[M, K]``."""
        return self._side(0)

    @property
    def b(self) -> Tensor:
        """``[N, K]``."""
        return self._side(1)

    @property
    def rows(self) -> int:
        """M."""
        return self.a.shape[0]

    def high(self) -> Tensor:
        """The result, by torch."""
        return self.in_high().to(self.dtype).reshape(self.rows, self.b.shape[0]).contiguous()

    def low(self, one: Codes, other: Codes) -> Tensor:
        """The result of codes."""
        codes = one, other
        a, b = ((codes[index].columns if flipped else codes[index].rows, codes[index]) for index, flipped in self.sides)
        shape = self.rows, self.b.shape[0]
        if one.form is INT8:
            result = a[0].new_empty(shape, dtype=self.dtype)
            sums = torch._int_mm(a[0], b[0].t())
            self.operations.finish(sums, result, self.bias, self.measured(), one.slot, other.slot)
            return result
        fast = self.role == "forward"  # sums of less digits, which gradients need
        found = torch._scaled_mm(
            a[0], b[0].t(), scale_a=a[1].scale, scale_b=b[1].scale, out_dtype=self.dtype, use_fast_accum=fast
        )
        found = found[: shape[0], : shape[1]].contiguous()
        return found if self.bias is None else found.add_(self.bias)

    def again(self, result: Tensor, table: Tensor, row: int, column: int = FLAG) -> None:
        """In high bits over ``result``, if the table says so."""
        self.operations.again(result, self.a, self.b, self.bias, self.high_bits, table, row, column)

    def _side(self, number: int) -> Tensor:
        index, flipped = self.sides[number]
        return self.tensors[index].t() if flipped else self.tensors[index]

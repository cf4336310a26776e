"""One call of an operation on a device, whose backward is to come: its three products as matrices."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_efficient.core.torch_internals import in_backward, innermost_saved_tensors_hooks
from lightning_efficient.precision.device.codes import Codes
from lightning_efficient.precision.device.engine import DeviceEngine
from lightning_efficient.precision.device.layouts import Product, layout, most_terms
from lightning_efficient.precision.kinds import Kind, MatMul
from lightning_efficient.precision.nodes import Node, Role

__all__ = ["DeviceCall", "has_kernels"]

_TYPES = (torch.float32, torch.bfloat16, torch.float16)


def has_kernels(kind: Kind, x: Tensor, weight: Tensor) -> bool:
    """Whether a GPU can multiply codes for this operation: by one matrix, not by a batch of them, nor a convolution."""
    return isinstance(kind, MatMul) and weight.dim() == 2 and {x.dtype, weight.dtype} <= {*_TYPES}


@dataclass
class DeviceCall:
    """Of an operation for which :func:`has_kernels`; what ``guarded_call.py`` has for a CPU."""

    engine: DeviceEngine
    node: Node
    kind: Kind
    input_codes: Codes | None = None

    @property
    def left(self) -> Codes | None:
        """What forward leaves for backward."""
        return self.input_codes

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None, result_type: torch.dtype) -> Tensor:
        """The result, in the type that the operation has."""
        engine, high = self.engine, self.engine.host.high
        if not in_backward():
            self.node.begin(engine.host.batch)
            self.node.work = self.kind.work(x, weight)

        def in_high() -> Tensor:
            parts = [part.to(high) if part is not None else None for part in (x, weight, bias)]
            return self.kind.forward(*parts)  # type: ignore[arg-type]

        def encoded() -> tuple[Codes, Codes]:
            self.input_codes = engine.codes.of(x, "input")
            return self.input_codes, engine.codes.of(weight, "weight")

        product = self._product("forward", (x, weight), bias, result_type, encoded, in_high)
        result = (engine.recompute if in_backward() else engine.compute)(self.node, product)
        if innermost_saved_tensors_hooks() is not None:  # what is saved may be kept elsewhere, or in fewer bits
            self.input_codes = None
        return result.view(*x.shape[:-1], -1)

    def backward(
        self, x: Tensor, weight: Tensor, bias: bool, gradient: Tensor, needed: tuple[bool, bool, bool]
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of the input, the weight and the bias."""
        gradient, shapes, high = gradient.contiguous(), (x.shape, weight.shape), self.engine.host.high
        codes, kept = self.engine.codes, list[Codes]()

        def of_gradient() -> Codes:
            if not kept:
                kept.append(codes.of(gradient, "gradient"))
            return kept[0]

        def of_input() -> Codes:
            if self.input_codes is None or not codes.is_there(self.input_codes):
                self.input_codes = codes.of(x, "input")
            return self.input_codes

        found: list[Tensor | None] = [None, None, None]
        if needed[0]:
            product = self._product(
                "grad_input", (gradient, weight), None, x.dtype, lambda: (of_gradient(), codes.of(weight, "weight")),
                lambda: self.kind.grad_input(gradient.to(high), weight.to(high), shapes),
            )  # fmt: skip
            found[0] = self.engine.compute(self.node, product).view(x.shape)
        if needed[1]:
            product = self._product(
                "grad_weight", (gradient, x), None, weight.dtype, lambda: (of_gradient(), of_input()),
                lambda: self.kind.grad_weight(gradient.to(high), x.to(high), shapes),
            )  # fmt: skip
            found[1] = self.engine.compute(self.node, product)
        if bias and needed[2]:
            found[2] = self.kind.grad_bias(gradient)
        self.input_codes = None  # as long as a loss is held, so is this
        return found[0], found[1], found[2]

    def _product(
        self, role: Role, operands: tuple[Tensor, Tensor], bias: Tensor | None, dtype: torch.dtype,
        encoded: Callable[[], tuple[Codes, Codes]], in_high: Callable[[], Tensor],
    ) -> Product:  # fmt: skip
        one, other = (tensor.detach().reshape(-1, tensor.shape[-1]) for tensor in operands)
        engine = self.engine
        product = Product(
            role, (one, other), layout(self.kind, role), bias.detach().contiguous() if bias is not None else None,
            dtype, engine.host.high, engine.operations, lambda: engine.codes.measured, encoded, in_high,
        )  # fmt: skip
        most = most_terms(engine.host.low.name)
        if most is not None and product.a.shape[1] > most:
            self.node.products[role].low_pays = False
            self.node.why_high = f"a sum has more than {most} terms"
        return product

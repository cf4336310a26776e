"""One call of an operation, whose backward is to come: its three products, each of which the engine decides.

(For a GPU there is :mod:`lightning_efficient.precision.device.call`.)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_efficient.core.torch_internals import (
    in_backward,
    innermost_saved_tensors_hooks,
    without_torch_function,
)
from lightning_efficient.precision.device.call import DeviceCall, has_kernels
from lightning_efficient.precision.engine import Engine
from lightning_efficient.precision.formats import Encoded
from lightning_efficient.precision.kinds import Kind, Shapes
from lightning_efficient.precision.nodes import Node, Role
from lightning_efficient.precision.signs import Probe

__all__ = ["Call", "call_of", "product"]


@dataclass
class Call:
    """One call of an operation, whose backward is to come."""

    engine: Engine
    node: Node
    kind: Kind
    input_low: Encoded | None = None

    @property
    def left(self) -> Encoded | None:
        """What forward leaves for backward."""
        return self.input_low

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None, result_type: torch.dtype) -> Tensor:
        engine, kind, shapes = self.engine, self.kind, (x.shape, weight.shape)
        again = in_backward()  # a part that is computed again in backward, as its first time
        if not again:
            self.node.begin(engine.batch)
            self.node.work = kind.work(x, weight)
            if x.device.type != "cpu":
                self.node.learning.untimed()

        def operands() -> tuple[Encoded, Encoded]:
            self.input_low = self._encoded(x, "input", weight)
            return self.input_low, self._encoded(weight, "weight", weight)

        def low(one: Encoded, other: Encoded) -> Tensor:
            added = bias.float().contiguous() if bias is not None else None
            found = kind.in_integers("forward", one, other, added, shapes, result_type)
            if found is None:
                a, b = _alike(one.decoded(), other.decoded())
                found = kind.forward(a, b, bias.to(a.dtype) if bias is not None else None)
            return found.to(result_type)

        def high(dtype: torch.dtype) -> Tensor:
            parts = [part.to(dtype) if part is not None else None for part in (x, weight, bias)]
            return kind.forward(*parts).to(result_type)  # type: ignore[arg-type]

        def probe(result: Tensor, *encoded: Encoded) -> Probe | None:
            return kind.probe("forward", x, weight, bias, result, engine.place(), encoded)

        if again:
            result = low(*operands()) if self.node.last_low else high(engine.high)
        else:
            before = self.node.products["forward"].status.low
            result = engine.compute(self.node, "forward", operands, low, high, probe)
            self.node.was_computed(engine.steps, low=self.node.products["forward"].status.low != before)
        if innermost_saved_tensors_hooks() is not None:  # what is saved may be kept elsewhere, or in fewer bits
            self.input_low = None
        return result

    def backward(
        self, x: Tensor, weight: Tensor, bias: bool, gradient: Tensor, needed: tuple[bool, bool, bool]
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        gradient = gradient.contiguous()
        shapes = x.shape, weight.shape
        kept: list[Encoded] = []

        def in_low() -> Encoded:
            if not kept:
                kept.append(self._encoded(gradient, "gradient", weight))
            return kept[0]

        def of_input() -> Encoded:
            if self.input_low is None:
                self.input_low = self._encoded(x, "input", weight)
            return self.input_low

        found: list[Tensor | None] = [None, None, None]
        if needed[0]:
            found[0] = self._gradient("grad_input", in_low, lambda: self._encoded(weight, "weight", weight), gradient,
                                      weight, shapes, x.dtype)  # fmt: skip
        if needed[1]:
            found[1] = self._gradient("grad_weight", in_low, of_input, gradient, x, shapes, weight.dtype)
        if bias and needed[2]:
            found[2] = self.kind.grad_bias(gradient)
        self.input_low = None  # as long as a loss is held, so is this
        return found[0], found[1], found[2]

    def _gradient(
        self, role: Role, gradient_low: Callable[[], Encoded], other_low: Callable[[], Encoded], gradient: Tensor,
        other: Tensor, shapes: Shapes, dtype: torch.dtype,
    ) -> Tensor:  # fmt: skip
        kind = self.kind
        function = kind.grad_input if role == "grad_input" else kind.grad_weight

        def low(one: Encoded, two: Encoded) -> Tensor:
            found = kind.in_integers(role, one, two, None, shapes, dtype)
            if found is not None:
                return found
            if one.values is None or two.values is None or not one.shift:
                return function(*_alike(one.decoded(), two.decoded()), shapes)
            return function(*_alike(one.values, two.decoded()), shapes).float().mul_(math.ldexp(1.0, -one.shift))

        def high(dtype: torch.dtype) -> Tensor:
            return function(gradient.to(dtype), other.to(dtype), shapes)

        return self.engine.compute(
            self.node, role, lambda: (gradient_low(), other_low()), low, high,
            lambda result, *encoded: kind.probe(role, gradient, other, None, result, self.engine.place(), encoded),
        ).to(dtype)  # fmt: skip

    def _encoded(self, tensor: Tensor, which: str, weight: Tensor) -> Encoded:
        """With the exponent that it had the last time, if that is still right."""
        exponents = self.node.last_exponents
        found = self.engine.encoded(tensor, which, exponents.get(which), columns=self.kind.reads_columns(weight))
        exponents[which] = found.measured.exponent
        return found


def _alike(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    kind = torch.promote_types(one.dtype, other.dtype)
    return one.to(kind), other.to(kind)


def call_of(engine: Engine, node: Node, kind: Kind, x: Tensor, weight: Tensor) -> Call | DeviceCall:
    """Who computes an operation: where the tensors' device has kernels, someone who does not wait for it."""
    other = engine.on_device(x.device)
    if other is None:
        return Call(engine, node, kind)
    if has_kernels(kind, x, weight):
        return DeviceCall(other, node, kind)
    node.stay_high("no kernels in few bits for it on this device")
    return Call(engine, node, kind)


class _Product(torch.autograd.Function):
    """Three products, each guarded."""

    @staticmethod
    def forward(ctx: Any, call: Call | DeviceCall, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.call, ctx.bias = call, bias.dtype if bias is not None else None
        ctx.save_for_backward(x, weight)
        kind = x.device.type
        result_type = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        with without_torch_function(), torch.autocast(kind, enabled=False):
            # data: torch forbids to change views in place that were made here, as an activation may want to
            return call.forward(x, weight, bias, result_type).data

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        of_input, of_weight = ctx.needs_input_grad[1:3]
        return _gradients(ctx, (x, weight), gradient, *[weight] * of_input, *[x] * of_weight)


@once_differentiable
def _gradients(ctx: Any, operands: tuple[Tensor, Tensor], gradient: Tensor, *of: Tensor) -> tuple[Tensor | None, ...]:
    """That of the input depends on the weight, and the other way round: ``of`` is what torch has to refuse for."""
    with without_torch_function(), torch.autocast(operands[0].device.type, enabled=False):
        found = ctx.call.backward(*operands, ctx.bias is not None, gradient, ctx.needs_input_grad[1:])
    bias = found[2].to(ctx.bias) if found[2] is not None else None
    return None, found[0], found[1], bias


def product(engine: Engine, node: Node, kind: Kind, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """An operation in few bits wherever that is healthy; differentiable once."""
    return _Product.apply(call_of(engine, node, kind, x, weight), x, weight, bias)

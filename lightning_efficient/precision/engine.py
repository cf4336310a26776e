"""Products in few bits, guarded: a sign of failure, and the product is computed again in high bits, there and then.

On a CPU the signs are looked at when a product is computed, so nothing has to be undone. (What comes after it is
decided by :mod:`lightning_efficient.precision.status`.)
"""

from __future__ import annotations

import math
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_efficient.core.random import mix
from lightning_efficient.core.torch_internals import (
    in_backward,
    innermost_saved_tensors_hooks,
    tensor_version,
    without_torch_function,
)
from lightning_efficient.precision.device import kernels_on
from lightning_efficient.precision.device.call import DeviceCall, has_kernels
from lightning_efficient.precision.device.codes import dying
from lightning_efficient.precision.device.engine import DeviceEngine
from lightning_efficient.precision.device.gate import Gate
from lightning_efficient.precision.formats import AtRandom, Encoded, Format, is_at_random
from lightning_efficient.precision.kinds import Kind, Shapes
from lightning_efficient.precision.nodes import Node, Role
from lightning_efficient.precision.probes import measured_result
from lightning_efficient.precision.product_times import ProductTimes
from lightning_efficient.precision.retry import Retry
from lightning_efficient.precision.signs import Probe
from lightning_efficient.precision.status import Run

__all__ = ["Call", "Engine", "Retry", "product"]


class Engine:
    """Decides for each product, and computes it.

    Attributes:
        learning: All in high bits; what is seen is healthy.
        force_high: All in high bits; nothing is looked at.
        run: Where the pass through the graph stands.
        retries: Since they were taken.
        low_work: Multiplications in low bits.
        work: All.
        steps: That have begun.
        times: What few bits cost and saved on the host.
        on_devices: Engines for tensors there; None: there are no kernels, and each product is waited for.

    Args:
        low: Format of few bits.
        high: Type of many bits.
        stochastic: What is rounded up or down at random; see :data:`~lightning_efficient.precision.formats.AtRandom`.
        protect: Whether signs of failure are looked for.
        seed: Of the rounding.
        adaptive: Whether products of tensors for which few bits are not enough are in bfloat16 for a while.
        timed: Whether devices time their products, and leave those alone for which few bits take longer.
    """

    def __init__(
        self, low: Format, high: torch.dtype, *, stochastic: AtRandom, protect: bool, seed: int, adaptive: bool = False,
        timed: bool = True,
    ) -> None:  # fmt: skip
        self.low, self.high, self.adaptive, self._timed = low, high, adaptive, timed
        self.learning = self.force_high = False
        self.run = Run()
        self.retries: list[Retry] = []
        self.low_work = self.work = 0
        self.batch = 0
        self._stochastic, self._protect, self._seed = stochastic, protect, seed
        self._count = 0  # of products, for noise and for which results are computed again exactly
        self._weights: dict[int, tuple[weakref.ref[Tensor], int, Encoded]] = {}
        self._last: tuple[weakref.ref[Tensor], int, Encoded] | None = None
        self.on_devices: dict[torch.device, DeviceEngine | None] = {}
        self.steps = 0
        self.times = ProductTimes()

    def begin(self, seed: int, batch: int = 0) -> None:
        """A step begins: weights may have changed."""
        self._seed, self._count, self.batch = seed, 0, batch
        self.steps += 1
        self._weights.clear()
        self._last = None
        for other in self.on_devices.values():
            if other is not None:
                other.begin(seed)

    def weights_changed(self) -> None:
        """An optimizer has stepped within a step; some do so without a trace (``parameter.data``)."""
        self._weights.clear()
        for other in self.on_devices.values():
            if other is not None:
                other.codes.weights_changed()

    def call(self, node: Node, kind: Kind, x: Tensor, weight: Tensor) -> Call | DeviceCall:
        """Who computes an operation: where the tensors' device has kernels, someone who does not wait for it."""
        if x.device not in self.on_devices:
            self.on_devices[x.device] = self._on(x.device)
        other = self.on_devices[x.device]
        if other is None:
            return Call(self, node, kind)
        if has_kernels(kind, x, weight):
            return DeviceCall(other, node, kind)
        node.stay_high("no kernels in few bits for it on this device")
        return Call(self, node, kind)

    def _on(self, device: torch.device) -> DeviceEngine | None:
        kernels = kernels_on(device, self.low)
        if kernels is None or self.adaptive:
            return None
        return DeviceEngine(
            self, device, kernels, stochastic=self._stochastic, protect=self._protect, seed=self._seed,
            gate=Gate() if self._timed else None,
        )  # fmt: skip

    def refresh(self, *, wait: bool = False) -> None:
        """Bring all nodes up to date; ``wait``: with what devices have done until now, not until a step ago."""
        for other in self.on_devices.values():
            if other is not None:
                other.refresh(wait=wait)

    def put_back(self) -> None:
        """Nodes are other than they were: so they are on devices."""
        for other in self.on_devices.values():
            if other is not None:
                other.put_back()

    def encoded(self, tensor: Tensor, which: str, guess: int | None = None) -> Encoded:
        """``tensor`` in few bits; made once for all products of a step that it is in."""
        if which == "weight":
            known = self._weights.get(id(tensor))
        elif which == "input":
            known = self._last
        else:
            known = None
        if known is not None and known[0]() is tensor and known[1] == tensor_version(tensor):
            return known[2]
        found = self._encode(tensor, which, guess)
        if tensor.is_inference():  # whether it was changed in place cannot be told
            return found
        if which == "weight":
            self._weights[id(tensor)] = dying(tensor, self._weights), tensor_version(tensor), found
        elif which == "input":
            self._last = weakref.ref(tensor), tensor_version(tensor), found
        return found

    def _encode(self, tensor: Tensor, which: str, guess: int | None) -> Encoded:
        self._count += 1
        key = mix(self._seed, self._count) if is_at_random(self._stochastic, which) else None
        return self.low.encode(tensor.detach(), gradient=which == "gradient", key=key, guess=guess)

    def compute(
        self,
        node: Node,
        role: Role,
        operands: Callable[[], tuple[Encoded, Encoded]],
        low: Callable[[Encoded, Encoded], Tensor],
        high: Callable[[torch.dtype], Tensor],
        probe: Callable[[Tensor], Probe | None],
    ) -> Tensor:
        """One product."""
        self.work += node.work
        if self.force_high or node.stays_high(role):
            return high(self.high)
        began, known = time.perf_counter(), node.products[role]
        status, run = known.status, self.run
        if self.learning or not node.learning.done:
            result = self._learn(node, role, operands, low, high, probe)
            status.computed_high(run)
            return result
        # where samples are scaled apart, so are their gradients, the other way round, and these do not show it
        doubted = role != "forward" and node.doubted == self.steps
        if doubted or not status.allows_low(run):
            self._doubt(node, role)
            status.computed_high(run)
            return high(self.high)
        if self.adaptive and node.needs_more(role, self.batch):
            status.computed_high(run)
            return high(torch.bfloat16)
        one, other = operands()
        if self.adaptive and node.look(role, one.measured, other.measured, self.batch):
            status.computed_high(run)
            return high(torch.bfloat16)
        reason = self._sign(node, role, one, other)
        if not reason:
            result = low(one, other)
            if self._protect:
                reason = node.sign_of_result(role, measured_result(result), probe(result))
            if not reason:
                status.computed_low()
                self.low_work += node.work
                self.times.low(known, time.perf_counter() - began)
                return result
        self.times.failed(time.perf_counter() - began)
        result = high(self.high)
        status.failed(reason, run)
        self._doubt(node, role)
        self.retries.append(Retry(node.name, role, reason))
        return result

    def _doubt(self, node: Node, role: Role) -> None:
        if role == "forward":
            node.doubted = self.steps

    def _learn(
        self,
        node: Node,
        role: Role,
        operands: Callable[[], tuple[Encoded, Encoded]],
        low: Callable[[Encoded, Encoded], Tensor],
        high: Callable[[torch.dtype], Tensor],
        probe: Callable[[Tensor], Probe | None],
    ) -> Tensor:
        """One product in high bits, whose numbers are taken for healthy."""
        start = time.perf_counter()
        one, other = operands()
        encoded = time.perf_counter()
        result = high(self.high)
        computed = time.perf_counter()
        if not (one.measured.finite and other.measured.finite):
            return result
        found = probe(low(one, other))
        node.learn(role, one.measured, other.measured, measured_result(result).exponent, found)
        took = encoded - start + time.perf_counter() - computed
        node.learning.took(took, computed - encoded)
        self.times.learnt(node.products[role], computed - encoded, took)
        return result

    def place(self) -> int:
        """Where some results are computed again exactly: elsewhere in each batch."""
        self._count += 1
        return self._count + self.batch

    def _sign(self, node: Node, role: Role, one: Encoded, other: Encoded) -> str:
        if self._protect:
            return node.sign_of_operands(role, one.measured, other.measured)
        return "" if one.measured.finite and other.measured.finite else "values that are not finite"


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
            self.input_low = self._encoded(x, "input")
            return self.input_low, self._encoded(weight, "weight")

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

        def probe(result: Tensor) -> Probe | None:
            return kind.probe("forward", x, weight, bias, result, engine.place())

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
                kept.append(self._encoded(gradient, "gradient"))
            return kept[0]

        def of_input() -> Encoded:
            if self.input_low is None:
                self.input_low = self._encoded(x, "input")
            return self.input_low

        found: list[Tensor | None] = [None, None, None]
        if needed[0]:
            found[0] = self._gradient("grad_input", in_low, lambda: self._encoded(weight, "weight"), gradient,
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
            lambda result: kind.probe(role, gradient, other, None, result, self.engine.place()),
        ).to(dtype)  # fmt: skip

    def _encoded(self, tensor: Tensor, which: str) -> Encoded:
        """With the exponent that it had the last time, if that is still right."""
        exponents = self.node.last_exponents
        encode = self.engine._encode if which == "gradient" else self.engine.encoded
        found = encode(tensor, which, exponents.get(which))
        exponents[which] = found.measured.exponent
        return found


def _alike(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    kind = torch.promote_types(one.dtype, other.dtype)
    return one.to(kind), other.to(kind)


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
    return _Product.apply(engine.call(node, kind, x, weight), x, weight, bias)

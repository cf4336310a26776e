"""Products in few bits, guarded: a sign of failure, and the product is computed again in high bits, there and then.

On a CPU the signs are looked at when a product is computed, so nothing has to be undone. (What comes after it is
decided by :mod:`lightning_efficient.precision.status`; which products an operation is made of, by
:mod:`lightning_efficient.precision.guarded_call`.)
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable

import torch
from torch import Tensor

from lightning_efficient.core.random import mix
from lightning_efficient.core.torch_internals import tensor_version
from lightning_efficient.precision.device import kernels_on
from lightning_efficient.precision.device.codes import dying
from lightning_efficient.precision.device.engine import DeviceEngine
from lightning_efficient.precision.device.gate import Gate
from lightning_efficient.precision.formats import AtRandom, Encoded, Format, is_at_random
from lightning_efficient.precision.nodes import Node, Role
from lightning_efficient.precision.probes import measured_result
from lightning_efficient.precision.product_times import ProductTimes
from lightning_efficient.precision.retry import Retry
from lightning_efficient.precision.signs import Probe
from lightning_efficient.precision.status import Run

__all__ = ["Engine", "Retry"]


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

    def on_device(self, device: torch.device) -> DeviceEngine | None:
        """The engine for tensors there; None: there is none, and each product is waited for."""
        if device not in self.on_devices:
            self.on_devices[device] = self._on(device)
        return self.on_devices[device]

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

    def encoded(self, tensor: Tensor, which: str, guess: int | None = None, *, columns: bool = False) -> Encoded:
        """``tensor`` in few bits; made once for all products of a step that it is in.

        Args:
            tensor: An operand.
            which: ``input``, ``weight`` or ``gradient``.
            guess: What its exponent may well be.
            columns: Whether probes will look at its columns.
        """
        if which == "weight":
            known = self._weights.get(id(tensor))
        elif which == "input":
            known = self._last
        else:
            known = None
        if known is not None and known[0]() is tensor and known[1] == tensor_version(tensor):
            return known[2]
        found = self._encode(tensor, which, guess, columns)
        if tensor.is_inference():  # whether it was changed in place cannot be told
            return found
        if which == "weight":
            self._weights[id(tensor)] = dying(tensor, self._weights), tensor_version(tensor), found
        elif which == "input":
            self._last = weakref.ref(tensor), tensor_version(tensor), found
        return found

    def _encode(self, tensor: Tensor, which: str, guess: int | None, columns: bool) -> Encoded:
        self._count += 1
        key = mix(self._seed, self._count) if is_at_random(self._stochastic, which) else None
        at = self._count + self.batch if columns and self._protect else None
        return self.low.encode(tensor.detach(), gradient=which == "gradient", key=key, guess=guess, at=at)

    def compute(
        self,
        node: Node,
        role: Role,
        operands: Callable[[], tuple[Encoded, Encoded]],
        low: Callable[[Encoded, Encoded], Tensor],
        high: Callable[[torch.dtype], Tensor],
        probe: Callable[[Tensor, Encoded, Encoded], Probe | None],
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
                reason = node.sign_of_result(role, measured_result(result), probe(result, one, other))
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
        probe: Callable[[Tensor, Encoded, Encoded], Probe | None],
    ) -> Tensor:
        """One product in high bits, whose numbers are taken for healthy."""
        start = time.perf_counter()
        one, other = operands()
        encoded = time.perf_counter()
        result = high(self.high)
        computed = time.perf_counter()
        if not (one.measured.finite and other.measured.finite):
            return result
        found = probe(low(one, other), one, other)
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

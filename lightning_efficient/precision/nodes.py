"""What is known of the operations of a network: of each a node, with its three products and its tensors."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any, Literal

from lightning_efficient.precision.bits import AdaptiveBits
from lightning_efficient.precision.learning import Learning
from lightning_efficient.precision.signs import (
    ERROR_MARGIN,
    HISTORY,
    OF_GRADIENTS,
    Limits,
    Measured,
    Probe,
    Tracker,
    aligned,
    apart,
)
from lightning_efficient.precision.status import ReturnPolicy, Status

__all__ = ["OPERANDS", "ROLES", "Node", "Product", "Role", "unmeasured"]

Role = Literal["forward", "grad_input", "grad_weight"]
ROLES: tuple[Role, ...] = ("forward", "grad_input", "grad_weight")
OPERANDS: Mapping[Role, tuple[str, str]] = {
    "forward": ("input", "weight"), "grad_input": ("gradient", "weight"), "grad_weight": ("gradient", "input"),
}  # fmt: skip
"""Of each product, by name."""

_OFF = {"forward": 0.25, "grad_input": 1.0, "grad_weight": 1.0}
"""What a probe may be off by, at least. Gradients: noise as large as they are, which on average is none."""

_LEAST_APART = 7.0  # bits of a code: what the difference of exponents may be off by, at least
_APART_MARGIN = 3.0


@dataclass
class Product:
    """One of the three products of a node.

    Attributes:
        status: When it is in low bits.
        result: Exponents of what it gives.
        distances: Between the exponents of its operands, the last ones.
        allowed: By how much that may be off.
        sizes: Norms of the last blocks that were computed exactly.
        error: How far off a block may be, over the largest of these norms: one alone may happen to be next to nothing.
        low_pays: On a GPU, whether low bits take less time; None: not known yet.
        known_wait: On a GPU: for how many products the host will leave out the low one, without asking the device.
        high_times: Seconds that it took in high bits while it learns, on the host, the last ones; of this process, and
            so in no checkpoint.
        high_time: Their median when it had learnt; 0: it has not, in this process.
    """

    status: Status
    result: Tracker = field(default_factory=Tracker)
    distances: deque[int] = field(default_factory=lambda: deque(maxlen=HISTORY))
    allowed: float = _LEAST_APART
    sizes: deque[float] = field(default_factory=lambda: deque(maxlen=HISTORY))
    error: float = _OFF["forward"]
    low_pays: bool | None = None
    known_wait: int = 0
    high_times: deque[float] = field(default_factory=lambda: deque(maxlen=HISTORY))
    high_time: float = 0.0

    @property
    def usual(self) -> float:
        """Distance of the operands' exponents."""
        return statistics.median(self.distances) if self.distances else 0.0

    def off(self, probe: Probe | None) -> float | None:
        """The relative error of a block; None if it cannot be told."""
        if probe is None:
            return None
        size = max(probe.size, *self.sizes, 0.0)
        return probe.off / size if size else None

    def saw(self, probe: Probe | None) -> None:
        """A block of a healthy product."""
        if probe is not None and 0 < probe.size < math.inf:
            self.sizes.append(probe.size)

    def agreed(self) -> list[float]:
        """What ranks agree on: the largest number of each."""
        return [
            *self.status.agreed(), *self.result.agreed(), *aligned(self.distances), *aligned(self.sizes), self.allowed,
            self.error,
            -1.0 if self.low_pays is None else float(not self.low_pays), self.known_wait,
        ]  # fmt: skip

    def agree(self, values: list[float]) -> None:
        """What :meth:`agreed` returned, the largest of all ranks."""
        status, result, distances, sizes, (self.allowed, self.error, slow, wait) = _split(
            values, len(self.status.agreed()), len(self.result.agreed()), HISTORY, HISTORY
        )
        self.sizes = deque((value for value in sizes if value > -math.inf), maxlen=HISTORY)
        self.status.agree(status)
        self.result.agree(result)
        self.distances = deque((int(value) for value in distances if value > -math.inf), maxlen=HISTORY)
        self.low_pays, self.known_wait = None if slow < 0 else not slow, int(wait)

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers and text."""
        return {
            "status": self.status.state_dict(), "result": self.result.state_dict(), "distances": list(self.distances),
            "sizes": list(self.sizes), "allowed": self.allowed, "error": self.error, "low_pays": self.low_pays,
            "known_wait": self.known_wait,
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """What :meth:`state_dict` returned."""
        self.status.load_state_dict(state["status"])
        self.result.load_state_dict(state["result"])
        self.distances = deque(state["distances"], maxlen=HISTORY)
        self.sizes = deque(state["sizes"], maxlen=HISTORY)
        self.allowed, self.error, self.low_pays = state["allowed"], state["error"], state["low_pays"]
        self.known_wait = state["known_wait"]


class Node:
    """An operation of the network.

    Attributes:
        name: Of its weight's module, or of the operation and its place among those without a weight.
        kind: Of the operation.
        policy: When low bits are allowed again.
        learns: Whether limits are learnt, rather than given.
        products: By role.
        tensors: Trackers by operand: input, weight, gradient.
        bits: By operand, whether few are enough; empty: nobody asks.
        learning: How long that is, and whether low bits pay.
        last_low: Whether all forward products of the last step were in low bits; so is what is computed again then.
        doubted: The last step in which a forward product showed a sign of failure, or waited because of one.
        work: Multiplications of one of its products, the last time.
        last_exponents: By operand, whether it was healthy or not: a guess for the next, which is no state.
        why_high: Why products stay in high bits for which ``low_pays`` is False; empty: that is all.

    Args:
        policy: When low bits are allowed again.
        limits: Given, rather than learnt.
        learning: None: nothing is learnt.
        adaptive: Whether the error of few bits says which tensors need more, rather than that something has failed.
    """

    def __init__(
        self,
        name: str,
        kind: str,
        policy: ReturnPolicy,
        limits: Limits | None = None,
        learning: Learning | None = None,
        *,
        adaptive: bool = False,
    ) -> None:
        self.name, self.kind, self.policy = name, kind, policy
        self.products = {role: Product(Status(policy), error=_OFF[role]) for role in ROLES}
        self.learns = limits is None
        self.tensors = {which: Tracker(limits) for which in ("input", "weight")}
        self.tensors["gradient"] = Tracker(limits or OF_GRADIENTS)
        self.bits = {which: AdaptiveBits() for which in self.tensors} if adaptive else {}
        self.learning = learning or Learning()
        self.last_low = False
        self._last_step = self.doubted = -1
        self.work = 0
        self.last_exponents: dict[str, int | None] = {}
        self.why_high = ""

    def begin(self, batch: int) -> None:
        """It is computed in ``batch``, maybe not for the first time."""
        if not self.learning.done:
            self.learning.begin(batch, self._limits_so_far())

    def was_computed(self, step: int, *, low: bool) -> None:
        """A forward product of ``step``. Which one is computed again is not known, so one in high bits is for all."""
        self.last_low = low and (self.last_low or step != self._last_step)
        self._last_step = step

    def _limits_so_far(self) -> tuple[float, ...]:
        products = (value for p in self.products.values() for value in (p.allowed, p.error, *p.result.limits.agreed()))
        return (*products, *(value for tracker in self.tensors.values() for value in tracker.limits.agreed()))

    def stays_high(self, role: Role) -> bool:
        """Whether low bits do not pay for a product, or cannot be."""
        return self.learning.low_pays is False or self.products[role].low_pays is False

    def stay_high(self, why: str) -> None:
        """None of its products will be in low bits."""
        self.why_high = why
        for product in self.products.values():
            product.low_pays = False

    def learn(self, role: Role, one: Measured, other: Measured, result: int | None, probe: Probe | None) -> None:
        """A healthy product: what its tensors are like, the exponent of its result, and a look at some of that."""
        product = self.products[role]
        for which, measured in zip(OPERANDS[role], (one, other), strict=True):
            self.tensors[which].learn(measured, fixed=not self.learns)
        product.result.learn(Measured(result), fixed=not self.learns)
        if one.exponent is not None and other.exponent is not None:
            distance = one.exponent - other.exponent
            if self.learns and product.distances:
                product.allowed = max(product.allowed, abs(distance - product.usual) + _APART_MARGIN)
            product.distances.append(distance)
        error = product.off(probe)
        product.saw(probe)
        if self.learns and error is not None:
            product.error = max(product.error, ERROR_MARGIN * error)

    def needs_more(self, role: Role, batch: int) -> bool:
        """Whether few bits are not enough for an operand, and that is not to be looked at again in ``batch``."""
        return any(not bits.few and batch < bits.due for bits in self._bits_of(role))

    def look(self, role: Role, one: Measured, other: Measured, batch: int) -> bool:
        """Look at the errors that few bits make in ``batch``, where that is due; whether they are too large."""
        for bits, measured in zip(self._bits_of(role), (one, other), strict=True):
            if batch >= bits.due:
                bits.look(batch, measured.error, measured.exponent)
        return any(not bits.few for bits in self._bits_of(role))

    def _bits_of(self, role: Role) -> list[AdaptiveBits]:
        return [self.bits[which] for which in OPERANDS[role]] if self.bits else []

    def sign_of_operands(self, role: Role, one: Measured, other: Measured) -> str:
        """The first sign of failure that the operands of a product show; empty if none."""
        product = self.products[role]
        for which, measured in zip(OPERANDS[role], (one, other), strict=True):
            if sign := self.tensors[which].sign(replace(measured, error=None) if self.bits else measured):
                return f"{which}: {sign}"
        if sign := apart((one.exponent, other.exponent), product.usual, product.allowed):
            return sign
        if one.exponent is not None and other.exponent is not None:
            product.distances.append(one.exponent - other.exponent)
        return ""

    def sign_of_result(self, role: Role, measured: Measured, probe: Probe | None) -> str:
        """Likewise of what a product gave, and of a look at some of that."""
        product = self.products[role]
        if not measured.finite:
            return "result: values that are not finite"
        error = product.off(probe)
        if error is not None and not error <= product.error:
            return f"result: {error:.2f} off where it was computed exactly (limit {product.error:.2f})"
        if not measured.all_zero and (sign := product.result.sign(measured)):
            return f"result: {sign}"
        product.saw(probe)
        return ""

    def agreed(self) -> list[float]:
        """What ranks agree on: the largest number of each."""
        return [value for part in self._parts() for value in part.agreed()]

    def agree(self, values: list[float]) -> None:
        """What :meth:`agreed` returned, the largest of all ranks."""
        parts = self._parts()
        lengths = [len(part.agreed()) for part in parts]
        for part, own in zip(parts, _split(values, *lengths[:-1]), strict=True):
            part.agree(own)

    def _parts(self) -> list[Learning | Product | Tracker | AdaptiveBits]:
        return [self.learning, *self.products.values(), *self.tensors.values(), *self.bits.values()]

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers and text."""
        return {
            "kind": self.kind,
            "learning": self.learning.state_dict(),
            "products": {role: product.state_dict() for role, product in self.products.items()},
            "bits": {which: bits.state_dict() for which, bits in self.bits.items()},
            "tensors": {which: tracker.state_dict() for which, tracker in self.tensors.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """What :meth:`state_dict` returned."""
        self.learning.load_state_dict(state["learning"])
        for role, product in self.products.items():
            product.load_state_dict(state["products"][role])
        for which, bits in self.bits.items():
            if which in state["bits"]:
                bits.load_state_dict(state["bits"][which])
        for which, tracker in self.tensors.items():
            tracker.load_state_dict(state["tensors"][which])


def unmeasured(state: Mapping[str, Any]) -> dict[str, Any]:
    """The state of a node, but that it is not known whether low bits pay: so it learns once more, from those limits."""
    products = {role: {**product, "low_pays": None} for role, product in state["products"].items()}
    return {**state, "learning": Learning().state_dict(), "products": products}


def _split(values: list[float], *lengths: int) -> list[list[float]]:
    """Parts of these lengths, and what is left."""
    ends = [0, *accumulate(lengths)]
    return [values[start:end] for start, end in zip(ends, [*ends[1:], len(values)], strict=True)]

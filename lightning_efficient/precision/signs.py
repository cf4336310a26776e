"""Signs that an operation in low bits has failed numerically, and how the limits are learnt that tell them from health.

What is healthy differs by role. Of the gradients of a network that trains well more than half of all elements may be
too small for a shared exponent, where one in a hundred is already much for activations; so each role of each node has
limits of its own, which are learnt while it still computes in high bits, and lie a margin beyond all that was seen
then. None is below what the source says: one in a hundred for elements that overflow (Yamaguchi et al., r_max), eight
for the range of shared exponents.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

from torch import Tensor

__all__ = [
    "ERROR_MARGIN",
    "EXPONENT_MARGIN",
    "HISTORY",
    "OF_GRADIENTS",
    "PART",
    "RATIO_MARGIN",
    "RUN",
    "Limits",
    "Measured",
    "Probe",
    "Tracker",
    "aligned",
    "apart",
    "one_run_in",
    "quantization_error",
    "sample",
    "shared_exponent",
]

HISTORY = 8
"""Operations whose shared exponents are remembered."""

RUN = 64  # neighbours that are sampled together: single elements would cost a line of the cache each
PART = 101  # of all elements one in so many is sampled; odd, lest it be always the same rows of two
_FEW = 200  # runs
RATIO_MARGIN = 16.0  # by which the odds of a ratio may exceed those that were seen
ERROR_MARGIN = 4.0
EXPONENT_MARGIN = 3  # powers of two


@dataclass(frozen=True)
class Measured:
    """What is known of one tensor when it has become low bits.

    Attributes:
        exponent: The shared one, Q: values are multiples of ``2 ** -Q``. None: there is none, as all values are zero.
        overflow: Of the sampled elements, the part that is beyond the largest code.
        underflow: Of those that are not zero, the part that has become zero.
        all_zero: Whether all sampled elements are zero.
        finite: Whether all elements are numbers.
        error: How far the mean of magnitudes is off, ``log2(|mean|x| - mean|x'|| / mean|x| + 1)``; None: not measured.
            (Zhang et al. 2020, "Fixed-Point Back-Propagation Training", "diff_bit".)
    """

    exponent: int | None
    overflow: float = 0.0
    underflow: float = 0.0
    all_zero: bool = False
    finite: bool = True
    error: float | None = None


class Probe(NamedTuple):
    """Of some numbers of a result that are computed again exactly.

    Attributes:
        off: The norm of what the result is off there.
        size: The norm of what it should be.
    """

    off: float
    size: float


@dataclass
class Limits:
    """Beyond which a measurement of a role is a sign.

    Attributes:
        overflow: See :class:`Measured`.
        underflow: Likewise.
        error: Likewise.
        exponent_range: Between the largest and the smallest exponent of the last :data:`HISTORY` operations.
    """

    overflow: float = 0.01
    underflow: float = 0.01
    error: float = 0.03
    exponent_range: float = 8.0

    def learn(self, measured: Measured, exponent_range: float) -> None:
        """A measurement in health."""
        self.overflow = max(self.overflow, _beyond(measured.overflow))
        self.underflow = max(self.underflow, _beyond(measured.underflow))
        self.error = max(self.error, ERROR_MARGIN * (measured.error or 0.0))
        self.exponent_range = max(self.exponent_range, exponent_range + EXPONENT_MARGIN)

    def agreed(self) -> list[float]:
        """What ranks agree on: the largest number of each."""
        return [self.overflow, self.underflow, self.error, self.exponent_range]

    def agree(self, values: list[float]) -> None:
        """What :meth:`agreed` returned, the largest of all ranks."""
        self.overflow, self.underflow, self.error, self.exponent_range = values

    def state_dict(self) -> dict[str, float]:
        """By name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


OF_GRADIENTS = Limits(underflow=0.99, error=0.7)
"""To begin with, of gradients: rounded up or down at random they lose nothing on average, however many become zero (of
a network that trains as in float32, 97 % of elements; and ever more as its loss falls), so that is a sign only where
next to nothing is left. Whether that noise harms their products, a block of these tells that is computed exactly."""


def _beyond(ratio: float) -> float:
    """A ratio whose odds are several times as high; never one."""
    return RATIO_MARGIN * ratio / (1 + (RATIO_MARGIN - 1) * ratio) if ratio < 1 else 1.0


class Tracker:
    """The exponents and the limits of one role of one node: an input, a weight, a gradient, or a result.

    Args:
        limits: To begin with.
    """

    def __init__(self, limits: Limits | None = None) -> None:
        self.limits = replace(limits) if limits is not None else Limits()
        self._exponents: deque[int] = deque(maxlen=HISTORY)

    @property
    def last(self) -> int | None:
        """The exponent of the last tensor that had one."""
        return self._exponents[-1] if self._exponents else None

    @property
    def exponent_range(self) -> int:
        """Between the largest and the smallest of the last operations."""
        return max(self._exponents) - min(self._exponents) if self._exponents else 0

    def sign(self, measured: Measured) -> str:
        """The first sign of failure that the tensor shows; empty if none. It is remembered if it shows none."""
        if not measured.finite:
            return "values that are not finite"
        if measured.all_zero:
            return "all sampled values are zero" if self._exponents else ""
        for name in ("overflow", "underflow"):
            ratio, limit = getattr(measured, name), getattr(self.limits, name)
            if ratio > limit:
                return f"{name} of {ratio:.1%} (limit {limit:.1%})"
        if measured.error is not None and measured.error > self.limits.error:
            return f"quantization error {measured.error:.3f} (limit {self.limits.error:.3f})"
        return self._sign_of_range(measured)

    def _sign_of_range(self, measured: Measured) -> str:
        if measured.exponent is None:
            return ""
        seen = [*[*self._exponents][-(HISTORY - 1) :], measured.exponent]
        spread = max(seen) - min(seen)
        if spread > self.limits.exponent_range:
            return f"shared exponent varies by {spread} (limit {self.limits.exponent_range:g})"
        self._exponents.append(measured.exponent)
        return ""

    def learn(self, measured: Measured, *, fixed: bool = False) -> None:
        """What a tensor of the same role is like in health; ``fixed``: the limits stay."""
        if measured.finite and not measured.all_zero and measured.exponent is not None:
            self._exponents.append(measured.exponent)
            if not fixed:
                self.limits.learn(measured, self.exponent_range)

    def agreed(self) -> list[float]:
        """What ranks agree on: the largest number of each."""
        return [*aligned([-exponent for exponent in self._exponents]), *self.limits.agreed()]

    def agree(self, values: list[float]) -> None:
        """What :meth:`agreed` returned, the largest of all ranks."""
        self._exponents = deque((int(-value) for value in values[:HISTORY] if value > -math.inf), maxlen=HISTORY)
        self.limits.agree(values[HISTORY:])

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers."""
        return {"exponents": list(self._exponents), "limits": self.limits.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """What :meth:`state_dict` returned."""
        self._exponents = deque(state["exponents"], maxlen=HISTORY)
        self.limits = Limits(**state["limits"])


def aligned(history: Iterable[float]) -> list[float]:
    """The last ones at the end, and the lowest number where there are none."""
    known = list(history)
    return [-math.inf] * (HISTORY - len(known)) + known


def sample(values: Tensor, part: int = PART) -> Tensor:
    """Runs of neighbours, evenly spread: one in ``part`` of ``values`` ``[n]``, and all of them if they are few."""
    every = one_run_in(values.numel(), part)
    return values[: values.numel() // RUN * RUN].view(-1, RUN)[::every] if every > 1 else values


def one_run_in(numel: int, part: int) -> int:
    """Of how many runs one is looked at: of ``part``, or all if they are few."""
    return part if numel // RUN >= _FEW else 1


def quantization_error(before: float, after: float) -> float | None:
    """Of sums of magnitudes before and after: ``log2(|before - after| / before + 1)``; None if there was nothing."""
    return math.log2(abs(before - after) / before + 1) if before and math.isfinite(before) else None


def apart(exponents: Iterable[int | None], usual: float, allowed: float) -> str:
    """Whether the exponents of the operands of one operation are further apart than usual by more than ``allowed``.

    In a sum, operands whose exponents differ by more than the bits of a code destroy one another; in a product, whose
    scales multiply, only a difference that it did not have before tells anything.
    """
    known = [exponent for exponent in exponents if exponent is not None]
    if len(known) < 2:
        return ""
    difference = abs(known[0] - known[1] - usual)
    return f"exponents of the operands are {difference:g} further apart than usual" if difference > allowed else ""


def shared_exponent(largest: float, bits: int) -> int | None:
    """Q, so that values up to ``largest`` become codes ``round(x * 2 ** Q)`` of so many bits; None for zero.

    Raises:
        ValueError: If it is not finite.
    """
    if not math.isfinite(largest):
        raise ValueError(f"A shared exponent for {largest} does not exist.")
    if largest == 0:
        return None
    return bits - 1 - math.frexp(largest)[1]

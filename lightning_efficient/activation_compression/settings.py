"""What the user asked for, checked."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from lightning_efficient.activation_compression.adaptive import AdaptiveRates
from lightning_efficient.activation_compression.classify import EXACT, FP8
from lightning_efficient.activation_compression.rates import Override
from lightning_efficient.activation_compression.schedule import CubicSchedule
from lightning_efficient.core.quantization import MAX_GROUP
from lightning_efficient.core.units import parse_bytes

__all__ = [
    "RateSchedule",
    "check_group_size",
    "parse_adaptive",
    "parse_bits",
    "parse_budget",
    "parse_error_bound",
    "parse_overrides",
    "parse_schedule",
]

MOST_BITS = 8


@dataclass(frozen=True)
class RateSchedule:
    """A schedule as the user wrote it; see :func:`parse_schedule`.

    Attributes:
        of: What changes.
        begin: A step, or a fraction of the run where it is a float.
        end: Likewise.
    """

    of: Literal["bits", "error_bound", "memory_budget"]
    initial: float
    final: float
    begin: int | float
    end: int | float

    @property
    def uses_fractions(self) -> bool:
        """Whether the length of the run must be known."""
        return isinstance(self.begin, float) or isinstance(self.end, float)

    def over(self, total_steps: float) -> CubicSchedule:
        """In a run of so many optimizer steps.

        Raises:
            ValueError: If the run has no end that the fractions could be of.
        """
        if self.uses_fractions and not math.isfinite(total_steps):
            raise ValueError(
                f"schedule={{begin: {self.begin}, end: {self.end}}} has fractions of a run that has no end. Give "
                "steps, or max_steps or max_epochs to the Trainer."
            )
        begin, end = (
            round(moment * total_steps) if isinstance(moment, float) else moment for moment in (self.begin, self.end)
        )
        return CubicSchedule(self.initial, self.final, begin, max(end, begin + 1))


def parse_bits(bits: Any, name: str = "bits") -> float:
    """The level that ``bits`` asks for.

    Raises:
        ValueError: If it is neither 1 to 8 nor ``"fp8"`` nor ``"lossless"``.
    """
    if bits in ("fp8", "lossless"):
        return FP8 if bits == "fp8" else EXACT
    if isinstance(bits, bool) or not isinstance(bits, int) or not 1 <= bits <= MOST_BITS:
        raise ValueError(f"{name}={bits!r} is not allowed. Use 1 to {MOST_BITS}, 'fp8', or 'lossless'.")
    return bits


def parse_overrides(overrides: Mapping[str, Any] | None) -> dict[str, Override]:
    """Bits by pattern.

    Raises:
        ValueError: Naming the one that is not allowed.
    """
    for pattern, value in (overrides or {}).items():
        if value in ("raw", "fp8"):
            continue
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MOST_BITS:
            raise ValueError(f"overrides[{pattern!r}]={value!r} is not allowed. Use 1 to {MOST_BITS}, 'fp8', or 'raw'.")
    return dict(overrides or {})


def parse_error_bound(error_bound: Any, name: str = "error_bound") -> float:
    """The bound.

    Raises:
        ValueError: If it is not a number above zero.
    """
    if isinstance(error_bound, bool) or not isinstance(error_bound, int | float) or not 0 < error_bound < math.inf:
        raise ValueError(
            f"{name}={error_bound!r} is not allowed. Use a number above zero, in the units of activations."
        )
    return float(error_bound)


def parse_budget(budget: Any, name: str = "memory_budget") -> int | float:
    """Bytes (int), or a part of what is saved without compression (float).

    Raises:
        ValueError: If it is neither.
    """
    if isinstance(budget, float):
        if not 0 < budget <= 1:
            raise ValueError(
                f"{name}={budget!r} is not allowed. Use bytes (a whole number, or a text such as '512MiB'), or the "
                "part of the memory that is taken without compression, up to 1.0."
            )
        return budget
    return parse_bytes(budget, name)


def parse_adaptive(adaptive: Mapping[str, Any] | None) -> AdaptiveRates | None:
    """``{every: 100, target: 0.1}``: steps, and the acceptable deviation of gradients; ``guard`` may be given too.

    Raises:
        ValueError: Naming what is missing, unknown or out of range.
    """
    if adaptive is None:
        return None
    if not {"every", "target"} <= set(adaptive) <= {"every", "target", "guard"}:
        raise ValueError(
            f"adaptive={dict(adaptive)!r} must have the keys every and target, may have guard, and no others."
        )
    every = adaptive["every"]
    if isinstance(every, bool) or not isinstance(every, int) or every < 2:
        raise ValueError(f"adaptive['every']={every!r} is not allowed. Use a number of steps from 2 on.")
    for key in set(adaptive) - {"every"}:
        value = adaptive[key]
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise ValueError(f"adaptive[{key!r}]={value!r} is not allowed. Use a number above zero, such as 0.1.")
    return AdaptiveRates(**adaptive)


def parse_schedule(schedule: Mapping[str, Any] | None) -> RateSchedule | None:
    """``{initial_bits: 8, final_bits: 2, begin: 0.05, end: 0.5}``: bits, and steps (int) or parts of the run (float).

    In place of the bits ``initial_error_bound`` and ``final_error_bound``, or ``initial_memory_budget`` and
    ``final_memory_budget``.

    Raises:
        ValueError: Naming what is missing, unknown or out of range.
    """
    if schedule is None:
        return None
    of: Literal["bits", "error_bound", "memory_budget"] = "bits"
    if "initial_error_bound" in schedule:
        of = "error_bound"
    elif "initial_memory_budget" in schedule:
        of = "memory_budget"
    keys = f"initial_{of}", f"final_{of}", "begin", "end"
    if set(schedule) != set(keys):
        raise ValueError(f"schedule={dict(schedule)!r} must have the keys {', '.join(keys)}, and no others.")
    values: list[float] = []
    for key in keys[:2]:
        value, name = schedule[key], f"schedule[{key!r}]"
        if of == "memory_budget":
            value = parse_budget(value, name)
            if isinstance(value, float):
                raise ValueError(
                    f"{name}={value!r} is not allowed. Use bytes: a whole number, or a text such as '1GiB'."
                )
        elif of == "error_bound":
            value = parse_error_bound(value, name)
        elif isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MOST_BITS:
            raise ValueError(f"{name}={value!r} is not allowed. Use 1 to {MOST_BITS}.")
        values.append(value)
    for key in keys[2:]:
        value = schedule[key]
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not 0 <= value < math.inf or (isinstance(value, float) and value > 1):
            raise ValueError(
                f"schedule[{key!r}]={value!r} is not allowed. Use a step (a whole number), or a fraction of the run "
                "up to 1.0."
            )
    begin, end = schedule["begin"], schedule["end"]
    if isinstance(begin, float) == isinstance(end, float) and end <= begin:
        raise ValueError(f"schedule={dict(schedule)!r} ends before it begins. Give an end after begin.")
    return RateSchedule(of, values[0], values[1], begin, end)


def check_group_size(group_size: Any) -> None:
    """Whether it is a power of two that codes can be packed in.

    Raises:
        ValueError: Naming what is allowed.
    """
    allowed = [64 << power for power in range(11)]
    if group_size not in allowed:
        raise ValueError(f"group_size={group_size!r} is not allowed. Use a power of two from 64 to {MAX_GROUP}.")

"""From errors in what a layer saved to the error of its weight's gradient, and back; and where bits do most.

With ``dW = sum over positions of L x`` (L: the gradient of the layer's output, x: its saved input) and independent
errors of x with variance v, an element of dW has the variance ``v R S``: S is the sum of L^2 over samples and
positions, for one output channel on average, and R the fraction of x that has an error at all. (Jin et al. 2021,
"COMET", section 4, gives ``sigma = a mean|L| sqrt(N R) eb`` with an empirical a; this is the exact form of it, for
conv and linear layers alike.)
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Hashable, Mapping
from typing import TypeVar

__all__ = ["allocate_bits", "error_bound", "gradient_deviation", "step_variance"]

Key = TypeVar("Key", bound=Hashable)


def step_variance(bits: int) -> float:
    """Of the errors of numbers in groups whose spread (greatest minus least) is one.

    With dither from 3 bits on, else with stochastic rounding.
    """
    step = 1 / ((1 << bits) - 1)
    return step * step / (12 if bits > 2 else 6)


def gradient_deviation(error_bound: float, loss_squares: float, nonzero: float) -> float:
    """Of an element of the weight's gradient, where errors are even within ``+-error_bound``."""
    return error_bound * math.sqrt(nonzero * loss_squares / 3)


def error_bound(deviation: float, loss_squares: float, nonzero: float) -> float:
    """The inverse: how large errors may be for this deviation; infinite where the gradient does not depend on them."""
    variance = nonzero * loss_squares / 3
    return deviation / math.sqrt(variance) if variance else math.inf


def allocate_bits(
    sizes: Mapping[Key, float],
    harm: Mapping[Key, float],
    floors: Mapping[Key, int],
    ceilings: Mapping[Key, int],
    budget_bits: float,
) -> dict[Key, int]:
    """Give bits where they do most against ``sum of harm * step_variance(bits)``.

    Args:
        sizes: Numbers that each has.
        harm: Of errors of variance one.
        floors: Fewest bits of each, given in any case.
        ceilings: Most bits.
        budget_bits: Of all numbers together.

    Returns:
        Bits of each: a heap on the gain per bit, as in GACT (Liu et al. 2022, section 4).
    """
    bits = dict(floors)
    left = budget_bits - sum(sizes[key] * bits[key] for key in bits)
    heap: list[tuple[float, int, Key]] = []

    def offer(order: int, key: Key) -> None:
        now = bits[key]
        if now < ceilings[key]:
            gain = harm[key] * (step_variance(now) - step_variance(now + 1))
            heapq.heappush(heap, (-gain / max(1, sizes[key]), order, key))

    for order, key in enumerate(bits):
        offer(order, key)
    while heap:
        _, order, key = heapq.heappop(heap)
        if sizes[key] <= left:
            left -= sizes[key]
            bits[key] += 1
            offer(order, key)
    return bits

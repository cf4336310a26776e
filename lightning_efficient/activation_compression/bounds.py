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
from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["LayerError", "allocate_bits", "error_bound", "gradient_deviation"]


@dataclass(frozen=True)
class LayerError:
    """What the errors of one layer's saved input depend on.

    Attributes:
        numel: Numbers that are saved.
        spread_squares: Mean of the squared spreads (greatest minus least) of their groups.
        loss_squares: S, above.
        nonzero: R, above.
        weight_numel: Elements of the weight.
        gradient_squares: Sum of squares of its gradient.
    """

    numel: int
    spread_squares: float
    loss_squares: float
    nonzero: float
    weight_numel: int
    gradient_squares: float

    def variance(self, bits: int) -> float:
        """Of the gradient, the sum over its elements."""
        return self.weight_numel * self.nonzero * self.loss_squares * error_variance(self.spread_squares, bits)

    def relative(self, bits: int) -> float:
        """Deviation of the gradient over its norm."""
        return math.sqrt(self.variance(bits) / self.gradient_squares) if self.gradient_squares else 0.0


def error_variance(spread_squares: float, bits: int) -> float:
    """Of numbers in groups of such spreads: with dither from 3 bits on, else with stochastic rounding."""
    scale_squares = spread_squares / ((1 << bits) - 1) ** 2
    return scale_squares / 12 if bits > 2 else scale_squares / 6


def gradient_deviation(error_bound: float, loss_squares: float, nonzero: float) -> float:
    """Of an element of the weight's gradient, where errors are even within ``+-error_bound``."""
    return error_bound * math.sqrt(nonzero * loss_squares / 3)


def error_bound(deviation: float, loss_squares: float, nonzero: float) -> float:
    """The inverse: how large errors may be for this deviation; infinite where the gradient does not depend on them."""
    variance = nonzero * loss_squares / 3
    return deviation / math.sqrt(variance) if variance else math.inf


def allocate_bits(
    layers: Mapping[str, LayerError], floors: Mapping[str, int], budget_bits: float, most: int = 8
) -> dict[str, int]:
    """Give each layer its bits, where each does most for the error relative to the gradient.

    Args:
        layers: By name.
        floors: Fewest bits of each.
        budget_bits: Of all numbers together; the floors are given in any case.
        most: For a number.

    Returns:
        Bits by layer: a heap on the gain per bit, as in GACT (Liu et al. 2022, section 4).
    """
    bits = {name: floors[name] for name in layers}
    left = budget_bits - sum(layers[name].numel * bits[name] for name in layers)
    heap: list[tuple[float, str]] = []

    def offer(name: str) -> None:
        layer, now = layers[name], bits[name]
        if now < most:
            gain = layer.relative(now) ** 2 - layer.relative(now + 1) ** 2
            heapq.heappush(heap, (-gain / layer.numel, name))

    for name in layers:
        offer(name)
    while heap:
        _, name = heapq.heappop(heap)
        if layers[name].numel <= left:
            left -= layers[name].numel
            bits[name] += 1
            offer(name)
    return bits

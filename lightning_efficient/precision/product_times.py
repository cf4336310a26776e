"""What few bits cost and saved, on the clock of the host; on devices, which compute behind its back, nobody knows."""

from __future__ import annotations

import statistics
import time

from lightning_efficient.precision.nodes import Product

__all__ = ["ProductTimes"]


class ProductTimes:
    """Sums over all products, in seconds.

    Attributes:
        cost: Of finding operations, of learning, of products that failed, and of those that took longer in few bits.
        gain: Of those that took less, guards included, than in high bits while they learnt.
    """

    def __init__(self) -> None:
        self.cost = self.gain = 0.0

    def found(self, began: float) -> None:
        """What a call of torch is was looked up, from the time ``began`` until now."""
        self.cost += time.perf_counter() - began

    def learnt(self, product: Product, high: float, beside: float) -> None:
        """One in high bits; looking at few bits ``beside`` it took as long."""
        product.high_times.append(high)
        self.cost += beside

    def failed(self, seconds: float) -> None:
        """As much was in vain."""
        self.cost += seconds

    def low(self, product: Product, seconds: float) -> None:
        """One in few bits."""
        if product.high_times:  # it has learnt
            product.high_time = statistics.median(product.high_times)
            product.high_times.clear()
        if product.high_time:
            shorter = product.high_time - seconds
            self.gain += max(0.0, shorter)
            self.cost += max(0.0, -shorter)

"""Whether few bits pay for a product on this device: timed there, once for each shape, in pre-learning."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_efficient.precision.device.layouts import Product
from lightning_efficient.precision.nodes import Node

if TYPE_CHECKING:
    from lightning_efficient.precision.device.engine import DeviceEngine

__all__ = ["Gate", "milliseconds"]

_REPEATS = 5
_WARM = 2
_MARGIN = 1.05  # by which high bits have to take longer: a saving smaller than that is not worth a worse number


def milliseconds(function: Callable[[], object]) -> float:
    """From the first launch until all is done, by events of the device; the median of some runs."""
    found = []
    for number in range(_WARM + _REPEATS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        function()
        end.record()
        end.synchronize()
        if number >= _WARM:
            found.append(begin.elapsed_time(end))
    return statistics.median(found)


class Gate:
    """Times products, and remembers which shapes few bits pay for.

    Args:
        milliseconds: Of a function that launches something.
    """

    def __init__(self, milliseconds: Callable[[Callable[[], object]], float] = milliseconds) -> None:
        self._milliseconds = milliseconds
        self._known: dict[tuple[object, ...], bool] = {}

    def low_pays(self, engine: DeviceEngine, node: Node, product: Product) -> bool:
        """Whether all that low bits take, launches and the guard too, is less than the product in high bits takes."""
        one, other = product.tensors
        key = (
            product.role,
            product.a.shape,
            product.b.shape,
            one.dtype,
            other.dtype,
            product.dtype,
            product.bias is None,
        )
        if key not in self._known:
            low, high = self.times(engine, node, product)
            self._known[key] = high > _MARGIN * low
        return self._known[key]

    def times(self, engine: DeviceEngine, node: Node, product: Product) -> tuple[float, float]:
        """Milliseconds in low bits and in high ones."""

        def encode(tensor: Tensor, which: str) -> float:
            return self._milliseconds(lambda: engine.codes.again(tensor, which)) / 2  # for two products that it is in

        gradient = "gradient" if product.role != "forward" else "input"
        low = encode(product.tensors[0], gradient) + encode(product.tensors[1], "weight")
        codes = engine.codes.again(product.tensors[0], gradient), engine.codes.again(product.tensors[1], "weight")
        table = engine.scratch(node)
        low += self._milliseconds(lambda: engine.rehearse(node, product, *codes, table))
        return low, self._milliseconds(product.high)

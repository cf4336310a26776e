"""How a quantity grows with the size of a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

__all__ = ["Curve"]

_WIDE = 4  # sizes from which on a curve may bend: attention takes memory by the square of the length


@dataclass(frozen=True)
class Curve:
    """A polynomial of the size: constant, a line, or, with four sizes and more, a parabola.

    Attributes:
        coefficients: Of the powers of ``size / scale``, the constant first.
        scale: The largest size that it was made of.
    """

    coefficients: tuple[float, ...]
    scale: float

    @classmethod
    def through(cls, values: Mapping[int, float]) -> Curve:
        """The curve of the least squares through what was measured, by size.

        Raises:
            ValueError: If nothing was.
        """
        if not values:
            raise ValueError("No batch was measured. Give a configuration that trains for some more batches.")
        sizes = sorted(values)
        degree = 0 if len(sizes) == 1 else 2 if len(sizes) >= _WIDE else 1
        scale = float(max(sizes[-1], 1))
        powers = (torch.tensor(sizes, dtype=torch.float64) / scale)[:, None] ** torch.arange(degree + 1)
        target = torch.tensor([float(values[size]) for size in sizes], dtype=torch.float64)
        found = torch.linalg.lstsq(powers, target[:, None]).solution[:, 0]
        return cls(tuple(found.tolist()), scale)

    def at(self, size: int) -> float:
        """Its value; never below zero."""
        part = size / self.scale
        return max(0.0, sum(factor * part**power for power, factor in enumerate(self.coefficients)))

    def mean_over(self, sizes: Sequence[int]) -> float:
        """The mean of its values."""
        return sum(self.at(size) for size in sizes) / len(sizes)

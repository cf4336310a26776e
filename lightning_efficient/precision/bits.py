"""Whether 8 bits are enough for a tensor, by the error that they make, and when to look again.

(Zhang et al. 2020, "Fixed-Point Back-Propagation Training", 4, where precision and interval are adapted layer by layer.
Its 16 and 24 bits are here the floats of 16 and 32, whose kernels there are: a wider integer with a shared exponent
would take longer than they do.)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["MOST_ERROR", "AdaptiveBits"]

MOST_ERROR = 0.03
"""Of a mean magnitude, as :func:`~lightning_efficient.precision.signs.quantization_error` gives it."""

_ALPHA, _BETA, _GAMMA, _DELTA = 0.04, 0.1, 2.0, 100.0  # those of the paper
_LONGEST = 200  # batches until it is looked at again, however steady it is


class AdaptiveBits:
    """Of one tensor of one operation.

    Attributes:
        few: Whether 8 bits do.
        due: The batch in which that is to be looked at again.
    """

    def __init__(self) -> None:
        self.few = True
        self.due = 0
        self._mean: float | None = None

    def look(self, batch: int, error: float | None, exponent: int | None) -> None:
        """Of the tensor in ``batch``: the error of 8 bits, and their shared exponent."""
        if error is None or exponent is None:
            return
        self.few = error <= MOST_ERROR
        apart = abs(exponent - self._mean) if self._mean is not None else 0.0
        self._mean = exponent if self._mean is None else _ALPHA * exponent + (1 - _ALPHA) * self._mean
        unsteady = max(_ALPHA * apart, _DELTA * error * error)
        wait = _BETA / unsteady - _GAMMA if unsteady else _LONGEST
        self.due = batch + min(max(round(wait), 1), _LONGEST)

    def agreed(self) -> list[float]:
        """What ranks agree on: the largest number of each."""
        return [float(not self.few), -self.due, -1e9 if self._mean is None else self._mean]

    def agree(self, values: list[float]) -> None:
        """What :meth:`agreed` returned, the largest of all ranks."""
        many, due, mean = values
        self.few, self.due = not many, int(-due)
        self._mean = None if mean <= -1e9 else mean

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers."""
        return {"few": self.few, "due": self.due, "mean": self._mean}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """What :meth:`state_dict` returned."""
        self.few, self.due, self._mean = state["few"], state["due"], state["mean"]

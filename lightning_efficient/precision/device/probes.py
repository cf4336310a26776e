"""Which elements of a result are looked at: a sample for its exponent, as in ``signs.py``."""

from __future__ import annotations

from lightning_efficient.precision.signs import PART, RUN

__all__ = ["sampled"]


def sampled(numel: int) -> tuple[int, int]:
    """How many elements, and of how many runs of neighbours each first one they are."""
    runs = numel // RUN
    return (numel, 1) if runs < 2 * PART else (-(-runs // PART) * RUN, PART)

"""Which elements of a result are looked at: a sample for its exponent, as in ``signs.py``, and a block of it."""

from __future__ import annotations

from lightning_efficient.precision.signs import PART, RUN

__all__ = ["PLACES", "sampled"]

PLACES = 16
"""Rows and columns of the block that is computed again exactly."""


def sampled(numel: int) -> tuple[int, int]:
    """How many elements, and of how many runs of neighbours each first one they are."""
    runs = numel // RUN
    return (numel, 1) if runs < 2 * PART else (-(-runs // PART) * RUN, PART)

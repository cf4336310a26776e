"""Which elements of a result are looked at: a sample for its exponent, as in ``signs.py``."""

from __future__ import annotations

from lightning_efficient.precision.signs import PART, RUN, one_run_in

__all__ = ["sampled"]


def sampled(numel: int) -> tuple[int, int]:
    """How many elements, and of how many runs of neighbours each first one they are."""
    every = one_run_in(numel, PART)
    return (numel if every == 1 else -(-(numel // RUN) // every) * RUN, every)

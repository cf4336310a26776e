"""Private random numbers: made of a key, wherever they are needed, and never drawn from the user's generators.

Noise for rounding has to be cheap: on a CPU torch draws one number in the time in which it rounds five. So there is
one table of 262144 numbers, all different and evenly spaced in (0, 1), in a fixed random order; who needs noise reads
it from an offset that a hash of the key gives, around its end. Over all offsets each element sees each number exactly
once: its mean is 1/2 and its variance 1/12, to the last digit.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

__all__ = ["TABLE", "mix", "noise_at", "noise_table"]

TABLE = 1 << 18
_MASK = (1 << 64) - 1
_SEED = 20_201_118


def mix(key: int, counter: int) -> int:
    """64 bits that look random: SplitMix64 (Steele et al. 2014, "Fast splittable pseudorandom number generators")."""
    z = (key + (counter + 1) * 0x9E3779B97F4A7C15) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


@cache
def noise_table(device: torch.device) -> Tensor:
    """The table, twice, so that it can be read from any offset: float32 ``[2 * TABLE]``."""
    order = torch.randperm(TABLE, generator=torch.Generator("cpu").manual_seed(_SEED), device="cpu")
    once = (order.to(torch.float32) + 0.5) / TABLE
    return torch.cat([once, once]).to(device)


def noise_at(key: int, counter: int) -> int:
    """Where in the table the noise of piece ``counter`` begins."""
    return mix(key, counter) % TABLE

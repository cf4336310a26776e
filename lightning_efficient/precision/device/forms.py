"""Codes that a GPU multiplies, and where what is seen of tensors lies."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["E4M3", "E5M2", "INT8", "SLOT", "Form", "Noise", "filled"]

SLOT = 8
"""Numbers that are seen of a tensor: bits of its largest magnitude; then how many elements are beyond the largest code,
were not zero and have become zero, were not zero; and the sums of their magnitudes before and after."""
_LEAST, _MULTIPLE = 32, 16  # ``_int_mm`` wants more than 16 rows, ``_scaled_mm`` whole sixteens


@dataclass(frozen=True)
class Form:
    """Of codes of 8 bits.

    Attributes:
        name: Short.
        dtype: Of the codes.
        least: The largest magnitude is scaled to below two to this power, and to half of that at least.
        fraction: Bits behind the point when magnitudes are summed; so that a row of 128 has room in 32 bits.
    """

    name: str
    dtype: torch.dtype
    least: int
    fraction: int


INT8 = Form("int8", torch.int8, 7, 15)
E4M3 = Form("e4m3", torch.float8_e4m3fn, 8, 15)
E5M2 = Form("e5m2", torch.float8_e5m2, 15, 8)


@dataclass(frozen=True)
class Noise:
    """Of one tensor.

    Attributes:
        seed: int64 ``[1]``, on the device: of the step, so that a graph that is replayed has other noise each time.
        count: Of the tensor within it.
    """

    seed: Tensor
    count: int


def filled(size: int) -> int:
    """With zeros, so that the kernels for codes take it."""
    return max(_LEAST, -(-size // _MULTIPLE) * _MULTIPLE)

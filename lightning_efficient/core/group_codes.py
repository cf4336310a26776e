"""How the scale of a group follows from its numbers, and what its codes can then be off by.

The codes themselves, and what the kinds of rounding are, are in :mod:`lightning_efficient.core.quantization`.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

__all__ = ["Code", "Rounding", "bound_of", "factor_of", "fewest_bytes", "width_of"]

Rounding = Literal["nearest", "dither", "stochastic"]
Code = int | Literal["fp8"]

_UP = 1 + 2.0**-8  # a bfloat16 rounded to nearest after this is not less than before
_MARGIN = 1 + 2.0**-12  # by which codes stay within their range, whatever float32 rounds
_EXPONENT = 0x7F800000  # bits of a float32
_FLOAT8_SCALE = (1 - 2.0**-8) / 448  # a bfloat16 rounded to nearest after this is not more: none decodes to infinity


def width_of(code: Code) -> int:
    """Bits of a code."""
    return 8 if code == "fp8" else code


def factor_of(code: Code) -> float:
    """By which a group's spread, or for floats its largest number, becomes its scale."""
    return _FLOAT8_SCALE if code == "fp8" else _UP * _MARGIN / ((1 << code) - 1)


def fewest_bytes(
    minimum: Tensor, spread: Tensor, error_bound: float, values: Tensor, group_size: int, rounding: Rounding
) -> int | None:
    """Bits with which codes and outliers together are smallest; None if ``values`` are not larger."""
    left: Tensor | float = error_bound
    if values.dtype != torch.float32:  # see _rounded
        low = minimum.float()
        left = (error_bound - _half_spacing(torch.maximum(low.abs(), low + spread), values.dtype)).clamp_min_(
            error_bound / 2
        )
    steps = spread * (_UP * _UP * _MARGIN * _MARGIN) / (left * (1 if rounding == "stochastic" else 2))
    needed = torch.log2(steps + 1).ceil_().clamp_(1, 9).to(torch.int64)  # 9: more than there are
    counts = torch.bincount(needed, minlength=10).tolist()
    whole = group_size * values.element_size() + 8
    costs = {bits: values.numel() * bits / 8 + sum(counts[bits + 1 :]) * whole for bits in range(1, 9)}
    best = min(costs, key=costs.__getitem__)
    return best if costs[best] + 4 * spread.numel() < values.nbytes else None


def bound_of(minimum: Tensor | None, scale: Tensor, bits: Code, rounding: Rounding, dtype: torch.dtype) -> Tensor:
    """What ``|x - decoded|`` never exceeds, of each group, float32."""
    scale = scale.float()
    if minimum is None or bits == "fp8":  # from 256 on e4m3 has every 32nd number
        return _rounded(scale * (16 * _MARGIN), scale * 464, dtype)
    low, width = minimum.float(), scale * ((1 << bits) - 1)
    float32 = (low.abs() + width) * 2.0**-22  # what that rounds on the way
    bound = scale * (1.0 if rounding == "stochastic" else 0.5) * _MARGIN + float32
    return _rounded(bound, torch.maximum(low.abs(), low + width) + scale, dtype)


def _rounded(bound: Tensor, largest: Tensor, dtype: torch.dtype) -> Tensor:
    """What ``bound`` becomes where the decoded numbers, up to ``largest``, are rounded to ``dtype``.

    By half its spacing at most, and by no more than they are off: what they stand for is a number of that type.
    """
    return bound if dtype == torch.float32 else bound + torch.minimum(bound, _half_spacing(largest, dtype))


def _half_spacing(largest: Tensor, dtype: torch.dtype) -> Tensor:
    """Of the numbers of ``dtype`` around ``largest`` (float32), which they have most."""
    info = torch.finfo(dtype)
    power = (largest.view(torch.int32) & _EXPONENT).view(torch.float32)  # of two, not above it
    return power.clamp_min_(info.smallest_normal).mul_(info.eps / 2)

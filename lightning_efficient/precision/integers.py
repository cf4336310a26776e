"""Products of tensors whose elements are integers of 8 bits with one shared exponent, by the real kernels for them.

One exponent for a whole tensor is less exact than one for each row, but the codes then serve all three products of a
linear layer, whatever they sum over: each tensor is quantized once in a step. Scales are powers of two, so that nothing
is rounded but to codes and in the sum's last conversion. (Zhang et al. 2020, "Fixed-Point Back-Propagation Training",
3; Yamaguchi et al. on shared exponents.)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["LARGEST", "Integers", "largest_magnitude", "multiply", "to_integers"]

LARGEST = 127
"""Of a code."""

_CHUNK = 1 << 15  # elements that are converted at a time: what lies between two operations stays in the cache
_ROWS = 1 << 16  # of a result, likewise
_MOST_TERMS = ((1 << 31) - 1) // (LARGEST * LARGEST)  # of a sum in 32 bits that cannot overflow


@dataclass(frozen=True)
class Integers:
    """A tensor ``codes * 2 ** -exponent``.

    Attributes:
        codes: int8, of any shape.
        exponent: Q; of a tensor of zeros any will do.
    """

    codes: Tensor
    exponent: int

    def decoded(self) -> Tensor:
        """The values, float32."""
        return self.codes.float() * math.ldexp(1.0, -self.exponent)


def largest_magnitude(values: Tensor) -> float:
    """The largest absolute value; NaN or infinite if there is one that is; 0 for nothing."""
    if not values.numel():
        return 0.0
    low, high = torch.aminmax(values)  # a third of the time that abs takes, and no memory
    return max(-low.item(), high.item()) if not (low.isnan() or high.isnan()) else math.nan


def _factors(exponent: int) -> tuple[float, float]:
    """Two powers of two whose product is ``2 ** exponent``, and which float32 has, as it may not have the product."""
    half = exponent // 2
    return math.ldexp(1.0, half), math.ldexp(1.0, exponent - half)


def to_integers(values: Tensor, exponent: int, *, noise: Tensor | None = None) -> Integers:
    """Codes of ``values``, to nearest, or up or down at random; what is beyond the largest code becomes that.

    Args:
        values: Floating-point numbers, of any shape.
        exponent: Q.
        noise: Uniform in [0, 1), of at least as many elements as are converted at a time; None: to nearest.
    """
    values = values.contiguous()
    codes = torch.empty(values.shape, dtype=torch.int8, device=values.device)
    plain = -126 <= exponent <= 126  # else twice: the smallest numbers need more than float32 has in one
    factor, again = (math.ldexp(1.0, exponent), 1.0) if plain else _factors(exponent)
    source, target = values.view(-1), codes.view(-1)
    scaled = torch.empty(min(_CHUNK, source.numel()), dtype=torch.float32, device=values.device)
    for start in range(0, source.numel(), _CHUNK):
        part = source[start : start + _CHUNK]
        chunk = scaled[: part.numel()]
        torch.mul(part, factor, out=chunk)
        if not plain:
            chunk.mul_(again)
        if noise is None:
            chunk.round_()
        else:
            chunk.add_(noise[: part.numel()]).floor_()
        target[start : start + _CHUNK].copy_(chunk.clamp_(-LARGEST, LARGEST))
    return Integers(codes, exponent)


def multiply(one: Tensor, other: Tensor, exponent: int, bias: Tensor | None = None) -> Tensor:
    """``one @ other * 2 ** -exponent + bias``, summed exactly.

    The sums are converted where they lie, a few rows at a time, so that a result takes no more memory than it has.

    Args:
        one: Codes ``[M, K]``, also a transposed view.
        other: Codes ``[K, N]``, likewise.
        exponent: The sum of theirs.
        bias: float32 ``[N]``.

    Returns:
        float32 ``[M, N]``.
    """
    terms = one.shape[1]
    if terms <= _MOST_TERMS:
        return _converted(torch._int_mm(one, other), exponent, bias)
    result = None
    for start in range(0, terms, _MOST_TERMS):
        part = torch._int_mm(one[:, start : start + _MOST_TERMS], other[start : start + _MOST_TERMS])
        part = _converted(part, exponent, bias if result is None else None)
        result = part if result is None else result.add_(part)
    return result if result is not None else one.new_zeros(one.shape[0], other.shape[1], dtype=torch.float32)


def _converted(sums: Tensor, exponent: int, bias: Tensor | None) -> Tensor:
    """int32 sums as float32, in the same memory."""
    result = sums.view(torch.float32)
    plain = -126 <= exponent <= 126
    factor, again = (math.ldexp(1.0, -exponent), 1.0) if plain else _factors(-exponent)
    rows = max(1, _ROWS // max(1, sums.shape[1]))
    for start in range(0, sums.shape[0], rows):
        part = result[start : start + rows]
        part.copy_(sums[start : start + rows])  # element by element, each over its own bytes
        if not plain:
            part.mul_(again)
        if bias is None:
            part.mul_(factor)
        else:
            torch.add(bias, part, alpha=factor, out=part)
    return result

"""Products of tensors whose elements are integers of 8 bits with one shared exponent, by the real kernels for them.

One exponent for a whole tensor is less exact than one for each row, but the codes then serve all three products of a
linear layer, whatever they sum over: each tensor is quantized once in a step. Scales are powers of two, so that nothing
is rounded but to codes and in the sum's last conversion. (Zhang et al. 2020, "Fixed-Point Back-Propagation Training",
3; Yamaguchi et al. on shared exponents.)

On a CPU the passes over memory are C, see ``integers.c``, and products where the processor has tiles for them, see
``tiles.c``; without a C compiler torch's operations give the same codes and results.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_efficient.core.native import compiled, in_team, in_threads
from lightning_efficient.core.random import TABLE, noise_at, noise_table
from lightning_efficient.precision.probes import SIDE, Kept, places
from lightning_efficient.precision.scratch import Scratch
from lightning_efficient.precision.signs import (
    Measured,
    one_run_in,
    quantization_error,
    sample,
    shared_exponent,
)
from lightning_efficient.precision.tiles import can_tile, multiply_in_tiles

__all__ = [
    "LARGEST",
    "LOOKED_AT",
    "Integers",
    "can_multiply",
    "largest_magnitude",
    "multiply",
    "to_integers",
    "with_shared_exponent",
]

LARGEST = 127
"""Of a code."""

LOOKED_AT = 17
"""Of the runs of neighbours in a large tensor one in so many is looked at for signs of failure. One in a hundred would
be too few for gradients of which next to all become zero."""

_CHUNK = 1 << 15  # elements that are converted at a time: what lies between two operations stays in the cache
_PART = TABLE  # elements that are a thread's work at a time; their noise is read from one place
_ROWS = 1 << 16  # elements of a result, likewise
_WIDE = 512  # from which on columns are kept, which take at most an eighth of what the codes do
_MOST_TERMS = ((1 << 31) - 1) // (LARGEST * LARGEST)  # of a sum in 32 bits that cannot overflow
_TYPES = {torch.float32: 0, torch.bfloat16: 1}
_LONG, _FLOAT = ctypes.c_int64, ctypes.c_float
_POINTER, _INT = ctypes.c_void_p, ctypes.c_int
_ARGUMENTS = {
    "largest": (_POINTER, _INT, _LONG, _LONG),
    "convert": (_POINTER, _POINTER, _INT, _LONG, _FLOAT, _FLOAT, _POINTER, _LONG, _LONG),
}


class _Seen(ctypes.Structure):
    """See ``integers.c``."""

    _fields_ = (
        ("beyond", ctypes.c_int64), ("gone", ctypes.c_int64), ("some", ctypes.c_int64), ("all", ctypes.c_int64),
        ("before", ctypes.c_double), ("after", ctypes.c_double),
    )  # fmt: skip


class _Kept(ctypes.Structure):
    """Likewise."""

    _fields_ = (("width", _LONG), ("places", _POINTER), ("columns", _POINTER))


class _Quantizing(ctypes.Structure):
    """Likewise."""

    _fields_ = (
        ("values", _POINTER), ("type", _LONG), ("count", _LONG), ("part", _LONG), ("factor", _FLOAT),
        ("again", _FLOAT), ("noise", _POINTER), ("noise_at", _POINTER), ("codes", _POINTER), ("every", _LONG),
        ("seen", _POINTER), ("largest", _POINTER), ("kept", _Kept), ("seats", _LONG), ("came", _LONG), ("taken", _LONG),
    )  # fmt: skip


@dataclass(frozen=True)
class Integers:
    """A tensor ``codes * 2 ** -exponent``.

    Attributes:
        codes: int8, of any shape.
        exponent: Q; of a tensor of zeros any will do.
        kept: Some columns of the values, if that was asked for.
    """

    codes: Tensor
    exponent: int
    kept: Kept | None = None

    def decoded(self) -> Tensor:
        """The values, float32."""
        factor, again = _factors(-self.exponent)
        return self.codes.float().mul_(factor).mul_(again)


def largest_magnitude(values: Tensor) -> float:
    """The largest absolute value; NaN or infinite if there is one that is; 0 for nothing."""
    if not values.numel():
        return 0.0
    library = _library_for(values)
    if library is None:
        low, high = torch.aminmax(values)  # a third of the time that abs takes, and no memory
        return max(-low.item(), high.item()) if not (low.isnan() or high.isnan()) else math.nan
    values, numel = _flat(values), values.numel()
    found: list[float] = []

    def work(first: int, last: int) -> None:
        end = min(last * _PART, numel)
        found.append(library.largest(values.data_ptr(), _TYPES[values.dtype], first * _PART, end))

    in_threads(work, -(-numel // _PART))
    return _most(found)


def with_shared_exponent(
    values: Tensor, *, guess: int | None = None, key: int | None = None, at: int | None = None
) -> tuple[Integers, Measured] | None:
    """Codes of ``values`` with the exponent that suits the largest.

    Args:
        values: Floating-point numbers, of any shape.
        guess: An exponent that may well be it; if it is, one pass over memory is enough.
        key: See :func:`to_integers`.
        at: Likewise.

    Returns:
        See :func:`to_integers`; None if there are values that are not finite.
    """
    if guess is not None and _library_for(values) is not None:
        integers, measured, largest = _coded(values, guess, key, at)
        if math.isfinite(largest) and shared_exponent(largest, 8) in (guess, None):
            return integers, measured
    else:
        largest = largest_magnitude(values)
    if not math.isfinite(largest):
        return None
    return to_integers(values, shared_exponent(largest, 8) or 0, key=key, at=at)


def to_integers(
    values: Tensor, exponent: int, *, key: int | None = None, at: int | None = None
) -> tuple[Integers, Measured]:
    """Codes of ``values``, to nearest, or up or down at random; what is beyond the largest code becomes that.

    Args:
        values: Floating-point numbers, of any shape, finite.
        exponent: Q.
        key: Of the noise by which they are rounded up or down; None: to nearest.
        at: Which columns are kept: see :class:`~.probes.Kept`; None: none.

    Returns:
        They, and what signs of failure can be seen in that.
    """
    if _library_for(values) is not None:
        return _coded(values, exponent, key, at)[:2]
    codes = torch.empty(values.shape, dtype=torch.int8, device=values.device)
    kept = Kept(at) if at is not None else None
    return Integers(codes, exponent, kept), _encode(_flat(values), codes.view(-1), exponent, key)


def _coded(values: Tensor, exponent: int, key: int | None, at: int | None) -> tuple[Integers, Measured, float]:
    """In C; with the largest magnitude."""
    codes = torch.empty(values.shape, dtype=torch.int8)
    kept = _to_keep(values, at)
    values = values.contiguous()
    numel, (factor, again) = values.numel(), _factors(exponent)
    library: Any = _library()
    parts = -(-numel // _PART)
    seen = (_Seen * parts)()  # no tensors: they would cost more than the rest
    found = (_FLOAT * parts)()
    table = noise_table(values.device).data_ptr() if key is not None else None
    noise = (_LONG * parts)(*(noise_at(key or 0, part) for part in range(parts)))
    keeping = _Kept()
    if kept is not None and kept.columns is not None:
        these = (_LONG * SIDE)(*places(values.shape[-1], kept.at))
        keeping = _Kept(values.shape[-1], ctypes.addressof(these), kept.columns.data_ptr())
    job = _Quantizing(
        values.data_ptr(), _TYPES[values.dtype], numel, _PART, factor, again, table, ctypes.addressof(noise),
        codes.data_ptr(), one_run_in(numel, LOOKED_AT), ctypes.addressof(seen), ctypes.addressof(found),
        keeping,
    )  # fmt: skip
    in_team(library.quantize_all, job, parts)
    largest = _most(list(found))
    some, looked_at = sum(one.some for one in seen), sum(one.all for one in seen)
    measured = Measured(
        exponent if largest else None,
        overflow=sum(one.beyond for one in seen) / looked_at if looked_at else 0.0,
        underflow=sum(one.gone for one in seen) / some if some else 0.0,
        all_zero=not largest,
        error=quantization_error(sum(one.before for one in seen), sum(one.after for one in seen)),
    )
    return Integers(codes, exponent, kept), measured, largest


def _to_keep(values: Tensor, at: int | None) -> Kept | None:
    if at is None:
        return None
    if values.dim() < 2 or values.shape[-1] < _WIDE or not values.numel() or not values.is_contiguous():
        return Kept(at)
    rows = values.numel() // values.shape[-1]
    return Kept(at, torch.empty(rows, SIDE, dtype=torch.float32, device="cpu"))


def _most(found: Sequence[float]) -> float:
    """The largest; NaN if one is."""
    return max(found, default=0.0) if not any(map(math.isnan, found)) else math.nan


def _encode(values: Tensor, codes: Tensor, exponent: int, key: int | None) -> Measured:
    factor, again = _factors(exponent)
    scaled = torch.empty(min(_CHUNK, values.numel()), dtype=torch.float32, device=values.device)
    table = noise_table(values.device) if key is not None else None
    for start in range(0, values.numel(), _CHUNK):
        part = values[start : start + _CHUNK]
        chunk = scaled[: part.numel()]
        torch.mul(part, factor, out=chunk)
        chunk.mul_(again)
        if table is None:
            chunk.round_()
        else:
            offset = noise_at(key or 0, start // _PART) + start % _PART
            chunk.add_(table[offset : offset + part.numel()]).floor_()
        codes[start : start + _CHUNK].copy_(chunk.clamp_(-LARGEST, LARGEST))
    before = sample(values, LOOKED_AT).float() * factor * again
    after = sample(codes, LOOKED_AT).float()
    some = before != 0
    known = int(some.sum())
    return Measured(
        exponent if known else None,
        overflow=float((before.abs() > LARGEST + 0.5).float().mean()) if values.numel() else 0.0,
        underflow=int((some & (after == 0)).sum()) / known if known else 0.0,
        all_zero=not known,
        error=quantization_error(float(before.abs().sum()), float(after.abs().sum())),
    )


def can_multiply(one: Tensor, other: Tensor) -> bool:
    """Whether there is a kernel for codes ``[M, K]`` and ``[K, N]`` where they are."""
    if one.device.type == "cpu":
        return True
    rows, terms, columns = *one.shape, other.shape[1]
    return one.device.type == "cuda" and rows > 16 and terms % 8 == 0 and columns % 8 == 0


def multiply(
    one: Tensor, other: Tensor, exponent: int, bias: Tensor | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """``one @ other * 2 ** -exponent + bias``, summed exactly.

    The sums are converted where they lie, so that a result takes no more memory than it has; if it takes less, the
    memory of the sums is used again.

    Args:
        one: Codes ``[M, K]``, also a transposed view.
        other: Codes ``[K, N]``, likewise.
        exponent: The sum of theirs.
        bias: float32 ``[N]``.
        dtype: Of the result, which is rounded to it from float32.

    Returns:
        ``[M, N]``.

    Raises:
        RuntimeError: If that is no product.
    """
    if one.shape[1] != other.shape[0]:
        raise RuntimeError(f"Shapes {list(one.shape)} and {list(other.shape)} cannot be multiplied.")
    one, other, terms = _plain(one), _plain(other), one.shape[1]
    if 0 < terms <= _MOST_TERMS and one.shape[0] and other.shape[1]:
        if can_tile(one, dtype):
            return multiply_in_tiles(one, other, *_factors(-exponent), bias, dtype)
        if dtype == torch.bfloat16 and one.device.type == "cpu" and _library() is not None:
            shape = one.shape[0], other.shape[1]
            sums = _scratch.memory(4 * math.prod(shape)).view(torch.int32).view(shape)
            return _converted(torch._int_mm(one, other, out=sums), exponent, bias, dtype)
        return _converted(torch._int_mm(one, other), exponent, bias, dtype)
    result = one.new_zeros(one.shape[0], other.shape[1], dtype=torch.float32)
    for start in range(0, terms if result.numel() else 0, _MOST_TERMS):
        sums = torch._int_mm(one[:, start : start + _MOST_TERMS], other[start : start + _MOST_TERMS])
        result += _converted(sums, exponent, None, torch.float32)
    return (result if bias is None else result.add_(bias)).to(dtype)


def _plain(codes: Tensor) -> Tensor:
    """Of a matrix of one row or column: with the strides of one that is no view.

    Without them torch 2.13's kernel for a CPU leaves the result as the memory was.
    """
    return codes.reshape(-1).view(codes.shape) if 1 in codes.shape else codes


_scratch = Scratch()


def _converted(sums: Tensor, exponent: int, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """int32 sums as numbers; float32 lies in the same memory."""
    factor, again = _factors(-exponent)
    rows, columns = sums.shape
    library = _library() if sums.device.type == "cpu" else None
    at_once = max(1, _ROWS // columns)
    if library is not None and dtype in _TYPES:
        result = sums.view(torch.float32) if dtype == torch.float32 else torch.empty(sums.shape, dtype=dtype)
        pointer = bias.data_ptr() if bias is not None else None

        def work(first: int, last: int) -> None:
            rows_here = first * at_once, min(last * at_once, rows)
            library.convert(
                sums.data_ptr(), result.data_ptr(), _TYPES[dtype], columns, factor, again, pointer, *rows_here
            )

        in_threads(work, -(-rows // at_once))
        return result
    result = sums.view(torch.float32)
    for start in range(0, rows, at_once):
        part = result[start : start + at_once]
        part.copy_(sums[start : start + at_once])  # element by element, each over its own bytes
        part.mul_(factor).mul_(again)
        if bias is not None:
            part.add_(bias)
    return result.to(dtype)


def _factors(exponent: int) -> tuple[float, float]:
    """Two powers of two whose product is ``2 ** exponent``, and which float32 has, as it may not have the product."""
    if -126 <= exponent <= 126:
        return math.ldexp(1.0, exponent), 1.0
    half = exponent // 2
    return math.ldexp(1.0, half), math.ldexp(1.0, exponent - half)


def _flat(values: Tensor) -> Tensor:
    return values.contiguous().view(-1)


@cache
def _library() -> Any | None:
    library = compiled(Path(__file__).with_name("integers.c"))
    if library is not None:
        for name, arguments in _ARGUMENTS.items():
            getattr(library, name).argtypes = arguments
        library.largest.restype, library.quantize_all.restype = _FLOAT, None
    return library


def _library_for(values: Tensor) -> Any | None:
    return _library() if values.device.type == "cpu" and values.dtype in _TYPES else None

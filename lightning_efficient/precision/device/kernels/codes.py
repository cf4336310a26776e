"""Tensors become codes: one pass for the largest magnitude, one for codes, both ways round, and what is seen in that.

Sums are of integers, so that they are the same in whatever order programs end: counts, and magnitudes in fractions of
a code's unit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_efficient.core.random import TABLE, noise_table
from lightning_efficient.precision.device.forms import SLOT, Form, Noise
from lightning_efficient.precision.device.kernels.numbers import as_float, device_of, raw, shared, times_power, type_of

__all__ = ["encode", "measure"]

_SPAN, _SPANS = 4096, 4
_ROWS, _COLUMNS = 32, 128
_FORMS = {"int8": 0, "e4m3": 1, "e5m2": 2}


def measure(values: Tensor, measured: Tensor, slot: int) -> None:
    """Into ``measured[slot, 0]``: the bits of the largest magnitude of contiguous ``values``; NaN's if one is."""
    numel = values.numel()
    with device_of(values):
        _measure[-(-numel // (_SPAN * _SPANS)),](
            raw(values), measured, slot, numel, TYPE=type_of(values), SPAN=_SPAN, SPANS=_SPANS, SLOT=SLOT, num_warps=8,
            enable_fp_fusion=False,
        )  # fmt: skip


def encode(
    values: Tensor, form: Form, measured: Tensor, slot: int, rows: Tensor, columns: Tensor, scale: Tensor,
    noise: Noise | None,
) -> None:  # fmt: skip
    """Fill ``rows`` and ``columns`` with codes of ``values`` and zeros around them; the slot, and ``scale``.

    Args:
        values: Contiguous ``[R, C]``.
        form: Of the codes.
        measured: What is seen, a row for each tensor.
        slot: Which.
        rows: ``[at least R, at least C]``, of one byte each.
        columns: The same the other way round.
        scale: float32 ``[1]``: what a code's unit is.
        noise: By which they are rounded up or down.
    """
    high, wide = rows.shape
    table = noise_table(values.device) if noise is not None else scale
    seed = noise.seed if noise is not None else measured
    across = -(-wide // _COLUMNS)
    with device_of(values):
        _encode[-(-high // _ROWS) * across,](
            raw(values), seed, table, measured, _bytes(rows), _bytes(columns), scale, slot,
            noise.count if noise is not None else 0, *values.shape, high, wide, across, FORM=_FORMS[form.name],
            LEAST=form.least, FRACTION=form.fraction, NOISE=noise is not None, TYPE=type_of(values), HEIGHT=_ROWS,
            WIDTH=_COLUMNS, TABLE=TABLE, SLOT=SLOT, num_warps=8, enable_fp_fusion=False,
        )  # fmt: skip


def _bytes(codes: Tensor) -> Tensor:
    return codes.view(torch.int8)


@triton.jit(do_not_specialize=["slot", "numel"])
def _measure(
    values, measured, slot, numel, TYPE: tl.constexpr, SPAN: tl.constexpr, SPANS: tl.constexpr, SLOT: tl.constexpr
):
    start = tl.program_id(0).to(tl.int64) * (SPAN * SPANS)
    most = tl.zeros([SPAN], tl.int32)
    for span in range(SPANS):
        at = start + span * SPAN + tl.arange(0, SPAN)
        x = as_float(tl.load(values + at, mask=at < numel, other=0), TYPE)
        most = tl.maximum(most, x.to(tl.int32, bitcast=True) & 0x7FFFFFFF)  # bits of magnitudes are in their order
    tl.atomic_max(measured + slot * SLOT, tl.max(most, 0).to(tl.int64))


@triton.jit
def _mixed(key, counter):
    """``mix`` of ``core/random.py``."""
    z = key.to(tl.uint64) + (counter + 1).to(tl.uint64) * 0x9E3779B97F4A7C15
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    return z ^ (z >> 31)


@triton.jit
def _noise(seed, table, count, row, column, C, inside, TABLE: tl.constexpr):
    """``noise_at``: a piece of so many numbers has its own place in the table; a row of a tile is in two at most."""
    key = _mixed(tl.load(seed), count.to(tl.int64))
    flat = row.to(tl.int64) * C + column
    first = tl.min(flat, 1)[:, None] // TABLE
    before = (_mixed(key, first) & (TABLE - 1)).to(tl.int64)
    behind = (_mixed(key, first + 1) & (TABLE - 1)).to(tl.int64)
    offset = tl.where(flat // TABLE == first, before, behind)
    return tl.load(table + offset + flat % TABLE, mask=inside, other=0.0)


@triton.jit
def _float8(x, MANTISSA: tl.constexpr, BIAS: tl.constexpr):
    """Codes, to nearest, ties to even; of numbers that do not round beyond the largest. And their magnitudes."""
    drop: tl.constexpr = 23 - MANTISSA
    bits = x.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    normal = ((size + ((1 << (drop - 1)) - 1) + ((size >> drop) & 1)) >> drop) - ((127 - BIAS) << MANTISSA)
    # Next to some power of two the numbers of float32 are as far from each other as the least ones of the format.
    power: tl.constexpr = (127 + drop - BIAS + 1) << 23
    least = tl.full(x.shape, power, tl.int32).to(tl.float32, bitcast=True)
    small = (tl.abs(x) + least).to(tl.int32, bitcast=True) - power
    is_small = size < ((128 - BIAS) << 23)
    code = tl.where(is_small, small, normal)
    exact = tl.abs(x) + least - least
    back = ((normal + ((127 - BIAS) << MANTISSA)) << drop).to(tl.float32, bitcast=True)
    return code | ((bits >> 24) & 0x80), tl.where(is_small, exact, back)


@triton.jit(do_not_specialize=["slot", "count", "R", "across"])
def _encode(
    values, seed, table, measured, rows, columns, scale, slot, count, R, C, high, wide, across,
    FORM: tl.constexpr, LEAST: tl.constexpr, FRACTION: tl.constexpr, NOISE: tl.constexpr, TYPE: tl.constexpr,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, TABLE: tl.constexpr, SLOT: tl.constexpr,
):  # fmt: skip
    first_row = (tl.program_id(0) // across) * HEIGHT
    first_column = (tl.program_id(0) % across) * WIDTH
    down, right = tl.arange(0, HEIGHT)[:, None], tl.arange(0, WIDTH)[None, :]
    row, column = first_row + down, first_column + right
    inside = (row < R) & (column < C)
    seen = measured + slot * SLOT
    largest = tl.load(seen).to(tl.int32)
    exponent = shared(largest, LEAST)
    if FORM != 0:
        exponent = tl.minimum(exponent, 126)  # so that the scale, which is a factor of its own, is a number
    # Only where a tile begins may take 64 bits to say.
    x = as_float(tl.load(values + first_row.to(tl.int64) * C + (down * C + column), mask=inside, other=0), TYPE)
    x = tl.where(largest < 0x7F800000, x, 0.0)
    scaled = times_power(x, exponent)
    if FORM == 0:
        if NOISE:
            rounded = tl.floor(scaled + _noise(seed, table, count, row, column, C, inside, TABLE))
        else:
            rounded = (scaled + 12582912.0) - 12582912.0  # to nearest, ties to even
        after = tl.minimum(tl.maximum(rounded, -127.0), 127.0)
        codes = after.to(tl.int32)
        beyond = (after != rounded).to(tl.int32)
        after = tl.abs(after)
    else:
        if FORM == 1:
            codes, after = _float8(scaled, 3, 7)
        else:
            codes, after = _float8(scaled, 2, 15)
        beyond = tl.zeros([HEIGHT, WIDTH], tl.int32)
    codes = codes.to(tl.int8)
    place = rows + first_row.to(tl.int64) * wide
    tl.store(place + (down * wide + column), codes, mask=(row < high) & (column < wide))
    place = columns + first_column.to(tl.int64) * high
    down, right = tl.arange(0, WIDTH)[:, None], tl.arange(0, HEIGHT)[None, :]
    there = (first_row + right < high) & (first_column + down < wide)
    tl.store(place + (down * high + first_row + right), tl.trans(codes), mask=there)
    some = (x != 0).to(tl.int32)
    lost = some * (after == 0).to(tl.int32)
    one = (1 << FRACTION) * 1.0
    before = (tl.abs(scaled) * one).to(tl.int32)
    tl.atomic_add(seen + 1, _total(beyond))
    tl.atomic_add(seen + 2, _total(lost))
    tl.atomic_add(seen + 3, _total(some))
    tl.atomic_add(seen + 4, _total(before))
    tl.atomic_add(seen + 5, _total((after * one).to(tl.int32)))
    if tl.program_id(0) == 0:
        tl.store(scale, times_power(tl.full([], 1.0, tl.float32), -exponent))


@triton.jit
def _total(numbers):
    """A row of them fits in 32 bits."""
    return tl.sum(tl.sum(numbers, 1).to(tl.int64), 0)

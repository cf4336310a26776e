"""What ``core/quantization.py`` does, for a GPU: one launch to encode and one to decode, whatever the size.

(Where the last chunk has no whole number of eighths of groups, three to encode.) A program works on the same columns of
the eight parts, one below the other, of a chunk: their codes share bytes, at any number of bits. Where a row of a part
is a group, its statistics are made on the way, so that the numbers are read once.

The results are the bits that the eager code gives: each operation rounds by itself (``enable_fp_fusion=False``), but
for the one that is fused there too (``addcmul``); bfloat16 and 8-bit floats are rounded by integer operations, for
Triton's interpreter truncates them, and not all GPUs have the latter.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_efficient.core.random import TABLE, noise_table

__all__ = ["decode", "encode"]

_CHUNK = TABLE
_WIDEST_ROW = 1024  # numbers of a group whose statistics are made on the way
_COLUMNS = 256
_SPAN = 4096  # numbers that are read at a time where only statistics are made


def encode(
    values: Tensor,
    payload: Tensor,
    code: int | str,
    group_size: int,
    rounding: str,
    key: int,
    factor: float,
    least: float,
) -> tuple[Tensor, Tensor | None]:
    """Fill ``payload``.

    Args:
        values: Contiguous ``[n]``.
        payload: uint8.
        code: Bits, or ``"fp8"``.
        group_size: Numbers that share a scale.
        rounding: As in ``core/quantization.py``.
        key: Of the noise.
        factor: What the spread of a group times this is, is its scale.
        least: A scale is not smaller.

    Returns:
        The scales, bfloat16 ``[groups]``, NaN where something is not finite; and the minima, None for ``"fp8"``.
    """
    numel, floats = values.numel(), code == "fp8"
    groups = -(-numel // group_size)
    scale = torch.empty(groups, dtype=torch.bfloat16, device=values.device)
    minimum = scale if floats else torch.empty_like(scale)  # which is not touched where there is none
    whole = numel // group_size * group_size
    in_rows = whole if whole % (8 * group_size) == 0 else whole // _CHUNK * _CHUNK
    if group_size > _WIDEST_ROW:
        in_rows = 0
    common = {
        "FACTOR": factor, "LEAST": least, "FLOATS": floats, "BFLOAT16": values.dtype == torch.bfloat16,
        "enable_fp_fusion": False,
    }  # fmt: skip
    with _device_of(values):
        for start, end, rows in ((0, in_rows, True), (in_rows, numel, False)):
            if start == end:
                continue
            if not rows:
                _statistics_of_groups[groups - start // group_size,](
                    _bits(values), _bits(scale), _bits(minimum), start // group_size, numel, GROUP=group_size,
                    SPAN=min(group_size, _SPAN), **common,
                )  # fmt: skip
            columns = group_size if rows else _COLUMNS
            chunks, blocks = _grid(start, end, whole, columns)
            _encode[chunks * blocks,](
                _bits(values), payload, _bits(scale), _bits(minimum), noise_table(values.device), _signed(key), numel,
                whole, -(-start // _CHUNK), blocks, GROUP=group_size, BITS=8 if floats else code,
                NEAREST=rounding == "nearest", ROWS=rows, COLUMNS=columns, CHUNK=_CHUNK,
                FULL=rows or numel % 64 == 0, **common,
            )  # fmt: skip
    return scale, None if floats else minimum


def decode(
    values: Tensor,
    payload: Tensor,
    scale: Tensor,
    minimum: Tensor | None,
    code: int | str,
    group_size: int,
    rounding: str,
    key: int,
) -> None:
    """Fill ``values`` with the numbers; see :func:`encode`."""
    numel, floats = values.numel(), code == "fp8"
    if not numel:
        return
    whole = numel // group_size * group_size
    columns = min(group_size, _COLUMNS)
    rows = numel == whole and numel % (8 * columns) == 0
    chunks, blocks = _grid(0, numel, whole, columns)
    with _device_of(values):
        _decode[chunks * blocks,](
            _bits(values), payload, _bits(scale), _bits(scale if minimum is None else minimum),
            noise_table(values.device), _signed(key), numel, whole, blocks, GROUP=group_size,
            BITS=8 if floats else code, FLOATS=floats, DITHER=rounding == "dither", ROWS=rows, COLUMNS=columns,
            CHUNK=_CHUNK, FULL=numel % 64 == 0, BFLOAT16=values.dtype == torch.bfloat16, enable_fp_fusion=False,
        )  # fmt: skip


def _device_of(values: Tensor) -> AbstractContextManager[object]:
    """Within it kernels are launched there; the interpreter takes tensors in the host's memory."""
    return torch.cuda.device(values.device) if values.is_cuda else nullcontext()


def _bits(tensor: Tensor) -> Tensor:
    return tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor


def _signed(key: int) -> int:
    return (key & (1 << 64) - 1) - (key >> 63 & 1) * (1 << 64)


def _grid(start: int, end: int, whole: int, columns: int) -> tuple[int, int]:
    """Chunks from ``start`` to ``end``, the part of a group at the end is one of its own; blocks of columns in each."""
    chunks = -(-(min(end, whole) - start) // _CHUNK) + (end > whole)
    widest = -(-min(_CHUNK, end - start) // 64) * 8
    return chunks, -(-widest // columns)


@triton.jit
def _float(bits, BFLOAT16: tl.constexpr):
    if BFLOAT16:
        return (bits.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        return bits.to(tl.float32)


@triton.jit
def _bfloat16(x):
    """To nearest, ties to even."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(x == x, (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16, 0x7FC0).to(tl.int16)


@triton.jit
def _float8(x):
    """Codes of e4m3, to nearest, ties to even; of numbers that are less than 464."""
    bits = x.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - (120 << 3)
    # Next to 2^14 the numbers of float32 are as far from each other as the least ones of e4m3.
    small = (tl.abs(x) + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    return tl.where(size < 0x3C800000, small, normal) | ((bits >> 24) & 0x80)


@triton.jit
def _piece(chunk, numel, whole, CHUNK: tl.constexpr):
    """Where a chunk begins, how many numbers it has, and an eighth of those that it is filled up to."""
    last = (whole.to(tl.int64) + CHUNK - 1) // CHUNK
    start = tl.where(chunk < last, chunk * CHUNK, whole)
    end = tl.where(chunk < last, tl.minimum(start + CHUNK, whole), numel)
    size = (end - start).to(tl.int32)
    return tl.multiple_of(start, 64), size, (size + 63) // 64 * 8


@triton.jit
def _tile(first_column, size, eighth, FULL: tl.constexpr, COLUMNS: tl.constexpr):
    """Where in the chunk its numbers are, their columns, and which of them there are."""
    columns = first_column + tl.arange(0, COLUMNS)[None, :]
    at = tl.arange(0, 8)[:, None] * eighth + columns
    inside = tl.broadcast_to(columns < eighth, [8, COLUMNS])
    if not FULL:
        inside = inside & (at < size)
    return at, columns, inside


@triton.jit
def _noise(table, key, chunk, at, inside, CHUNK: tl.constexpr):
    """``noise_at`` of ``core/random.py``."""
    z = key.to(tl.uint64) + (chunk + 1).to(tl.uint64) * 0x9E3779B97F4A7C15
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    offset = ((z ^ (z >> 31)) & (CHUNK - 1)).to(tl.int32)
    return tl.load(table + offset + at, mask=inside, other=0.0)


@triton.jit
def _statistics(low, high, finite, FACTOR: tl.constexpr, LEAST: tl.constexpr, FLOATS: tl.constexpr):
    """Scales and minima, the bits of bfloat16."""
    if FLOATS:
        minimum = tl.zeros_like(low).to(tl.int16)
        spread = tl.maximum(high, -low)
    else:
        minimum = _bfloat16(low - tl.abs(low) * 0.00390625)
        spread = high - _float(minimum, True)
    scale = _bfloat16(tl.maximum(spread * FACTOR, LEAST))
    finite = (finite > 0) & (scale < 0x7F80)
    return tl.where(finite, scale, 0x7FC0).to(tl.int16), tl.where(finite, minimum, 0).to(tl.int16)


@triton.jit(do_not_specialize=["first", "numel"])
def _statistics_of_groups(
    values, scale, minimum, first, numel,
    GROUP: tl.constexpr, SPAN: tl.constexpr, FACTOR: tl.constexpr, LEAST: tl.constexpr, FLOATS: tl.constexpr,
    BFLOAT16: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(0).to(tl.int64) + first
    low = tl.full([SPAN], float("inf"), tl.float32)
    high = tl.full([SPAN], float("-inf"), tl.float32)
    finite = tl.full([SPAN], 1, tl.int32)
    for begin in range(0, GROUP, SPAN):
        at = group * GROUP + begin + tl.arange(0, SPAN)
        inside = at < numel
        x = _float(tl.load(values + at, mask=inside, other=0), BFLOAT16)
        low = tl.minimum(low, tl.where(inside, x, float("inf")))
        high = tl.maximum(high, tl.where(inside, x, float("-inf")))
        finite = tl.minimum(finite, (tl.abs(x) < float("inf")).to(tl.int32))
    found = _statistics(tl.min(low, 0), tl.max(high, 0), tl.min(finite, 0), FACTOR, LEAST, FLOATS)
    tl.store(scale + group, found[0])
    if not FLOATS:
        tl.store(minimum + group, found[1])


@triton.jit(do_not_specialize=["key", "numel", "whole", "first", "blocks"])
def _encode(
    values, payload, scale, minimum, table, key, numel, whole, first, blocks,
    GROUP: tl.constexpr, BITS: tl.constexpr, FLOATS: tl.constexpr, NEAREST: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, CHUNK: tl.constexpr, FULL: tl.constexpr, FACTOR: tl.constexpr, LEAST: tl.constexpr,
    BFLOAT16: tl.constexpr,
):  # fmt: skip
    chunk = (tl.program_id(0) // blocks).to(tl.int64) + first
    start, size, eighth = _piece(chunk, numel, whole, CHUNK)
    first_column = (tl.program_id(0) % blocks) * COLUMNS
    if first_column >= eighth:
        return
    at, columns, inside = _tile(first_column, size, eighth, FULL, COLUMNS)
    x = _float(tl.load(values + start + at, mask=inside, other=0), BFLOAT16)
    if ROWS:
        group = start // GROUP + (tl.arange(0, 8) * eighth + first_column) // GROUP
        finite = tl.min((tl.abs(x) < float("inf")).to(tl.int32), 1)
        low, high = tl.min(x, 1), tl.max(x, 1)
        steps, floors = _statistics(low, high, finite, FACTOR, LEAST, FLOATS)
        tl.store(scale + group, steps)
        if not FLOATS:
            tl.store(minimum + group, floors)
        steps, floors = steps[:, None], floors[:, None]
    else:
        group = start // GROUP + at // GROUP
        steps = tl.load(scale + group, mask=inside, other=0x3F80)
        floors = tl.load(minimum + group, mask=inside, other=0)
    step = _float(steps, True)
    inverse = tl.div_rn(tl.full(step.shape, 1.0, tl.float32), step)
    if FLOATS:
        codes = _float8(x * inverse)
    else:
        numbers = x - _float(floors, True)
        if NEAREST:
            numbers = numbers * inverse + 0.5
        else:
            inverse = tl.broadcast_to(inverse, [8, COLUMNS])
            numbers = tl.fma(numbers, inverse, _noise(table, key, chunk, at, inside, CHUNK))
        if BITS == 8:
            numbers = tl.floor(numbers - 128.0)
        codes = tl.where(step == step, numbers, 0.0).to(tl.int32)
    codes = tl.where(inside & (step == step), codes, 0)
    plane = payload + start * BITS // 8
    if BITS == 8:
        tl.store(plane + at, codes.to(tl.uint8), mask=columns < eighth)
    if BITS & 4 != 0:
        _store_plane(plane, codes, columns, eighth, 4, 0, COLUMNS)
    if BITS & 2 != 0:
        _store_plane(plane + (BITS & 4) * eighth, codes, columns, eighth, 2, BITS & 4, COLUMNS)
    if BITS & 1 != 0:
        _store_plane(plane + (BITS & 6) * eighth, codes, columns, eighth, 1, BITS & 6, COLUMNS)


@triton.jit
def _store_plane(plane, codes, columns, eighth, WIDTH: tl.constexpr, SHIFT: tl.constexpr, COLUMNS: tl.constexpr):
    """``WIDTH`` bits of each code: a byte holds those of as many parts as it has room for."""
    places = tl.arange(0, 8)[:, None] // WIDTH * WIDTH
    parts = ((codes >> SHIFT) & ((1 << WIDTH) - 1)) << places
    joined = tl.sum(tl.reshape(parts, [8 // WIDTH, WIDTH, COLUMNS]), 0)
    at = tl.arange(0, WIDTH)[:, None] * eighth + columns
    tl.store(plane + at, joined.to(tl.uint8), mask=tl.broadcast_to(columns < eighth, [WIDTH, COLUMNS]))


@triton.jit
def _load_plane(plane, columns, eighth, WIDTH: tl.constexpr, SHIFT: tl.constexpr):
    rows = tl.arange(0, 8)[:, None]
    joined = tl.load(plane + rows % WIDTH * eighth + columns, mask=(rows >= 0) & (columns < eighth), other=0)
    return ((joined.to(tl.int32) >> (rows // WIDTH * WIDTH)) & ((1 << WIDTH) - 1)) << SHIFT


@triton.jit(do_not_specialize=["key", "numel", "whole", "blocks"])
def _decode(
    values, payload, scale, minimum, table, key, numel, whole, blocks,
    GROUP: tl.constexpr, BITS: tl.constexpr, FLOATS: tl.constexpr, DITHER: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, CHUNK: tl.constexpr, FULL: tl.constexpr, BFLOAT16: tl.constexpr,
):  # fmt: skip
    chunk = (tl.program_id(0) // blocks).to(tl.int64)
    start, size, eighth = _piece(chunk, numel, whole, CHUNK)
    first_column = (tl.program_id(0) % blocks) * COLUMNS
    if first_column >= eighth:
        return
    at, columns, inside = _tile(first_column, size, eighth, FULL, COLUMNS)
    if ROWS:
        group = start // GROUP + (tl.arange(0, 8)[:, None] * eighth + first_column) // GROUP
        step = _float(tl.load(scale + group), True)
        floor = _float(tl.load(minimum + group), True)
    else:
        group = start // GROUP + at // GROUP
        step = _float(tl.load(scale + group, mask=inside, other=0), True)
        floor = _float(tl.load(minimum + group, mask=inside, other=0), True)
    plane = payload + start * BITS // 8
    codes = tl.load(plane + at, mask=inside, other=0).to(tl.int32) if BITS == 8 else tl.zeros([8, COLUMNS], tl.int32)
    if BITS & 4 != 0:
        codes = codes | _load_plane(plane, columns, eighth, 4, 0)
    if BITS & 2 != 0:
        codes = codes | _load_plane(plane + (BITS & 4) * eighth, columns, eighth, 2, BITS & 4)
    if BITS & 1 != 0:
        codes = codes | _load_plane(plane + (BITS & 6) * eighth, columns, eighth, 1, BITS & 6)
    if FLOATS:
        numbers = (((codes & 0x80) << 24) | ((codes & 0x7F) << 20)).to(tl.float32, bitcast=True)
        numbers = numbers * 1329227995784915872903807060280344576.0 * step
    else:
        if BITS == 8:
            codes = codes.to(tl.uint8).to(tl.int8, bitcast=True)
            floor = floor + step * 128.5 if DITHER else floor + step * 128.0
        elif DITHER:
            floor = floor + step * 0.5
        numbers = codes.to(tl.float32)
        if DITHER:
            numbers = numbers - _noise(table, key, chunk, at, inside, CHUNK)
        numbers = numbers * step + floor
    if BFLOAT16:
        tl.store(values + start + at, _bfloat16(numbers), mask=inside)
    else:
        tl.store(values + start + at, numbers.to(values.dtype.element_ty), mask=inside)

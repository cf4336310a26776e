"""A product: the sums of codes become numbers; a look at them; and the whole of it once more in high bits, if it must.

The grid of the last is launched always, and its programs end at once where the row of the product says that low bits
are fine: so neither the host nor a graph of launches has to know.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_efficient.precision.device.forms import INT8, SLOT
from lightning_efficient.precision.device.kernels.numbers import (
    as_bfloat16,
    as_float,
    as_type,
    device_of,
    raw,
    shared,
    times_power,
    type_of,
)
from lightning_efficient.precision.device.probes import sampled
from lightning_efficient.precision.device.rows import FLAG, WIDTH
from lightning_efficient.precision.probes import GROUP, SIDE

__all__ = ["again", "finish", "look"]

_SPAN = 1024
_TERMS = 256  # of a probe's sums at a time


def finish(sums: Tensor, out: Tensor, bias: Tensor | None, measured: Tensor, one: int, other: int) -> None:
    """``out``: of int32 ``sums`` ``[at least M, at least N]`` of codes, the numbers, with ``bias``, in its type.

    Args:
        sums: Of products of codes.
        out: ``[M, N]``, contiguous.
        bias: ``[N]``.
        measured: What was seen of all tensors.
        one: The slot of an operand there.
        other: Of the other.
    """
    with device_of(out):
        _finish[triton.cdiv(out.shape[0], 16) * triton.cdiv(out.shape[1], 256),](
            sums, raw(out), raw(bias) if bias is not None else sums, measured, one, other, *out.shape, sums.stride(0),
            LEAST=INT8.least, TYPE=type_of(out), BIAS=type_of(bias) if bias is not None else -1,
            HEIGHT=16, WIDTH=256, SLOT=SLOT, enable_fp_fusion=False,
        )  # fmt: skip


def look(
    out: Tensor, a: Tensor, b: Tensor, bias: Tensor | None, measured: Tensor, slot: int, probes: Tensor, at: int,
    result: Tensor | None = None,
) -> None:  # fmt: skip
    """Into ``measured[slot, 0]`` the largest magnitude of a sample of ``out``; of a block of it, how far it is off.

    Args:
        out: ``[M, N]``, contiguous.
        a: ``[M, K]``, of any strides.
        b: ``[N, K]``, likewise.
        bias: ``[N]``.
        measured: What was seen of all tensors.
        slot: Of the result there.
        probes: float32 ``[SIDE, 2]``: of each row of the block, squares of what it is off and of what it is.
        at: Where the block is.
        result: Of which the sample is taken, if not of ``out``.
    """
    result = out if result is None else result
    runs, every = sampled(result.numel())
    rows = min(out.shape[0], SIDE)
    with device_of(out):
        _look[rows + triton.cdiv(runs, _SPAN),](
            raw(out), raw(result), raw(a), raw(b), raw(bias) if bias is not None else raw(out), measured, slot, probes,
            *out.shape, a.shape[1], *a.stride(), *b.stride(), at, rows, runs, every, TYPE=type_of(out),
            RESULT=type_of(result), A=type_of(a), B=type_of(b), BIAS=type_of(bias) if bias is not None else -1,
            SPAN=_SPAN, TERMS=_TERMS, SIDE=SIDE, GROUP=GROUP, SLOT=SLOT, enable_fp_fusion=False,
        )  # fmt: skip


def again(
    out: Tensor, a: Tensor, b: Tensor, bias: Tensor | None, high: torch.dtype, state: Tensor, row: int,
    column: int = FLAG,
) -> None:  # fmt: skip
    """``a @ b.T + bias`` over ``out``, in the type ``high``, if the flag of the product is set; else nothing.

    Args:
        out: ``[M, N]``, contiguous.
        a: ``[M, K]``, of any strides.
        b: ``[N, K]``, likewise.
        bias: ``[N]``.
        high: bfloat16 or float32.
        state: The table.
        row: Of the product.
        column: Of the flag.
    """
    rows, columns = out.shape
    on_gpu, half = out.is_cuda, high == torch.bfloat16
    height, width, terms = ((128, 128, 64) if half else (64, 64, 32)) if on_gpu else (32, 32, 32)
    with device_of(out):
        _again[triton.cdiv(rows, height) * triton.cdiv(columns, width),](
            raw(out), raw(a), raw(b), raw(bias) if bias is not None else raw(out), state, row, rows, columns,
            a.shape[1], *a.stride(), *b.stride(), TYPE=type_of(out), A=type_of(a), B=type_of(b),
            BIAS=type_of(bias) if bias is not None else -1, HALF=half, CORES=on_gpu, HEIGHT=height, WIDTH=width,
            TERMS=terms, GROUP=8, FLAG=column, ROW=WIDTH, num_warps=8 if on_gpu and half else 4,
            num_stages=3 if on_gpu else 1, enable_fp_fusion=True,
        )  # fmt: skip


@triton.jit(do_not_specialize=["one", "other", "M"])
def _finish(
    sums, out, bias, measured, one, other, M, N, stride, LEAST: tl.constexpr, TYPE: tl.constexpr,
    BIAS: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, SLOT: tl.constexpr,
):  # fmt: skip
    across = tl.cdiv(N, WIDTH)
    row = (tl.program_id(0) // across).to(tl.int64) * HEIGHT + tl.arange(0, HEIGHT)[:, None]
    column = (tl.program_id(0) % across) * WIDTH + tl.arange(0, WIDTH)[None, :]
    inside = (row < M) & (column < N)
    exponent = shared(tl.load(measured + one * SLOT).to(tl.int32), LEAST)
    exponent += shared(tl.load(measured + other * SLOT).to(tl.int32), LEAST)
    x = tl.load(sums + row * stride + column, mask=inside, other=0).to(tl.float32)
    x = times_power(x, -exponent)
    if BIAS >= 0:
        x += as_float(tl.load(bias + column, mask=column < N, other=0), BIAS)
    tl.store(out + row * N + column, as_type(x, TYPE), mask=inside)


@triton.jit
def _place(number, size, at, SIDE: tl.constexpr, GROUP: tl.constexpr):
    """As ``probes.places``."""
    spread = number // GROUP * (size * GROUP // SIDE) + number % GROUP
    return (tl.where(size < SIDE, number, spread) + at) % size


@triton.jit(do_not_specialize=["slot", "at", "rows", "runs", "every"])
def _look(
    out, result, a, b, bias, measured, slot, probes, M, N, K, a_row, a_term, b_row, b_term, at, rows, runs, every,
    TYPE: tl.constexpr, RESULT: tl.constexpr, A: tl.constexpr, B: tl.constexpr, BIAS: tl.constexpr,
    SPAN: tl.constexpr, TERMS: tl.constexpr, SIDE: tl.constexpr, GROUP: tl.constexpr, SLOT: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    if program >= rows:
        number = (program - rows).to(tl.int64) * SPAN + tl.arange(0, SPAN)
        place = number // 64 * (64 * every) + number % 64
        x = as_float(tl.load(result + place, mask=number < runs, other=0), RESULT)
        tl.atomic_max(measured + slot * SLOT, tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0).to(tl.int64))
    else:
        row = _place(program, M, at, SIDE, GROUP).to(tl.int64)
        places = tl.arange(0, SIDE)
        some = places < N
        column = _place(places, N, at, SIDE, GROUP).to(tl.int64)
        exact = tl.zeros([SIDE], tl.float32)
        for first in range(0, K, TERMS):
            term = (first + tl.arange(0, TERMS)).to(tl.int64)
            x = as_float(tl.load(a + row * a_row + term * a_term, mask=term < K, other=0), A)
            inside = some[:, None] & (term < K)[None, :]
            y = as_float(tl.load(b + column[:, None] * b_row + term[None, :] * b_term, mask=inside, other=0), B)
            exact += tl.sum(x[None, :] * y, 1)
        if BIAS >= 0:
            exact += as_float(tl.load(bias + column, mask=some, other=0), BIAS)
        found = as_float(tl.load(out + row * N + column, mask=some, other=0), TYPE)
        tl.store(probes + program * 2, tl.sum(tl.where(some, (found - exact) * (found - exact), 0.0), 0))
        tl.store(probes + program * 2 + 1, tl.sum(tl.where(some, exact * exact, 0.0), 0))


@triton.jit
def _high(bits, TYPE: tl.constexpr, HALF: tl.constexpr, CORES: tl.constexpr):
    """In the type of high bits; in the interpreter, which multiplies no bfloat16, the same numbers in float32."""
    if HALF:
        if CORES:
            if TYPE == 1:
                return bits.to(tl.bfloat16, bitcast=True)
            else:
                return bits.to(tl.bfloat16)
        else:
            return as_float(as_bfloat16(as_float(bits, TYPE)), 1)
    else:
        return as_float(bits, TYPE)


@triton.jit(do_not_specialize=["row"])
def _again(
    out, a, b, bias, state, row, M, N, K, a_row, a_term, b_row, b_term,
    TYPE: tl.constexpr, A: tl.constexpr, B: tl.constexpr, BIAS: tl.constexpr, HALF: tl.constexpr,
    CORES: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, TERMS: tl.constexpr, GROUP: tl.constexpr,
    FLAG: tl.constexpr, ROW: tl.constexpr,
):  # fmt: skip
    if tl.load(state + row * ROW + FLAG) == 0:
        return
    # Programs that run at the same time share rows and columns, so that those are in the cache.
    down, across = tl.cdiv(M, HEIGHT), tl.cdiv(N, WIDTH)
    together = GROUP * across
    first = tl.program_id(0) // together * GROUP
    size = tl.minimum(down - first, GROUP)
    first_row = (first + tl.program_id(0) % together % size) * HEIGHT
    first_column = (tl.program_id(0) % together // size) * WIDTH
    down, right, terms = tl.arange(0, HEIGHT), tl.arange(0, WIDTH), tl.arange(0, TERMS)
    rows, columns = first_row + down, first_column + right
    # Only where a tile begins may take 64 bits to say.
    a += first_row.to(tl.int64) * a_row
    b += first_column.to(tl.int64) * b_row
    a_tile, b_tile = down[:, None] * a_row + terms[None, :] * a_term, right[None, :] * b_row + terms[:, None] * b_term
    total = tl.zeros([HEIGHT, WIDTH], tl.float32)
    for begin in range(0, K, TERMS):
        x = tl.load(a + a_tile, mask=(rows < M)[:, None] & (terms < K - begin)[None, :], other=0)
        y = tl.load(b + b_tile, mask=(terms < K - begin)[:, None] & (columns < N)[None, :], other=0)
        a += TERMS * a_term
        b += TERMS * b_term
        total = tl.dot(_high(x, A, HALF, CORES), _high(y, B, HALF, CORES), total, input_precision="ieee")
    if BIAS >= 0:
        added = as_float(tl.load(bias + columns, mask=columns < N, other=0), BIAS)
        if HALF:
            added = as_float(as_bfloat16(added), 1)
        total += added[None, :]
    if HALF:
        total = as_float(as_bfloat16(total), 1)  # as a result in high bits is, before it takes the type of the result
    inside = (rows < M)[:, None] & (columns < N)[None, :]
    out += first_row.to(tl.int64) * N
    tl.store(out + (down[:, None] * N + columns[None, :]), as_type(total, TYPE), mask=inside)

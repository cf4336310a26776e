"""The rules of ``signs.py``, ``nodes.py`` and ``status.py``, for one product, as a program of a GPU.

What is long there in Python is here in the same order; a test holds the two against one another over hundreds of
products. All is float64, and no multiplication is fused with an addition, as in Python.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from lightning_efficient.precision.device import rows as layout
from lightning_efficient.precision.device.forms import SLOT
from lightning_efficient.precision.device.kernels.numbers import device_of, exponent_of
from lightning_efficient.precision.device.verdict import Seen
from lightning_efficient.precision.probes import SIDE
from lightning_efficient.precision.signs import ERROR_MARGIN, EXPONENT_MARGIN, RATIO_MARGIN

__all__ = ["decide"]

_C = tl.constexpr
COUNT, EXPONENTS, OVERFLOW, UNDERFLOW = (_C(layout.COUNT), _C(layout.EXPONENTS), _C(layout.OVERFLOW),
                                         _C(layout.UNDERFLOW))  # fmt: skip
ERROR, RANGE = _C(layout.ERROR), _C(layout.RANGE)
HIGH, LOW, RETRIES, RECENT_LOW = _C(layout.HIGH), _C(layout.LOW), _C(layout.RETRIES), _C(layout.RECENT_LOW)
RECENT_RETRIES, WAIT, LEFT, GOOD = _C(layout.RECENT_RETRIES), _C(layout.WAIT), _C(layout.LEFT), _C(layout.GOOD)
REASON, VALUE, LIMIT = _C(layout.REASON), _C(layout.VALUE), _C(layout.LIMIT)
FLAG, DOUBT, SIZES = _C(layout.FLAG), _C(layout.DOUBT), _C(layout.SIZES)
DISTANCES, ALLOWED, PROBE, RESULT = _C(layout.DISTANCES), _C(layout.ALLOWED), _C(layout.PROBE), _C(layout.RESULT)
IN_A_ROW, RETURN_AFTER, RETRY_RATE = _C(layout.IN_A_ROW), _C(layout.RETURN_AFTER), _C(layout.RETRY_RATE)
RECENT, LONGEST_WAIT = _C(layout.RECENT), _C(layout.LONGEST_WAIT)
NOT_FINITE, ZERO, OVER, UNDER = _C(layout.NOT_FINITE), _C(layout.ZERO), _C(layout.OVER), _C(layout.UNDER)
OFF, VARIES, APART, PROBED = _C(layout.OFF), _C(layout.VARIES), _C(layout.APART), _C(layout.PROBED)
OPERAND = _C(layout.OPERAND)
RATIO, ERRORS, SPREAD = _C(RATIO_MARGIN), _C(ERROR_MARGIN), _C(float(EXPONENT_MARGIN))


def decide(state: Tensor, measured: Tensor, probes: Tensor, seen: Seen) -> None:
    """See :func:`lightning_efficient.precision.device.verdict.decide`."""
    with device_of(state):
        _decide[1,](
            state, measured, probes, *seen.rows, layout.product_row(seen.first, "forward"), *seen.slots, *seen.numels,
            seen.probed, FORWARD=seen.role == "forward", LEARN=seen.learning, FIXED=seen.fixed, PROTECT=seen.protect,
            PROBES=bool(seen.probed), SIDE=SIDE, ROW=layout.WIDTH, SLOT=SLOT, num_warps=1, enable_fp_fusion=False,
        )  # fmt: skip


@triton.jit
def _append(row, number, going, lanes):
    """Of the last eight numbers the oldest goes."""
    count = tl.load(row + COUNT)
    later = tl.load(row + EXPONENTS + 1 + lanes, mask=lanes < 7, other=0.0)
    tl.store(row + EXPONENTS + lanes, tl.where(lanes == 7, number, later), mask=lanes < tl.where(going, 8, 0))
    tl.store(row + COUNT, tl.minimum(count + 1, 8.0), mask=going)


@triton.jit
def _spread(row, number, lanes):
    """Between the largest and the smallest of the last seven numbers and this one."""
    there = (lanes >= 8 - tl.load(row + COUNT)) & (lanes >= 1)
    numbers = tl.load(row + EXPONENTS + lanes)
    most = tl.maximum(tl.max(tl.where(there, numbers, float("-inf")), 0), number)
    return most - tl.minimum(tl.min(tl.where(there, numbers, float("inf")), 0), number)


@triton.jit
def _median(row, lanes):
    """Of the last eight numbers; 0 if there are none."""
    count = tl.load(row + COUNT)
    numbers = tl.load(row + EXPONENTS + lanes)
    there = lanes >= 8 - count
    others = tl.load(row + EXPONENTS + lanes)
    before = (others[None, :] < numbers[:, None]) | (
        (others[None, :] == numbers[:, None]) & (lanes[None, :] < lanes[:, None])
    )
    place = tl.sum((before & (lanes >= 8 - count)[None, :]).to(tl.int32), 1)
    n = count.to(tl.int32)
    lower = tl.sum(tl.where(there & (place == (n - 1) // 2), numbers, 0.0), 0)
    upper = tl.sum(tl.where(there & (place == n // 2), numbers, 0.0), 0)
    return (lower + upper) / 2


@triton.jit
def _seen(slot, numel):
    """Of a tensor: finite, all zero, its exponent, overflow, underflow, quantization error (-1: none)."""
    largest = tl.load(slot).to(tl.int32)
    finite = largest < 0x7F800000
    some = tl.load(slot + 3).to(tl.float64)
    over = tl.load(slot + 1).to(tl.float64) / numel.to(tl.float64)
    under = tl.load(slot + 2).to(tl.float64) / tl.maximum(some, 1.0)
    before = tl.load(slot + 4).to(tl.float64)
    off = tl.abs(before - tl.load(slot + 5).to(tl.float64)) / tl.maximum(before, 1.0)
    error = tl.where(before > 0, tl.log2(off + 1), -1.0)
    return finite, some == 0, (7 - exponent_of(largest)).to(tl.float64), over, under, error


@triton.jit
def _sign(row, going, finite, zero, exponent, over, under, error, lanes):
    """``Tracker.sign``: a code, what was measured, the limit."""
    code = tl.where(finite, 0, NOT_FINITE)
    there = finite & (zero == 0)
    code = tl.where(finite & zero & (tl.load(row + COUNT) > 0), ZERO, code)
    most_over, most_under = tl.load(row + OVERFLOW), tl.load(row + UNDERFLOW)
    most_error, most_spread = tl.load(row + ERROR), tl.load(row + RANGE)
    spread = _spread(row, exponent, lanes)
    code = tl.where(there & (code == 0) & (over > most_over), OVER, code)
    code = tl.where(there & (code == 0) & (under > most_under), UNDER, code)
    code = tl.where(there & (code == 0) & (error > most_error), OFF, code)
    code = tl.where(there & (code == 0) & (spread > most_spread), VARIES, code)
    value = tl.where(code == OVER, over, tl.where(code == UNDER, under, tl.where(code == OFF, error, spread)))
    limit = tl.where(code == OVER, most_over, tl.where(code == UNDER, most_under, most_spread))
    limit = tl.where(code == OFF, most_error, limit)
    _append(row, exponent, going & there & (code == 0), lanes)
    return code, value, limit


@triton.jit
def _beyond(ratio):
    return tl.where(ratio < 1, RATIO * ratio / (1 + (RATIO - 1) * ratio), 1.0)


@triton.jit
def _learn(row, going, exponent, over, under, error, lanes, FIXED: tl.constexpr):
    """``Tracker.learn``."""
    spread = _spread(row, exponent, lanes)
    _append(row, exponent, going, lanes)
    if not FIXED:
        tl.store(row + OVERFLOW, tl.maximum(tl.load(row + OVERFLOW), _beyond(over)), mask=going)
        tl.store(row + UNDERFLOW, tl.maximum(tl.load(row + UNDERFLOW), _beyond(under)), mask=going)
        tl.store(row + ERROR, tl.maximum(tl.load(row + ERROR), error * ERRORS), mask=going)
        tl.store(row + RANGE, tl.maximum(tl.load(row + RANGE), spread + SPREAD), mask=going)


@triton.jit
def _probed(probes, rows, product, lanes, SIDE: tl.constexpr):
    """The relative error, whether there is one, the norm of the block, and whether that is one to remember."""
    places = tl.arange(0, SIDE)
    off = tl.sum(tl.load(probes + 2 * places, mask=places < rows, other=0.0).to(tl.float64), 0)
    size = tl.sum(tl.load(probes + 2 * places + 1, mask=places < rows, other=0.0).to(tl.float64), 0)
    norm = tl.sqrt(size)
    before = tl.load(product + SIZES + EXPONENTS + lanes)
    known = lanes >= 8 - tl.load(product + SIZES + COUNT)
    most = tl.maximum(tl.max(tl.where(known, before, 0.0), 0), norm)
    return tl.sqrt(off) / tl.where(most == 0, 1.0, most), most != 0, norm, (norm > 0) & (norm < float("inf"))


@triton.jit(do_not_specialize=["one_row", "other_row", "row", "forward_row", "one_slot", "other_slot", "slot",
                               "one_numel", "other_numel", "probed"])  # fmt: skip
def _decide(
    state, measured, probes, one_row, other_row, row, forward_row, one_slot, other_slot, slot, one_numel, other_numel,
    probed, FORWARD: tl.constexpr, LEARN: tl.constexpr, FIXED: tl.constexpr, PROTECT: tl.constexpr,
    PROBES: tl.constexpr, SIDE: tl.constexpr, ROW: tl.constexpr, SLOT: tl.constexpr,
):  # fmt: skip
    lanes = tl.arange(0, 8)
    one, other, product = state + one_row * ROW, state + other_row * ROW, state + row * ROW
    finite1, zero1, exponent1, over1, under1, error1 = _seen(measured + one_slot * SLOT, one_numel)
    finite2, zero2, exponent2, over2, under2, error2 = _seen(measured + other_slot * SLOT, other_numel)
    largest = tl.load(measured + slot * SLOT).to(tl.int32)
    exponent = (7 - exponent_of(largest)).to(tl.float64)
    both = finite1 & finite2 & (zero1 == 0) & (zero2 == 0)
    distance = exponent1 - exponent2
    usual = _median(product + DISTANCES, lanes)
    off = tl.abs(distance - usual)
    allowed_off, most_off = tl.load(product + ALLOWED), tl.load(product + PROBE)
    in_a_row, return_after = tl.load(state + IN_A_ROW), tl.load(state + RETURN_AFTER)
    retry_rate, recent = tl.load(state + RETRY_RATE), tl.load(state + RECENT)
    high, retries = tl.load(product + HIGH), tl.load(product + RETRIES)
    recent_low, recent_retries = tl.load(product + RECENT_LOW), tl.load(product + RECENT_RETRIES)
    wait, left, good = tl.load(product + WAIT), tl.load(product + LEFT), tl.load(product + GOOD)
    on = tl.where(in_a_row > 0, in_a_row + 1, 0.0)
    if LEARN:
        healthy = finite1 & finite2
        known = tl.load(product + DISTANCES + COUNT) > 0
        _learn(one, healthy & (zero1 == 0), exponent1, over1, under1, error1, lanes, FIXED)
        _learn(other, healthy & (zero2 == 0), exponent2, over2, under2, error2, lanes, FIXED)
        fine = healthy & (largest > 0) & (largest < 0x7F800000)
        _learn(product + RESULT, fine, exponent, over1 * 0, over1 * 0, over1 * 0, lanes, FIXED)
        if not FIXED:
            tl.store(product + ALLOWED, tl.maximum(allowed_off, off + SPREAD), mask=healthy & both & known)
        _append(product + DISTANCES, distance, healthy & both, lanes)
        if PROBES:
            error, there, size, fit = _probed(probes, probed, product, lanes, SIDE)
            _append(product + SIZES, size, healthy & fit, lanes)
            if not FIXED:
                error = error * ERRORS
                tl.store(product + PROBE, error, mask=healthy & there & (error > most_off))
        tl.store(product + HIGH, high + 1)
        tl.store(product + LEFT, tl.maximum(left - 1, 0.0))
        tl.store(state + IN_A_ROW, on)
        tl.store(product + FLAG, 1.0)
    else:
        tried = recent_low + recent_retries
        rate = recent_retries / tl.where(tried > 0, tried, 1.0)
        returns = (in_a_row == 0) | (in_a_row >= return_after) | (rate < retry_rate)
        allowed = (left <= 0) & returns
        if not FORWARD:
            allowed = allowed & (tl.load(state + forward_row * ROW + DOUBT) == 0)
        if PROTECT:
            code, value, limit = _sign(one, allowed, finite1, zero1, exponent1, over1, under1, error1, lanes)
            code = tl.where(code != 0, code + OPERAND, 0)
            going = allowed & (code == 0)
            code2, value2, limit2 = _sign(other, going, finite2, zero2, exponent2, over2, under2, error2, lanes)
            value, limit = tl.where(code == 0, value2, value), tl.where(code == 0, limit2, limit)
            code = tl.where((code == 0) & (code2 != 0), code2 + 2 * OPERAND, code)
            is_apart = (code == 0) & both & (off > allowed_off)
            value, limit = tl.where(is_apart, off, value), tl.where(is_apart, allowed_off, limit)
            code = tl.where(is_apart, APART, code)
            _append(product + DISTANCES, distance, allowed & (code == 0) & both, lanes)
            found = tl.where(largest < 0x7F800000, 0, NOT_FINITE)
            if PROBES:
                error, there, size, fit = _probed(probes, probed, product, lanes, SIDE)
                is_off = (code == 0) & (found == 0) & there & ((error <= most_off) == 0)
                value, limit = tl.where(is_off, error, value), tl.where(is_off, most_off, limit)
                found = tl.where(is_off, PROBED, found)
            going = allowed & (code == 0) & (found == 0) & (largest > 0)
            none = over1 * 0
            code3, value3, limit3 = _sign(
                product + RESULT, going, largest < 0x7F800000, largest == 0, exponent, none, none, none - 1, lanes
            )
            found = tl.where((found == 0) & (largest > 0), code3, found)
            is_range = (code == 0) & (found == VARIES)
            value, limit = tl.where(is_range, value3, value), tl.where(is_range, limit3, limit)
            code = tl.where((code == 0) & (found != 0), found + 3 * OPERAND, code)
            if PROBES:
                _append(product + SIZES, size, allowed & (code == 0) & fit, lanes)
        else:
            code = tl.where(finite1 & finite2, 0, NOT_FINITE)
            value, limit = over1 * 0, over1 * 0
        low = allowed & (code == 0)
        failed = allowed & (code != 0)
        recent_low = recent_low * recent + tl.where(low, 1.0, 0.0)
        recent_retries = recent_retries * recent + tl.where(failed, 1.0, 0.0)
        tl.store(product + RECENT_LOW, recent_low, mask=allowed)
        tl.store(product + RECENT_RETRIES, recent_retries, mask=allowed)
        tl.store(product + LOW, tl.load(product + LOW) + 1, mask=low)
        tl.store(product + HIGH, high + 1, mask=low == 0)
        tl.store(product + RETRIES, retries + 1, mask=failed)
        tl.store(product + REASON, code.to(tl.float64), mask=failed)
        tl.store(product + VALUE, value, mask=failed)
        tl.store(product + LIMIT, limit, mask=failed)
        tl.store(product + FLAG, tl.where(low, 0.0, 1.0))
        if FORWARD:
            tl.store(product + DOUBT, 1.0, mask=low == 0)
        often = failed & (recent_retries / tl.maximum(recent_low + recent_retries, 1.0) >= retry_rate)  # one at least
        longer = (good < wait) & (retries + 1 > 1)
        longest = tl.minimum(2 * wait, tl.load(state + LONGEST_WAIT))
        waits = tl.where(longer, longest, return_after)
        tl.store(product + WAIT, tl.where(often, waits, return_after), mask=often | (low & (good + 1 >= wait)))
        tl.store(product + LEFT, tl.where(often, waits, tl.maximum(left - 1, 0.0)), mask=often | (allowed == 0))
        tl.store(product + GOOD, tl.where(low, good + 1, 0.0), mask=allowed)
        on = tl.where(failed, 1.0, tl.where(allowed, 0.0, on))
        tl.store(state + IN_A_ROW, on)

"""Numbers in 1 to 8 bits: groups of neighbours share a scale and a minimum, and the error has a bound that always
holds.

A group of numbers x becomes codes ``q = floor((x - minimum) / scale + u)`` with ``u`` from (0, 1). Scale and minimum
are kept in bfloat16, rounded so that no code leaves its range. How ``u`` is chosen says what the error is like:

========== ============================== ============ ======== ============
rounding   decoded                        ``|error|``  biased   variance
========== ============================== ============ ======== ============
nearest    ``q * scale``, ``u = 1/2``     scale / 2    yes      scale^2 / 12
dither     ``(q - u + 1/2) * scale``      scale / 2    no       scale^2 / 12
stochastic ``q * scale``                  scale        no       <= scale^2 / 4
========== ============================== ============ ======== ============

each ``+ minimum``. (Subtractive dither: Schuchman 1964, "Dither signals and their effect on quantization noise".)

Or a group becomes floats of 8 bits (``"fp8"``: e4m3, Micikevicius et al. 2022, "FP8 Formats for Deep Learning"), the
largest of them next to 448, with a scale and no minimum. They are rounded to nearest, so biased, and small numbers
have small errors: ``|error| <= max(|x| / 16, scale / 1024)``, in a group at most ``16 * scale``.

The kernels of :mod:`lightning_efficient.core.kernels` do the same, bit for bit: on a GPU, and on a CPU, where a C
compiler is at hand, in a third of the time.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from lightning_efficient.core.bit_packing import filled, pack_bits, unpack_bits
from lightning_efficient.core.group_codes import Code, Rounding, bound_of, factor_of, fewest_bytes, width_of
from lightning_efficient.core.kernels import host, kernels_for
from lightning_efficient.core.random import TABLE, noise_at, noise_table

__all__ = [
    "MAX_GROUP",
    "Code",
    "Quantized",
    "Rounding",
    "dequantize",
    "dequantized_pieces",
    "pack_bits",
    "payload_bytes",
    "quantize",
    "unpack_bits",
]

CHUNK = TABLE  # elements that are worked on at a time, so that what lies between two operations stays in the cache
MAX_GROUP = 1 << 16
_LEAST_SCALE = 2.0**-100
_FLOAT8_MASK = 0x87F00000 - (1 << 32)


@dataclass(frozen=True)
class Quantized:
    """What :func:`quantize` returns.

    Attributes:
        payload: The codes, packed, uint8 ``[bytes]``.
        scale: Of each group, bfloat16 ``[groups]``; NaN: so are all its numbers.
        minimum: Likewise; None where the codes are floats.
        outliers: Groups that are kept as they were, and their numbers ``[outliers, group_size]``; None: there are none.
        numel: How many numbers.
        dtype: Their type.
        bits: Of a code; or ``"fp8"``.
        group_size: Numbers in a group; the last one may have fewer.
        rounding: How.
        key: Of the noise.
    """

    payload: Tensor
    scale: Tensor
    minimum: Tensor | None
    outliers: tuple[Tensor, Tensor] | None
    numel: int
    dtype: torch.dtype
    bits: Code
    group_size: int
    rounding: Rounding
    key: int

    @property
    def nbytes(self) -> int:
        """Of all that is kept."""
        kept = [self.payload, self.scale, self.minimum, *(self.outliers or ())]
        return sum(tensor.nbytes for tensor in kept if tensor is not None)

    def bound(self) -> Tensor:
        """What ``|x - decoded|`` never exceeds, for each group: float32 ``[groups]``."""
        bound = bound_of(self.minimum, self.scale, self.bits, self.rounding, self.dtype)
        if self.outliers is not None:
            bound[self.outliers[0]] = 0
        return bound


@torch.no_grad()
def quantize(
    values: Tensor,
    bits: Code | None,
    *,
    group_size: int = 128,
    rounding: Rounding = "dither",
    key: int = 0,
    error_bound: float | None = None,
    nonfinite: Literal["refuse", "propagate"] = "refuse",
) -> Quantized | None:
    """Encode ``values``.

    Args:
        values: Floating-point numbers ``[n]``, contiguous.
        bits: Of a code, 1 to 8; or ``"fp8"``. None: as many as take the fewest bytes under ``error_bound``.
        group_size: Neighbours that share a scale: a power of two from 64 to :data:`MAX_GROUP`.
        rounding: See above; of no effect on ``"fp8"``.
        key: Of the noise: another one gives other errors.
        error_bound: Groups whose error could be larger are kept as they are.
        nonfinite: What becomes of numbers that are infinite or NaN, or so far apart that no scale holds them.
            ``"refuse"`` asks the device whether there are any, and so waits for it; ``"propagate"`` does not, and
            groups that have some decode to NaN, all of their numbers.

    Returns:
        None if they are refused, or if the numbers themselves take no more.

    Raises:
        ValueError: If there are neither bits nor a bound.
    """
    minimum = spread = None
    if bits is None:
        if error_bound is None:
            raise ValueError("Give bits, or an error_bound that says how many it takes.")
        minimum, spread = _minimum_and_spread(values, group_size)
        finite = bool(spread.isfinite().all())
        bits = fewest_bytes(minimum, spread, error_bound, values, group_size, rounding) if finite else None
        if bits is None:
            return None
    rounding = "nearest" if bits == "fp8" else rounding
    payload = torch.empty(payload_bytes(values.numel(), bits), dtype=torch.uint8, device=values.device)
    kernels = kernels_for(values)
    if kernels is not None:
        scale, minimum = kernels.encode(values, payload, bits, group_size, rounding, key, factor_of(bits), _LEAST_SCALE)
    else:
        if bits == "fp8":
            minimum, spread = None, _largest(values, group_size)
        elif spread is None:
            minimum, spread = _minimum_and_spread(values, group_size)
        scale = (spread * factor_of(bits)).clamp_min_(_LEAST_SCALE).to(torch.bfloat16)
    if nonfinite == "refuse" and not scale.isfinite().all():
        return None
    if kernels is None:
        if nonfinite == "propagate":
            finite = scale.isfinite()
            scale = torch.where(finite, scale, torch.nan)
            minimum = torch.where(finite, minimum, 0) if minimum is not None else None
        _encode(values, payload, scale, minimum, bits, group_size, rounding, key, nonfinite == "propagate")
    outliers = None
    if error_bound is not None:
        outliers = _outliers(values, minimum, scale, bits, error_bound, group_size, rounding)
    return Quantized(payload, scale, minimum, outliers, values.numel(), values.dtype, bits, group_size, rounding, key)


@torch.no_grad()
def dequantize(encoded: Quantized) -> Tensor:
    """The numbers again, ``[n]``, each within the bound of its group."""
    values = torch.empty(encoded.numel, dtype=encoded.dtype, device=encoded.payload.device)
    kernels = kernels_for(values)
    if kernels is not None:
        kernels.decode(
            values, encoded.payload, encoded.scale, encoded.minimum, encoded.bits, encoded.group_size,
            encoded.rounding, encoded.key,
        )  # fmt: skip
    else:
        for _ in _decoded(encoded, values):
            pass
    if encoded.outliers is not None:
        _put_back(values, *encoded.outliers, encoded.group_size)
    return values


def dequantized_pieces(encoded: Quantized) -> Iterator[tuple[slice, Tensor]]:
    """The same numbers, a few at a time, so that not all of them are in memory.

    Yields:
        Which they are, and they: until the next ones are asked for, in this thread.
    """
    if encoded.outliers is not None or encoded.payload.is_cuda:  # where pieces would take thousands of launches
        yield slice(0, encoded.numel), dequantize(encoded)
        return
    if encoded.payload.device.type == "cpu" and host.available(encoded.dtype):
        yield from host.decoded_pieces(
            encoded.numel, encoded.dtype, encoded.payload, encoded.scale, encoded.minimum, encoded.bits,
            encoded.group_size, encoded.rounding, encoded.key,
        )  # fmt: skip
    else:
        yield from _decoded(encoded, None)


def _encode(
    values: Tensor,
    payload: Tensor,
    scale: Tensor,
    minimum: Tensor | None,
    code: Code,
    group_size: int,
    rounding: Rounding,
    key: int,
    may_be_nan: bool,
) -> None:
    """Fill ``payload``; the codes of a group whose scale is NaN are 0, lest they spill into their neighbours'."""
    bits = width_of(code)
    inverse = scale.float().reciprocal_()[:, None]
    floor = minimum.float()[:, None] if minimum is not None else None
    table = noise_table(values.device)
    for piece in _pieces(values.numel(), group_size):
        work = _workspaces.get(values.device, piece.size, bits)
        numbers, source = work.numbers.view(-1, piece.width), values[piece.numbers].view(-1, piece.width)
        if floor is None:
            torch.mul(source, inverse[piece.groups], out=numbers)
        else:
            torch.sub(source, floor[piece.groups], out=numbers)
            if rounding == "nearest":
                numbers.mul_(inverse[piece.groups]).add_(0.5)
            else:
                offset = noise_at(key, piece.index)
                noise = table[offset : offset + piece.size].view(-1, piece.width)
                torch.addcmul(noise, numbers, inverse[piece.groups], out=numbers)
            if bits == 8:  # -128 to 127, for torch converts to signed bytes five times as fast as to unsigned ones
                numbers.sub_(128).floor_()
        if may_be_nan:
            numbers.nan_to_num_(0)
        codes = work.floats if floor is None else work.signed
        codes.copy_(work.numbers)  # to integers towards zero: floor, for none is negative
        start = piece.numbers.start * bits // 8
        work.pack(payload[start : start + work.nbytes])


def _decoded(encoded: Quantized, values: Tensor | None) -> Iterator[tuple[slice, Tensor]]:
    """Pieces of ``values``, or of memory that is used again."""
    device, bits = encoded.payload.device, width_of(encoded.bits)
    scale, minimum = encoded.scale.float(), None
    if encoded.minimum is not None:
        minimum = encoded.minimum.float()
        if shift := (128 if bits == 8 else 0) + (0.5 if encoded.rounding == "dither" else 0):
            minimum = torch.add(minimum, scale, alpha=shift)
        minimum = minimum[:, None]
    scale = scale[:, None]
    table = noise_table(device)
    for piece in _pieces(encoded.numel, encoded.group_size):
        work = _workspaces.get(device, piece.size, bits)
        start = piece.numbers.start * bits // 8
        work.unpack(encoded.payload[start : start + work.nbytes])
        out = values[piece.numbers] if values is not None else None
        numbers = out if out is not None and out.dtype == torch.float32 else work.numbers
        groups = numbers.view(-1, piece.width)
        if minimum is None:  # sign, exponent and fraction to their places in a float32: torch takes five times as long
            numbers.view(torch.int32).copy_(work.signed).bitwise_left_shift_(20).bitwise_and_(_FLOAT8_MASK)
            groups.mul_(2.0**120).mul_(scale[piece.groups])
        else:
            numbers.copy_(work.signed)
            if encoded.rounding == "dither":
                offset = noise_at(encoded.key, piece.index)
                numbers.sub_(table[offset : offset + piece.size])
            groups.mul_(scale[piece.groups]).add_(minimum[piece.groups])
        if out is None:
            out = numbers.to(encoded.dtype)
        elif out is not numbers:
            out.copy_(numbers)
        yield piece.numbers, out


@dataclass(frozen=True)
class _Piece:
    """Numbers that are worked on at a time: whole groups, or the shorter last one."""

    index: int
    numbers: slice
    groups: slice
    size: int
    width: int  # of its groups


@lru_cache(256)
def _pieces(numel: int, group_size: int) -> tuple[_Piece, ...]:
    whole = numel // group_size * group_size
    pieces: list[_Piece] = []
    for start in range(0, whole, CHUNK):
        end = min(start + CHUNK, whole)
        groups = slice(start // group_size, end // group_size)
        pieces.append(_Piece(len(pieces), slice(start, end), groups, end - start, group_size))
    if whole < numel:
        last = whole // group_size
        pieces.append(_Piece(len(pieces), slice(whole, numel), slice(last, last + 1), numel - whole, numel - whole))
    return tuple(pieces)


class _Workspace:
    """Memory for a piece of so many numbers, and the views of it that are needed again and again."""

    def __init__(self, device: torch.device, size: int, bits: int) -> None:
        room = filled(size)
        codes = torch.zeros(room, dtype=torch.uint8, device=device)
        self.numbers = torch.empty(size, dtype=torch.float32, device=device)
        self.signed = codes[:size].view(torch.int8)
        self.floats = codes[:size].view(torch.float8_e4m3fn)
        self.nbytes = room * bits // 8
        self._codes, self._bits = codes, bits

    def pack(self, packed: Tensor) -> None:
        pack_bits(self._codes, self._bits, packed)

    def unpack(self, packed: Tensor) -> None:
        unpack_bits(packed, self._bits, self._codes)


class _Workspaces(threading.local):
    """The last ones used, of each thread."""

    def __init__(self) -> None:
        self.get = lru_cache(8)(_Workspace)


_workspaces = _Workspaces()


def _largest(values: Tensor, group_size: int) -> Tensor:
    """Largest absolute number of each group, float32."""
    low, high = _extremes(values, group_size)
    return torch.maximum(high, low.neg_())


def _minimum_and_spread(values: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Of each group: a bfloat16 that none of its numbers is below, and what the greatest is above that, float32."""
    low, high = _extremes(values, group_size)
    minimum = (low - low.abs() * 2.0**-8).to(torch.bfloat16)
    return minimum, high.sub_(minimum.float())


def _extremes(values: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Least and greatest of each group, float32."""
    count = -(-values.numel() // group_size)
    low, high = torch.empty(2, count, dtype=torch.float32, device=values.device)
    for piece in _pieces(values.numel(), group_size):
        numbers = values[piece.numbers]
        if values.dtype != torch.float32:  # much faster than in that type
            numbers = _workspaces.get(values.device, piece.size, 8).numbers.copy_(numbers)
        numbers = numbers.view(-1, piece.width)
        torch.amin(numbers, 1, out=low[piece.groups])
        torch.amax(numbers, 1, out=high[piece.groups])
    return low, high


def _outliers(
    values: Tensor,
    minimum: Tensor | None,
    scale: Tensor,
    bits: Code,
    error_bound: float,
    group_size: int,
    rounding: Rounding,
) -> tuple[Tensor, Tensor] | None:
    found = (bound_of(minimum, scale, bits, rounding, values.dtype) > error_bound).nonzero().flatten()
    if not found.numel():
        return None
    at = found[:, None] * group_size + torch.arange(group_size, device=values.device)
    return found, values[at.clamp_max_(values.numel() - 1)]


def _put_back(values: Tensor, groups: Tensor, kept: Tensor, group_size: int) -> None:
    at = groups[:, None] * group_size + torch.arange(group_size, device=values.device)
    inside = at < values.numel()
    values[at[inside]] = kept[inside]


def payload_bytes(numel: int, code: Code) -> int:
    """Of the codes of so many numbers."""
    return filled(numel) * width_of(code) // 8
